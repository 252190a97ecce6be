"""Check the values of recipes and flags against type annotations."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastpo.domain import Misfit, OtherType, choices, fitted, in_words
from fastpo.errors import nearest
from fastpo.redact import REDACTED, is_secret


class RecipeError(ValueError):
    """Something in a recipe or a flag is wrong; one line per problem, each naming its place."""


class Entry(NamedTuple):
    """A value that a file or a flag sets."""

    value: Any
    where: str
    text: str | None = None  # what was typed, for flags whose field is a string
    parts: Mapping[str, str] = types.MappingProxyType({})  # places of a mapping's own keys

    def place(self, part: object) -> str:
        """Return where one key of a mapping was set."""
        return self.parts.get(str(part), self.where)


def checked(name: str, entry: Entry, expected: Any) -> Any:
    """Return the entry's value as `expected`, a type annotation, has it.

    Raises:
        RecipeError: it is none; names the place, the key, the value and what is expected.
    """
    shown = REDACTED if is_secret(name) else repr(entry.value)
    typed = entry.text is not None and not isinstance(entry.value, list | dict | None)
    for value in (entry.value, entry.text) if typed else (entry.value,):
        try:
            return fitted(value, expected, lenient=True)
        except OtherType:
            continue
        except Misfit as misfit:
            raise RecipeError(f"{entry.where}: {name} = {shown} {misfit}") from None
    hint = nearest(entry.value, map(str, choices(expected)))
    raise RecipeError(
        f"{entry.where}: {name} = {shown} ({type(entry.value).__name__}), "
        f"expected {in_words(expected)}.{hint}"
    )
