"""Check arguments of `peft.LoraConfig`, which accepts a rank of 0 or a dropout of 7."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from fastpo.domain import Count, Misfit, Positive, ProperShare, fitted
from fastpo.errors import did_you_mean

# Drawn from data by functions of peft, whose tensors no recipe can hold.
_FROM_DATA = ("eva", "corda", "lora_ga")
# By the pattern of a module's name.
PATTERNS: dict[str, object] = {"rank_pattern": Count, "alpha_pattern": Positive}
NUMBERS: dict[str, object] = {"r": Count, "lora_alpha": Positive, "lora_dropout": ProperShare}


def lora_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) of arguments that `LoraConfig` lacks or whose values make no adapter."""
    from peft import LoraConfig

    known = [f.name for f in fields(LoraConfig) if f.init]
    for name, value in arguments.items():
        if name not in known:
            hint = did_you_mean(name, known, f"it has {', '.join(sorted(known))}", cutoff=0.5)
            yield name, f"lora has no argument {name!r}; {hint}"
        elif name == "init_lora_weights" and str(value).lower() in _FROM_DATA:
            yield (
                name,
                f"lora.{name} = {value!r} is drawn from data by a function of peft, which nothing "
                "here calls: take 'pissa', 'olora' or true, or give PreferenceTrainer the model",
            )
        elif name in NUMBERS:
            yield from _misfits(name, name, value, NUMBERS[name])
        elif name in ("target_modules", "exclude_modules") and isinstance(value, str):
            yield from _bad_pattern(name, value)
        elif name in PATTERNS and isinstance(value, Mapping):
            for pattern, number in value.items():
                yield from _bad_pattern(name, str(pattern))
                yield from _misfits(name, f"{name}[{pattern!r}]", number, PATTERNS[name])


def _misfits(name: str, shown: str, value: Any, expected: Any) -> Iterator[tuple[str, str]]:
    try:
        fitted(value, expected)
    except Misfit as misfit:
        yield name, f"lora.{shown} = {value!r} {misfit}"


def _bad_pattern(name: str, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield faults of a pattern; peft takes any string for one regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        yield name, f"lora.{name} = {pattern!r} is no regular expression: {error}"
        return
    if re.fullmatch(r"[\w.]+([ ,]+[\w.]+)+", pattern):
        names = ", ".join(re.split(r"[ ,]+", pattern))
        yield (
            name,
            f"lora.{name} = {pattern!r} is one regular expression: give a list of names: [{names}]",
        )
    elif pattern == "all":
        yield name, f"lora.{name} = 'all': did you mean 'all-linear'?"
