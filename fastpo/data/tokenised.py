"""Read rows that were tokenised elsewhere: the columns of LongPO's official code."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.dialects import SIDES
from fastpo.data.example import Example, Tokens, Turn
from fastpo.data.messages import is_sequence, parsed

UNSCORED = -100
"""The label of a token that is context, in rows of token ids."""


def _token_rows(row: Mapping[str, Any], side: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read a side's sequences: ids [T] int32, and which of them are scored [T] bool.

    A column holds one sequence or a list of them; what `attention_mask` hides is left out.
    """

    def column(kind: str) -> list[np.ndarray]:
        name = f"{side}_{kind}"
        value = parsed(name, row.get(name))
        if value is None:
            raise BadField(name, "missing")
        nested = is_sequence(value) and len(value) and is_sequence(value[0])
        arrays = []
        for i, item in enumerate(value if nested else [value]):
            try:
                array = np.asarray(item)
            except ValueError:  # lists of several lengths
                array = np.zeros(())
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise BadField(f"{name}[{i}]" if nested else name, "no list of integers", item)
            arrays.append(array)
        return arrays

    ids, labels = column("input_ids"), column("labels")
    masks = column("attention_mask") if f"{side}_attention_mask" in row else map(np.ones_like, ids)
    sequences = []
    for i, (sequence, label, mask) in enumerate(itertools.zip_longest(ids, labels, masks)):
        where = f"[{i}]" if len(ids) > 1 else ""
        sizes = [0 if each is None else len(each) for each in (sequence, label, mask)]
        if len(set(sizes)) != 1:
            reason = "{} tokens, {} labels and a mask of {}".format(*sizes)
            raise BadField(f"{side}_input_ids{where}", reason)
        sequence, label = sequence[mask != 0], label[mask != 0]
        scored = label != UNSCORED
        wrong = np.flatnonzero(scored & (label != sequence))
        if len(wrong):
            reason = f"label {wrong[0]} is neither the token in its place nor {UNSCORED}"
            raise BadField(f"{side}_labels{where}", reason, int(label[wrong[0]]))
        if len(sequence) and not 0 <= sequence.min() <= sequence.max() < 2**31:
            raise BadField(f"{side}_input_ids{where}", "not all are token ids")
        sequences.append((sequence.astype(np.int32), scored))
    return sequences


def read_longpo(row: Mapping[str, Any]) -> Example:
    """Read a pair of token ids: what stands before the first scored token is the prompt."""
    prompts, responses = [], []
    for side in SIDES:
        sequences = _token_rows(row, side)
        if len(sequences) != 1:
            raise BadField(f"{side}_input_ids", f"{len(sequences)} sequences where a row has one")
        ids, scored = sequences[0]
        places = np.flatnonzero(scored)
        if not len(places) or not places[0]:
            reason = "no token is scored" if not len(places) else "no token before the first answer"
            raise BadField(f"{side}_labels", reason)
        start, stop = places[0], places[-1] + 1
        prompts.append(ids[:start])
        # Copies: a view would keep the rejected side's document in memory.
        responses.append((ids[start:stop].copy(), scored[start:stop].copy()))
    if not np.array_equal(*prompts):
        raise BadField(
            "rejected_input_ids", "not those of chosen_input_ids before the first answer"
        )
    return Example(
        prompt=None,
        responses=[],
        names=[f"{side}_input_ids" for side in SIDES],
        labels=[True, False],
        ranks=[0, 1],
        scores=[None, None],
        tokens=Tokens(prompts[0], responses),
    )


def read_turns(row: Mapping[str, Any], tokens: Tokens) -> list[Turn]:
    """Return the answers of both responses in order, each after the prompt of its short row."""
    turns = []
    for side, (ids, scored) in zip(SIDES, tokens.responses, strict=True):
        # Every other piece is context.
        responses = np.split(ids, np.flatnonzero(np.diff(scored)) + 1)[::2]
        short, name = _token_rows(row, f"ref_{side}"), f"ref_{side}_input_ids"
        if len(short) != len(responses):
            reason = f"{len(short)} short rows for the {len(responses)} answers in {side}_labels"
            raise BadField(name, reason)
        for i, (response, (sequence, marked)) in enumerate(zip(responses, short, strict=True)):
            # The row may end with more: its tokenizer was asked for the header of a next answer.
            start = int(marked.argmax())
            if not start or not np.array_equal(sequence[start : start + len(response)], response):
                reason = f"its labels do not begin with answer {i} of {side}_input_ids"
                raise BadField(f"{name}[{i}]", reason)
            # The rejected answer's page is as a rule the chosen one's, and kept once.
            page = twin = sequence[:start]
            if i < len(turns):
                twin = turns[i].prompt
            turns.append(
                Turn(f"{name}[{i}]", twin if np.array_equal(page, twin) else page, response)
            )
    return turns
