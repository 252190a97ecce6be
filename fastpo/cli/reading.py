"""Flags that say how rows are read, for every command that reads some; as the keys of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from fastpo.data.options import DataOptions


def data_options(arguments: argparse.Namespace, **others: Any) -> DataOptions:
    """Make the options that the flags of `reading_flags` describe, and others.

    Raises:
        ValueError: a flag's value is no mapping, or one that `DataOptions` refuses.
    """
    given: dict[str, Any] = {}
    for name in ("columns", "chat_template_kwargs"):
        text = getattr(arguments, name)
        try:
            value = yaml.safe_load(text) if text is not None else {}
        except yaml.YAMLError:
            value = text
        if not isinstance(value, dict):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {text!r} is no mapping: write it as '{{name: value}}'")
        given[name] = value
    if getattr(arguments, "list_to_pairs", None) is not None:
        given["list_to_pairs"] = arguments.list_to_pairs
    return DataOptions(
        dialect=arguments.dialect,
        text_as_messages=arguments.text_as_messages,
        append_eos=not arguments.no_append_eos,
        continue_final_message=arguments.continue_final_message,
        bos=arguments.bos,
        on_bad_row="skip" if getattr(arguments, "skip_bad_rows", False) else "error",
        **given,
        **others,
    )
