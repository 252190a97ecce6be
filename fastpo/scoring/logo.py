"""LOGO's rows from long documents by a model: the questions and answers that `data.logo` asks for.

Blocks of documents are finished one after the other and kept beside the output, so that a run that
was killed goes on.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastpo.data.logo import Document, Dropped, Generate, LogoOptions, LogoRow, logo_rows, split
from fastpo.data.messages import Content
from fastpo.data.rows import load_rows
from fastpo.model.limits import Positions, Vocabulary
from fastpo.run.folder import write_text
from fastpo.run.partial import hold
from fastpo.scoring.sampling import drawing, prompt_ids, sample_responses

BLOCK = 16  # documents whose questions, and whose answers, are written together


class Block(TypedDict):
    """Hold the rows of some documents, and the documents without one."""

    rows: list[LogoRow]
    dropped: list[Dropped]


def read_documents(source: str, name: str | None, split: str, limit: int | None) -> list[Document]:
    """Read rows with `text`; a .txt or .md file is one row.

    Raises:
        ValueError: a row without text, or no rows.
    """
    files = sorted(f for f in glob.glob(source, recursive=True) if f.endswith((".txt", ".md")))
    if files:
        rows: Any = [{"text": Path(f).read_text(encoding="utf-8")} for f in files]
    else:
        rows = load_rows(source, split=split, name=name)
    documents: list[Document] = [dict(row) for row in itertools.islice(rows, limit)]
    for i, row in enumerate(documents):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            shown = repr(row.get("text"))
            raise ValueError(f"{source}, row {i}: `text` must be a document, got {shown:.80}")
    if not documents:
        raise ValueError(f"{source}: no documents")
    return documents


def digest(documents: Sequence[Document]) -> str:
    """Return a hash of the documents, by which a run that goes on knows its own."""
    text = json.dumps(documents, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def chunk(text: str, tokenizer: Any, size: int) -> list[str]:
    """Cut a text into chunks of `size` tokens by the tokenizer's count."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return split(text, np.asarray(encoded["offset_mapping"]), size)


def transformers_generator(
    model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float, batch_size: int
) -> Generate:
    """Return a generator by `model.generate`; a seed before the first batch decides all of them."""
    draw = drawing(temperature)
    limits = Vocabulary.of(tokenizer, model), Positions.of(model)

    def generate(prompts: Sequence[Content], seed: int) -> list[str]:
        responses = sample_responses(
            model,
            tokenizer,
            [prompt_ids(tokenizer, {"prompt": prompt}) for prompt in prompts],
            draw,
            count=1,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            source="the questions",
            limits=limits,
        )
        return [text for (text,) in responses]

    return generate


def vllm_generator(
    name: str, tokenizer: Any, *, max_new_tokens: int, temperature: float, **engine: Any
) -> Generate:
    """Return a generator by a vLLM engine in this process; every prompt has a seed of its own.

    Raises:
        ValueError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--generator vllm: no module vllm; pip install vllm, or --generator transformers"
        )
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(model=name, **engine)

    def generate(prompts: Sequence[Content], seed: int) -> list[str]:
        ids = [{"prompt_token_ids": prompt_ids(tokenizer, {"prompt": p})} for p in prompts]
        params = [
            SamplingParams(temperature=temperature, max_tokens=max_new_tokens, seed=seed + i)
            for i in range(len(ids))
        ]
        return [each.outputs[0].text for each in llm.generate(ids, params, use_tqdm=False)]

    return generate


class Progress:
    """Keep finished blocks beside the output file, so that a run that was killed goes on.

    A block is one line, written at once; a line that a kill tore is written again.

    Args:
        path: OUT.partial; its first line is the key.
        key: what the rows depend on, by name.

    Raises:
        ValueError: the file is another's, or another process writes it, or it was begun with
            another key; names what changed.
    """

    def __init__(self, path: Path, key: Mapping[str, object]) -> None:
        self.path = path
        self.blocks: list[Block] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        hold(self._file, path)
        lines = path.read_bytes().splitlines(keepends=True)
        if not lines:
            self._write(key)
            return
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            begun, *self.blocks = map(json.loads, whole)
            changed = [name for name in key if begun.get(name) != key[name]]
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is no file of this command: name another OUT, or remove it"
            ) from error
        if changed:
            raise ValueError(
                f"{path} was begun with another {', '.join(changed)}: give the same, or remove the "
                "file to start over"
            )
        if whole != lines:  # the last one was torn by a kill
            self._file.truncate(sum(map(len, whole)))

    def _write(self, line: Mapping[str, object]) -> None:
        text = json.dumps(line, ensure_ascii=False) + "\n"
        self._file.write(text.encode(errors="replace"))
        self._file.flush()

    def add(self, block: Block) -> None:
        """Keep a block."""
        self._write(block)
        self.blocks.append(block)

    def finish(self, out: Path) -> list[LogoRow]:
        """Write the rows to `out`, which appears complete, and remove this file."""
        rows = [row for block in self.blocks for row in block["rows"]]
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.path.unlink()
        self._file.close()
        return rows

    def reasons(self) -> list[tuple[str, int]]:
        """Return why documents gave no row, and how many, the most frequent reason first."""
        dropped = (reason for block in self.blocks for _, reason in block["dropped"])
        return Counter(dropped).most_common()


def prepare_logo(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    generator: Callable[[], Generate],
    options: LogoOptions,
    progress: Progress,
) -> None:
    """Ask, score and answer block by block, after the blocks that `progress` has already.

    Args:
        documents: of all blocks, one for each question.
        tokenizer: a fast one; counts the tokens of chunks.
        generator: opens the model; not called where nothing is left to do.
        options: what rows are made of.
        progress: keeps the finished blocks.

    Raises:
        ValueError: no document gave a row.
    """
    starts = range(0, len(documents), BLOCK)[len(progress.blocks) :]
    if starts:
        generate = generator()
        cut = partial(chunk, tokenizer=tokenizer, size=options.chunk_tokens)
        chat = tokenizer.chat_template is not None
        bar = tqdm(
            total=len(documents), initial=starts[0], desc="preparing", unit="row", disable=None
        )
        with bar:
            for first in starts:
                block = documents[first : first + BLOCK]
                rows, dropped = logo_rows(block, cut, generate, options, first=first, chat=chat)
                progress.add({"rows": rows, "dropped": dropped})
                bar.update(len(block))
    if not any(block["rows"] for block in progress.blocks):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in progress.reasons())
        raise ValueError(f"no document gave a row: {reasons} (kept in {progress.path})")
