"""Every row format means what docs/data.md says, and every bad row is named exactly."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.builder import row_to_group
from fastpo.data.dataset import build_groups
from fastpo.data.formats import read_row
from fastpo.data.options import DataOptions
from fastpo.data.rows import load_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
CHAT = {
    "prompt": [user("hi")],
    "chosen": [assistant("blue")],
    "rejected": [assistant("green")],
}


def texts(tokenizer, group):
    return [tokenizer.decode(response.input_ids) for response in group.responses]


def one(row, tokenizer, **options):
    (group,) = row_to_group(row, tokenizer, DataOptions(**options))
    return group


FORMATS = {
    "pair": (PAIR, "The sky is", [" blue.</s>", " green.</s>"]),
    "implicit": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "The sky is",
        [" blue.</s>", " green.</s>"],
    ),
    "single": (
        {"prompt": "The sky is", "completion": " blue.", "label": False},
        "The sky is",
        [" blue.</s>"],
    ),
    "list": (
        {"prompt": "The sky is", "responses": [" a.", " b.", " c."]},
        "The sky is",
        [" a.</s>", " b.</s>", " c.</s>"],
    ),
    "implicit list": (
        {"responses": ["sky a", "sky b"], "ranks": [2, 1]},
        "sky",  # " b" is one token
        [" b</s>", " a</s>"],
    ),
    "chat": (
        CHAT,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ["blue<|im_end|>", "green<|im_end|>"],
    ),
    "implicit chat": (
        {"chosen": [user("hi"), assistant("blue")], "rejected": [user("hi"), assistant("green")]},
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ["blue<|im_end|>", "green<|im_end|>"],
    ),
    "single chat": (
        {"prompt": [user("hi")], "completion": [assistant("blue")], "label": True},
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ["blue<|im_end|>"],
    ),
    "list chat": (
        {
            "prompt": [user("hi")],
            "responses": [[assistant("a")], [assistant("b")]],
            "scores": [0, 1],
        },
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ["b<|im_end|>", "a<|im_end|>"],
    ),
}


# Every format of fastpo's own columns, with what it must become.
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tokenizers, name):
    row, prompt, responses = FORMATS[name]
    tokenizer = tokenizers("chatml")
    group = one(row, tokenizer)
    assert tokenizer.decode(group.prompt_ids) == prompt
    assert texts(tokenizer, group) == responses
    for response in group.responses:
        assert response.input_ids.dtype == np.int32
        assert response.loss_mask.all()
        assert response.loss_mask.dtype == bool


def test_the_examples_of_the_documentation(tokenizers):
    blocks = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("```json\n")[1:]
    rows = [json.loads(line) for b in blocks for line in b.split("```")[0].splitlines()]
    groups = build_groups(rows, tokenizers("chatml"))
    assert [len(group.responses) for group in groups] == [2, 2, 2, 2, 1, 3, 3, 3, 3, 2, 2]
    short = DataOptions(reference_prompt="short_prompt")
    text, tokens = build_groups(rows[-2:], tokenizers("chatml"), short)
    assert tokenizers("chatml").decode(text.for_reference.prompt_ids).startswith("Its page on the")
    turns = [c.prompt_ids.tolist() for c in tokens.for_reference.contexts]
    assert turns == [[1, 20, 40], [1, 22, 41]] * 2
    for group, row in zip(groups.groups[:-1], rows[:-1], strict=True):
        best = tokenizers("chatml").decode(group.responses[0].input_ids)
        assert best in (" blue.</s>", " blue.<|im_end|>", "Blue.<|im_end|>"), row


def test_labels_and_weight(tokenizers):
    tokenizer = tokenizers("chatml")
    pair = one({**PAIR, "weight": 0.5, "unknown": object()}, tokenizer)
    assert [r.label for r in pair.responses] == [True, False]
    assert [r.rank for r in pair.responses] == [0, 1]
    assert pair.weight == 0.5
    assert one({**PAIR, "weight": None}, tokenizer).weight == 1.0
    for label in (True, False, np.True_, np.False_):
        row = {"prompt": "a", "completion": "b", "label": label}
        (response,) = one(row, tokenizer).responses
        assert response.label is bool(label)


# No grades, scores, ranks and both, with and without ties: the order is best first and stable.
@pytest.mark.parametrize(
    ("grades", "order", "ranks", "scores"),
    [
        ({}, "abcd", [0, 1, 2, 3], [None] * 4),
        ({"scores": [1, 3, 2, 0]}, "bcad", [0, 1, 2, 3], [3, 2, 1, 0]),
        ({"scores": [1.0, 3.0, 1.0, 3.0]}, "bdac", [0, 0, 1, 1], [3, 3, 1, 1]),
        ({"ranks": [7, 1, 3, 3]}, "bcda", [0, 1, 1, 2], [None] * 4),
        ({"scores": [-0.5, -0.5, -0.5, -0.5]}, "abcd", [0, 0, 0, 0], [-0.5] * 4),
    ],
)
def test_list_order_and_ties(grades, order, ranks, scores):
    example = read_row({"prompt": "p", "responses": list("abcd"), **grades})
    assert "".join(example.responses) == order
    assert example.ranks == ranks
    assert example.scores == scores
    assert example.labels == [rank == 0 for rank in ranks]
    assert example.names == [f"responses[{'abcd'.index(letter)}]" for letter in order]


def test_equal_responses_of_equal_rank_are_fine(tokenizers):
    row = {"prompt": "p", "responses": [" a", " b", " a"], "scores": [2, 1, 2]}
    tokenizer = tokenizers()
    assert texts(tokenizer, one(row, tokenizer)) == [" a</s>", " a</s>", " b</s>"]


def test_none_columns_and_keys_of_columnar_storage(tokenizers):
    """Arrow fills absent columns and message keys with None; they count as absent."""
    rows = [
        {"prompt": [user("hi")], "completion": [assistant("x", name="m")], "label": True},
        {"prompt": [user("hi")], "chosen": [assistant("x")], "rejected": [assistant("y")]},
    ]
    stored = load_rows(rows)
    assert stored[1]["label"] is None
    tokenizer = tokenizers("chatml")
    for row, back in zip(rows, stored, strict=True):
        assert texts(tokenizer, one(row, tokenizer)) == texts(tokenizer, one(back, tokenizer))


def test_template_kwargs_and_tools(tokenizers):
    tokenizer = tokenizers()
    tokenizer.chat_template = (
        "{{ style }}{% if tools %}{{ tools[0]['name'] }}{% endif %}:"
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    options = {"chat_template_kwargs": {"style": "A"}}
    assert tokenizer.decode(one(CHAT, tokenizer, **options).prompt_ids) == "A:hi<|im_end|>"
    row = {**CHAT, "chat_template_kwargs": {"style": "B"}, "tools": '[{"name": "f"}]'}
    assert tokenizer.decode(one(row, tokenizer, **options).prompt_ids) == "Bf:hi<|im_end|>"


IMAGE = [{"type": "image", "url": "x"}]
BAD = {
    "not a dict": ("text", "row", "not a dict"),
    "no format": ({"prompt": "a", "answer": "b"}, "columns", "no known format"),
    "two formats": (
        {**PAIR, "responses": ["a", "b"]},
        "chosen, rejected, responses",
        "more than one",
    ),
    "missing rejected": ({**PAIR, "rejected": None}, "rejected", "missing"),
    "missing chosen": ({"prompt": "a", "rejected": "b"}, "chosen", "missing"),
    "number": ({**PAIR, "chosen": 3}, "chosen", "neither text nor"),
    "number as prompt": ({**PAIR, "prompt": 3.5}, "prompt", "neither text nor"),
    "nan": ({**PAIR, "rejected": float("nan")}, "rejected", "neither text nor"),
    "empty": ({**PAIR, "chosen": ""}, "chosen", "empty response"),
    "blank": ({**PAIR, "rejected": " \n"}, "rejected", "empty response"),
    "only eos": ({**PAIR, "rejected": "</s></s>"}, "rejected", "empty response"),
    "identical": ({**PAIR, "rejected": " blue."}, "rejected", "identical to chosen"),
    "identical tokens": ({**PAIR, "rejected": " blue.</s>"}, "rejected", "identical to chosen"),
    "implicit identical": ({"chosen": "ab", "rejected": "ab"}, "rejected", "identical to chosen"),
    "implicit prefix": (
        {"chosen": "hi you", "rejected": "hi"},
        "rejected",
        "empty response: no text",
    ),
    "implicit, nothing shared": ({"chosen": "ab", "rejected": "cd"}, "prompt", "nothing in common"),
    "prompt without tokens": ({**PAIR, "prompt": ""}, "prompt", "no tokens"),
    "negative weight": ({**PAIR, "weight": -1}, "weight", "negative"),
    "nan weight": ({**PAIR, "weight": float("nan")}, "weight", "not a finite number"),
    "text weight": ({**PAIR, "weight": "5 kg"}, "weight", "number, and every objective weighs"),
    "single without prompt": ({"completion": "a", "label": True}, "prompt", "missing"),
    "single without label": ({"prompt": "a", "completion": "b"}, "label", "missing"),
    "label as number": ({"prompt": "a", "completion": "b", "label": 2}, "label", "neither true"),
    "label as text": (
        {"prompt": "a", "completion": "b", "label": "so so"},
        "label",
        "neither true",
    ),
    "one response": ({"prompt": "a", "responses": ["b"]}, "responses", "at least two"),
    "no responses": ({"prompt": "a", "responses": []}, "responses", "at least two"),
    "responses as text": ({"prompt": "a", "responses": "bc"}, "responses", "neither a list"),
    "responses as JSON of text": ({"prompt": "a", "responses": '"bc"'}, "responses", "not a list"),
    "messages as Python writes them": (
        {**PAIR, "chosen": str(CHAT["chosen"])},
        "chosen",
        "nor JSON of one: Expecting property name",
    ),
    "spans as number": ({**PAIR, "chosen_spans": 3}, "chosen_spans", "not a list of [start"),
    "response as number": ({"prompt": "a", "responses": ["b", 4]}, "responses[1]", "neither text"),
    "empty in list": ({"prompt": "a", "responses": ["b", ""]}, "responses[1]", "empty response"),
    "too few scores": (
        {"prompt": "a", "responses": ["b", "c"], "scores": [1]},
        "scores",
        "1 scores for 2",
    ),
    "too many ranks": (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2, 3]},
        "ranks",
        "3 ranks for 2",
    ),
    "nan score": (
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]},
        "scores[1]",
        "not a finite number",
    ),
    "null score": (
        {"prompt": "a", "responses": ["b", "c"], "scores": [None, 1]},
        "scores[0]",
        "not a finite",
    ),
    "bool score": (
        {"prompt": "a", "responses": ["b", "c"], "scores": [True, 1]},
        "scores[0]",
        "not a finite",
    ),
    "scores and ranks": (
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2], "ranks": [1, 2]},
        "ranks",
        "either",
    ),
    "same text, other rank": (
        {"prompt": "a", "responses": ["b", "c", "b"], "scores": [3, 2, 1]},
        "responses[2]",
        "identical to responses[0]",
    ),
    "text that nobody says": (
        {
            "prompt": "hello",
            "chosen": [user("hi"), assistant("a")],
            "rejected": [user("hi"), assistant("b")],
        },
        "prompt",
        "no user message",
    ),
    "empty conversation": ({**CHAT, "chosen": []}, "chosen", "empty response"),
    "empty message": ({**CHAT, "chosen": [assistant(" ")]}, "chosen", "empty response"),
    "empty last message": (
        {**CHAT, "chosen": [assistant("a"), user("b"), assistant("")]},
        "chosen",
        "empty response",
    ),
    "no role": ({**CHAT, "chosen": [{"content": "a"}]}, "chosen", "no role"),
    "content as number": ({**CHAT, "chosen": [assistant(3)]}, "chosen", "content is not text"),
    "no content": ({**CHAT, "prompt": [{"role": "user"}]}, "prompt", "content is not text"),
    "image": ({**CHAT, "prompt": [user(IMAGE)]}, "prompt", "only text is supported"),
    "user speaks last": (
        {**CHAT, "chosen": [assistant("a"), user("b")]},
        "chosen",
        "ends with a message of role 'user'",
    ),
    "two assistants": (
        {**CHAT, "prompt": [user("a"), assistant("b")]},
        "chosen",
        "two assistant messages in a row",
    ),
    "another conversation": (
        {**CHAT, "chosen": [user("hello"), assistant("a")]},
        "chosen",
        "begins with the user's message",
    ),
    "implicit chat, nothing shared": (
        {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("a")]},
        "prompt",
        "nothing in common",
    ),
    "implicit chat prefix": (
        {
            "chosen": [user("x"), assistant("a")],
            "rejected": [user("x"), assistant("a"), user("y"), assistant("b")],
        },
        "chosen",
        "empty response: no messages",
    ),
    "tools": ({**CHAT, "tools": "[{"}, "tools", "nor JSON of one"),
    "template kwargs": (
        {**CHAT, "chat_template_kwargs": "x"},
        "chat_template_kwargs",
        "neither a list or dict",
    ),
}


# One row for each refusal of a format.
@pytest.mark.parametrize("name", BAD)
def test_bad_rows(tokenizers, name):
    row, field, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        build_groups([PAIR, row], tokenizers("chatml"), source="pairs.jsonl")
    message = str(caught.value)
    assert message.startswith(f"pairs.jsonl, row 1, field {field!r}: ")
    assert reason in message
    assert (caught.value.source, caught.value.row, caught.value.field) == ("pairs.jsonl", 1, field)
    # Workers hand errors over pickled.
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


FOREIGN = {
    "margin": ("margin", ["large", [1], float("nan"), 10**400]),
    "group": ("population", [3.5, [1], True, 1e300, {"a": 1}]),
    "scores": ("score", [[1, 2, 3, 4], [1, "good"], "[1]", 3, {"a": 1}]),
    "score_rejected": ("score", ["bad"]),
    "token_rewards": ("token_rewards", ["x", [1, 2], [[1], [2]]]),
}


# Columns that mean something in one format and nothing in another.
@pytest.mark.parametrize("name", FOREIGN)
def test_a_column_is_judged_where_it_is_read(tokenizers, name):
    need, values = FOREIGN[name]
    for value in values:
        row = {**PAIR, name: value}
        for needs in (None, (), {"logps"}):
            (group,) = row_to_group(row, tokenizers(), needs=needs)
            assert (group.margin, group.population) == (None, None)
            assert {(r.score, r.token_rewards) for r in group.responses} == {(None, None)}
        with pytest.raises(BadRow, match=f"field '{name}"):
            row_to_group(row, tokenizers(), needs={need})


def test_what_nothing_reads_is_left_out(tokenizers):
    """So that a batch may mix rows with and without it."""
    row = {**PAIR, "margin": 1, "group": "a", "scores": [2, 1], "chunk_spans": 3, "lifespans": 4}
    (group,) = row_to_group(row, tokenizers(), needs=())
    assert (group.margin, group.population, group.responses[0].score) == (None, None, None)
    (group,) = row_to_group(row, tokenizers())
    assert (group.margin, group.responses[0].score) == (1.0, 2.0)


# CSV has no null: an empty cell of any optional column is one.
@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize(
    "name", ["tools", "chosen_spans", "scores", "weight", "margin", "group", "token_weights"]
)
def test_blank_is_absent(tokenizers, name, blank):
    needs = {"score", "margin", "population"}
    (plain,), (group,) = (
        row_to_group(row, tokenizers("chatml"), needs=needs)
        for row in (CHAT, {**CHAT, name: blank})
    )
    assert str(group) == str(plain)


def test_a_whole_number_may_be_a_float(tokenizers):
    populations = [
        row_to_group({**PAIR, "group": value}, tokenizers(), needs={"population"})[0].population
        for value in (3, 3.0, np.float32(3), np.int64(3))
    ]
    assert populations == [3] * 4


def test_tools_are_read_by_chat_templates_alone(tokenizers):
    for name in ("tools", "chat_template_kwargs"):
        assert row_to_group({**PAIR, name: "hammer"}, tokenizers())
        with pytest.raises(BadRow, match=f"field '{name}': neither a list or dict nor JSON"):
            row_to_group({**CHAT, name: "hammer"}, tokenizers("chatml"))


def test_token_ids_fit(tokenizers):
    for wrong in (-1, 2**31, 2**40):
        side = {"input_ids": [1, wrong, 2], "labels": [-100, wrong, 2]}
        row = {f"{name}_{key}": ids for name in ("chosen", "rejected") for key, ids in side.items()}
        with pytest.raises(BadRow, match=r"chosen_input_ids.*not all are token ids"):
            row_to_group(row, tokenizers())


def test_bad_value_is_shown_and_cut():
    error = BadRow("f", 0, "label", "not a bool", "x" * 1000)
    assert str(error).endswith("...")
    assert len(str(error)) < 260
    assert "got 'yes'" in str(BadRow("f", 0, "label", "not a bool", "yes"))
