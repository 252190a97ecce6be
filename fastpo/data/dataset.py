"""Groups of a whole data set, in memory and tokenised once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadRow, report
from fastpo.data.builder import Builder
from fastpo.data.groups import Group
from fastpo.data.mismatched import with_mismatched
from fastpo.data.options import DataOptions
from fastpo.data.source_rows import source_rows

log = logging.getLogger(__name__)


class Spread(NamedTuple):
    """Hold the least, median and greatest of a count."""

    min: int
    median: float
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        return cls(min(values), float(np.median(values)), max(values))

    def __str__(self) -> str:
        return f"{self.min} / {self.median:g} / {self.max}"


@dataclass(frozen=True)
class TokenCounts:
    """Hold the numbers of tokens of a data set, extra responses included."""

    groups: int
    prompt: Spread  # tokens of a prompt
    response: Spread  # tokens of a response
    shared: int  # with one copy of each prompt
    unshared: int  # with one prompt copy per response

    @classmethod
    def of(cls, groups: Sequence[Group]) -> TokenCounts:
        return cls(
            groups=len(groups),
            prompt=Spread.of([len(g.prompt_ids) for g in groups]),
            response=Spread.of([len(r.input_ids) for g in groups for r in g.every]),
            shared=sum(len(g) for g in groups),
            unshared=sum(g.unshared_tokens for g in groups),
        )

    def __str__(self) -> str:
        return (
            f"{self.groups} groups; tokens (min / median / max): prompt {self.prompt}, response "
            f"{self.response}; {self.shared} in all with one prompt copy per group, "
            f"{self.unshared} ({self.unshared / self.shared:.2f}x) with one per response"
        )


class GroupDataset(torch.utils.data.Dataset[Group]):
    """Hold groups in the order of their rows.

    Attributes:
        groups: the groups.
        skipped: the bad rows that were left out.
        num_rows: rows read.
        statistics: token counts.
    """

    def __init__(self, groups: list[Group], skipped: list[BadRow], num_rows: int):
        self.groups, self.skipped, self.num_rows = groups, skipped, num_rows
        self.statistics = TokenCounts.of(groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]

    def skipped_report(self, shown: int = 10) -> str:
        """Say how many rows were skipped, for which reasons, and list the first of them."""
        return report(self.skipped, self.num_rows, shown)


def build_groups(
    rows: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions | None = None,
    *,
    extras: Sequence[str] = (),
    needs: Collection[str] | None = None,
    source: str = "rows",
    progress: bool = True,
) -> GroupDataset:
    """Build the groups of all rows, in order, tokenised once.

    Args:
        rows: dicts, as from `load_rows`; `docs/data.md` lists the formats.
        tokenizer: the model's; its chat template is used for conversations.
        options: see DataOptions.
        extras: roles of further responses; "mismatched" (KTO) gives each group the first response
            of the next group with another prompt that fits into `max_length`, "gold" and
            "ref_response" come from columns, "context_chosen" and its kind are candidates after the
            prompt of another column.
        needs: what the objective takes, `PreferenceLoss.needs`: the columns that it reads are
            checked, and others not looked at; None takes of every column what can be used.
        source: name of the data for messages.
        progress: show a progress bar on a terminal.

    Raises:
        BadRow: at the first bad row, unless `options.on_bad_row` is "skip".
        ValueError: no rows, no good row, or "mismatched" with fewer than two prompts.
    """
    options = options or DataOptions()
    builder = Builder(tokenizer, options, source, extras, needs)
    groups: list[Group] = []
    skipped: list[BadRow] = []
    num_rows = 0
    total = len(rows) if isinstance(rows, Sized) else None
    # disable=None: only where stderr is a terminal.
    hidden = None if progress else True
    bar = tqdm(source_rows(rows, source), total=total, desc=f"Tokenising {source}", disable=hidden)
    for row in bar:
        num_rows += 1
        try:
            groups += builder.groups(row)
        except BadRow as bad:
            if options.on_bad_row == "error":
                raise
            skipped.append(bad)
    builder.columns.check_seen(source)
    if groups and "mismatched" in extras:
        groups = list(with_mismatched(groups, options, source, skipped.append))
    if not groups:
        raise ValueError(f"{source}: no usable row; {report(skipped, num_rows, 10)}")
    dataset = GroupDataset(groups, skipped, num_rows)
    builder.tell()
    if skipped:
        log.warning("%s: %s", source, dataset.skipped_report())
    log.info("%s: %s", source, dataset.statistics)
    return dataset
