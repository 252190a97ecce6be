"""LongPO's released rows: token ids, several turns after one document, a short row for each."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.data.packing import collate, counts_of, group_key
from fastpo.data.rows import load_rows

DOCUMENT, HEADER = [1, *range(20, 32)], [7, 8]
QUESTIONS = [[40, 41], [42, 43, 44], [45]]
SHORT = [[1, 20, 21], [1, 24, 25, 26, 27], [1, 30]]
CHOSEN = [[50, 51, 2], [52, 2], [53, 54, 55, 2]]
REJECTED = [[60, 2], [61, 62, 63, 2], [64, 2]]


def marked(parts: list[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
    """Token ids, and labels of the parts that are answers."""
    ids = [token for part, _ in parts for token in part]
    labels = [token if answer else -100 for part, answer in parts for token in part]
    return ids, labels


def longpo(turns: int = 3) -> dict[str, Any]:
    """A row as the authors' script writes it: short rows are padded, and end with a header."""
    row: dict[str, Any] = {}
    for side, answers in (("chosen", CHOSEN), ("rejected", REJECTED)):
        parts = [(DOCUMENT, False)]
        short = []
        for question, page, answer in list(zip(QUESTIONS, SHORT, answers, strict=True))[:turns]:
            parts += [(question, False), (answer, True)]
            short.append(marked([(page + question, False), (answer + HEADER, True)]))
        ids, labels = marked(parts)
        width = max(len(ids) for ids, _ in short)
        row |= {
            f"{side}_input_ids": ids,
            f"{side}_attention_mask": [1] * len(ids),
            f"{side}_labels": labels,
            f"ref_{side}_input_ids": [ids + [0] * (width - len(ids)) for ids, _ in short],
            f"ref_{side}_attention_mask": [
                [1] * len(ids) + [0] * (width - len(ids)) for ids, _ in short
            ],
            f"ref_{side}_labels": [ids + [-100] * (width - len(ids)) for _, ids in short],
        }
    return row


def build(rows: Any, tokenizer: Any, **options: Any) -> Any:
    options = {"reference_prompt": "short_prompt", **options}
    return build_groups(rows, tokenizer, DataOptions(**options))


def test_turns(tokenizers: Any) -> None:
    (group,) = build([longpo()], tokenizers(adds="<s> $A"))
    chosen, rejected = group.responses
    assert group.prompt_ids.tolist() == DOCUMENT + QUESTIONS[0]
    for response, answers in ((chosen, CHOSEN), (rejected, REJECTED)):
        a, b, c = answers
        assert response.input_ids.tolist() == a + QUESTIONS[1] + b + QUESTIONS[2] + c
        assert response.input_ids[response.loss_mask].tolist() == a + b + c
    assert [r.label for r in group.responses] == [True, False]
    # What the reference reads: its target tokens are those of the group, one by one.
    seen = [
        (context.prompt_ids.tolist(), response.input_ids.tolist())
        for context in group.for_reference.contexts
        for response in context.responses
    ]
    prompts = [page + question for page, question in zip(SHORT, QUESTIONS, strict=True)]
    assert seen == list(zip(prompts * 2, CHOSEN + REJECTED, strict=True))
    seen = group.for_reference.responses
    assert all(a.prompt_ids is b.prompt_ids for a, b in zip(seen[:3], seen[3:], strict=True))
    assert group.responses[1].input_ids.base is None  # holds no second document
    for share in (True, False):
        ours, its = (
            collate([g], pad_token_id=0, share_prompt=share) for g in (group, group.for_reference)
        )
        assert ours.tokens.targets.tolist() == its.tokens.targets.tolist()
    assert counts_of([group]).target_tokens == 17
    assert len(group) == 15 + len(chosen.input_ids) + len(rejected.input_ids)


def test_one_turn_is_a_pair_of_text(tokenizers: Any) -> None:
    tokenizer = tokenizers(adds="<s> $A")
    page, document = "It is blue. The sky is", "The sea is blue as well. The sky is"
    text = {"prompt": document, "short_prompt": page, "chosen": " blue", "rejected": " green"}
    row: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        for prefix, prompt in (("", document), ("ref_", page)):
            before, answer = tokenizer(prompt)["input_ids"], tokenizer(text[side])["input_ids"][1:]
            ids, labels = marked([(before, False), ([*answer, tokenizer.eos_token_id], True)])
            listed = (lambda x: [x]) if prefix else (lambda x: x)
            row[f"{prefix}{side}_input_ids"] = listed(ids)
            row[f"{prefix}{side}_labels"] = listed(labels)
    for options in ({}, {"max_length": 9}, {"max_prompt_length": 4, "truncation": "cut_middle"}):
        (mine,), (theirs,) = build([row], tokenizer, **options), build([text], tokenizer, **options)
        assert group_key(mine) == group_key(theirs)
        assert mine.prompt_ids.tolist() == theirs.prompt_ids.tolist()
        for a, b in zip(mine.responses, theirs.responses, strict=True):
            assert (a.input_ids.tolist(), a.label, a.rank) == (
                b.input_ids.tolist(),
                b.label,
                b.rank,
            )
    assert len(mine.prompt_ids) == 4  # the last options cut


def test_other_columns_and_forms(tokenizers: Any, tmp_path: Any) -> None:
    """A batch of one as the authors' script has it, no masks, files, optional columns."""
    tokenizer, row = tokenizers(adds="<s> $A"), longpo(1)
    (expected,) = build([row], tokenizer)
    nested = {k: v if k.startswith("ref_") else [v] for k, v in row.items() if "mask" not in k}
    more = {"weight": 0.5, "score_chosen": 2, "score_rejected": 1}
    more["token_weights"] = [[1, 0, 1], [1, 2]]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**nested, **more}) + "\n")
    (group,) = build(load_rows(path, origin=True), tokenizer)
    assert group_key(group) == group_key(expected)
    assert (group.weight, [r.score for r in group.responses]) == (0.5, [2, 1])
    assert group.responses[0].token_weights.tolist() == [1, 0, 1]
    # The reference reads the document where no short prompt is asked for.
    del nested["ref_chosen_labels"]
    (plain,) = build([nested], tokenizer, reference_prompt="prompt")
    assert plain.for_reference is plain
    # Text wins over the ids that another trainer made of it.
    text = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    (group,) = build([{**text, **row}], tokenizer, reference_prompt="prompt")
    assert tokenizer.decode(group.prompt_ids) == "<s>The sky is"


def changed(**columns: Any) -> dict[str, Any]:
    row = longpo()
    for name, change in columns.items():
        row[name] = change(row[name]) if callable(change) else change
    return row


def masked(labels: list) -> list:
    return [-100 if label == 51 else label for label in labels]


BAD = {
    "missing": (changed(rejected_labels=None), "rejected_labels", "missing"),
    "no ids": (changed(rejected_input_ids=None), "rejected_input_ids", "missing"),
    "no short rows": (changed(ref_chosen_input_ids=None), "ref_chosen_input_ids", "missing"),
    "text": (changed(chosen_input_ids="ids"), "chosen_input_ids", "neither a list or dict"),
    "numbers": (changed(chosen_labels=[0.5]), "chosen_labels", "no list of integers"),
    "hole": (
        changed(ref_chosen_labels=lambda x: [x[0], None, x[2]]),
        "ref_chosen_labels[1]",
        "no list of integers",
    ),
    "lengths": (
        changed(chosen_labels=lambda x: x[:-1]),
        "chosen_input_ids",
        "28 tokens, 27 labels and a mask of 28",
    ),
    "two sequences": (
        changed(
            **dict.fromkeys(
                [f"chosen_{k}" for k in ("input_ids", "labels", "attention_mask")], lambda x: [x, x]
            )
        ),
        "chosen_input_ids",
        "2 sequences where a row has one",
    ),
    "labels": (
        changed(rejected_labels=lambda x: [*x[:-1], 3]),
        "rejected_labels",
        "label 26 is neither the token in its place nor -100; got 3",
    ),
    "unscored": (
        changed(chosen_labels=lambda x: [-100] * len(x)),
        "chosen_labels",
        "no token is scored",
    ),
    "no prompt": (
        changed(chosen_labels=changed()["chosen_input_ids"]),
        "chosen_labels",
        "no token before the first answer",
    ),
    "documents": (
        changed(rejected_input_ids=lambda x: [1, 9, *x[2:]]),
        "rejected_input_ids",
        "not those of chosen_input_ids before the first answer",
    ),
    "turns": (
        changed(chosen_labels=masked),
        "ref_chosen_input_ids",
        "3 short rows for the 4 answers in chosen_labels",
    ),
    "answers": (
        changed(
            **{
                f"ref_rejected_{k}": lambda x: x[::-1]
                for k in ("input_ids", "labels", "attention_mask")
            }
        ),
        "ref_rejected_input_ids[0]",
        "its labels do not begin with answer 0 of rejected_input_ids",
    ),
    "identical": (
        {
            **longpo(),
            **{
                k.replace("chosen", "rejected"): v
                for k, v in longpo().items()
                if "rejected" not in k
            },
        },
        "rejected_input_ids",
        "identical to chosen_input_ids",
    ),
    "other tokenizer": (
        changed(chosen_input_ids=lambda x: [32000 if t == 43 else t for t in x]),
        "chosen_input_ids",
        "token 32000 is none of the tokenizer's 375",
    ),
}


# One row for each refusal of tokenised columns.
@pytest.mark.parametrize("name", BAD)
def test_bad_rows(tokenizers: Any, name: str) -> None:
    row, field, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        build([longpo(), row], tokenizers())
    assert str(caught.value).startswith(f"rows, row 1, field {field!r}: ")
    assert reason in str(caught.value)


# Each limit where token ids cannot be cut.
@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"max_length": 20, "truncation": "error"}, "chosen_input_ids", "15 tokens, but 7 fit"),
        ({"max_length": 12}, "chosen_input_ids", "13 tokens leave no room"),
        ({"max_prompt_length": 5, "truncation": "error"}, "chosen_input_ids", "but 5 fit"),
    ],
)
def test_bad_lengths(tokenizers: Any, options: dict, field: str, reason: str) -> None:
    with pytest.raises(BadRow, match=f"field '{field}': .*{reason}"):
        build([longpo()], tokenizers(), **options)


def test_further_prompts_are_text(tokenizers: Any) -> None:
    with pytest.raises(BadRow, match="field 'chosen_spans': not for rows of token ids"):
        build([{**longpo(), "chosen_spans": [[0, 1, 0.5]]}], tokenizers())
    with pytest.raises(BadRow, match="field 'gold': not for rows of token ids"):
        build_groups([longpo()], tokenizers(), extras=("gold",))
    with pytest.raises(BadRow, match="field 'context_prompt': not for rows of token ids"):
        build_groups([longpo()], tokenizers(), extras=("context_chosen",))


def test_a_mismatched_answer_keeps_its_prompt(tokenizers: Any) -> None:
    """KTO's, behind turns that have prompts of their own."""
    rows = [
        longpo(),
        changed(
            **{n: lambda x: [1, 9, *x[2:]] for n in ("chosen_input_ids", "rejected_input_ids")}
        ),
    ]
    options = DataOptions(reference_prompt="short_prompt")
    group = build_groups(rows, tokenizers(), options, extras=("mismatched",))[0]
    last = group.for_reference.contexts[-1]
    assert last.prompt_ids.tolist() == SHORT[0] + QUESTIONS[0]
    assert np.array_equal(last.responses[-1].input_ids, group.extras["mismatched"].input_ids)
