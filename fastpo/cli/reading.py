"""Read flags that several commands have: how rows are read, and where a model lies."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TypedDict

from fastpo.data.options import DataOptions, DataSettings
from fastpo.yaml_text import scalar


class Source(TypedDict):
    """Hold arguments of `open_model` and `open_tokenizer` that say where a model lies."""

    revision: str | None
    trust_remote_code: bool
    gguf_file: str | None


def source_of(arguments: argparse.Namespace) -> Source:
    """Return what the flags say of the place of a model."""
    return {
        "revision": arguments.revision,
        "trust_remote_code": arguments.trust_remote_code,
        "gguf_file": arguments.gguf_file,
    }


def data_options(arguments: argparse.Namespace) -> DataOptions:
    """Return the options that a command's flags describe.

    Raises:
        ValueError: a flag's value is no mapping, or one that `DataOptions` refuses.
    """
    flags = vars(arguments)
    names = [field.name for field in fields(DataSettings) if field.name in flags]
    options = {name: flags[name] for name in names}
    for name in ("columns", "chat_template_kwargs"):
        text = options[name]
        options[name] = {} if text is None else scalar(text)
        if not isinstance(options[name], dict):
            raise ValueError(f"--{name} {text!r} is no mapping: write it as '{{name: value}}'")
    options["on_bad_row"] = "skip" if flags.get("skip_bad_rows") else "error"
    return DataOptions(**options)
