"""`fastpo prepare logo`: long documents to the rows that LOGO trains on."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from fastpo.cli.output import check_outputs
from fastpo.cli.reading import source_of
from fastpo.cli.terminal import show_log
from fastpo.data.logo import Generate, LogoOptions
from fastpo.model.device import default_device
from fastpo.model.opening import open_model, open_tokenizer
from fastpo.redact import redact
from fastpo.run.partial import partial_of
from fastpo.scoring.logo import (
    Progress,
    digest,
    prepare_logo,
    read_documents,
    transformers_generator,
    vllm_generator,
)


def prepare(arguments: argparse.Namespace) -> int:
    """Ask, score and answer block by block, then write the rows."""
    show_log(logging.WARNING)
    if arguments.generator == "vllm" and arguments.gguf_file is not None:
        raise ValueError("--gguf_file is read by --generator transformers alone: drop one of them")
    names = ("chunk_tokens", "context_chunks", "critical_chunks", "min_overlap", "seed")
    options = LogoOptions(**{name: getattr(arguments, name) for name in names})
    out = Path(arguments.out)
    check_outputs(
        out,
        inputs=[arguments.documents, arguments.chat_template],
        overwrite=arguments.overwrite,
        goes_on=True,
    )
    source = source_of(arguments)
    documents = read_documents(
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
    unread = ("command", "debug", "out", "overwrite")  # change no row
    key = redact({k: v for k, v in vars(arguments).items() if k not in unread})
    progress = Progress(partial_of(out), {**key, "documents": digest(documents)})

    def generator() -> Generate:
        how = {
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": arguments.temperature,
        }
        if arguments.generator == "vllm":
            engine = {"dtype": arguments.dtype, "seed": arguments.seed}
            engine |= {name: source[name] for name in ("revision", "trust_remote_code")}
            return vllm_generator(arguments.model, tokenizer, **how, **engine)
        place = {"dtype": arguments.dtype, "device": default_device()}
        model = open_model(arguments.model, **place, **source)
        return transformers_generator(model, tokenizer, **how, batch_size=arguments.batch_size)

    prepare_logo(documents, tokenizer, generator, options, progress)
    reasons = progress.reasons()
    rows = progress.finish(out)
    sys.stderr.write(f"{len(rows)} rows of {len(documents)} in {out}\n")
    for reason, count in reasons:
        sys.stderr.write(f"  {count} x {reason}\n")
    return 0
