"""Bad rows of a data set, and its token counts."""

from __future__ import annotations

import numpy as np
import pytest

from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.data.stream import GroupStream
from tests.data.test_formats import BAD, PAIR
from tests.data.test_truncation import row


def test_skipped_rows_are_listed(tokenizers):
    rows = [PAIR, BAD["empty"][0], PAIR, BAD["blank"][0], BAD["nan weight"][0]]
    dataset = build_groups(
        rows, tokenizers(), DataOptions(on_bad_row="skip"), source="d.csv", progress=False
    )
    assert [group.row for group in dataset] == [0, 2]
    assert [bad.row for bad in dataset.skipped] == [1, 3, 4]
    report = dataset.skipped_report(shown=2)
    assert report.splitlines()[0] == "3 of 5 rows were skipped"
    assert "  1 x chosen: empty response" in report
    assert "d.csv, row 1, field 'chosen': empty response" in report
    assert "row 4" not in report  # beyond `shown`
    clean = build_groups([PAIR], tokenizers())
    assert clean.skipped_report() == "no row of 1 was skipped"


# No rows at all, and bad ones alone: both leave nothing to train on.
@pytest.mark.parametrize("rows", [[], [BAD["empty"][0]] * 2])
def test_no_good_row(tokenizers, rows):
    options = DataOptions(on_bad_row="skip")
    with pytest.raises(ValueError, match=r"d\.csv: no usable row"):
        build_groups(rows, tokenizers(), options, source="d.csv")
    with pytest.raises(ValueError, match=r"d\.csv: no usable row"):
        list(GroupStream(rows, tokenizers(), options, source="d.csv"))


def test_statistics(tokenizers):
    tokenizer = tokenizers()
    rows = [row("a", "b", "cd"), {"prompt": "a b", "responses": ["b", "c", "d"]}]
    dataset = build_groups(rows, tokenizer, extras=("mismatched",))
    counts = dataset.statistics
    prompts = [len(g.prompt_ids) for g in dataset]
    every = [[*g.responses, g.extras["mismatched"]] for g in dataset]
    lengths = [len(r.input_ids) for group in every for r in group]
    assert counts.groups == 2
    assert counts.prompt == (min(prompts), np.median(prompts), max(prompts))
    assert counts.response == (min(lengths), np.median(lengths), max(lengths))
    assert counts.shared == sum(prompts) + sum(lengths)
    assert counts.unshared == 3 * prompts[0] + 4 * prompts[1] + sum(lengths)
    assert f"{counts.unshared} ({counts.unshared / counts.shared:.2f}x)" in str(counts)
