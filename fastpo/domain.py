"""What values a setting may have: an annotation beside a default, `beta: Positive = 0.1`.

Objectives and the dataclasses of settings are checked here; recipes, whose values are YAML's, by
pydantic with the same domains and words. A number's annotation may carry a `Domain`, and text's the
only words that it may be: `Annotated[str, Literal["auto"]]`, for readers of annotations that want
one plain type beside None.
"""

from __future__ import annotations

import enum
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union

from fastpo.errors import did_you_mean

if typing.TYPE_CHECKING:
    from torch import Tensor

Number = typing.TypeVar("Number", bound="float | Tensor")


class Misfit(ValueError):
    """Say that a value is outside its annotation; follows the value: `must be above 0`."""


class OtherType(Misfit):
    """Say that a value is of none of its annotation's types, or none of its words."""


@dataclass(frozen=True)
class Domain:
    """Hold the finite numbers between two ends.

    Args:
        low, high: the ends.
        open_low, open_high: whether an end itself is outside.
        besides: one number more, such as the -1 of `max_steps`.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    besides: float | None = None

    def holds(self, x: Any) -> Any:
        """Return whether a number is inside, or which numbers of a tensor are."""
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return ((x > -math.inf) & (x < math.inf) & above & below) | (x == self.besides)

    def __str__(self) -> str:
        if self.high < math.inf and self.low > -math.inf:
            left, right = "[("[self.open_low], "])"[self.open_high]
            words = f"in {left}{_short(self.low)}, {_short(self.high)}{right}"
        elif self.low > -math.inf:
            words = f"{'above' if self.open_low else 'at least'} {_short(self.low)}"
        elif self.high < math.inf:
            words = f"{'below' if self.open_high else 'at most'} {_short(self.high)}"
        else:
            words = "finite"
        return words if self.besides is None else f"{words}, or {_short(self.besides)}"

    def check(self, name: str, value: Number) -> Number:
        """Return `value`, or raise ValueError with its name: for functions without an engine."""
        from torch import Tensor  # rows of data are read without torch

        scalar = isinstance(value, Tensor) and value.dim() == 0
        if isinstance(value, bool) or not (scalar or isinstance(value, Real)):
            raise ValueError(f"{name}={value!r} must be a number {self}")
        if misfit := self.misfit(value):
            raise ValueError(f"{name}={value!r} {misfit}")
        return value

    def misfit(self, value: Any) -> str | None:
        """Return what a number must be, or None where it is."""
        try:
            as_float = float(value)
        except OverflowError:  # an integer of hundreds of digits
            as_float = math.inf
        if self.holds(value) and as_float < math.inf:
            return None
        finite = "finite and " if math.isinf(as_float) and self != FINITE else ""
        return f"must be {finite}{self}"


def _short(x: float) -> str:
    return str(int(x)) if float(x).is_integer() else f"{x:g}"


FINITE = Domain()
FLIP_RATE = Domain(0, 0.5, open_high=True)
POSITIVE_FLIP_RATE = Domain(0, 0.5, open_low=True, open_high=True)

Positive = Annotated[float, Domain(0, open_low=True)]
NonNegative = Annotated[float, Domain(0)]
Negative = Annotated[float, Domain(high=0, open_high=True)]
Share = Annotated[float, Domain(0, 1)]
ProperShare = Annotated[float, Domain(0, 1, open_high=True)]
FlipRate = Annotated[float, FLIP_RATE]
PositiveFlipRate = Annotated[float, POSITIVE_FLIP_RATE]
Count = Annotated[int, Domain(1)]
Natural = Annotated[int, Domain(0)]
Auto = Annotated[str, Literal["auto"]]


def options(expected: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one annotation that it is.

    Text beside an enumeration (`OptimizerNames | str`) is one of its words, and no member.
    """
    if typing.get_origin(expected) not in (Union, types.UnionType):
        return (expected,)
    members = typing.get_args(expected)
    return tuple(m for m in members if m is not str or not any(map(is_enum, members)))


def is_enum(expected: Any) -> bool:
    """Return whether an annotation is an enumeration."""
    return isinstance(expected, type) and issubclass(expected, enum.Enum)


def domain_of(expected: Any) -> Domain | None:
    """Return the domain that an annotation declares, itself or in a union."""
    for option in options(expected):
        for extra in getattr(option, "__metadata__", ()):
            if isinstance(extra, Domain):
                return extra
    return None


def number_types(expected: Any) -> set[type]:
    """Return which of float and int an annotation has."""
    return {kind for kind in (float, int) if kind in map(plain_of, options(expected))}


def plain_of(option: Any) -> Any:
    """Return a member of a union without its domain; of text with words, the words."""
    extras = getattr(option, "__metadata__", ())
    words = (extra for extra in extras if typing.get_origin(extra) is Literal)
    return next(words, typing.get_args(option)[0]) if extras else option


def choices(expected: Any) -> list[Any]:
    """Return the values that an annotation enumerates, if any."""
    listed = []
    for plain in map(plain_of, options(expected)):
        if typing.get_origin(plain) is Literal:
            listed += typing.get_args(plain)
        elif is_enum(plain):
            listed += [member.value for member in plain]
    return listed


_WORDS = {
    **{float: "a number", int: "an integer", bool: "true or false", str: "text"},
    **{type(None): "null", list: "a list", dict: "a mapping", Mapping: "a mapping"},
}


def in_words(expected: Any) -> str:
    """Return what a value of this annotation must be: `a number above 0 or null`."""
    words = []
    both = {"true", "false"} <= set(map(str, choices(expected)))
    for option in options(expected):
        plain, domain = plain_of(option), domain_of(option)
        if listed := choices(option):
            more = f" and {len(listed) - 8} more" if is_enum(plain) and len(listed) > 8 else ""
            shown = ", ".join(map(str, listed[:8] if more else listed))
            words.append(f"one of {shown}{more}" if len(listed) > 1 else shown)
        elif not (plain is bool and both):
            name = getattr(plain, "__name__", str(plain))
            word = _WORDS.get(typing.get_origin(plain) or plain, name)
            words.append(f"{word} {domain}" if domain else word)
    return " or ".join(dict.fromkeys(words))


def moved(value: Any, expected: Any) -> Any:
    """Return a hyper-parameter as its annotation has it; of a number also two, [first, last].

    Between those it moves over training: both are in the domain, and they return as a tuple.

    Raises:
        Misfit: as `fitted`, or a list that is not two numbers.
    """
    numbers = [o for o in options(expected) if plain_of(o) is float]
    if not isinstance(value, list | tuple) or not numbers:
        return fitted(value, expected)
    if len(value) != 2:
        raise Misfit("must be one number, or two that it moves between over training")
    return tuple(fitted(end, numbers[0]) for end in value)


def fitted(value: Any, expected: Any) -> Any:
    """Return `value` as its annotation has it: 3.0 is an integer too, true is no number.

    Args:
        value: any object; a path is text too.
        expected: the annotation; of a union the first member that takes the value does.

    Raises:
        Misfit: a number outside the domain, NaN or an infinity; `OtherType`: anything else.
    """
    outside = None
    for option in options(expected):
        try:
            return _as_member(value, plain_of(option), domain_of(option))
        except OtherType:
            continue
        except Misfit as misfit:
            outside = outside or misfit
    if outside is not None:
        raise outside
    near = did_you_mean(value, map(str, choices(expected))) if isinstance(value, str) else ""
    raise OtherType(f"must be {in_words(expected)}{'; ' if near else ''}{near}")


def _as_member(value: Any, plain: Any, domain: Domain | None) -> Any:
    """Return a value as one member of a union has it; raises Misfit."""
    kind, parts = typing.get_origin(plain) or plain, typing.get_args(plain)
    if kind in (Union, types.UnionType):  # inside of Annotated
        value = fitted(value, plain)
        return value if value is None or domain is None else _as_number(value, float, domain)
    if plain in (float, int):
        return _as_number(value, plain, domain or FINITE)
    if plain is bool and type(value).__module__ == "numpy" and getattr(value, "shape", 0) == ():
        return fitted(value.item(), bool)
    if isinstance(value, os.PathLike) and plain is str:
        return os.fspath(value)
    if kind is Literal or is_enum(plain):
        words = choices(plain)
        if any(isinstance(value, type(word)) and value == word for word in words):
            return value
        if is_enum(plain) and isinstance(value, plain):
            return value
    elif kind is list and isinstance(value, list | tuple):
        return [fitted(v, parts[0]) for v in value] if parts else value
    elif kind is dict and isinstance(value, Mapping):
        # Whoever has names for keys refuses others by themselves.
        item = parts[1] if parts else Any
        return {k: fitted(v, item) for k, v in value.items()}
    elif _cannot_judge(kind) or isinstance(value, kind):
        return value
    raise OtherType


def _cannot_judge(kind: Any) -> bool:
    """Return whether no value can be asked for its type: a NewType, a protocol, Any."""
    return (
        not isinstance(kind, type)
        or kind is Any
        or getattr(kind, "_is_protocol", False)
        or typing.is_typeddict(kind)
    )


def _as_number(value: Any, plain: type, domain: Domain) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OtherType
    if type(value).__module__ == "numpy":
        value = typing.cast(Any, value).item()  # settings are written as JSON
    if plain is int and not isinstance(value, Integral):
        if not float(value).is_integer():
            raise OtherType
        value = int(float(value))
    if misfit := domain.misfit(value):
        raise Misfit(misfit)
    return value


def fitted_as(name: str, value: Any, expected: Any) -> Any:
    """Return `value` as its annotation has it; ValueError names it and says what it must be."""
    try:
        return fitted(value, expected)
    except Misfit as misfit:
        raise ValueError(f"{name}={value!r} {misfit}") from None


def fit_fields(settings: object, expected: Mapping[str, Any], before: str = "") -> None:
    """Give fields of a dataclass their values as annotations have them.

    Args:
        settings: the dataclass, frozen ones included.
        expected: the annotations of the fields to check.
        before: what the error says before the field's name.

    Raises:
        ValueError: a value that is outside its annotation; names the field and the value.
    """
    for name, kind in expected.items():
        vars(settings)[name] = fitted_as(f"{before}{name}", getattr(settings, name), kind)
