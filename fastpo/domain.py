"""Domains of numbers: an annotation beside a default, `beta: Positive = 0.1`, and its one check."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union

from torch import Tensor


class Misfit(ValueError):
    """A value is outside its annotation; the text goes after the value: `must be above 0`."""


@dataclass(frozen=True)
class Domain:
    """Finite numbers between two ends.

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

    def check(self, name: str, value: float) -> float:
        """`value`, or ValueError with its name: for functions that are called by themselves."""
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
        if math.isfinite(as_float) and self.holds(value):
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

# Grades of responses. 2^100 is what float32 still multiplies by a discount.
Probabilities = Annotated[Tensor, Domain(0, 1)]
NonNegatives = Annotated[Tensor, Domain(0)]
Exponents = Annotated[Tensor, Domain(high=100)]
Gains = Annotated[Tensor, Domain(0, 100)]


def options(expected: Any) -> tuple[Any, ...]:
    """The members of a union, or the one annotation that it is."""
    union = typing.get_origin(expected) in (Union, types.UnionType)
    return typing.get_args(expected) if union else (expected,)


def domain_of(expected: Any) -> Domain | None:
    """The domain that an annotation declares, itself or in a union."""
    for option in options(expected):
        for extra in getattr(option, "__metadata__", ()):
            if isinstance(extra, Domain):
                return extra
    return None


def in_words(expected: Any) -> str:
    """Return what a value of this annotation must be: `a number above 0, or None`."""
    words = []
    for option in options(expected):
        base = typing.get_args(option)[0] if domain_of(option) else option
        named = {float: "a number", int: "an integer", bool: "true or false", type(None): "null"}
        if typing.get_origin(base) is Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(base))))
        else:
            domain = domain_of(option)
            words.append(named.get(base, "text") + (f" {domain}" if domain else ""))
    return ", or ".join(words)


def moved(value: Any, expected: Any) -> Any:
    """A hyper-parameter as its annotation has it; of a number also two, [first, last].

    Between those it moves over training: both are in the domain, and they return as a tuple.

    Raises:
        Misfit: as `fitted`, or a list that is not two numbers.
    """
    numbers = [o for o in options(expected) if (typing.get_args(o) or (o,))[0] is float]
    if not isinstance(value, list | tuple) or not numbers:
        return fitted(value, expected)
    if len(value) != 2:
        raise Misfit("must be one number, or two that it moves between over training")
    return tuple(fitted(end, numbers[0]) for end in value)


def fitted(value: Any, expected: Any) -> Any:
    """`value` as its annotation has it: 3.0 is an integer too, true is no number.

    Raises:
        Misfit: another type, NaN or an infinity, or a number outside the domain.
    """
    if expected is Any:
        return value
    misfit = None
    for option in options(expected):
        domain = domain_of(option)
        base = typing.get_args(option)[0] if domain else option
        if base in (float, int):
            if isinstance(value, bool) or not isinstance(value, Real):
                continue
            if base is int and not isinstance(value, Integral):
                if not float(value).is_integer():
                    continue
                value = int(float(value))
            misfit = (domain or FINITE).misfit(value)
            if misfit is None:
                return value
        elif typing.get_origin(base) is Literal:
            if value in typing.get_args(base):
                return value
        elif base is type(None):
            if value is None:
                return value
        elif isinstance(base, type) and isinstance(value, base):
            return value
    raise Misfit(misfit or f"must be {in_words(expected)}")
