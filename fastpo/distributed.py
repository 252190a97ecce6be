"""Gather rows of different numbers from all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def process_group(name: str | None) -> dist.ProcessGroup | None:
    """Return the group by its name, which unlike the group can be an operator's argument."""
    if name is None:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]


def gather_rows(
    rows: Tensor, group: str | None = None, sizes: tuple[int, ...] | None = None
) -> Tensor:
    """Return the rows [n, ...] of all ranks, in the order of ranks; n may differ between them.

    Args:
        group: name of the process group; None for the default one, and `rows` where there is none.
        sizes: n of each rank, if they are known.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return rows
    pg = process_group(group)
    if sizes is None:
        sizes = all_sizes(len(rows), rows.device, pg)
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=pg)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def all_sizes(
    size: int, device: torch.device, group: dist.ProcessGroup | None = None
) -> tuple[int, ...]:
    """Return one integer of each rank, in the order of ranks."""
    local = torch.tensor([size], device=device)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    return tuple(torch.cat(gathered).tolist())
