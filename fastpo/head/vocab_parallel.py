"""A head cut by vocabulary over ranks: who holds which rows, and what ranks tell one another.

Only numbers a token travel, and hidden states where every rank has tokens of its own; the weight
never does. Sums are taken in the order of ranks, so that all of them hold the same bits.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.distributed import all_sizes, gather_rows, process_group
from fastpo.head.tensors import HeadTensors


class Shard(NamedTuple):
    """Hold this rank's vocabulary rows of a head.

    Args:
        group: name of the process group that holds the others; None where the head is whole.
        rank: which of them this is.
        rows: how many vocabulary rows each rank holds; V alone for a whole head.
        tokens: how many tokens each rank has of its own; () where all have the same ones.
    """

    group: str | None
    rank: int
    rows: tuple[int, ...]
    tokens: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """Number of the first vocabulary row here."""
        return sum(self.rows[: self.rank])

    @property
    def vocab_size(self) -> int:
        """Return the vocabulary rows of the whole head."""
        return sum(self.rows)

    def trimmed(self, vocab_size: int) -> Shard:
        """Return the shard without the vocabulary rows from number `vocab_size` on."""
        ends = itertools.accumulate(self.rows)
        left = (n - max(0, end - vocab_size) for n, end in zip(self.rows, ends, strict=True))
        return self._replace(rows=tuple(max(0, n) for n in left))

    def of_tokens(self, count: int, device: torch.device) -> Shard:
        """Return the shard of a rank that has `count` tokens of its own."""
        return self._replace(tokens=all_sizes(count, device, process_group(self.group)))

    def _stack(self, values: Tensor) -> Tensor:
        """Return the values of all ranks, [ranks, ...]."""
        group = process_group(self.group)
        every = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, values.contiguous(), group=group)
        return torch.stack(every)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, on all of them."""
        return values if self.group is None else self._stack(values).sum(dim=0)

    def max(self, values: Tensor) -> Tensor:
        """Return the maximum over the ranks, on all of them."""
        return values if self.group is None else self._stack(values).amax(dim=0)

    def gather(self, values: Tensor) -> Tensor:
        """Join [n, ...] of each rank to [sum of `tokens`, ...]; nothing where tokens are shared."""
        return gather_rows(values, self.group, self.tokens) if self.tokens else values

    def own(self, values: Tensor) -> Tensor:
        """Return this rank's part of a tensor that is gathered over all ranks."""
        if not self.tokens:
            return values
        return values.split(list(self.tokens))[self.rank].clone()

    def sum_gradient(self, values: Tensor) -> Tensor:
        """Sum gathered gradients over the ranks; each rank gets those of its own tokens."""
        if self.group is None:
            return values
        group = process_group(self.group)
        if not self.tokens:
            dist.all_reduce(values, group=group)
            return values
        padded = values.new_zeros(len(self.tokens), max(self.tokens), *values.shape[1:])
        for to, part in zip(padded, values.split(list(self.tokens)), strict=True):
            to[: len(part)] = part
        own = torch.empty_like(padded[0])
        dist.reduce_scatter(own, list(padded), group=group)
        return own[: self.tokens[self.rank]]


class OwnRows(NamedTuple):
    """Hold this rank's vocabulary rows of the heads of a pass."""

    head: HeadTensors
    reference: HeadTensors | None
    shard: Shard
    same_tokens: bool | None  # whether all ranks have the same tokens; None without other ranks


def own_rows(
    head: HeadTensors,
    reference: HeadTensors | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    same_tokens: bool | None = None,
    vocab_size: int | None = None,
) -> OwnRows:
    """Return the vocabulary rows that this rank computes, without padding.

    Args:
        head, reference: DTensors, or this rank's rows.
        group: the ranks that hold the others; a DTensor knows its own.
        same_tokens: None for what is usual: True for plain tensors, False for a DTensor.
        vocab_size: rows of the whole head that stand for tokens; None for all.

    Raises:
        ValueError: a DTensor that is not cut by rows over one mesh dimension, a `vocab_size` that
            the weight does not have, a rank without rows.
    """
    rows: dict[str, Tensor | None] = {"weight": head.weight, "bias": head.bias}
    if reference is not None:
        rows |= {"ref_weight": reference.weight, "ref_bias": reference.bias}
    if head.lora is not None:
        rows["lora_b"] = head.lora.b
    shard = Shard(None, 0, (len(head.weight),))
    if group is not None or is_cut(head.weight):
        rows, shard, same_tokens = _local_rows(rows, group, same_tokens)
    if vocab_size is not None:
        if not 0 < vocab_size <= shard.vocab_size:
            raise ValueError(f"vocab_size {vocab_size} for a weight of {shard.vocab_size} rows")
        shard = shard.trimmed(vocab_size)
        real = slice(shard.rows[shard.rank])
        rows = {name: None if t is None else t[real] for name, t in rows.items()}
    if not min(shard.rows):
        raise ValueError(f"a rank holds no rows of the head: they hold {shard.rows}")
    lora = None if head.lora is None else head.lora._replace(b=cast(Tensor, rows["lora_b"]))
    own = HeadTensors(cast(Tensor, rows["weight"]), rows["bias"], lora)
    if reference is not None:
        reference = HeadTensors(cast(Tensor, rows["ref_weight"]), rows["ref_bias"])
    return OwnRows(own, reference, shard, same_tokens)


def _local_rows(
    rows: dict[str, Tensor | None], group: dist.ProcessGroup | None, same_tokens: bool | None
) -> tuple[dict[str, Tensor | None], Shard, bool]:
    """Return (this rank's rows by name, its shard, whether all ranks have the same tokens)."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as ByRows

    of_mesh = {name: t for name, t in rows.items() if isinstance(t, DTensor)}
    if same_tokens is None:
        same_tokens = not of_mesh
    for name, tensor in of_mesh.items():
        mesh = tensor.device_mesh
        if mesh.ndim != 1 or tuple(tensor.placements) != (ByRows(0),):
            raise ValueError(
                f"{name} is placed {tuple(tensor.placements)} on a mesh of {tuple(mesh.shape)}: a "
                "head is cut by rows, (Shard(0),), on a mesh of one dimension; pass full_tensor()"
            )
        group, local = mesh.get_group(), tensor.to_local()
        if local.requires_grad and not same_tokens:
            # As FSDP2 reduces every other gradient: the mean of the ranks' losses.
            local.register_hook(partial(_mean, ranks=mesh.size()))
        rows = {**rows, name: local}
    weight = rows["weight"]
    assert weight is not None and group is not None  # noqa: PT018
    sizes = all_sizes(len(weight), weight.device, group)
    return rows, Shard(group.group_name, dist.get_rank(group), sizes), same_tokens


def _mean(grad: Tensor, ranks: int) -> Tensor:
    return grad / ranks


def whole(tensor: Tensor) -> Tensor:
    """Return a factor that every rank needs whole; its gradient is the mean of the ranks'."""
    if not is_cut(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")])  # pyright: ignore[reportAttributeAccessIssue]


def is_cut(tensor: Tensor) -> bool:
    """Return whether it is a DTensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
