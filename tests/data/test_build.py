"""Budgets, bad-row policy, lists to pairs, mismatched responses, statistics, streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch.utils.data

from fastpo.data.bad_rows import BadRow
from fastpo.data.builder import row_to_group
from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.data.packing import group_key
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream
from tests.data.test_formats import BAD, PAIR, one, texts


def row(prompt, chosen="x", rejected="y"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


LONG = row("The sky is blue and the sea is blue", " as well.", " green at night, and the sky too.")


# Budgets


@pytest.mark.parametrize("adds", ["$A", "<s> $A"])
@pytest.mark.parametrize("truncation", ["keep_end", "keep_start", "cut_middle"])
@pytest.mark.parametrize("limit", ["max_length", "max_prompt_length"])
def test_prompt_is_cut_and_responses_are_not(tokenizers, adds, truncation, limit):
    tokenizer = tokenizers(adds=adds)
    whole = one(LONG, tokenizer)
    longest = max(len(r.input_ids) for r in whole.responses)
    kept = 5
    options = {limit: kept + (longest if limit == "max_length" else 0)}
    cut = one(LONG, tokenizer, truncation=truncation, **options)
    bos = int(adds != "$A")
    ids = whole.prompt_ids.tolist()
    start = {"keep_end": bos, "keep_start": kept, "cut_middle": kept // 2}[truncation]
    expected = ids[:start] + ids[len(ids) - kept + start :]
    assert cut.prompt_ids.tolist() == expected
    assert len(expected) == kept
    for a, b in zip(cut.responses, whole.responses, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()


def test_exact_fit_is_left_alone(tokenizers):
    tokenizer = tokenizers(adds="<s> $A")
    whole = one(LONG, tokenizer)
    longest = max(len(r.input_ids) for r in whole.responses)
    p = len(whole.prompt_ids)
    for truncation in ("keep_end", "keep_start", "cut_middle", "error"):
        fits = one(
            LONG,
            tokenizer,
            truncation=truncation,
            max_length=p + longest,
            max_prompt_length=p,
            max_response_length=longest,
        )
        assert group_key(fits) == group_key(whole)


def test_too_long(tokenizers):
    tokenizer = tokenizers(adds="<s> $A")
    whole = one(LONG, tokenizer)
    p, r = len(whole.prompt_ids), len(whole.responses[1].input_ids)
    for options, message in [
        ({"max_response_length": r - 1}, rf"'rejected': {r} tokens, more than max_response_length"),
        (
            {"max_length": r + 1},
            rf"'rejected': {r} tokens leave no room for a prompt in max_length",
        ),
        ({"max_length": r - 3}, rf"'rejected': {r} tokens leave no room"),
        ({"max_prompt_length": 1}, rf"'prompt': {p} tokens, but 1 fit"),  # nothing but BOS
        (
            {"max_prompt_length": p - 1, "truncation": "error"},
            rf"'prompt': {p} tokens, but {p - 1}",
        ),
        ({"max_length": p + r - 1, "truncation": "error"}, rf"'prompt': {p} tokens, but {p - 1}"),
    ]:
        with pytest.raises(BadRow, match=message):
            one(LONG, tokenizer, **options)


def test_bos_alone_is_a_prompt_that_fits(tokenizers):
    tokenizer = tokenizers(adds="<s> $A")
    group = one(row(""), tokenizer)
    longest = max(len(r.input_ids) for r in group.responses)
    assert len(one(row(""), tokenizer, max_length=1 + longest).prompt_ids) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "keep"}, "truncation='keep'"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore'"),
        ({"list_to_pairs": "all"}, "list_to_pairs='all'"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


# Bad rows


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


@pytest.mark.parametrize("rows", [[], [BAD["empty"][0]] * 2])
def test_no_good_row(tokenizers, rows):
    options = DataOptions(on_bad_row="skip")
    with pytest.raises(ValueError, match=r"d\.csv: no usable row"):
        build_groups(rows, tokenizers(), options, source="d.csv")
    with pytest.raises(ValueError, match=r"d\.csv: no usable row"):
        list(GroupStream(rows, tokenizers(), options, source="d.csv"))


# Lists to pairs

LIST = {"prompt": "p", "responses": [" a", " b", " c", " d"], "scores": [2, 3, 1, 3], "weight": 2.0}


@pytest.mark.parametrize(
    ("mode", "pairs"),
    [(None, ["bdac"]), ("best_worst", ["bc"]), ("best_rest", ["ba", "bc"])],
)
def test_list_to_pairs(tokenizers, mode, pairs):
    tokenizer = tokenizers()
    groups = row_to_group(LIST, tokenizer, DataOptions(list_to_pairs=mode), index=7)
    found = ["".join(t.removesuffix("</s>").strip() for t in texts(tokenizer, g)) for g in groups]
    assert found == pairs
    for group in groups:
        assert (group.row, group.weight) == (7, 2.0)
        if mode is not None:
            assert [r.label for r in group.responses] == [True, False]
            assert [r.rank for r in group.responses] == [0, 1]
    # The grades stay; a pair that was a pair is left alone.
    assert groups[0].responses[0].score == 3
    assert len(row_to_group(PAIR, tokenizer, DataOptions(list_to_pairs=mode))) == 1


def test_list_without_a_preference(tokenizers):
    tied = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}
    with pytest.raises(BadRow, match="'scores': all equal, so the list holds no pair"):
        row_to_group(tied, tokenizers(), DataOptions(list_to_pairs="best_rest"))
    assert len(one(tied, tokenizers()).responses) == 2


# Mismatched responses

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


# Statistics


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


# Determinism and streams


def keys(groups):
    return [(group.row, group.weight, group_key(group)) for group in groups]


MIXED = [PAIR, LIST, BAD["empty"][0], LONG, {**PAIR, "prompt": "hi", "weight": 3.0}]


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


def test_stream_mismatched(tokenizers):
    tokenizer = tokenizers()
    stream = GroupStream(kto_rows(), tokenizer, extras=("mismatched",))
    # The last row before with another prompt; the first prompt waits for the first one after.
    assert donors(stream, tokenizer) == [2, 2, 1, 2, 2, 4]
    assert [group.row for group in stream] == list(range(6))


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
