"""Prompts cut to a budget, responses never."""

from __future__ import annotations

import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.packing import group_key
from tests.data.test_formats import one


def row(prompt, chosen="x", rejected="y"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


LONG = row("The sky is blue and the sea is blue", " as well.", " green at night, and the sky too.")


# With and without a BOS to keep, each end to keep, each limit.
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
