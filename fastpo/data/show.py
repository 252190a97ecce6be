"""Write rows in words: who says what, and how a tokenizer and its template write it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fastpo.data.bad_rows import BadRow
from fastpo.data.builder import Builder
from fastpo.data.dialects import Columns
from fastpo.data.example import Example
from fastpo.data.formats import read_row
from fastpo.data.groups import Group
from fastpo.data.messages import REASONING, Content, message_text
from fastpo.data.options import DataOptions
from fastpo.data.source_rows import SourceRow

SHOWN = 1000  # characters of a prompt; of a longer one its start and its end
LEGEND = "dim: the template's own text; green, red: scored tokens of the better and worse responses"
PLAIN = "«the template's own text», [scored token]"


class Piece(NamedTuple):
    """Hold a token's text, whether the row says it, and whether it is scored."""

    text: str
    from_row: bool
    scored: bool


def _said(content: Content) -> Iterator[str]:
    """Yield what a row's text or messages say, in order."""
    if isinstance(content, str):
        yield content
        return
    for message in content:
        for key in REASONING:
            yield str(message.get(key) or "")
        yield message_text(message)
        for call in message.get("tool_calls") or ():
            yield str((call.get("function") or call).get("name", ""))


def pieces(texts: Sequence[str], scored: Sequence[bool], said: Iterator[str]) -> list[Piece]:
    """Mark the texts of tokens by who wrote them.

    Args:
        texts: of every token.
        scored: of every token.
        said: what the row says, in order; a template may strip it, or leave it out.
    """
    whole, place, from_row = "".join(texts), 0, []
    for text in filter(None, map(str.strip, said)):
        start = whole.find(text, place)
        if start >= 0:
            place = start + len(text)
            from_row.append((start, place))
    marked, place = [], 0
    for text, counted in zip(texts, scored, strict=True):
        inside = any(start < place + len(text) and place < stop for start, stop in from_row)
        marked.append(Piece(text, inside, counted))
        place += len(text)
    return marked


def _painted(marked: Sequence[Piece], tone: int | None) -> str:
    """Write pieces as a terminal shows them, or without a tone as plain text."""
    if tone is None:
        shown = []
        for (from_row, scored), run in itertools.groupby(marked, lambda p: (p.from_row, p.scored)):
            text = "".join(f"[{p.text}]" if scored else p.text for p in run)
            shown.append(text if from_row else f"«{text}»")
        return "".join(shown)
    styles = [f"{'' if p.from_row else '2;'}{tone if p.scored else 39}" for p in marked]
    return "".join(f"\x1b[{s}m{p.text}\x1b[0m" for s, p in zip(styles, marked, strict=True))


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"


def _block(title: str, text: str) -> str:
    lines = text.split("\n")
    return "\n".join([f"  {title}", *(f"    {line}" for line in lines)])


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return what each token adds; alone, SentencePiece's tokens lose the blank before them."""
    texts = []
    for before, token in zip([ids[:0], *([i] for i in ids[:-1])], ids, strict=True):
        known = tokenizer.decode(before)
        texts.append(str(tokenizer.decode([*before, token]))[len(known) :])
    return texts


def _messages(content: Content) -> str:
    if isinstance(content, str):
        return _shortened(content)
    return "\n".join(
        f"{m['role']}: {_shortened(message_text(m))}"
        + "".join(f"  {key}: {said}" for key, said in m.items() if key not in ("role", "content"))
        for m in content
    )


def written(example: Example) -> str:
    """Write a row without a tokenizer: who says what."""
    if example.tokens is not None:
        return "  token ids"
    prompt, responses = example.parts()
    blocks = []
    if prompt is not None:
        blocks.append(_block("prompt", _messages(prompt)))
    for name, response, rank in zip(example.names, responses, example.ranks, strict=True):
        blocks.append(_block(f"{name}, rank {rank}", _messages(response)))
    return "\n".join(blocks)


def tokenised(
    example: Example, group: Group, tokenizer: PreTrainedTokenizerBase, *, colours: bool
) -> str:
    """Write a row as the model reads it: border, scored tokens, the template's own text."""
    texts = token_texts(tokenizer, group.prompt_ids.tolist())
    asked, contents = example.parts()
    contents = contents or [""] * len(group.responses)  # of a row of token ids
    # A text's implied prompt is some tokens that the responses begin with.
    asked = contents[0] if asked is None else asked
    marked = pieces(texts, [False] * len(texts), _said(asked))
    prompt = _painted(marked, 39 if colours else None)
    if len("".join(texts)) > SHOWN:
        prompt = _shortened("".join(texts))
    blocks = [_block(f"prompt, {len(texts)} tokens", prompt)]
    for k, response in enumerate(group.responses):
        texts = token_texts(tokenizer, response.input_ids.tolist())
        marked = pieces(texts, response.loss_mask.tolist(), _said(contents[k]))
        good = response.label if response.label is not None else k == 0
        tone = (32 if good else 31) if colours else None
        title = f"{example.names[k]}, {int(response.loss_mask.sum())} of {len(texts)} tokens scored"
        blocks.append(_block(title, _painted(marked, tone)))
    return "\n".join(blocks)


def odd_columns(columns: Columns) -> Iterator[str]:
    """Say what is odd about the columns of the rows so far."""
    if ignored := columns.told_of_ignored():
        yield ignored
    for name, column in columns.taken.items():
        if column in columns.unseen:
            yield f"columns={{{name}: {column}}}: no row so far has a column {column!r}"


class Shown(NamedTuple):
    """Hold what is printed of a row, and whether it could be read."""

    text: str
    good: bool


class RowPrinter:
    """Write rows as they are read, with a tokenizer as the model reads them.

    Args:
        options: how rows are read.
        tokenizer: whose tokens are shown, or None.
        source: name of the data for messages.
        colours: whether the text is for a terminal that shows them.
    """

    def __init__(
        self,
        options: DataOptions,
        tokenizer: PreTrainedTokenizerBase | None,
        source: str,
        *,
        colours: bool,
    ) -> None:
        self.tokenizer, self.colours = tokenizer, colours
        self.builder = None if tokenizer is None else Builder(tokenizer, options, source)
        self.columns = options.reader() if self.builder is None else self.builder.columns

    def __call__(self, rows: Iterable[SourceRow]) -> Iterator[Shown]:
        """Yield each row in words, or what is wrong with it."""
        for row in rows:
            try:
                with row.naming():
                    example = read_row(row.columns, columns=self.columns)
                    text = self._text(row, example)
            except BadRow as bad:
                yield Shown(f"{bad}\n", good=False)
                continue
            place = f"{row.source}, row {row.index}, read as {example.dialect}"
            yield Shown(f"{place}\n{text}\n", good=True)

    def _text(self, row: SourceRow, example: Example) -> str:
        if self.tokenizer is None or self.builder is None:
            return written(example)
        (group, *_) = self.builder.groups(row)
        return tokenised(example, group, self.tokenizer, colours=self.colours)
