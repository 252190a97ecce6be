"""Fields of a dataclass whose help is said once, under `Args:` in its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import MappingProxyType
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def documented(cls: C) -> C:
    """Give each field of a dataclass the text under its name in `Args:` as `metadata["help"]`.

    Recipes, command lines and `transformers.HfArgumentParser` read it there.

    Raises:
        KeyError: the docstring names what is no field.
    """
    table: dict[str, dataclasses.Field[Any]] = cls.__dataclass_fields__
    for name, text in argument_texts(cls.__doc__ or "").items():
        field = table[name]
        field.metadata = MappingProxyType({**field.metadata, "help": text})
    return cls


def argument_texts(docstring: str) -> dict[str, str]:
    """Return name -> text of the arguments that a docstring lists, each as one line.

    >>> argument_texts("Do.\\n\\nArgs:\\n    a: the first\\n        one.\\n    b: two.\\n")
    {'a': 'the first one.', 'b': 'two.'}
    """
    listed = re.search(r"^Args:\n((?:[ \t].*\n?|\n)+)", inspect.cleandoc(docstring), re.M)
    texts: dict[str, str] = {}
    for line in listed[1].splitlines() if listed else ():
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            texts[start[1]] = start[2]
        elif line.strip():
            last = next(reversed(texts))
            texts[last] += f" {line.strip()}"
    return texts


def summary(text: str) -> str:
    """Return the first sentence or clause of a help text, without its full stop."""
    return re.split(r"(?<=\w)[.;](?: |$)|(?<=[)}`\"'])[.;](?: |$)", text, maxsplit=1)[0]
