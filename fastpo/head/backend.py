"""What a backend of the head supplies; schedules are the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fastpo.head.schedule import Traits, Workload
from fastpo.head.types import (
    NOTHING_KEPT,
    Coefficients,
    Kept,
    KeptChunk,
    PassOptions,
    PassTensors,
    accumulator,
    chunks,
    concatenate,
)


class Backend(Protocol):
    """Run the forward pass over the vocabulary, and make the coefficients of the backward pass."""

    def traits(self, work: Workload, device_type: str) -> Traits:
        """Return what a schedule has to know.

        It may depend on what is asked for, never on whether a gradient is due: the same chunks of
        tokens give the same bits, so that policy and reference agree exactly at step 0.
        """
        ...

    def keeps_exponentials(self, tensors: PassTensors, options: PassOptions) -> bool:
        """Return whether exponentials are kept in the place of logits."""
        ...

    def forward(
        self, tensors: PassTensors, options: PassOptions, keep: Kept = NOTHING_KEPT
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return `options.statistics` [N], and d statistic / d hidden [N, D] of `early_grads`.

        Both in the accumulator's dtype; `keep` is to be filled.
        """
        ...

    def coefficients(
        self,
        tensors: PassTensors,
        options: PassOptions,
        stats: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        first: int,
        kept: KeptChunk | None = None,
        spend: bool = False,
    ) -> Coefficients:
        """Return C [N, Vc] of the columns that start at number `first` of the whole head.

        Args:
            stats, cotangents: name -> [N] of these tokens.
            kept: what there is of these columns.
            spend: let C take the place of the kept products; nobody reads them again.
        """
        ...


Step = Callable[[PassTensors, slice], "tuple[dict[str, Tensor], list[Tensor]]"]


def forward_by_tokens(
    step: Step, tensors: PassTensors, options: PassOptions
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run `Backend.forward` over chunks of tokens, each with all of its columns.

    Args:
        step: (the pass of a chunk, its tokens) -> statistics, and for each of `early_grads` the
            coefficients C [B, V] at unit cotangent.
    """
    acc = accumulator(tensors.hidden.dtype)
    buffers = [torch.empty_like(tensors.hidden, dtype=acc) for _ in options.early_grads]
    parts = []
    for lo, hi in chunks(tensors.targets.numel(), options.chunk_tokens):
        index = slice(lo, hi)
        stats, coefficients = step(tensors.pick(index), index)
        for buffer, coefficient in zip(buffers, coefficients, strict=True):
            tensors.put_gradient_(buffer[index], coefficient, add=False)
        parts.append(stats)
    return concatenate(parts), buffers
