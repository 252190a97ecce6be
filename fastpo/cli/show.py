"""`fastpo data show`: how the rows of a file are read, before anybody trains on them."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from typing import Any

from tqdm.auto import tqdm

from fastpo.cli.output import check_outputs, json_lines
from fastpo.cli.reading import data_options
from fastpo.cli.terminal import show_log
from fastpo.data.options import DataOptions
from fastpo.data.rows import load_rows
from fastpo.data.show import LEGEND, PLAIN, RowPrinter, odd_columns
from fastpo.data.source_rows import good_rows, source_rows
from fastpo.data.trl import TrlWriter
from fastpo.model.opening import open_tokenizer
from fastpo.redact import redact


def _colours() -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def show(arguments: argparse.Namespace) -> int:
    """Print how the first rows are read, or write all of them in TRL's form."""
    show_log(logging.WARNING)
    if arguments.to is None:
        if arguments.out is not None:
            raise ValueError(
                f"{arguments.out} is only written with --to trl: drop it, or give the flag"
            )
        if arguments.skip_bad_rows:
            raise ValueError("bad rows are shown: drop --skip_bad_rows, or write with --to trl")
    else:
        for name in ("rows", "model", "tokenizer"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--to {arguments.to} writes all rows, unread: drop --{name}")
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
    printer = RowPrinter(options, tokenizer, arguments.dataset, colours=_colours())
    good = 0
    for row in printer(itertools.islice(source_rows(rows, arguments.dataset), arguments.rows or 3)):
        print(redact(row.text))
        good += row.good
    if tokenizer is not None:
        print(LEGEND if printer.colours else PLAIN)
    print("".join(f"{line}\n" for line in odd_columns(printer.columns)), end="")
    return 0 if good else 2


def _convert(arguments: argparse.Namespace, rows: Any, options: DataOptions) -> int:
    """Write all rows in TRL's form."""
    writer = TrlWriter(options)
    good = good_rows(rows, writer, source=arguments.dataset, on_bad_row=options.on_bad_row)
    count = 0
    with json_lines(arguments.out, over=arguments.overwrite) as write:
        for _, written in tqdm(good, total=len(rows), desc="rows", unit="row", disable=None):
            for row in written:
                write(row)
                count += 1
    odd = list(odd_columns(writer.columns))
    if arguments.out is not None:
        odd.append(f"{arguments.out}: {count} rows")
    sys.stderr.write("".join(f"{line}\n" for line in odd))
    return 0
