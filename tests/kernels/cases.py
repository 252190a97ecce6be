"""Inputs, float64 truths and same-dtype plain results that every kernel test shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.kernels.tile import transform_reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

FACTS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
}
"""The head's facts by the name of their case."""


class Inputs(NamedTuple):
    """The arguments of `linear_stats`, in its order."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    bias: Tensor | None  # [V]

    def double(self) -> Inputs:
        bias = None if self.bias is None else self.bias.double()
        return Inputs(self.hidden.double(), self.weight.double(), self.labels, bias)

    def in_order(self, v: Tensor, d: Tensor) -> Inputs:
        """The same numbers with the vocabulary and the width permuted."""
        bias = None if self.bias is None else self.bias[v]
        labels = v.argsort()[self.labels]
        return Inputs(self.hidden[:, d], self.weight[v][:, d], labels, bias)


def make(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Logits of deviation 3: a softmax with a few large entries, as a language model's is."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    hidden, weight = normal(n, d), normal(v, d) * (3 * d**-0.5)
    labels = torch.randint(v, (n,), generator=g, device=device)
    b = normal(v).to(dtype) if bias else None
    return Inputs(hidden.to(dtype), weight.to(dtype), labels, b)


def exact(logits: Tensor, labels: Tensor) -> Inputs:
    """Inputs whose raw logits are `logits` [N, V] to the last bit: one width per row."""
    n = logits.shape[0]
    eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
    return Inputs(eye, logits.T.contiguous(), labels, None)


def linear_logits(
    x: Inputs,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """z [N, V] in the inputs' dtype."""
    return transform_reference(
        x.hidden @ x.weight.T, x.bias, softcap, logit_scale, temperature
    )


def orders(x: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Permutations (vocabulary, width) that plain PyTorch's rounding is seen through.

    float64 inputs have a truth that is rounded like everybody; other orders show how far.
    """
    (v, d), device = x.weight.shape, x.weight.device
    found = [(torch.arange(v, device=device), torch.arange(d, device=device))]
    if x.hidden.dtype == torch.float64:
        found = []
        for seed in range(4):
            g = torch.Generator(device).manual_seed(seed)
            found.append(
                tuple(torch.randperm(size, generator=g, device=device) for size in (v, d))
            )
    return found


def plain_rows(reference: Callable[[Inputs], Tensor], x: Inputs) -> list[Tensor]:
    """A per-row result [N] in plain PyTorch, once per order of its sums."""
    return [reference(x.in_order(v, d)) for v, d in orders(x)]


def plain_columns(reference: Callable[[Inputs], Tensor], x: Inputs) -> list[Tensor]:
    """A per-column result [N, V] in plain PyTorch, once per order of its sums."""
    return [reference(x.in_order(v, d))[:, v.argsort()] for v, d in orders(x)]
