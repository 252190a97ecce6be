"""Which tokens have a target: the others cost nothing and get zeros."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScoredTokens(NamedTuple):
    """Hold those of N tokens that have a target; as it stands all of them."""

    positions: Tensor | None = None  # [n] of those that are computed
    ignored: Tensor | None = None  # [N] mask of those that are computed and then dropped

    def spread(self, values: Tensor, total: int) -> Tensor:
        """Return values [n] as [N], 0 where there is no target."""
        if self.ignored is not None:
            return values.masked_fill(self.ignored, 0)
        if self.positions is not None:
            return values.new_zeros(total).index_copy(0, self.positions, values)
        return values


def scored_tokens(targets: Tensor, ignore_index: int, vocab_size: int) -> ScoredTokens:
    """Find the tokens whose target is not `ignore_index`; waits for the device.

    Under `torch.compile` all tokens are computed, since a graph's shapes cannot depend on targets.

    Raises:
        ValueError: a target outside [0, vocab_size); compiled, an assertion fails on the device.
    """
    ignored = targets == ignore_index
    outside = ((targets < 0) | (targets >= vocab_size)) & ~ignored
    if torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"a label is outside [0, {vocab_size})")
        return ScoredTokens(ignored=ignored)
    any_ignored, any_outside = torch.stack([ignored.any(), outside.any()]).tolist()
    if any_outside:
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"label {int(targets[position])} at position {position} is outside the vocabulary "
            f"[0, {vocab_size}) and is not ignore_index={ignore_index}"
        )
    return ScoredTokens((~ignored).nonzero().squeeze(1) if any_ignored else None)
