"""Arguments of `peft.LoraConfig`, which takes a rank of 0 or a dropout of 7 without a word."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from fastpo.objectives.domain import Count, Misfit, Positive, ProperShare, fitted

# Drawn from data by functions of peft, whose tensors no recipe can hold.
_FROM_DATA = ("eva", "corda", "lora_ga")
NUMBERS: dict[str, Any] = {"r": Count, "lora_alpha": Positive, "lora_dropout": ProperShare}


def lora_faults(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of arguments that `LoraConfig` has not, or whose values make no adapter, and why."""
    from peft import LoraConfig

    known = [f.name for f in fields(LoraConfig) if f.init]
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            yield name, f"lora has no argument {name!r}; {hint}"
        elif name == "init_lora_weights" and str(value).lower() in _FROM_DATA:
            yield (
                name,
                f"lora.{name} = {value!r} is drawn from data by a function of peft, which nothing "
                "here calls: take 'pissa', 'olora' or true, or give PreferenceTrainer the model",
            )
        elif name in NUMBERS:
            try:
                fitted(value, NUMBERS[name])
            except Misfit as misfit:
                yield name, f"lora.{name} = {value!r} {misfit}"
