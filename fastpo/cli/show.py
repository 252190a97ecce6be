"""`fastpo data show`: how the rows of a file are read, before anybody trains on them."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastpo.cli.models import open_tokenizer, show_log
from fastpo.cli.output import check_outputs, json_lines
from fastpo.cli.reading import data_options
from fastpo.data.bad_rows import BadRow
from fastpo.data.builder import Builder
from fastpo.data.columns import EXTRA_COLUMNS, PROMPT_COLUMNS
from fastpo.data.dialects import Columns
from fastpo.data.example import Example
from fastpo.data.formats import read_row
from fastpo.data.groups import Group
from fastpo.data.messages import REASONING, Content, message_text
from fastpo.data.options import DataOptions
from fastpo.data.rows import load_rows
from fastpo.data.source_rows import good_rows, source_rows
from fastpo.data.trl import to_trl
from fastpo.redact import redact
from fastpo.report.tokens import token_texts

SHOWN = 1000  # characters of a prompt; of a longer one its start and its end
LEGEND = "dim: the template's own text; green, red: scored tokens of the better and worse responses"
PLAIN = "«the template's own text», [scored token]"


class Piece(NamedTuple):
    """A token's text: whether the row says it, and whether it is scored."""

    text: str
    own: bool
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
    whole, place, own = "".join(texts), 0, []
    for text in filter(None, map(str.strip, said)):
        start = whole.find(text, place)
        if start >= 0:
            place = start + len(text)
            own.append((start, place))
    marked, place = [], 0
    for text, counted in zip(texts, scored, strict=True):
        inside = any(start < place + len(text) and place < stop for start, stop in own)
        marked.append(Piece(text, inside, counted))
        place += len(text)
    return marked


def _painted(marked: Sequence[Piece], tone: int | None) -> str:
    """Write pieces as a terminal shows them, or without a tone as plain text."""
    if tone is None:
        shown = []
        for (own, scored), run in itertools.groupby(marked, lambda p: (p.own, p.scored)):
            text = "".join(f"[{p.text}]" if scored else p.text for p in run)
            shown.append(text if own else f"«{text}»")
        return "".join(shown)
    dim = {True: "", False: "2;"}
    return "".join(f"\x1b[{dim[p.own]}{tone if p.scored else 39}m{p.text}\x1b[0m" for p in marked)


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"


def _block(title: str, text: str) -> str:
    lines = text.split("\n")
    return "\n".join([f"  {title}", *(f"    {line}" for line in lines)])


def _colours() -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def _messages(content: Content) -> str:
    if isinstance(content, str):
        return _shortened(content)
    return "\n".join(
        f"{m['role']}: {_shortened(message_text(m))}"
        + "".join(f"  {key}: {m[key]}" for key in m if key not in ("role", "content"))
        for m in content
    )


def _read(example: Example) -> str:
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


def _tokenised(example: Example, group: Group, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a row as the model reads it: border, scored tokens, the template's own text."""
    colours = _colours()
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


def show(arguments: argparse.Namespace) -> int:
    """Print how the first rows are read, or write all of them in TRL's form."""
    show_log(logging.WARNING)
    most = 3 if arguments.rows is None else arguments.rows
    if most < 1:
        raise ValueError(f"--rows {arguments.rows} must be at least 1")
    if arguments.to is None and arguments.out is not None:
        raise ValueError(
            f"{arguments.out} is only written with --to trl: drop it, or give the flag"
        )
    check_outputs(arguments.out, inputs=[arguments.dataset], overwrite=arguments.overwrite)
    options = data_options(arguments)
    rows: Any = load_rows(
        arguments.dataset,
        split=arguments.split,
        name=arguments.dataset_name,
        origin=True,
        streaming=arguments.to is None,
    )
    if arguments.to == "trl":
        return _convert(arguments, rows, options)
    if arguments.model is None and arguments.tokenizer is None:
        tokenizer = None
    else:
        tokenizer = open_tokenizer(
            arguments.model or arguments.tokenizer,
            arguments.tokenizer,
            arguments.chat_template,
            trust_remote_code=arguments.trust_remote_code,
        )
    builder = Builder(tokenizer, options, arguments.dataset) if tokenizer is not None else None
    columns = options.reader() if builder is None else builder.columns
    shown = 0
    for row in itertools.islice(source_rows(rows, arguments.dataset), most):
        try:
            with row.naming():
                example = read_row(row.columns, columns=columns)
                if tokenizer is None or builder is None:
                    text = _read(example)
                else:
                    (group, *_) = builder.groups(row)
                    text = _tokenised(example, group, tokenizer)
        except BadRow as bad:
            print(redact(f"{bad}\n"))
            continue
        shown += 1
        print(redact(f"{row.source}, row {row.index}, read as {example.dialect}\n{text}\n"))
    if tokenizer is not None:
        print(LEGEND if _colours() else PLAIN)
    print("".join(f"{line}\n" for line in _odd(columns)), end="")
    return 0 if shown else 2


def _odd(columns: Columns) -> Iterator[str]:
    """Say what is odd about the columns of the rows so far."""
    if ignored := columns.told_of_ignored():
        yield ignored
    for name, own in columns.taken.items():
        if own in columns.unseen:
            yield f"columns={{{name}: {own}}}: no row so far has a column {own!r}"


def _convert(arguments: argparse.Namespace, rows: Any, options: DataOptions) -> int:
    """Write all rows in TRL's form."""
    columns = options.reader()

    def converted(row: dict[str, Any]) -> list[dict[str, Any]]:
        named = columns.renamed(row)
        extras = [column for column in EXTRA_COLUMNS if named.get(column) is not None]
        prompts = [column for column in PROMPT_COLUMNS if named.get(column) is not None]
        example = read_row(row, extras, prompts, columns=columns)
        return list(to_trl(example, named, options.list_to_pairs))

    good = good_rows(rows, converted, source=arguments.dataset, on_bad_row=options.on_bad_row)
    count = 0
    with json_lines(arguments.out, over=arguments.overwrite) as write:
        for _, written in tqdm(good, total=len(rows), desc="rows", unit="row", disable=None):
            for row in written:
                write(row)
                count += 1
    odd = list(_odd(columns))
    if arguments.out is not None:
        odd.append(f"{arguments.out}: {count} rows")
    sys.stderr.write("".join(f"{line}\n" for line in odd))
    return 0
