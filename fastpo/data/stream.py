"""Groups of rows that are read as they are needed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch.utils.data
from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadRow, report
from fastpo.data.builder import Builder
from fastpo.data.groups import Group
from fastpo.data.mismatched import stream_mismatched
from fastpo.data.options import DataOptions
from fastpo.data.source_rows import source_rows

log = logging.getLogger(__name__)


class GroupStream(torch.utils.data.IterableDataset[Group]):
    """Build groups as their rows are read, for rows that are streamed or do not fit memory.

    The same groups in the same order as `build_groups`, except that a mismatched response comes
    from the last group before that has another prompt and a response that fits (before there is
    one: from the first group after). `skipped` and `num_rows` tell of all that was read so far, a
    row of several passes once. With several DataLoader workers each builds its share and counts its
    own; a `datasets.IterableDataset` divides itself, other rows are dealt out in turn.

    Args and errors: as `build_groups`.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions | None = None,
        *,
        extras: Sequence[str] = (),
        needs: Collection[str] | None = None,
        source: str = "rows",
    ):
        self.rows, self.tokenizer, self.source = rows, tokenizer, source
        self.options, self.extras, self.needs = options or DataOptions(), tuple(extras), needs
        self.num_rows = 0
        self._skipped: dict[tuple[str, int], BadRow] = {}
        self._head: list[Group] = []
        self._builder = Builder(tokenizer, self.options, source, self.extras, needs)

    @property
    def skipped(self) -> list[BadRow]:
        """Return the bad rows that were left out so far."""
        return list(self._skipped.values())

    def head(self, count: int) -> list[Group]:
        """Return the first groups of the first pass, the same however often they are asked for."""
        if len(self._head) < count:
            self.set_epoch(0)
            self._head = list(itertools.islice(self, count))
            self._builder.tell()
        return self._head[:count]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to rows that are shuffled by it."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]

    def skipped_report(self, shown: int = 10) -> str:
        """Say how many rows were skipped so far, for which reasons, and list the first of them."""
        return report(self.skipped, self.num_rows, shown)

    def __iter__(self) -> Iterator[Group]:
        groups = self._groups()
        if "mismatched" in self.extras:
            return stream_mismatched(groups, self.options, self.source, self._skip)
        return groups

    def _groups(self) -> Iterator[Group]:
        builder = self._builder
        num_rows = num_bad = 0
        rows = source_rows(self.rows, self.source)
        worker = torch.utils.data.get_worker_info()
        if worker is not None and not isinstance(self.rows, torch.utils.data.IterableDataset):
            rows = itertools.islice(rows, worker.id, None, worker.num_workers)
        for row in rows:
            num_rows += 1
            self.num_rows = max(self.num_rows, num_rows)
            try:
                yield from builder.groups(row)
            except BadRow as bad:
                if self.options.on_bad_row == "error":
                    raise
                num_bad += 1
                self._skip(bad)
        if num_bad == num_rows and worker is None:
            raise ValueError(f"{self.source}: no usable row; {self.skipped_report()}")
        if worker is None:
            builder.columns.check_seen(self.source)
        builder.tell()
        if num_bad:
            log.warning("%s: %s", self.source, self.skipped_report())

    def _skip(self, bad: BadRow) -> None:
        self._skipped[bad.source, bad.row] = bad
