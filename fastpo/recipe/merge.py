"""Lay the flags of a recipe over its file: dotted keys reach into mappings."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastpo.domain import Positive, in_words
from fastpo.recipe.keys import Keys
from fastpo.recipe.values import Entry, RecipeError, checked
from fastpo.train.elsewhere import unknown

if typing.TYPE_CHECKING:
    from fastpo.objectives.base import Objective

Entries: typing.TypeAlias = Mapping[str, Entry]


def merge_objectives(
    layers: Iterable[Entries], keys: Keys, default: str, beside: Path | None = None
) -> tuple[Mapping[str, Objective], list[str]]:
    """Return the objectives that the last layer names, by their own names, and what names them.

    Args:
        layers: the file's keys, then the flags'.
        keys: every key and its type.
        default: the objective of a recipe without.
        beside: the recipe's folder, where files of a user's own may lie.

    Raises:
        RecipeError: an unknown objective, none, two of one name, or a weight that is not above 0.
    """
    from fastpo.objectives import get_objective
    from fastpo.objectives.user import is_reference, spelled

    values: dict[str, Entry] = {}
    for layer in layers:
        _lay(values, {k: e for k, e in layer.items() if _head(k) == "objective"}, keys)
    entry = values.get("objective", Entry(None, "default"))
    if "objective" in values:
        checked("objective", entry, keys["objective"])
    value = default if entry.value is None else entry.value
    weights = value if isinstance(value, Mapping) else {value: 1.0}
    objectives: dict[str, Objective] = {}
    for name, weight in weights.items():
        try:
            objective = get_objective(name, beside=beside)
        except ValueError as error:
            raise RecipeError(f"{entry.place(name)}: {error}") from error
        if objective.name in objectives:
            raise RecipeError(
                f"{entry.place(name)}: two objectives of the mixture are called "
                f"{objective.name!r}: rename one"
            )
        checked(f"objective.{name}", Entry(weight, entry.place(name)), Positive)
        objectives[objective.name] = objective
    if not weights:
        raise RecipeError(f"{entry.where}: objective = {{}} names no objective")
    return objectives, [spelled(n, beside) if is_reference(n) else n for n in weights]


def merge(
    layers: Iterable[Entries], keys: Keys, objectives: Mapping[str, Objective]
) -> tuple[dict[str, Entry], list[str]]:
    """Return the values in force, of the last layer that sets them, and a line an unknown key."""
    values: dict[str, Entry] = {}
    problems: list[str] = []
    for layer in layers:
        placed = _place_hyper(layer, objectives, keys)
        problems += [
            f"{entry.where}: {unknown(key, entry.value, keys, objectives)}"
            for key, entry in placed.items()
            if _head(key) not in keys
        ]
        _forget_particulars(values, placed)
        _lay(values, {k: e for k, e in placed.items() if _head(k) in keys}, keys)
    return values, problems


def _head(key: str) -> str:
    return key.partition(".")[0]


def _place_hyper(
    entries: Entries, objectives: Mapping[str, Objective], keys: Keys
) -> dict[str, Entry]:
    """Rewrite `beta` and `dpo.beta` as `objective_args.beta` and `objective_args.dpo.beta`."""
    placed: dict[str, Entry] = {}
    for key, entry in entries.items():
        is_hyper = _head(key) in objectives or any(key in o.hyper for o in objectives.values())
        if _head(key) not in keys and is_hyper:
            key = f"objective_args.{key}"
        if key in placed:
            raise RecipeError(f"{entry.where}: {key} was already set at {placed[key].where}")
        placed[key] = entry
    inside = entries.get("objective_args")
    if inside is not None and isinstance(inside.value, Mapping):
        for name in inside.value:
            twice = placed.get(f"objective_args.{name}")
            if twice is not None:
                raise RecipeError(
                    f"{twice.where}: {name} is also in objective_args at {inside.where}"
                )
    return placed


def _lay(values: dict[str, Entry], entries: Entries, keys: Keys) -> None:
    """Lay `entries` over `values`; dotted keys change one item of a mapping."""
    for key, entry in entries.items():
        head, dot, part = key.partition(".")
        if not dot:
            values[head] = entry
            continue
        if head in keys and not _takes_mapping(keys[head]):
            raise RecipeError(
                f"{entry.where}: {head} takes {in_words(keys[head])} and has no part {part!r}"
            )
        before = values.get(head)
        if head == "objective" and before is not None and isinstance(before.value, str):
            before = Entry({before.value: 1.0}, before.where)  # --objective.sft adds
        if before is not None and isinstance(before.value, Mapping):
            where = ", ".join(dict.fromkeys((*before.where.split(", "), entry.where)))
            parts = {**before.parts, part: entry.where}
            values[head] = Entry({**before.value, part: entry.value}, where, parts=parts)
        else:
            values[head] = Entry({part: entry.value}, entry.where, parts={part: entry.where})


def _takes_mapping(kind: object) -> bool:
    return any((typing.get_origin(k) or k) is dict for k in (*typing.get_args(kind), kind))


def _forget_particulars(values: dict[str, Entry], flags: Entries) -> None:
    """Drop `dpo.beta: 0.1` of a file for `--beta 0.2`, over which the particular would win."""
    before = values.get("objective_args")
    if before is not None and isinstance(before.value, Mapping):
        kept = {
            key: value
            for key, value in before.value.items()
            if f"objective_args.{str(key).rpartition('.')[2]}" not in flags
        }
        values["objective_args"] = before._replace(value=kept)
