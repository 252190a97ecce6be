"""Choose the backend and the schedule of a call of the head."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal

import torch

from fastpo.head.backend import Backend
from fastpo.head.schedule import Schedule, Workload, auto_workspace_mib, choose_schedule
from fastpo.head.spec import BackendName, HeadOptions, Workspace, check_backend, check_workspace
from fastpo.head.torch_backend import TorchBackend
from fastpo.head.triton_backend import TritonBackend

BACKENDS: dict[str, Backend] = {"torch": TorchBackend(), "triton": TritonBackend()}

# Looked up once: it reads folders, every call of a head asks, and no compiled graph may.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(
    backend: BackendName, device: torch.device, plain_only: str = ""
) -> tuple[Literal["torch", "triton"], str]:
    """Return (a key of `BACKENDS`, why) for a named backend, or the best one for `auto`.

    Args:
        plain_only: what only plain PyTorch does and the call asks for, in words.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here; named ones never fall back.
    """
    check_backend(backend)
    if backend == "torch":
        return "torch", "torch was asked for"
    if backend == "triton":
        if plain_only:
            raise ValueError(f"backend='triton' has no {plain_only}: use 'torch' or 'auto'")
        if not HAS_TRITON:
            raise ValueError("backend='triton' needs the triton package: pip install triton")
        if device.type != "cuda" and not _interpreting():
            raise ValueError(
                f"backend='triton' cannot run on {device.type!r}: use 'torch' or 'auto', or set "
                "TRITON_INTERPRET=1 before Python starts to interpret the kernels slowly"
            )
        return "triton", "triton was asked for"
    if plain_only:
        return "torch", f"torch: {plain_only} was asked for"
    if device.type == "cuda" and HAS_TRITON:
        return "triton", "triton: a GPU and the triton package are here"
    if device.type != "cuda":
        return "torch", f"torch: kernels do not run on {device.type}"
    return "torch", "torch: the triton package is missing"


def runs_kernels(backend: BackendName, device: torch.device) -> bool:
    """Return whether the kernels run, for a named backend or for `auto`."""
    return choose_backend(backend, device)[0] == "triton"


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def plan_head(
    work: Workload,
    options: HeadOptions = HeadOptions(),
    *,
    device: torch.device | str,
    plain_only: str = "",
) -> tuple[str, Schedule, str]:
    """Return (backend, schedule, why this backend): the decision of one call, without making it."""
    device = torch.device(device)
    backend, why = choose_backend(options.backend, device, plain_only)
    traits = BACKENDS[backend].traits(work, device.type)
    workspace_bytes = int(workspace_in_mib(options.workspace_mib, device) * 2**20)
    return backend, choose_schedule(work, traits, workspace_bytes), why


def workspace_in_mib(workspace_mib: Workspace, device: torch.device) -> float:
    """Return the workspace of a call on `device`; `auto` is `schedule.auto_workspace_mib`."""
    check_workspace(workspace_mib)
    if not isinstance(workspace_mib, str):
        return float(workspace_mib)
    if device.type != "cuda":
        return auto_workspace_mib(None)
    return auto_workspace_mib(torch.cuda.get_device_properties(device).total_memory)


@functools.lru_cache(maxsize=256)  # a loss on a trained head asks at every step
def most_kept_tokens(
    vocab_size: int,
    width: int,
    *,
    device: torch.device | str,
    backend: BackendName = "auto",
    workspace_mib: Workspace = "auto",
    **needs: Any,
) -> int:
    """Return how many tokens' logits fit the workspace, so that a trained head costs 3 matmuls.

    Args:
        vocab_size, width: V and D.
        **needs: further fields of `Workload`.
    """
    work = Workload(0, vocab_size, width, needs_head=True, **needs)
    options = HeadOptions(backend, workspace_mib)

    def fits(num_tokens: int) -> bool:
        _, schedule, _ = plan_head(work._replace(num_tokens=num_tokens), options, device=device)
        return schedule.name == "kept"

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
