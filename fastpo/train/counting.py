"""What a step is divided by, and what is counted and averaged between two records of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fastpo.batch import Batch, Counts
from fastpo.loss.metrics import LossOutput
from fastpo.train.metrics import MetricWindow, Stopwatch, peak_memory_gib


def over_ranks(counts: Counts, accelerator: Accelerator, copies: int) -> Counts:
    """Return the counts of all ranks.

    Args:
        counts: of this rank.
        accelerator: of the ranks.
        copies: ranks that share their data, as those of a tensor-parallel model do.
    """
    if accelerator.num_processes == 1:
        return counts
    local = torch.tensor(counts, dtype=torch.float64, device=accelerator.device)
    total: Any = accelerator.reduce(local)
    return Counts(*(total / copies).tolist())


def with_balance(
    output: LossOutput, balance: Tensor, weight: float, batch: Batch, totals: Counts | None
) -> LossOutput:
    """Return the output of a row with the load-balance loss of its routers added.

    Args:
        output: of the preference loss.
        balance: [] the load-balance loss, a mean over the row's tokens.
        weight: what it is multiplied by.
        batch: the row.
        totals: counts of the whole optimiser step; None: the row is all of it.
    """
    # Tokens are counted as the rows have them.
    tokens_of = attrgetter("tokens" if batch.shares_prompts else "unshared_tokens")
    count = tokens_of(batch.counts)
    share = count / tokens_of(totals) if totals is not None else 1.0
    return output._replace(
        loss=output.loss + weight * share * balance,
        metrics={**output.metrics, "aux_loss": balance.detach()},
        counts={**output.counts, "aux_loss": balance.new_full((), count)},
    )


class TrainingMeter:
    """Hold metrics, tokens and time of training since the last record.

    Attributes:
        window: means of metrics.
    """

    def __init__(self) -> None:
        self.window = MetricWindow()
        self._watch: Stopwatch | None = None
        self._tokens = 0.0

    def start(self) -> None:
        """Start the clock, once."""
        if self._watch is None:
            self._watch = Stopwatch()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: evaluation, saving and sampling are no training."""
        if self._watch is None:
            yield
        else:
            with self._watch.paused():
                yield

    def count(self, rows: Sequence[Batch], totals: Counts, most: int | None) -> None:
        """Count the rows of an optimiser step.

        Args:
            rows: of this rank.
            totals: of all ranks.
            most: tokens that a row may have, or None.
        """
        self._tokens += totals.tokens
        if not totals.tokens:
            return
        shared = all(row.shares_prompts for row in rows)  # as they were packed
        sharing = totals.unshared_tokens / totals.tokens if shared else 1.0
        self.window.add({"sharing": sharing}, {"sharing": totals.tokens})
        if shared and most is not None:
            fill = [row.counts.tokens / most for row in rows]
            self.window.add({"row_fill": sum(fill) / len(fill)}, {"row_fill": len(fill)})

    def record(self, device: torch.device, num_tokens: float) -> dict[str, float]:
        """Return what a training record says beside the loss, and begin anew."""
        if self._watch is None:
            return {}
        record = {
            **self.window.means(),
            "num_tokens": num_tokens,
            "tokens_per_second": self._tokens / self._watch.lap(),
            "peak_memory_gib": peak_memory_gib(device),
        }
        self._tokens = 0.0
        return record
