"""Check what the keys of a recipe say together, and fill in what follows from them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from fastpo.domain import Misfit
from fastpo.model.lora import NUMBERS, lora_faults
from fastpo.recipe.values import Entry, RecipeError, checked
from fastpo.train.elsewhere import unknown
from fastpo.train.sections import DataSection, ModelSection

if typing.TYPE_CHECKING:
    from fastpo.objectives.base import Objective


def check_hyper(
    settings: Mapping[str, Any], values: Mapping[str, Entry], objectives: Mapping[str, Objective]
) -> dict[str, dict[str, object]]:
    """Return the hyper-parameters in force by objective: objective_args over the defaults.

    Raises:
        RecipeError: one that no objective has, or a value that it cannot have.
    """
    in_force: dict[str, dict[str, object]] = {name: dict(o.hyper) for name, o in objectives.items()}
    args = settings.get("objective_args") or {}
    if not isinstance(args, Mapping):
        where = values["objective_args"].where
        raise RecipeError(f"{where}: objective_args = {args!r} is no mapping of names to values")
    for key in sorted(args, key=lambda k: "." in str(k)):  # the particular after the general
        place = values["objective_args"].place(key)
        owner, dot, name = str(key).partition(".")
        owners = [owner] if dot else [o for o in objectives if key in objectives[o].hyper]
        name = name if dot else str(key)
        if (dot and owner not in objectives) or (not dot and key in objectives):
            raise RecipeError(
                f"{place}: objective_args: {key!r} is no hyper-parameter of "
                f"{' + '.join(objectives)}: one of a mixture's is written as "
                f"{next(iter(objectives))}.beta: 0.1"
            )
        if not owners or owners[0] not in objectives or name not in objectives[owners[0]].hyper:
            raise RecipeError(
                f"{place}: objective_args: {unknown(name, args[key], (), objectives)}"
            )
        for o in owners:
            try:
                value = objectives[o].fitted(name, args[key])
            except Misfit as misfit:
                raise RecipeError(f"{place}: {key} = {args[key]!r} {misfit}") from None
            in_force[o][name] = list(value) if isinstance(value, tuple) else value
    return in_force


def check_lora(entry: Entry) -> dict[str, object]:
    """Return arguments of `peft.LoraConfig` with the types that it has.

    Raises:
        RecipeError: an argument that it lacks, or a value that makes no adapter.
    """
    from peft import LoraConfig

    for name, fault in lora_faults(entry.value):
        raise RecipeError(f"{entry.place(name)}: {fault}")
    # Some initialisations are patterns, pissa_niter_4: peft itself judges them.
    types = typing.get_type_hints(LoraConfig) | NUMBERS | {"init_lora_weights": Any}
    return {
        name: checked(f"lora.{name}", Entry(value, entry.place(name)), types[name])
        for name, value in entry.value.items()
    }


def complete_model(
    model: ModelSection, settings: dict[str, Any], values: Mapping[str, Entry]
) -> None:
    """Fill in what the folders say that the recipe names.

    Raises:
        RecipeError: a folder that is not there, or settings that do not fit what lies in it.
    """
    from fastpo.model.load import check_place, trained_adapter

    for key in ("model", "ref_model", "ref_model2"):
        named = getattr(model, key)
        try:
            if isinstance(named, dict):
                from fastpo.model.merge import check_shares

                check_shares(named)
            for name in [named] if isinstance(named, str) else named or ():
                check_place(name)
        except ValueError as error:
            raise RecipeError(f"{values[key].where}: {key}: {error}") from error
    adapter = trained_adapter(model.model)
    if adapter is not None and model.random_init:
        raise RecipeError(
            f"{values['random_init'].where}: random_init = true, but {model.model} is an adapter: "
            "name a model, and add lora"
        )
    if adapter is None:
        needs = {
            "quantization": model.quantization is not None,
            "reference": settings.get("reference") == "adapter",
        }
        for key in (key for key, needed in needs.items() if needed and not model.lora):
            raise RecipeError(
                f"{values[key].where}: {key} = {settings[key]!r} needs an adapter: add lora: "
                "true (or its arguments)"
            )
        if not model.lora and model.dtype == "auto":
            # Of bfloat16 weights a step of 1e-5 changes hardly any.
            model.dtype = settings["dtype"] = "float32"
        return
    if model.lora:
        raise RecipeError(
            f"{values['lora'].where}: lora = {model.lora!r}, but {model.model} is an adapter, and "
            "that one is trained on: drop lora, or merge it first with `fastpo merge`"
        )
    if adapter.gguf_file is not None:
        model.gguf_file = settings.setdefault("gguf_file", adapter.gguf_file)


def complete(
    data: DataSection, settings: dict[str, Any], values: Mapping[str, Entry], name: str
) -> None:
    """Fill in what follows from other keys, and refuse what the Trainer would refuse much later.

    Raises:
        RecipeError: evaluations without rows for them, or a stream without `max_steps`.
    """
    settings.setdefault("output_dir", f"runs/{name}")
    settings.setdefault("num_samples", 3)
    stops_early = settings.get("early_stopping_patience") is not None
    if stops_early and data.evaluates:
        settings.setdefault("load_best_model_at_end", True)
    best = settings.get("load_best_model_at_end", False)
    if data.evaluates:
        if settings.setdefault("eval_strategy", "steps") == "steps":
            # Below one, the Trainer reads eval_steps as a share of the run: five evaluations.
            settings.setdefault("eval_steps", settings.get("save_steps", 0.2) if best else 0.2)
        if best:  # among the checkpoints, so each evaluation has one
            settings.setdefault("save_strategy", settings["eval_strategy"])
            if "eval_steps" in settings:
                settings.setdefault("save_steps", settings["eval_steps"])
    else:
        for key, unset in (
            ("eval_strategy", "no"),
            ("load_best_model_at_end", False),
            ("early_stopping_patience", None),
        ):
            if settings.get(key, unset) != unset:
                raise RecipeError(
                    f"{values[key].where}: {key} = {settings[key]!r}, but no rows are held out: "
                    "give eval_dataset, eval_split or eval_fraction"
                )
    if data.streaming and settings.get("max_steps", -1) < 1:
        raise RecipeError("streaming = true needs max_steps: a stream has no length")
