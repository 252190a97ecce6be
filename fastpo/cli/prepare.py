"""`fastpo prepare logo`: long documents to the rows that LOGO trains on."""

from __future__ import annotations

import argparse
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import set_seed

from fastpo.cli.models import open_model, open_tokenizer, show_log
from fastpo.cli.output import check_outputs, hold, partial_of
from fastpo.cli.sample import answers, check_prompts, prompt_ids, sampling
from fastpo.data.logo import Generate, LogoOptions, logo_rows, split
from fastpo.data.messages import Content
from fastpo.data.rows import load_rows
from fastpo.model.device import default_device
from fastpo.model.hidden import generation
from fastpo.model.limits import Positions, Vocabulary
from fastpo.redact import redact
from fastpo.run.folder import write_text

BLOCK = 16  # documents whose questions, and whose answers, are written together


def documents_of(
    source: str, name: str | None, split: str, limit: int | None
) -> list[dict[str, Any]]:
    """Rows with `text`; of .txt and .md files each is a row.

    Raises:
        ValueError: a row without text, or no rows.
    """
    files = sorted(f for f in glob.glob(source, recursive=True) if f.endswith((".txt", ".md")))
    if files:
        rows: Any = [{"text": Path(f).read_text(encoding="utf-8")} for f in files]
    else:
        rows = load_rows(source, split=split, name=name)
    documents = [dict(row) for row in itertools.islice(rows, limit)]
    for i, row in enumerate(documents):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            shown = repr(row.get("text"))
            raise ValueError(f"{source}, row {i}: `text` must be a document, got {shown:.80}")
    if not documents:
        raise ValueError(f"{source}: no documents")
    return documents


def chunk(text: str, tokenizer: Any, size: int) -> list[str]:
    """The chunks of a text, by the tokenizer's count."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return split(text, np.asarray(found["offset_mapping"]), size)


def transformers_generator(
    model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float, batch_size: int
) -> Generate:
    """Answers with `model.generate`, in batches that a seed before the first decides."""
    how = sampling(temperature)
    limits = Vocabulary.of(tokenizer, model), Positions.of(model)

    def generate(prompts: Sequence[Content], seed: int) -> list[str]:
        ids = [prompt_ids(tokenizer, {"prompt": p}) for p in prompts]
        check_prompts(*limits, ids, "the questions", max_new_tokens)
        set_seed(seed)
        texts: list[str] = []
        with generation(model), torch.inference_mode():
            for start in range(0, len(ids), batch_size):
                batch = ids[start : start + batch_size]
                texts += answers(model, tokenizer, batch, **how, max_new_tokens=max_new_tokens)
        return texts

    return generate


def vllm_generator(
    name: str, tokenizer: Any, *, max_new_tokens: int, temperature: float, **engine: Any
) -> Generate:
    """Answers with a vLLM engine in this process; every prompt has a seed of its own.

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
        return [found.outputs[0].text for found in llm.generate(ids, params, use_tqdm=False)]

    return generate


class Progress:
    """Finished blocks beside the output file, so that a run that was killed goes on.

    A block is one line, written at once; a line that a kill tore is written again.

    Args:
        path: OUT.partial; its first line is the key.
        key: what the rows depend on, by name.

    Raises:
        ValueError: the file is another's, or another process writes it, or it was begun with
            another key; names what changed.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        self.blocks: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        hold(self._file, path)
        lines = path.read_bytes().splitlines(keepends=True)
        if not lines:
            self._write(key)
            return
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            held, *self.blocks = map(json.loads, whole)
            changed = [name for name in key if held.get(name) != key[name]]
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

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False) + "\n"
        self._file.write(text.encode(errors="replace"))
        self._file.flush()

    def add(self, block: dict[str, Any]) -> None:
        """Keep a block."""
        self._write(block)
        self.blocks.append(block)

    def finish(self, out: Path) -> list[dict[str, Any]]:
        """Write the rows to `out`, which appears complete, and remove this file."""
        rows = [row for block in self.blocks for row in block["rows"]]
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.path.unlink()
        self._file.close()
        return rows


def prepare(arguments: argparse.Namespace) -> int:
    """Ask, score and answer block by block, then write the rows."""
    show_log(logging.WARNING)
    for name in ("questions", "max_new_tokens", "batch_size", "max_rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    sampling(arguments.temperature)
    names = ("chunk_tokens", "context_chunks", "critical_chunks", "min_overlap", "seed")
    options = LogoOptions(**{name: getattr(arguments, name) for name in names})
    out = Path(arguments.out)
    check_outputs(
        out,
        inputs=[arguments.documents, arguments.chat_template],
        overwrite=arguments.overwrite,
        goes_on=True,
    )
    source = {
        "revision": arguments.revision,
        "trust_remote_code": arguments.trust_remote_code,
        "gguf_file": arguments.gguf_file,
    }
    documents = documents_of(
        arguments.documents, arguments.dataset_name, arguments.split, arguments.max_rows
    )
    documents = [each for each in documents for _ in range(arguments.questions)]
    tokenizer = open_tokenizer(
        arguments.model, arguments.tokenizer, arguments.chat_template, **source
    )
    if not tokenizer.is_fast:
        raise ValueError(
            f"cutting documents needs a tokenizer that knows its offsets, and "
            f"{type(tokenizer).__name__} is not a fast one: give another --tokenizer"
        )
    own = ("command", "debug", "out", "overwrite")
    key = redact({k: v for k, v in vars(arguments).items() if k not in own})
    text = json.dumps(documents, sort_keys=True, default=str)
    key["documents"] = hashlib.sha256(text.encode()).hexdigest()
    progress = Progress(partial_of(out), key)
    starts = range(0, len(documents), BLOCK)[len(progress.blocks) :]
    if starts:
        how: dict[str, Any] = {
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": arguments.temperature,
        }
        if arguments.generator == "vllm":
            engine = {k: source[k] for k in ("revision", "trust_remote_code")}
            engine |= {"dtype": arguments.dtype, "seed": arguments.seed}
            generate = vllm_generator(arguments.model, tokenizer, **how, **engine)
        else:
            model = open_model(
                arguments.model, dtype=arguments.dtype, device=default_device(), **source
            )
            generate = transformers_generator(
                model, tokenizer, **how, batch_size=arguments.batch_size
            )
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
    reasons = Counter(reason for block in progress.blocks for _, reason in block["dropped"])
    if not any(block["rows"] for block in progress.blocks):
        told = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
        raise ValueError(f"no document gave a row: {told} (kept in {progress.path})")
    rows = progress.finish(out)
    sys.stderr.write(f"{len(rows)} rows of {len(documents)} in {out}\n")
    for reason, count in reasons.most_common():
        sys.stderr.write(f"  {count} x {reason}\n")
    return 0
