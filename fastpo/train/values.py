"""Values of recipes and flags: YAML 1.2 scalars, checked against type annotations.

`5e-7` is a number and `no` is the word that `eval_strategy` takes; PyYAML's own rules, those of
YAML 1.1, read them as text and as false, and `010` as eight.
"""

from __future__ import annotations

import difflib
import enum
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union

import yaml

from fastpo.objectives.domain import Misfit, fitted
from fastpo.redact import REDACTED, is_secret


class RecipeError(ValueError):
    """Something in a recipe or a flag is wrong; one line per problem, each naming its place."""


_OLDER = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "timestamp")}


class Loader(yaml.SafeLoader):
    """YAML 1.2 core scalars: 5e-7 is a float, 010 is ten, 1:30 and 2026-01-01 are text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0] not in _OLDER]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?\d[\d_]*|0o[0-7]+|0x[\da-fA-F]+)$"),
    list("-+0123456789"),
)


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class Dumper(yaml.SafeDumper):
    """Quotes text that PyYAML or `Loader` would read as something else, such as `1e10`."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *Loader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
    }


def written(values: Mapping[str, Any]) -> str:
    """A mapping as YAML, which `parse` reads back as it was."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


_MOST_NODES = 100_000


def _nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many nodes a node has once its aliases are written out."""
    if id(node) not in counts:
        counts[id(node)] = 0  # meanwhile: an alias inside itself
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [each for pair in node.value for each in pair]
        counts[id(node)] = 1 + sum(_nodes(child, counts) for child in children)
    if not 0 < counts[id(node)] <= _MOST_NODES:
        raise yaml.YAMLError("aliases that stand inside themselves, or for too much")
    return counts[id(node)]


def parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The node and the value of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, or YAML that no recipe can mean.
    """
    try:
        node = yaml.compose(text, Loader)
        if node is not None:
            _nodes(node, {})
        return node, yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError("brackets inside brackets without end") from None
    except ValueError as error:  # `!!int x`, an integer of thousands of digits
        raise yaml.YAMLError(str(error).partition(";")[0]) from error


def scalar(text: str) -> Any:
    """The value of a flag: YAML, and plain text where YAML sees no value (`a: b: c`, `@x`)."""
    try:
        return parse(text)[1]
    except yaml.YAMLError:
        return text


class Entry(NamedTuple):
    value: Any
    where: str
    text: str | None = None  # what was typed, for flags whose field is a string
    parts: Mapping[str, str] = types.MappingProxyType({})  # places of a mapping's own keys

    def place(self, part: object) -> str:
        """Where one key of a mapping was set."""
        return self.parts.get(str(part), self.where)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'x'?` with the most similar of `names`, or nothing if none is similar."""
    by_plain = {n.lower().replace("-", "_"): n for n in names}
    plain = name.lower().replace("-", "_")
    # `adamw` is adamw_torch cut short and no misspelt grokadamw.
    close = [n for n in by_plain if len(plain) > 2 and n.startswith(plain)]
    close = close or difflib.get_close_matches(plain, by_plain, n=1, cutoff=cutoff)
    return f" Did you mean {by_plain[close[0]]!r}?" if close else ""


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
