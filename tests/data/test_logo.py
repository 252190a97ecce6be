"""Long documents to LOGO's rows, with a generator that writes down what it was asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastpo.data.builder import row_to_group
from fastpo.data.logo import ASK, Dropped, LogoOptions, logo_rows, overlaps, split
from fastpo.data.messages import message_text
from fastpo.data.options import DataOptions
from fastpo.data.positions import PositionSynthesis

OPTIONS = LogoOptions(context_chunks=6, critical_chunks=4, min_overlap=2)
CHUNKS = [f"Filler number {i} says nothing." for i in range(8)]
for place, fact in ((1, "owl"), (3, "fox"), (4, "bee"), (6, "elk")):
    CHUNKS[place] += f" The rare {fact} lives in the forest of Arden."
DOCUMENT = {"text": "\f".join(CHUNKS), "question": "Which rare animals live in Arden forest?"}


class Generator:
    """Answers with how many of the facts its prompt has, and remembers the calls."""

    def __init__(self, question: str = "Question: Which rare owl?\nAnswer: Arden forest.") -> None:
        self.question = question
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, prompts: Any, seed: int) -> list[str]:
        texts = [p if isinstance(p, str) else message_text(p[-1]) for p in prompts]
        self.calls.append((texts, seed))
        return [
            self.question if ASK in text else f"{text.count('Arden.')} animals." for text in texts
        ]


def rows(*documents: dict, **more: Any) -> tuple[list[dict], list[Dropped], Generator]:
    generator = more.pop("generator", None) or Generator()
    options = more.pop("options", OPTIONS)
    made, dropped = logo_rows(documents, lambda t: t.split("\f"), generator, options, **more)
    return made, dropped, generator


def test_answers_to_all_half_and_none_of_the_critical_chunks() -> None:
    (row,), dropped, generator = rows(DOCUMENT)
    assert not dropped
    said = [message_text(r[0]) for r in row["responses"]]
    assert said == ["4 animals.", "2 animals.", "0 animals."]
    assert row["ranks"] == [0, 1, 1]
    (prompts, _) = generator.calls[-1]
    critical = [CHUNKS[i] for i in (1, 3, 4, 6)]
    for prompt, shown in zip(prompts, (critical, critical[:2], []), strict=True):
        assert prompt.count("Filler") == 4  # others take the missing ones' places
        assert [c for c in critical if c in prompt] == shown
        assert prompt.endswith(DOCUMENT["question"])


def test_the_prompt_has_all_critical_chunks_among_others() -> None:
    (row,), _, _ = rows(DOCUMENT)
    text = message_text(row["prompt"][0])
    held = [text[start:stop] for start, stop in row["chunk_spans"]]
    assert len(held) == 6
    assert held == [c for c in CHUNKS if c in held]  # in the document's order
    assert sum("Arden." in c for c in held) == 4


def test_rows_train(tokenizers: Any) -> None:
    (row,), _, _ = rows(DOCUMENT)
    options = DataOptions(position_synthesis=PositionSynthesis(2048))
    (group,) = row_to_group(row, tokenizers("chatml"), options)
    assert [r.label for r in group.responses] == [True, False, False]
    assert group.span == 2048
    (plain,), _, _ = rows(DOCUMENT, chat=False)
    assert plain["prompt"].startswith("Filler")
    (group,) = row_to_group(plain, tokenizers(), options)
    assert group.span == 2048


def test_a_question_is_written_about_a_drawn_chunk() -> None:
    made, _, generator = rows({"text": DOCUMENT["text"]}, {"text": DOCUMENT["text"]})
    asked, _ = generator.calls[0]
    assert len(asked) == 2
    assert all(any(a == f"{c}\n\n{ASK}" for c in CHUNKS) for a in asked)
    assert {row["question"] for row in made} == {"Which rare owl?"}


def test_the_users_answer_is_the_chosen_one() -> None:
    (row,), _, _ = rows({**DOCUMENT, "answer": "Owl, fox, bee and elk."})
    assert message_text(row["responses"][0][0]) == "Owl, fox, bee and elk."


def test_draws_depend_on_seed_and_number_alone() -> None:
    documents = [{"text": DOCUMENT["text"]}] * 3
    first, _, calls = rows(*documents)
    again, _, same = rows(*documents)
    assert first == again
    assert calls.calls == same.calls
    other, _, generator = rows(*documents, first=16)
    assert generator.calls[0][1] != calls.calls[0][1]
    assert other != first


# Each way in which a document is dropped, in the order of the steps.
@pytest.mark.parametrize(
    ("document", "question", "reason"),
    [
        ({"text": DOCUMENT["text"]}, "I cannot.", "no question and answer in the form"),
        ({**DOCUMENT, "question": "Who?"}, "", "fewer than 2 chunks share 2 words"),
        ({"text": "a b\fc d\fe", "question": "a b c d"}, "", "fewer other chunks than critical"),
        ({**DOCUMENT, "answer": "2 animals."}, "", "the same answer without all critical"),
    ],
)
def test_what_gives_no_row(document: dict, question: str, reason: str) -> None:
    made, (dropped,), _ = rows(document, generator=Generator(question), first=7)
    assert not made
    assert dropped.document == 7
    assert reason in dropped.reason


def test_words_of_most_chunks_do_not_count() -> None:
    chunks = ["the old owl", "the red fox", "the owl and the fox", "the end"]
    assert overlaps("The owl? The fox!", chunks).tolist() == [1, 1, 2, 0]


def test_chunks_keep_the_text_and_the_size() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abc"], rng.integers(1, 9))) for _ in range(400)]
    text = "".join(
        w + ("\n\n" if i % 40 == 39 else ". " if i % 9 == 8 else " ") for i, w in enumerate(words)
    )
    offsets = np.array([[i, i + 1] for i in range(len(text))])
    chunks = split(text, offsets, 100)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert max(map(len, chunks)) <= 100
    assert min(map(len, chunks[:-1])) >= 48
    paragraph = "one two.\n\nno. xyzw"  # its end wins over that of a later sentence
    each = np.array([[i, i + 1] for i in range(len(paragraph))])
    assert split(paragraph, each, 16) == ["one two.", "no. xyzw"]
    # A character of several tokens, and a word longer than a chunk.
    assert split("\u00e9x", np.array([[0, 1], [0, 1], [1, 2]]), 1)[-1] == "x"
    assert split("a" * 25, np.array([[i, i + 1] for i in range(25)]), 10) == [
        "a" * 10,
        "a" * 10,
        "a" * 5,
    ]


# Each bound of the options, at its edge.
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
        ({"critical_chunks": 1}, "critical_chunks=1 must be at least 2"),
        ({"context_chunks": 6}, "context_chunks=6 must be more than critical_chunks=6"),
    ],
)
def test_bad_options(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogoOptions(**values)
