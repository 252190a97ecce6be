"""Make LOGO's rows of long documents: chunks, a question, which of them matter, and three answers.

After arXiv 2410.18533. Chosen is the model's answer to all critical chunks, the first rejected one
(`prefix`, half right as a rule) to the first half of them, the second (`suffix`) to none; chunks
from elsewhere in the document take the missing ones' places. The row's prompt has all critical
chunks among others. Chunks are scored by the words that they share with question and answer; the
authors count verbs, nouns and entities as spaCy tags them, here words count that at most half of
the document's chunks have, in any language.

Nothing here knows a model: a generator answers prompts, `(prompts, seed) -> texts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypedDict

import numpy as np

from fastpo.data.logo_columns import joined_chunks
from fastpo.data.messages import Content, assistant, user

Generate: TypeAlias = Callable[[Sequence[Content], int], list[str]]

Document: TypeAlias = Mapping[str, Any]
"""A row with `text`, and perhaps a `question` with its `answer`."""


class LogoRow(TypedDict):
    """Hold a row as it is written, its three responses best first."""

    prompt: Content
    responses: list[Content]
    ranks: list[int]
    chunk_spans: list[tuple[int, int]]
    document: int
    question: str


ASK = (
    "Write one question about this passage that can be answered from it alone, and its answer, in "
    "the form\nQuestion: ...\nAnswer: ..."
)
_ASKED = re.compile(r"Question:\s*(.+?)\s*Answer:\s*(.+)", re.DOTALL)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class LogoOptions:
    """Say what rows are made of.

    Args:
        chunk_tokens: most tokens of a chunk.
        context_chunks: chunks of a prompt; times `chunk_tokens` its real length.
        critical_chunks: at most so many of them are critical.
        min_overlap: words that a critical chunk shares with question and answer.
        seed: of drawn chunks and, with the block's number, of the generator.

    Raises:
        ValueError: a value out of range.
    """

    chunk_tokens: int = 512
    context_chunks: int = 16
    critical_chunks: int = 6
    min_overlap: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chunk_tokens", 1), ("critical_chunks", 2), ("min_overlap", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.context_chunks <= self.critical_chunks:
            raise ValueError(
                f"context_chunks={self.context_chunks} must be more than critical_chunks="
                f"{self.critical_chunks}: a prompt holds others too"
            )


class Dropped(NamedTuple):
    """Hold a document without a row, and why."""

    document: int
    reason: str


class _Drop(Exception):
    """Say why a document gives no row."""


def split(text: str, offsets: np.ndarray, size: int) -> list[str]:
    """Cut a text into chunks that end with a paragraph, else a sentence, else a word.

    Args:
        text: the document.
        offsets: [T, 2] characters of its tokens.
        size: most tokens of a chunk.

    >>> offsets = np.array([[i, i + 1] for i in range(17)])
    >>> split("One two. Three fo", offsets, 10)
    ['One two.', 'Three fo']
    """
    chunks, first = [], 0
    while first < len(offsets):
        last = min(first + size, len(offsets))
        start, stop = int(offsets[first, 0]), int(offsets[last - 1, 1])
        if last < len(offsets):
            half = start + (stop - start) // 2
            cuts = (text.rfind(mark, half, stop) for mark in ("\n\n", ". ", "\n", " "))
            stop = next((cut + 1 for cut in cuts if cut > 0), stop)
        # At least one token, also where a character has several.
        first = max(first + 1, int(np.searchsorted(offsets[:, 0], stop)))
        chunks.append(text[start:stop].strip())
    return [chunk for chunk in chunks if chunk]


def overlaps(query: str, chunks: Sequence[str]) -> np.ndarray:
    """Count [n] distinct words that each chunk shares with the query, less those of most chunks.

    >>> overlaps("Who saw the owl in May?", ["the owl of the hill", "the May rain", "the end"])
    array([1, 1, 0])
    """
    words = [set(_WORD.findall(chunk.lower())) for chunk in chunks]
    wanted = set(_WORD.findall(query.lower()))
    rare = {w for w in wanted if 2 * sum(w in each for each in words) <= max(len(chunks), 2)}
    return np.array([len(rare & each) for each in words])


def _rng(options: LogoOptions, number: int, stage: int) -> np.random.Generator:
    return np.random.default_rng([options.seed, number, stage])


def _prompt(
    chunks: Sequence[str], question: str, chat: bool
) -> tuple[Content, list[tuple[int, int]]]:
    text, spans = joined_chunks(chunks, question)
    return ([user(text)] if chat else f"{text}\n\n"), spans


class _Item(NamedTuple):
    """Hold a document with its question, on the way to three responses."""

    number: int
    question: str
    answer: str | None  # the user's own
    context: list[str]  # chunks of the row's prompt
    contexts: list[list[str]]  # of the prompts of the three answers


def _asked(written: str) -> tuple[str, str]:
    match = _ASKED.search(written)
    if match is None:
        raise _Drop("no question and answer in the form that was asked for")
    return match[1].strip(), match[2].strip()


def _item(
    number: int,
    chunks: Sequence[str],
    question: str,
    answer: str,
    known: str | None,
    options: LogoOptions,
) -> _Item:
    scores = overlaps(f"{question} {answer}", chunks)
    best = np.argsort(-scores, kind="stable")[: options.critical_chunks]
    critical = sorted(int(i) for i in best if scores[i] >= options.min_overlap)
    if len(critical) < 2:
        raise _Drop(f"fewer than 2 chunks share {options.min_overlap} words with the question")
    others = [i for i in range(len(chunks)) if i not in critical]
    if len(others) < len(critical):
        raise _Drop("fewer other chunks than critical ones")
    others = _rng(options, number, 1).permutation(others).tolist()
    half = critical[: len(critical) // 2]

    def texts(*parts: Sequence[int]) -> list[str]:
        return [chunks[i] for i in sorted(i for part in parts for i in part)]

    return _Item(
        number,
        question,
        known,
        texts(critical, others[: options.context_chunks - len(critical)]),
        [
            texts(critical),
            texts(half, others[: len(critical) - len(half)]),
            texts(others[: len(critical)]),
        ],
    )


def _row(item: _Item, responses: Sequence[str], chat: bool) -> LogoRow:
    texts = [response.strip() for response in responses]
    if not all(texts):
        raise _Drop("an empty answer")
    if texts[0] in texts[1:]:
        raise _Drop("the same answer without all critical chunks")
    prompt, spans = _prompt(item.context, item.question, chat)
    return {
        "prompt": prompt,
        "responses": [[assistant(text)] if chat else text for text in texts],
        "ranks": [0, 1, 1],  # the two may be alike
        "chunk_spans": spans,
        "document": item.number,
        "question": item.question,
    }


def logo_rows(
    documents: Sequence[Document],
    chunk: Callable[[str], list[str]],
    generate: Generate,
    options: LogoOptions,
    *,
    first: int = 0,
    chat: bool = True,
) -> tuple[list[LogoRow], list[Dropped]]:
    """Make the rows of a block of documents, and list those that gave none.

    Args:
        documents: with `text`; where they come with a `question`, none is written, and its
            `answer`, if any, is the chosen one.
        chunk: cuts a text, as `split`.
        generate: answers prompts; the same prompts and seed must give the same texts.
        options: see LogoOptions.
        first: the number of the block's first document, which with the seed decides all draws.
        chat: prompts are conversations; False: text.
    """

    def ask(prompts: Sequence[Content], stage: int) -> list[str]:
        return generate(prompts, int(_rng(options, first, stage).integers(2**31)))

    def passage(i: int) -> Content:
        drawn = int(_rng(options, first + i, 0).integers(len(chunks[i])))
        return _prompt([chunks[i][drawn]], ASK, chat)[0]

    chunks = [chunk(document["text"]) for document in documents]
    unasked = [i for i, document in enumerate(documents) if not document.get("question")]
    written = dict(zip(unasked, ask([passage(i) for i in unasked], 2), strict=True))

    rows: list[LogoRow] = []
    items: list[_Item] = []
    dropped: list[Dropped] = []
    for i, document in enumerate(documents):
        known = None if i in written else document.get("answer") or None
        try:
            question, answer = (
                _asked(written[i]) if i in written else (document["question"], known or "")
            )
            items.append(_item(first + i, chunks[i], question, answer, known, options))
        except _Drop as reason:
            dropped.append(Dropped(first + i, str(reason)))

    prompts = [_prompt(each, item.question, chat)[0] for item in items for each in item.contexts]
    responses = iter(ask(prompts, 3))
    for item in items:
        chosen, *rejected = next(responses), next(responses), next(responses)
        try:
            rows.append(_row(item, [item.answer or chosen, *rejected], chat))
        except _Drop as reason:
            dropped.append(Dropped(item.number, str(reason)))
    return rows, dropped
