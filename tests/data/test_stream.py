"""Streams give the groups of a data set in memory."""

from __future__ import annotations

import pytest
import torch.utils.data

from fastpo.data.bad_rows import BadRow
from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.data.packing import group_key
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream
from tests.data.test_builder import LIST
from tests.data.test_formats import BAD, PAIR
from tests.data.test_mismatched import kto_rows
from tests.data.test_truncation import LONG


def keys(groups):
    return [(group.row, group.weight, group_key(group)) for group in groups]


MIXED = [PAIR, LIST, BAD["empty"][0], LONG, {**PAIR, "prompt": "hi", "weight": 3.0}]


# Rows as they are, and lists that become several groups.
@pytest.mark.parametrize("mode", [None, "best_rest"])
def test_stream_equals_map_style(tokenizers, mode):
    tokenizer, options = tokenizers(), DataOptions(on_bad_row="skip", list_to_pairs=mode)
    dataset = build_groups(MIXED, tokenizer, options)
    assert keys(dataset) == keys(build_groups(MIXED, tokenizer, options))
    stream = GroupStream(MIXED, tokenizer, options)
    for _ in range(2):  # every pass is the same, counts included
        assert keys(stream) == keys(dataset)
        assert [str(bad) for bad in stream.skipped] == [str(bad) for bad in dataset.skipped]
        assert stream.skipped_report() == dataset.skipped_report()
    lazy = load_rows([PAIR, LONG], streaming=True)
    assert keys(GroupStream(lazy, tokenizer)) == keys(build_groups([PAIR, LONG], tokenizer))


def test_stream_is_lazy_and_stops_at_a_bad_row(tokenizers):
    def rows():
        yield PAIR
        yield BAD["empty"][0]

    groups = iter(GroupStream(rows(), tokenizers(), source="s.jsonl"))
    assert next(groups).row == 0
    with pytest.raises(BadRow, match=r"s\.jsonl, row 1, field 'chosen'"):
        next(groups)


def test_stream_is_divided_among_workers(tokenizers):
    stream = GroupStream(kto_rows(), tokenizers())
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(group.row for group in loader) == list(range(6))


def test_stream_passes_the_epoch(tokenizers):
    lazy = load_rows(kto_rows("abcdefgh"), streaming=True).shuffle(seed=0, buffer_size=8)
    stream = GroupStream(lazy, tokenizers())
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([group_key(group) for group in stream])
    assert orders[0] == orders[2] != orders[1]
    GroupStream(kto_rows(), tokenizers()).set_epoch(1)  # rows without epochs are fine
