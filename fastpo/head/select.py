"""Choose the backend and the schedule of a call of the head."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from fastpo.head.backend import Tiles
from fastpo.head.schedule import Schedule, auto_workspace_mib, choose_schedule
from fastpo.head.spec import BackendName, Workspace, check_backend, check_workspace
from fastpo.head.torch_backend import TorchTiles
from fastpo.head.triton_backend import TritonTiles
from fastpo.head.types import Link, accumulator

# Looked up once: it reads folders, every call of a head asks, and no compiled graph may.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(
    backend: BackendName, device: torch.device, plain_only: str = ""
) -> tuple[Tiles, str]:
    """(tiles, why) for a named backend, or the best one for `auto`.

    Args:
        plain_only: what only plain PyTorch does and the call asks for, in words.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here; named ones never fall back.
    """
    check_backend(backend)
    plain = TorchTiles(device_type=device.type)
    if backend == "torch":
        return plain, "torch was asked for"
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
        return TritonTiles(), "triton was asked for"
    if plain_only:
        return plain, f"torch: {plain_only} was asked for"
    if device.type == "cuda" and HAS_TRITON:
        return TritonTiles(), "triton: a GPU and the triton package are here"
    if device.type != "cuda":
        return plain, f"torch: kernels do not run on {device.type}"
    return plain, "torch: the triton package is missing"


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def plan_head(
    num_tokens: int,
    vocab_size: int,
    width: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    stats: tuple[str, ...] = ("logps",),
    num_grad_stats: int = 1,
    needs_hidden: bool = True,
    needs_head: bool = False,
    needs_weight: bool | None = None,
    with_reference: bool = False,
    backend: BackendName = "auto",
    workspace_mib: Workspace = "auto",
    link: Link | None = None,
    plain_only: str = "",
) -> tuple[Tiles, Schedule, str]:
    """(tiles, schedule, why this backend): the decision of one call, without making it.

    Args:
        num_tokens, vocab_size, width: N, V and D.
    """
    device = torch.device(device)
    tiles, why = choose_backend(backend, device, plain_only)
    schedule = choose_schedule(
        num_tokens,
        vocab_size,
        needs_hidden=needs_hidden,
        needs_head=needs_head,
        needs_weight=needs_head if needs_weight is None else needs_weight,
        num_grad_stats=num_grad_stats,
        with_reference=with_reference,
        num_slabs=tiles.num_slabs(link or Link(), stats, with_reference),
        workspace_bytes=int(workspace_in_mib(workspace_mib, device) * 2**20),
        itemsize=accumulator(dtype).itemsize,
        width=width,
        weight_itemsize=dtype.itemsize,
        largest_slab=tiles.largest_slab,
        tile=tiles.tile,
    )
    return tiles, schedule, why


def workspace_in_mib(workspace_mib: Workspace, device: torch.device) -> float:
    """Return the workspace of a call on `device`; `auto` is `schedules.auto_workspace_mib`."""
    check_workspace(workspace_mib)
    if not isinstance(workspace_mib, str):
        return float(workspace_mib)
    if device.type != "cuda":
        return auto_workspace_mib(None)
    return auto_workspace_mib(torch.cuda.get_device_properties(device).total_memory)


@functools.lru_cache(maxsize=256)  # a loss on a trained head asks at every step
def most_kept_tokens(vocab_size: int, width: int, **options: Any) -> int:
    """How many tokens' logits fit the workspace, so that a trained head costs 3 products.

    Args:
        vocab_size, width: V and D.
        **options: of `plan_head`.
    """
    low, high = 0, 1
    while plan_head(high, vocab_size, width, needs_head=True, **options)[1].name == "kept":
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        kept = plan_head(middle, vocab_size, width, needs_head=True, **options)[1].name == "kept"
        low, high = (middle, high) if kept else (low, middle)
    return low
