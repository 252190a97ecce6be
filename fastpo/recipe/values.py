"""Check the values of recipes and flags against type annotations."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import AfterValidator, BeforeValidator, Strict, TypeAdapter, ValidationError

from fastpo.domain import Misfit, fitted
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


def describe(expected: Any) -> str:
    """Return a type as a user would say it."""
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
    if _is_enum(expected):
        names = [str(m.value) for m in expected]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return "one of " + ", ".join(names[:8]) + more
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if expected in words:
        return words[expected]
    return {list: "a list", dict: "a mapping"}.get(origin or expected, str(expected))


def choices(expected: Any) -> list[Any]:
    """Return the values that a type enumerates, if any."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return [c for a in args for c in choices(a)]
    if origin is Literal:
        return list(args)
    return [m.value for m in expected] if _is_enum(expected) else []


def checked(name: str, entry: Entry, expected: Any) -> Any:
    """Return the entry's value as `expected`, a type annotation, has it.

    Raises:
        RecipeError: it is none; names the place, the key, the value and what is expected.
    """
    shown = REDACTED if is_secret(name) else repr(entry.value)
    typed = entry.text is not None and not isinstance(entry.value, list | dict | None)
    for value in (entry.value, entry.text) if typed else (entry.value,):
        try:
            return _adapter(expected).validate_python(value)
        except ValidationError as error:
            causes = (each.get("ctx", {}).get("error") for each in error.errors())
            misfit = next((cause for cause in causes if isinstance(cause, Misfit)), None)
            if misfit is not None:
                raise RecipeError(f"{entry.where}: {name} = {shown} {misfit}") from None
    hint = nearest(entry.value, map(str, choices(expected)))
    raise RecipeError(
        f"{entry.where}: {name} = {shown} ({type(entry.value).__name__}), "
        f"expected {describe(expected)}.{hint}"
    )


def _is_enum(expected: Any) -> bool:
    return isinstance(expected, type) and issubclass(expected, enum.Enum)


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_STRICT: dict[Any, Any] = {
    bool: Annotated[bool, Strict()],
    int: Annotated[int, Strict(), BeforeValidator(_whole)],  # 3.0 is an integer, "3" is none
    float: Annotated[int, Strict()] | Annotated[float, Strict()],  # 3 stays 3
    str: Annotated[str, Strict()],
}


@cache
def _adapter(expected: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_strict(expected))


def _strict(expected: Any) -> Any:
    """Return an annotation for pydantic that takes a value as YAML has it, or refuses it.

    Of a union the exact type wins, so that "1" for `int | str` stays text.
    """
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return Annotated[_strict(args[0]), AfterValidator(lambda value: fitted(value, expected))]
    if origin in (Union, types.UnionType):
        # An enumeration beside `str` (optim, eval_strategy) is stricter than the `str`.
        enums = any(map(_is_enum, args))
        return Union[tuple(_strict(a) for a in args if not (enums and a is str))]  # noqa: UP007
    if _is_enum(expected):
        return Literal[tuple(m.value for m in expected)]
    if origin in (list, dict):
        return list[_strict(args[0])] if origin is list else dict[Any, _strict(args[1])]
    if origin is Literal or expected in (list, dict, type(None)):
        return expected
    return _STRICT.get(expected, Any)  # the constructor of a library's class judges
