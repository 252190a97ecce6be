"""Responses to another prompt, of data in memory and of streams."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.data.stream import GroupStream
from tests.data.test_truncation import row

PROMPTS = "aabcca"  # runs of one prompt, and the first one again at the end


def kto_rows(prompts=PROMPTS):
    return [
        {"prompt": f"{p}:", "completion": f" {i}", "label": i % 2 == 0}
        for i, p in enumerate(prompts)
    ]


def donors(groups, tokenizer):
    """Which row each mismatched response was written for (completions are row numbers)."""
    return [int(tokenizer.decode(g.extras["mismatched"].input_ids[:-1])) for g in groups]


def test_mismatched_rotation(tokenizers):
    tokenizer = tokenizers()
    dataset = build_groups(kto_rows(), tokenizer, extras=("mismatched",))
    # The next row with another prompt; the last row goes on at the top past its own prompt.
    assert donors(dataset, tokenizer) == [2, 2, 3, 5, 5, 2]
    plain = build_groups(kto_rows(), tokenizer)
    for group, same in zip(dataset, plain, strict=True):
        donor = plain[donors([group], tokenizer)[0]].responses[0]
        mismatched = group.extras["mismatched"]
        assert group.responses[0].input_ids.tolist() == same.responses[0].input_ids.tolist()
        assert mismatched.input_ids.tolist() == donor.input_ids.tolist()
        assert mismatched.loss_mask.tolist() == donor.loss_mask.tolist()
        assert not plain[0].extras


def test_mismatched_needs_two_prompts(tokenizers):
    rows = kto_rows("aaa")
    message = r"k\.csv: .* all 3 groups have the same prompt"
    with pytest.raises(ValueError, match=message):
        build_groups(rows, tokenizers(), extras=("mismatched",), source="k.csv")
    with pytest.raises(ValueError, match=message):
        list(GroupStream(rows, tokenizers(), extras=("mismatched",), source="k.csv"))
    with pytest.raises(ValueError, match="cannot build 'bronze'"):
        build_groups(rows, tokenizers(), extras=("bronze",))
    with pytest.raises(ValueError, match="cannot build 'bronze'"):
        GroupStream(rows, tokenizers(), extras=("bronze",))


# A list and a stream look for donors by different code.
@pytest.mark.parametrize("build", [build_groups, GroupStream])
def test_mismatched_fits_or_makes_a_bad_row(tokenizers, build):
    """Whole, from further on where the nearest does not fit; never cut."""
    tokenizer = tokenizers()
    rows = [
        row("The sky is blue", " x", " y"), row("hi", " as well and more of it", " y"),
        row("a b", " z", " y"),
    ]  # fmt: skip
    free = list(build(rows, tokenizer, extras=("mismatched",)))
    limit = max(len(g.prompt_ids) + len(r.input_ids) for g in free for r in g.responses)
    assert len(free[0].prompt_ids) + len(free[1].responses[0].input_ids) > limit
    options = DataOptions(max_length=limit)
    first, *_ = build(rows, tokenizer, options, extras=("mismatched",))
    borrowed, whole = first.extras["mismatched"].input_ids, free[2].responses[0].input_ids
    assert borrowed.tolist() == whole.tolist()

    reason = r"k\.csv, row 0, field 'mismatched': no response to another prompt fits"
    with pytest.raises(BadRow, match=reason):
        list(build(rows[:2], tokenizer, options, extras=("mismatched",), source="k.csv"))
    options = replace(options, on_bad_row="skip")
    left = build(rows[:2], tokenizer, options, extras=("mismatched",), source="k.csv")
    assert [group.row for group in left] == [1]
    assert [bad.row for bad in left.skipped] == [0]


def test_stream_mismatched(tokenizers):
    tokenizer = tokenizers()
    stream = GroupStream(kto_rows(), tokenizer, extras=("mismatched",))
    # The last row before with another prompt; the first prompt waits for the first one after.
    assert donors(stream, tokenizer) == [2, 2, 1, 2, 2, 4]
    assert [group.row for group in stream] == list(range(6))
