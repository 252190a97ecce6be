"""What a backend of the head supplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fastpo.head.types import (
    NOTHING_KEPT,
    Coefficients,
    Heads,
    Kept,
    KeptSlice,
    Link,
    accumulator,
    blocks,
    concatenate,
)


class Tiles(Protocol):
    """The two walks that a backend supplies; schedules are the same for every backend.

    Attributes:
        largest_slab: elements above which a slab only gets slower, or None. Where it is set, logits
            can be kept for a part of the vocabulary.
        tile: rows that a matrix product takes at a time; blocks of rows are a multiple of it and
            of equal size. 1 where that does not matter.
    """

    largest_slab: int | None
    tile: int

    def num_slabs(self, link: Link, want: tuple[str, ...], with_reference: bool) -> int:
        """Accumulator slabs alive at once.

        It may depend on what is asked for, never on whether a gradient is due: the same row blocks
        give the same bits, so that policy and reference agree exactly at step 0.
        """
        ...

    def forward(
        self,
        heads: Heads,
        link: Link,
        want: tuple[str, ...],
        grads: tuple[str, ...],
        row_block: int,
        vocab_block: int,
        keep: Kept = NOTHING_KEPT,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Statistics [N], and r = d stat / d hidden [N, D] in the accumulator for each of `grads`.

        Args:
            row_block: whole rows of logits that a slab may hold, of any shape.
            vocab_block: columns of a slice of the vocabulary, where the walk has slices.
            keep: to be filled.
        """
        ...

    def coefficients(
        self,
        heads: Heads,
        link: Link,
        stats: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        first: int,
        vocab_size: int,
        kept: KeptSlice | None = None,
        spend: bool = False,
    ) -> Coefficients:
        """C [N, Vs] of the vocabulary slice that starts at `first`, of which `kept` may be had.

        `spend` lets C take the place of the kept products; nobody reads them again.
        """
        ...


Step = Callable[[Heads, int, int], "tuple[dict[str, Tensor], list[Tensor]]"]


def forward_by_rows(
    step: Step, heads: Heads, grads: tuple[str, ...], row_block: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """`Tiles.forward` over slabs of whole rows.

    Args:
        step: (heads of a row block, its first row, its end) -> statistics, and for each name in
            `grads` the coefficients C [B, V] at unit cotangent.
    """
    acc = accumulator(heads.hidden.dtype)
    buffers = [torch.empty_like(heads.hidden, dtype=acc) for _ in grads]
    parts = []
    for lo, hi in blocks(heads.labels.numel(), row_block):
        stats, coefficients = step(heads.rows(lo, hi), lo, hi)
        for buffer, coefficient in zip(buffers, coefficients, strict=True):
            heads.put_gradient_(buffer[lo:hi], coefficient, add=False)
        parts.append(stats)
    return concatenate(parts), buffers
