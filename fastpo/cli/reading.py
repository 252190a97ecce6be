"""Flags that say how rows are read, as `DataOptions`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from fastpo.data.options import DataOptions, DataSettings
from fastpo.yaml_text import scalar


def data_options(arguments: argparse.Namespace, **others: Any) -> DataOptions:
    """Make the options that a command's flags describe, and others.

    Raises:
        ValueError: a flag's value is no mapping, or one that `DataOptions` refuses.
    """
    flags = vars(arguments)
    options: dict[str, Any] = {
        field.name: flags[field.name] for field in fields(DataSettings) if field.name in flags
    }
    for name in ("columns", "chat_template_kwargs"):
        text = options[name]
        options[name] = {} if text is None else scalar(text)
        if not isinstance(options[name], dict):
            raise ValueError(f"--{name} {text!r} is no mapping: write it as '{{name: value}}'")
    options["append_eos"] = not flags["no_append_eos"]
    options["on_bad_row"] = "skip" if flags.get("skip_bad_rows") else "error"
    return DataOptions(**options | others)
