"""Hold a packed batch, from the collator to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.segments import Segments, changed_tensors


class GroupSpan(NamedTuple):
    """Say where a prompt and its responses lie in the packed row: half-open intervals."""

    prompt: tuple[int, int]
    responses: tuple[tuple[int, int], ...]


class Layout(NamedTuple):
    """Lay out a packed row in plain Python integers, so that attention never syncs.

    Each token of a response attends to the prompt before it and to its own response, causally.
    """

    groups: tuple[GroupSpan, ...]
    length: int


class Counts(NamedTuple):
    """Hold what sums are divided by (`fastpo.objectives.base.Per`), and what is only reported.

    `responses` are candidates. `response_tokens` are scored tokens of the candidates less those of
    weight zero; `chosen_tokens` are those of desirable ones, `gold_tokens` of the extra `gold`.
    """

    groups: float = 0
    responses: float = 0
    desirable: float = 0
    undesirable: float = 0
    chosen_tokens: float = 0
    response_tokens: float = 0
    gold_tokens: float = 0
    tokens: float = 0  # T, with one copy of each prompt
    target_tokens: float = 0  # N
    unshared_tokens: float = 0  # with one prompt copy a response

    @classmethod
    def total(cls, counts: Iterable[Counts]) -> Counts:
        """Return the sums of all counts."""
        return cls(*map(sum, zip(cls(), *counts, strict=True)))


@dataclass(frozen=True)
class TargetTokens:
    """Hold what the head predicts, and what is known of each target token beside it.

    The head reads M positions, scores read the N target tokens of responses. They are the same
    tokens in the same order where `index` is None; responses that share tokens share positions.

    Args:
        targets: [M] int64, the token that each hidden state is to predict.
        segments: which response and group each of the N target tokens belongs to.
        index: [N] int64, the position in [0, M) that each target token reads; None: 0, 1, ....
        token_weights: [N], or None for ones.
        kl_weights: [N] weights of the divergences, or None for `token_weights`.
        token_rewards: [N] signed rewards of single tokens, or None.
        ref_logps, ref2_logps: [N] log-probs under the reference and a second one, or None.
        old_logps: [N] log-probs under the policy that drew the responses, or None.
    """

    targets: Tensor
    segments: Segments
    index: Tensor | None = None
    token_weights: Tensor | None = None
    kl_weights: Tensor | None = None
    token_rewards: Tensor | None = None
    ref_logps: Tensor | None = None
    ref2_logps: Tensor | None = None
    old_logps: Tensor | None = None

    def read(self, values: Tensor) -> Tensor:
        """Return [N, ...] of target tokens from [M, ...] of positions."""
        return values if self.index is None else values[self.index]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TargetTokens:
        """Return the same tokens with every tensor changed."""
        return replace(self, **changed_tensors(self, change), segments=self.segments.mapped(change))


@dataclass(frozen=True)
class Batch:
    """Hold groups as a model and a loss take them; `fastpo.data.packing.collate` makes it.

    Never pass it into a wrapped model: FSDP2 rebuilds dataclasses as it casts inputs.

    Args:
        input_ids, position_ids: [1, T] int64; padded: [R, longest]. Responses go on where their
            prompt ends.
        attention_mask: [R, longest] int64 of padded rows, else None.
        layout: the segment table of the packed row; None for padded rows.
        head_positions: [M] int64, the flat position whose hidden state predicts each target.
        tokens: the targets.
        counts: what losses are divided by; see `Counts`.
        row_numbers, sources: of each group its row in the user's file, and the file.
        counted: False for a batch that only keeps a rank in step with the others.
        reference: the same responses after the prompt that the reference sees; None: this batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    layout: Layout | None
    head_positions: Tensor
    tokens: TargetTokens
    counts: Counts
    row_numbers: tuple[int, ...]
    sources: tuple[str, ...]
    counted: bool = True
    reference: Batch | None = None

    @property
    def for_reference(self) -> Batch:
        """Return what the reference reads; its target tokens are numbered as the policy's."""
        return self if self.reference is None else self.reference

    @property
    def shares_prompts(self) -> bool:
        """Return whether a group has one copy of its prompt."""
        return self.layout is not None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the same batch with every tensor changed; the layout stays plain integers."""
        return replace(
            self,
            **changed_tensors(self, change),
            tokens=self.tokens.mapped(change),
            reference=None if self.reference is None else self.reference.mapped(change),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the same batch with every tensor on `device`."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory, which a copy to a GPU need not wait for."""
        return self.mapped(Tensor.pin_memory)
