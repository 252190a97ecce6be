"""Check the values of recipes and flags against type annotations."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union

from fastpo.errors import nearest
from fastpo.objectives.domain import Misfit, fitted
from fastpo.redact import REDACTED, is_secret


class RecipeError(ValueError):
    """Something in a recipe or a flag is wrong; one line per problem, each naming its place."""


class Entry(NamedTuple):
    value: Any
    where: str
    text: str | None = None  # what was typed, for flags whose field is a string
    parts: Mapping[str, str] = types.MappingProxyType({})  # places of a mapping's own keys

    def place(self, part: object) -> str:
        """Where one key of a mapping was set."""
        return self.parts.get(str(part), self.where)


def describe(expected: Any) -> str:
    """A type as a user would say it."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if expected is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        listed = [a for a in args if not (a is str and choices(expected))]
        return " or ".join(dict.fromkeys(describe(a) for a in listed))
    if origin is Annotated:
        return f"{describe(args[0])} {args[1]}"
    if origin is Literal:
        return " or ".join(map(str, args))
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        names = [str(m.value) for m in expected]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return "one of " + ", ".join(names[:8]) + more
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if expected in words:
        return words[expected]
    return {list: "a list", dict: "a mapping"}.get(origin or expected, str(expected))


class Mismatch(Exception):
    """A value does not have the type of its field."""


def _coerce(value: Any, expected: Any, text: str | None) -> Any:
    """`value` as `expected`, a type annotation.

    Raises:
        Mismatch: it is not of that type.
        Misfit: it is, and outside the domain that the annotation declares.
    """
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or expected is None:
        return value
    if origin in (Union, types.UnionType):
        # An enumeration beside `str` (optim, eval_strategy) is stricter than the `str`.
        enums = [a for a in args if isinstance(a, type) and issubclass(a, enum.Enum)]
        # The exact type first, so that "1" for `int | str` stays what YAML says it is.
        order = sorted(args, key=lambda a: type(value) is not (typing.get_origin(a) or a))
        for option in [a for a in order if not (enums and a is str)]:
            try:
                return _coerce(value, option, None if option is not str else text)
            except Mismatch:
                continue
        raise Mismatch
    if origin is Annotated:
        return fitted(_coerce(value, args[0], text), expected)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise Mismatch
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        if value in [m.value for m in expected] or value in expected.__members__.values():
            return value
        raise Mismatch
    if expected is type(None):
        if value is None:
            return value
        raise Mismatch
    if expected is bool:
        if isinstance(value, bool):
            return value
        raise Mismatch
    if expected is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise Mismatch
    if expected is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        raise Mismatch
    if expected is str:
        if isinstance(value, str):
            return value
        if text is not None and not isinstance(value, list | dict) and value is not None:
            return text
        raise Mismatch
    if origin is list or expected is list:
        if isinstance(value, list):
            return [_coerce(v, args[0] if args else Any, None) for v in value]
        raise Mismatch
    if origin is dict or expected is dict:
        if isinstance(value, Mapping):
            return {k: _coerce(v, args[1] if args else Any, None) for k, v in value.items()}
        raise Mismatch
    return value  # a class of a library: its own constructor judges


def checked(name: str, entry: Entry, expected: Any) -> Any:
    """The entry's value as `expected`, a type annotation.

    Raises:
        RecipeError: it is none; names the place, the key, the value and what is expected.
    """
    told = REDACTED if is_secret(name) else repr(entry.value)
    try:
        return _coerce(entry.value, expected, entry.text)
    except Misfit as misfit:
        raise RecipeError(f"{entry.where}: {name} = {told} {misfit}") from None
    except Mismatch:
        hint = nearest(str(entry.value), map(str, choices(expected)))
        raise RecipeError(
            f"{entry.where}: {name} = {told} ({type(entry.value).__name__}), "
            f"expected {describe(expected)}.{hint}"
        ) from None


def choices(expected: Any) -> list[Any]:
    """The values that a type enumerates, if any."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return [c for a in args for c in choices(a)]
    if origin is Literal:
        return list(args)
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return [m.value for m in expected]
    return []
