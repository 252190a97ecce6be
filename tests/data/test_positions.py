"""Synthetic positions: the axis, truncation by chunks, and rows of both column sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastpo.data.bad_rows import BadField, BadRow
from fastpo.data.builder import row_to_group
from fastpo.data.dataset import build_groups
from fastpo.data.logo_columns import joined_chunks
from fastpo.data.options import DataOptions
from fastpo.data.packing import collate, group_key
from fastpo.data.positions import PositionSynthesis, chunk_tokens, synthetic_positions
from fastpo.data.truncation import cut_chunks

CHUNKS = ["The sky is blue.", "I like it: the sea is blue as well.", "It is green at night."]
QUESTION = "What colour is the sky?"
ANSWERS = ("It is blue.", "It is blue, as the sea.", "It is green.")


def row(chat: bool = False) -> dict[str, Any]:
    text, spans = joined_chunks(CHUNKS, QUESTION)
    said = [[{"role": "assistant", "content": a}] if chat else f" {a}" for a in ANSWERS]
    prompt = [{"role": "user", "content": text}] if chat else text
    return {"prompt": prompt, "chunk_spans": spans, "responses": said, "ranks": [0, 1, 1]}


def authors_row(suffix: str = "suffix_a") -> dict[str, Any]:
    return {
        "all_ref_text": CHUNKS,
        "combined_question": QUESTION,
        "final_answer": ANSWERS[0],
        "prefix_a": ANSWERS[1],
        suffix: ANSWERS[2],
        "label": "blue",
        "all_ref_ids": [3, 5, 8],
        "prefix_id": [3],
        "suffix_id": [8],
    }


def options(length: int = 400, **more: Any) -> DataOptions:
    return DataOptions(position_synthesis=PositionSynthesis(length, **more))


INTERVALS = np.array([[3, 10], [12, 17]])


def test_the_axis() -> None:
    """Head at 0, tail up to the end, a chunk in one piece in its slot: by hand."""
    found = synthetic_positions(INTERVALS, 20, 106, np.random.default_rng(0))
    assert found.dtype == np.int32
    assert found[:3].tolist() == [0, 1, 2]
    assert found[17:].tolist() == [103, 104, 105]
    assert (np.diff(found) > 0).all()
    slot = 50  # (106 - 3 - 3) / 2; what lies between the chunks goes with the first
    for start, stop, low in ((3, 12, 3), (12, 17, 3 + slot)):
        assert (np.diff(found[start:stop]) == 1).all()
        assert low <= found[start]
        assert found[stop - 1] < low + slot


def test_every_position_of_a_slot_is_seen() -> None:
    seen: set[int] = set()
    for seed in range(300):
        seen |= {*synthetic_positions(INTERVALS, 20, 106, np.random.default_rng(seed)).tolist()}
    assert seen == set(range(106))


def test_no_room_no_jump() -> None:
    """Slots as long as their chunks: ordinary positions; longer chunks: the first is named."""
    even = np.array([[2, 6], [6, 10]])
    rng = np.random.default_rng(0)
    assert synthetic_positions(even, 12, 12, rng).tolist() == list(range(12))
    with pytest.raises(BadField, match=r"chunk_spans\[0\].*4 tokens.*give each 3"):
        synthetic_positions(even, 12, 11, rng)


# A template shifts the characters of the chunks.
@pytest.mark.parametrize("chat", [False, True])
def test_rows_jump_between_their_chunks_alone(tokenizers: Any, chat: bool) -> None:
    tokenizer = tokenizers("chatml")
    (group,) = row_to_group(row(chat), tokenizer, options())
    positions = group.prompt_positions
    (plain,) = row_to_group(row(chat), tokenizer)
    assert np.array_equal(plain.prompt_ids, group.prompt_ids)
    assert plain.prompt_positions is None
    assert plain.span == len(plain.prompt_ids) + plain.longest
    assert positions is not None
    assert positions[0] == 0 or not chat  # text has no head: its first chunk is drawn a window too
    assert positions[-1] + 1 + group.longest == group.span == 400
    jumps = np.flatnonzero(np.diff(positions) != 1) + 1
    pieces = [tokenizer.decode(p) for p in np.split(group.prompt_ids, jumps)]
    texts = [*CHUNKS, QUESTION]
    pieces = pieces[-len(texts) :]  # a head of its own where the first chunk was moved
    for piece, text in zip(pieces, texts, strict=True):
        assert text in piece


def test_draws_are_a_function_of_seed_row_and_variant(tokenizers: Any) -> None:
    tokenizer = tokenizers()

    def drawn(seed: int, variants: int, count: int = 3) -> list[bytes]:
        opts = replace(options(variants=variants), seed=seed)
        groups = build_groups([row()] * count, tokenizer, opts, progress=False).groups
        return [g.prompt_positions.tobytes() for g in groups]

    two = drawn(0, 2)
    assert two == drawn(0, 2)
    assert len(set(two)) == len(two) == 6
    assert two[::2] == drawn(0, 1)  # more variants leave the first as it is
    assert drawn(1, 2) != two
    assert drawn(0, 2, count=1) == two[:2]


# The authors' files spell the column in both ways.
@pytest.mark.parametrize("suffix", ["suffix_a", "siffix_a"])
def test_the_authors_columns_are_our_row(tokenizers: Any, suffix: str) -> None:
    tokenizer = tokenizers("chatml")
    (ours,) = row_to_group(row(chat=True), tokenizer, options())
    (theirs,) = row_to_group(authors_row(suffix), tokenizer, options())
    assert group_key(ours) == group_key(theirs)
    assert np.array_equal(ours.prompt_positions, theirs.prompt_positions)
    assert [(r.label, r.rank) for r in theirs.responses] == [(True, 0), (False, 1), (False, 1)]


def test_wrong_answers_may_be_alike_but_not_right(tokenizers: Any) -> None:
    tokenizer = tokenizers("chatml")
    alike = {**authors_row(), "suffix_a": ANSWERS[1]}
    (group,) = row_to_group(alike, tokenizer, options())
    assert len(group.responses) == 3
    with pytest.raises(BadRow, match="identical to final_answer"):
        row_to_group({**alike, "prefix_a": ANSWERS[0]}, tokenizer, options())


# Each of their columns, missing, blank or of another type.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_a": None}, "'prefix_a': missing or not text"),
        ({"combined_question": " "}, "'combined_question': missing or not text"),
        ({"all_ref_text": "one"}, "'all_ref_text': neither a list"),
        ({"all_ref_text": ["one", ""]}, "'all_ref_text': not a list of texts"),
    ],
)
def test_bad_rows_of_the_authors(tokenizers: Any, change: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        row_to_group({**authors_row(), **change}, tokenizers("chatml"), options())


# Spans that are absent, empty, overlapping, torn, or beyond the text.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_spans": None}, "'chunk_spans': missing"),
        ({"chunk_spans": []}, "not a list of"),
        ({"chunk_spans": [[0, 5], [4, 9]]}, r"'chunk_spans\[1\]': empty, or begins before"),
        ({"chunk_spans": [[0, 5], [7]]}, r"'chunk_spans\[1\]': not \[start, stop\]"),
        ({"chunk_spans": [[0, 5], [900, 990]]}, r"'chunk_spans\[1\]': no token of the prompt"),
    ],
)
def test_bad_chunks(tokenizers: Any, change: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        row_to_group({**row(), **change}, tokenizers(), options())


def test_chunks_share_no_token() -> None:
    offsets = np.array([[0, 4], [4, 8]])
    with pytest.raises(BadField, match="no token"):
        chunk_tokens(offsets, [(0, 5), (5, 8)])


def test_chunks_are_cut_to_one_length(tokenizers: Any) -> None:
    kept = cut_chunks(INTERVALS, 20, 14)  # 8 beside the chunks, 3 for each
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 17, 18, 19]
    with pytest.raises(BadField, match="8 tokens beside its 2 chunks"):
        cut_chunks(INTERVALS, 20, 9)
    tokenizer = tokenizers()
    (whole,) = row_to_group(row(), tokenizer)
    most = len(whole.prompt_ids) + whole.longest - 6
    opts = replace(options(), max_length=most, truncation="cut_chunks")
    (cut,) = row_to_group(row(), tokenizer, opts)
    assert most - 3 < len(cut.prompt_ids) + cut.longest <= most
    text = tokenizer.decode(cut.prompt_ids)
    assert QUESTION in text
    assert all(chunk[:8] in text for chunk in CHUNKS)
    assert len(cut.prompt_positions) == len(cut.prompt_ids)
    with pytest.raises(BadRow, match="'chunk_spans': missing"):
        row_to_group({**row(), "chunk_spans": None}, tokenizer, replace(opts, max_length=None))


def test_chunks_that_truncation_took_away_have_no_slot(tokenizers: Any) -> None:
    tokenizer = tokenizers()
    (whole,) = row_to_group(row(), tokenizer)
    tail = len(tokenizer(CHUNKS[2] + "\n\n" + QUESTION)["input_ids"])
    opts = replace(options(), max_length=tail + whole.longest)
    (cut,) = row_to_group(row(), tokenizer, opts)
    jumps = np.flatnonzero(np.diff(cut.prompt_positions) != 1)
    assert len(jumps) <= 2  # before and after the one chunk that is left
    assert cut.span == 400
    short = replace(opts, max_length=3 + whole.longest)
    with pytest.raises(BadRow, match="no token of its 3 chunks is left"):
        row_to_group(row(), tokenizer, short)


# One refusal for each field.
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variants": 2}, "needs length"),
        ({"length": 64, "window": 2}, "has no fields but length, variants"),
        ({"length": 0}, "length=0 must be at least 1"),
        ({"length": 64, "variants": 1.5}, "variants=1.5 must be"),
    ],
)
def test_bad_settings(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PositionSynthesis.of(values)


def test_batches_have_the_positions(tokenizers: Any) -> None:
    """Both forms: the prompt's own, and each response on from its end."""
    tokenizer = tokenizers()
    groups = [*row_to_group(row(), tokenizer, options()), *row_to_group(row(), tokenizer)]
    packed = collate(groups, pad_token_id=0)
    padded = collate(groups, share_prompt=False, pad_token_id=0)
    number = 0
    for group, spans in zip(groups, packed.layout.groups, strict=True):
        end = group.span - group.longest
        prompt = group.prompt_positions
        prompt = np.arange(end) if prompt is None else prompt
        assert packed.position_ids[0, slice(*spans.prompt)].tolist() == prompt.tolist()
        for response, span in zip(group.responses, spans.responses, strict=True):
            own = list(range(end, end + len(response.input_ids)))
            assert packed.position_ids[0, slice(*span)].tolist() == own
            row_of = padded.position_ids[number][padded.attention_mask[number].bool()]
            assert row_of.tolist() == [*prompt.tolist(), *own]
            number += 1
    broken = replace(groups[0], prompt_positions=groups[0].prompt_positions[1:])
    with pytest.raises(ValueError, match=r"row 0: \d+ prompt_positions for \d+ tokens"):
        collate([broken], pad_token_id=0)


def test_reference_log_probs_depend_on_positions(tokenizers: Any) -> None:
    (plain,) = row_to_group(row(), tokenizers())
    (near,) = row_to_group(row(), tokenizers(), options(300))
    (far,) = row_to_group(row(), tokenizers(), options(400))
    assert len({group_key(g) for g in (plain, near, far)}) == 3
    short = replace(far, short_prompt_ids=plain.prompt_ids)
    assert short.for_reference.prompt_positions is None
    assert group_key(short) == group_key(plain)
