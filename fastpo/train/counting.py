"""What is counted and averaged between two records of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastpo.batch import Batch, Counts
from fastpo.train.metrics import MetricWindow, Stopwatch, peak_memory_gib


class TrainingMeter:
    """Metrics, tokens and time of training since the last record.

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

    def record(self, device: torch.device, num_tokens: float) -> dict[str, Any]:
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
