"""Weights of tokens: from spans of characters, and from schemes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastpo.data.bad_rows import BadField, BadRow
from fastpo.data.builder import row_to_group
from fastpo.data.dataset import build_groups
from fastpo.data.groups import Group, Response
from fastpo.data.options import DataOptions
from fastpo.data.packing import collate
from fastpo.data.token_weights import check_schemes, weighted


def texts(tokenizer, group: Group, k: int) -> dict[float, str]:
    """weight -> the text of a response's tokens that have it, in order."""
    response = group.responses[k]
    assert response.token_weights is not None
    found: dict[float, str] = {}
    for token, weight in zip(response.input_ids, response.token_weights.tolist(), strict=True):
        found[weight] = found.get(weight, "") + tokenizer.decode([token])
    return found


def span(text: str, part: str, weight: float) -> list[float]:
    start = text.index(part)
    return [start, start + len(part), weight]


# Text, and messages whose template moves the characters.
@pytest.mark.parametrize("conversational", [False, True])
def test_spans_count_characters_of_the_response(tokenizers, conversational: bool) -> None:
    tokenizer = tokenizers("chatml")
    good, bad = " The sky is blue, and Paris is in Spain.", "The sky is green."
    row = {
        "prompt": "What do you know? ",
        "chosen": good,
        "rejected": bad,
        "chosen_spans": [span(good, "Spain", 0.0), span(good, "blue", 2.5)],
    }
    if conversational:
        row |= {
            "prompt": [{"role": "user", "content": "What do you know?"}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        }
    (group,) = row_to_group(row, tokenizer)
    found = texts(tokenizer, group, 0)
    assert found[0.0].strip() == "Spain"
    assert found[2.5].strip() == "blue"
    assert "Paris" in found[1.0]
    assert group.responses[1].token_weights is None


def test_spans_of_lists_follow_their_response(tokenizers) -> None:
    tokenizer = tokenizers()
    row = {
        "prompt": "p ",
        "responses": ["worst one", "best one"],
        "scores": [0.0, 1.0],
        "spans": [[], [[0, 4, 3.0]]],
    }
    (group,) = row_to_group(row, tokenizer)
    assert texts(tokenizer, group, 0)[3.0].strip() == "best"
    assert group.responses[1].token_weights is None


LIST = {"prompt": "p ", "responses": ["worst one", "best one"], "scores": [0.0, 1.0]}


def test_columns_follow_their_response(tokenizers) -> None:
    """One number a token, end of sequence included; weights multiply with spans, rewards do not."""
    (plain,) = row_to_group(LIST, tokenizers())
    best, worst = (len(r.input_ids) for r in plain.responses)
    weights = [np.linspace(1, 2, n).tolist() for n in (worst, best)]
    rewards = [np.linspace(-1, 1, n).tolist() for n in (worst, best)]
    spans = {"spans": [[], [[0, 8, 3.0]]]}
    row = {**LIST, "token_weights": weights, "token_rewards": rewards, **spans}
    (group,) = row_to_group(row, tokenizers())
    for k, i in enumerate((1, 0)):
        assert group.responses[k].token_rewards.tolist() == np.float32(rewards[i]).tolist()
    assert group.responses[1].token_weights.tolist() == np.float32(weights[0]).tolist()
    inside = np.array([3.0] * (best - 1) + [1.0])
    expected = np.float32(weights[1]) * inside
    assert group.responses[0].token_weights.tolist() == expected.astype(np.float32).tolist()
    as_text = {**row, "token_weights": json.dumps(weights)}  # a cell of a CSV file
    assert np.array_equal(
        row_to_group(as_text, tokenizers())[0].responses[1].token_weights,
        group.responses[1].token_weights,
    )


def test_columns_reach_the_batch(tokenizers) -> None:
    (plain,) = row_to_group(LIST, tokenizers())
    sizes = [len(r.input_ids) for r in plain.responses][::-1]
    columns = {
        "token_weights": [[2.0] * n for n in sizes],
        "token_rewards": [[-1] * n for n in sizes],
    }
    groups = [*row_to_group({**LIST, **columns}, tokenizers()), plain]
    batch = collate(groups, pad_token_id=0)
    n = sum(sizes)
    assert batch.tokens.token_weights.tolist() == [2.0] * n + [1.0] * n
    assert batch.tokens.token_rewards.tolist() == [-1.0] * n + [0.0] * n
    assert collate([plain], pad_token_id=0).tokens.token_rewards is None


# Each misfit of length or type, in both columns.
@pytest.mark.parametrize("column", ["token_weights", "token_rewards"])
@pytest.mark.parametrize(
    ("values", "part"),
    [
        ([[1.0], [1.0, 1.0]], "1 numbers for the {best} tokens of responses[1]"),
        ([[1.0]], "1 lists of numbers for 2 responses"),
        ([[1.0], 2.0], "not a list of numbers; got 2.0"),
        ([[1.0], [[1.0]]], "not a list of finite numbers"),
        ([[1.0], ["x"]], "not a list of numbers: could not convert"),
        ([[1.0], [float("inf")]], "not a list of finite numbers"),
    ],
)
def test_a_wrong_column_names_the_row(tokenizers, column: str, values, part: str) -> None:
    (plain,) = row_to_group(LIST, tokenizers())
    part = part.format(best=len(plain.responses[0].input_ids))
    if part.startswith("1 numbers"):
        values = values[::-1]  # the best response stands second
    with pytest.raises(BadRow, match=rf"row 7, field '{column}.*{re.escape(part)}"):
        row_to_group({**LIST, column: values}, tokenizers(), needs={"token_rewards"}, index=7)


# Each misfit of a span: its place, its form, its weight.
@pytest.mark.parametrize(
    ("spans", "part"),
    [
        ([[0, 99, 1.0]], "reach beyond the text's 9 characters"),
        ([[4, 4, 1.0]], "start and stop are no characters"),
        ([[-1, 2, 1.0]], "start and stop are no characters"),
        ([[0, 2]], r"not \[start, stop, weight\]"),
        ([[0, 2, float("nan")]], "not a finite number"),
    ],
)
def test_a_wrong_span_names_the_row(tokenizers, spans, part: str) -> None:
    row = {"prompt": "p ", "chosen": "good text", "rejected": "bad", "chosen_spans": spans}
    with pytest.raises(BadRow, match=rf"rows, row 4, field 'chosen.spans.*{part}"):
        row_to_group(row, tokenizers(), index=4)


def group(*responses: list[int], row: int = 0, masked: int = 0) -> Group:
    made = []
    for ids in responses:
        mask = np.ones(len(ids), dtype=bool)
        mask[:masked] = False
        made.append(Response(np.array(ids, dtype=np.int32), mask))
    return Group(np.array([1], dtype=np.int32), made, row=row)


def weights(g: Group, schemes: dict[str, float], seed: int = 0) -> list[list[float]]:
    made = weighted(g.responses, schemes, seed, g.row)
    return [r.token_weights.tolist() for r in made]


def test_ld_keeps_the_common_length() -> None:
    found = weights(group([5, 6, 7], [5, 6, 7, 8, 9]), {"ld": 0.5})
    assert found == [[1, 1, 1], [1, 1, 1, 0.5, 0.5]]
    # Two tokens of context, which are not counted.
    found = weights(group([5, 6, 7], [5, 6, 7, 8, 9], masked=2), {"ld": 0.0})
    assert found[1] == [1, 1, 1, 0, 0]


def test_decay_starts_at_gamma() -> None:
    found = weights(group([5, 6, 7]), {"decay": 0.5})
    assert found == [[0.5, 0.25, 0.125]]


def test_sampo_keeps_as_many_tokens_of_each_and_draws_by_row_and_seed() -> None:
    g = group(list(range(40)), list(range(9)))
    first = weights(g, {"sampo": True})
    assert [sum(w) for w in first] == [9, 9]
    assert first == weights(g, {"sampo": True})
    assert first != weights(g, {"sampo": True}, 1)
    assert first != weights(replace(g, row=1), {"sampo": True})
    kept = np.mean([weights(g, {"sampo": True}, s)[0] for s in range(500)], axis=0)
    # Uniform: each of 40 tokens in 9 of 40 draws; 5 deviations of a share of 500 draws.
    assert np.abs(kept - 9 / 40).max() < 5 * (9 / 40 * 31 / 40 / 500) ** 0.5


def test_diff_weighs_what_the_other_lacks() -> None:
    same = [3, 4, 5]
    found = weights(group([*same, 8, *same], [*same, 9, 9, *same]), {"diff": 5.0})
    assert found == [[1, 1, 1, 5, 1, 1, 1], [1, 1, 1, 5, 5, 1, 1, 1]]
    # Two common tokens between changes are too short a match to count.
    found = weights(group([*same, 8, 6, 7, 8], [*same, 9, 6, 7, 9]), {"diff": 5.0})
    assert found[0] == [1, 1, 1, 5, 5, 5, 5]
    with pytest.raises(BadField, match="compares two responses, not 1"):
        weights(group(same), {"diff": 5.0})


def test_schemes_multiply_and_spans_are_kept(tokenizers) -> None:
    row = {"prompt": "p ", "chosen": "abcdef", "rejected": "b", "chosen_spans": [[0, 6, 2.0]]}
    options = DataOptions(token_weights={"decay": 0.5, "ld": 0.0})
    dataset = build_groups([row], tokenizers(), options)
    chosen, rejected = dataset[0].responses
    shorter = min(len(chosen.input_ids), len(rejected.input_ids))
    expected = [2 * 0.5 ** (t + 1) for t in range(len(chosen.input_ids))]
    expected[-1] /= 2  # EOS stands for no character of the span
    expected[shorter:] = [0.0] * (len(expected) - shorter)
    assert chosen.token_weights.tolist() == expected


# Names first, then types, then domains.
@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"decays": 0.5}, "token_weights: unknown scheme 'decays': did you mean 'decay'"),
        ({1: 0.5}, "token_weights: unknown scheme 1: choose from"),
        ({"ld": "0.5"}, "ld takes a number, not '0.5'"),
        ({"ld": True}, "ld takes a number, not True"),
        ({"sampo": 3}, "sampo takes true or false, not 3"),
        ({"decay": -1.0}, "decay=-1.0 must be finite and not negative"),
    ],
)
def test_wrong_schemes_are_named(schemes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schemes(schemes)
    with pytest.raises(ValueError, match=message):
        DataOptions(token_weights=schemes)


def test_columns_reach_the_segments(tokenizers) -> None:
    rows = [
        {
            "prompt": f"p{i} ",
            "chosen": "good",
            "rejected": "bad",
            "score_chosen": 4.0 + i,
            "score_rejected": 1.0,
            "margin": i - 0.5,
            "group": name,
            "gold": "perfect",
            "ref_response": "so so",
        }
        for i, name in enumerate(["east", "west", "east"])
    ]
    dataset = build_groups(rows, tokenizers(), extras=("gold", "ref_response", "mismatched"))
    batch = collate(list(dataset), pad_token_id=0)
    segments = batch.tokens.segments
    assert segments.score.tolist() == [[4, 1], [5, 1], [6, 1]]
    assert segments.margin.tolist() == [-0.5, 0.5, 1.5]
    assert segments.population[0] == segments.population[2] != segments.population[1]
    assert sorted(segments.extras) == ["gold", "mismatched", "ref_response"]
    tokenizer = tokenizers()
    of_gold = batch.tokens.targets[segments.response == segments.extras["gold"][0]]
    assert tokenizer.decode(of_gold, skip_special_tokens=True).strip() == "perfect"
    plain = build_groups(rows, tokenizers())  # columns that nothing asks for cost nothing
    assert not plain[0].extras
    with pytest.raises(BadRow, match="row 1, field 'gold': missing"):
        build_groups([rows[0], {**rows[1], "gold": None}], tokenizers(), extras=("gold",))
    with pytest.raises(ValueError, match="row 1: no margin, which other rows have"):
        collate(
            list(build_groups([rows[0], {**rows[1], "margin": None}], tokenizers())), pad_token_id=0
        )
    assert segments.margin.dtype == torch.float32
