"""No step is taken on a loss that is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from fastpo.batch import Batch
from fastpo.loss.metrics import LossOutput


class _Seen(NamedTuple):
    loss: Tensor  # []
    losses: Tensor  # [G]
    sources: tuple[str, ...]  # [G]
    row_numbers: tuple[int, ...]  # [G]

    def rows(self) -> list[str]:
        """Name the rows that a loss that is not finite comes from, or all where none stands out."""
        names = zip(self.sources, self.row_numbers, strict=True)
        every = [f"{source or 'rows'} row {number}" for source, number in names]
        bad = (~self.losses.isfinite()).tolist()
        return [name for name, wrong in zip(every, bad, strict=True) if wrong] or every


class FiniteLosses(TrainerCallback):
    """Look at all losses of an optimiser step once, before the optimiser steps.

    Until then they stay on the device, and nobody waits for it. The names of rows are the host's.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def add(self, output: LossOutput, batch: Batch) -> None:
        """Keep the losses of a micro-batch."""
        loss, losses = output.loss.detach(), output.losses
        self._seen.append(_Seen(loss, losses, batch.sources, batch.row_numbers))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the micro-batches of a run that was stopped within a step."""
        self._seen = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse the step on every rank where one of them has a loss that is not finite.

        Raises:
            FloatingPointError: names the rows of this rank.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return
        wrong = ~torch.stack([each.loss for each in seen]).isfinite()
        any_wrong = wrong.any().to(torch.int32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(any_wrong, dist.ReduceOp.MAX)
        if not bool(any_wrong):
            return
        here = [each for each, bad in zip(seen, wrong.tolist(), strict=True) if bad]
        value, rows = "not finite", "rows of another rank"
        if here:
            value, rows = here[0].loss.item(), ", ".join(here[0].rows())
        raise FloatingPointError(
            f"the loss is {value} in step {state.global_step + 1}, from {rows}; look at these "
            f"rows, lower learning_rate={args.learning_rate}, or resume from a checkpoint before it"
        )
