"""Check the values of recipes and flags against type annotations."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import AfterValidator, BeforeValidator, Strict, TypeAdapter, ValidationError

from fastpo.domain import (
    Misfit,
    choices,
    domain_of,
    fitted,
    in_words,
    is_enum,
    options,
    plain_of,
)
from fastpo.errors import nearest
from fastpo.redact import REDACTED, is_secret


class RecipeError(ValueError):
    """Say what is wrong in a recipe or a flag; one line per problem, each naming its place."""


class Entry(NamedTuple):
    """Hold a value that a file or a flag sets."""

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
            return _adapter(expected).validate_python(value)
        except ValidationError as error:
            causes = (each.get("ctx", {}).get("error") for each in error.errors())
            misfit = next((cause for cause in causes if isinstance(cause, Misfit)), None)
            if misfit is not None:
                raise RecipeError(f"{entry.where}: {name} = {shown} {misfit}") from None
    hint = nearest(entry.value, map(str, choices(expected)))
    raise RecipeError(
        f"{entry.where}: {name} = {shown} ({type(entry.value).__name__}), "
        f"expected {in_words(expected)}.{hint}"
    )


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
    if origin is Annotated and domain_of(expected) is None:
        return plain_of(expected)  # text of few words
    if origin is Annotated:
        return Annotated[_strict(args[0]), AfterValidator(lambda value: fitted(value, expected))]
    if origin in (Union, types.UnionType):
        return Union[tuple(_strict(member) for member in options(expected))]  # noqa: UP007
    if is_enum(expected):
        return Literal[tuple(m.value for m in expected)]
    if origin in (list, dict):
        return list[_strict(args[0])] if origin is list else dict[Any, _strict(args[1])]
    if origin is Literal or expected in (list, dict, type(None)):
        return expected
    return _STRICT.get(expected, Any)  # the constructor of a library's class judges
