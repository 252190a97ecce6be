"""What a call of the head may ask for: how products become logits, who computes, in what memory."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args

BackendName = Literal["auto", "torch", "triton"]
Workspace = float | Literal["auto"]


@dataclass(frozen=True)
class HeadSpec:
    """Hold what makes logits of a head's products: z = softcap(scale (W h + b)) / temperature.

    Args:
        softcap: cap of cap tanh(x / cap), or None.
        logit_scale: factor on the products, the bias included.
        temperature: divisor of the logits, after the soft-cap.
        vocab_size: vocabulary rows that stand for tokens; None for all rows of the weight.

    Raises:
        ValueError: a softcap or a temperature that is not positive.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive or None: got {self.softcap}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive: got {self.temperature}")


@dataclass(frozen=True)
class HeadOptions:
    """Say how statistics are computed; `fastpo.head.linear_stats` explains each.

    Args:
        backend: `auto`, `torch` or `triton`.
        workspace_mib: budget of the chunks of logits that are alive at once, in MiB, or `auto`.
        skip_below: probability under which a chunk of the vocabulary is left out of a gradient.
        jsd_beta: the reference's share of the mixture of `jsd`.

    Raises:
        ValueError: an unknown backend, or a number outside its range.
    """

    backend: BackendName = "auto"
    workspace_mib: Workspace = "auto"
    skip_below: float = 0.0
    jsd_beta: float = 0.5

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_workspace(self.workspace_mib)
        if not 0 <= self.skip_below < 1:
            raise ValueError(f"skip_below must lie in [0, 1): got {self.skip_below}")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"jsd_beta must lie between 0 and 1: got {self.jsd_beta}; towards 0 use "
                "kl_ref_policy, towards 1 kl_policy_ref"
            )


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown name."""
    if backend not in get_args(BackendName):
        raise ValueError(f"unknown backend {backend!r}: choose 'auto', 'torch' or 'triton'")


def check_workspace(workspace_mib: Workspace) -> None:
    """Raise ValueError for what is neither a positive finite number of MiB nor `auto`."""
    number: Any = None
    # NumPy's are numbers too; torch.compile knows a float it traces by its class alone.
    if isinstance(workspace_mib, int | float | numbers.Real):
        number = None if isinstance(workspace_mib, bool) else workspace_mib
    if not (workspace_mib == "auto" if number is None else 0 < number < math.inf):
        raise ValueError(
            f"workspace_mib must be positive and finite, or 'auto': got {workspace_mib!r}"
        )
