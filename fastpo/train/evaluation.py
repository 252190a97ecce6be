"""An evaluation: its numbers are those of the whole set, however it is cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from fastpo.batch import Batch, Counts
from fastpo.data.packing import counts_of
from fastpo.loss.metrics import LossOutput
from fastpo.train.batches import PaddedGroups
from fastpo.train.metrics import MetricWindow


class Evaluation:
    """Take means over the groups of a data set, as if it were one batch.

    Args:
        dataset: groups, filled up or not; batch means of a stream are weighted by its groups.

    Attributes:
        totals: the counts of the set, which its losses are divided by; None for a stream.
    """

    def __init__(self, dataset: Any = None) -> None:
        groups = dataset.dataset if isinstance(dataset, PaddedGroups) else dataset
        self.totals: Counts | None = None
        if isinstance(groups, Sized):
            self.totals = counts_of(groups[i] for i in range(len(groups)))  # pyright: ignore
        self._window = MetricWindow()
        self._counts = Counts()  # of this rank so far

    def add(self, row: Batch, loss: Tensor, output: LossOutput) -> None:
        """Add a packed row, unless it only keeps this rank in step with the others."""
        if not row.counted:
            return
        groups = row.counts.groups
        # A sum over rows, written as a mean: every row's share is already divided.
        share = 1.0 if self.totals is None else self.totals.groups / groups
        self._window.add({"loss": loss * share}, {"loss": groups})
        self._window.add(output.metrics, output.counts)
        self._counts = Counts.total([self._counts, row.counts])

    def completed(
        self, output: EvalLoopOutput, prefix: str, over_ranks: Callable[[Counts], Counts]
    ) -> EvalLoopOutput:
        """Return what the Trainer's loop does, with the means and groups of all ranks.

        Args:
            output: the Trainer's, whose loss is a mean of batch means.
            prefix: of the names of metrics.
            over_ranks: adds up the counts of all ranks.
        """
        means = {f"{prefix}_{name}": mean for name, mean in self._window.means().items()}
        # The Trainer counts no groups of a stream, and those that fill a set up.
        counts = over_ranks(self._counts) if self.totals is None else self.totals
        return output._replace(
            metrics={**(output.metrics or {}), **means}, num_samples=round(counts.groups)
        )


def is_one_of(dataset: Any, *own: Any) -> bool:
    """Return whether a data set is one of a trainer's, or one of several by name."""
    each = [d for data in own for d in (data.values() if isinstance(data, dict) else [data])]
    return any(dataset is data for data in each)


def filled_up(dataset: Any, batch_size: int, num_ranks: int) -> Any:
    """Return a data set of known length with as many batches on every rank."""
    if num_ranks == 1 or not isinstance(dataset, Sized):
        return dataset
    return PaddedGroups(dataset, batch_size * num_ranks)
