"""Recipes: one flat YAML mapping, `--flag value` on top of it, checked before anything is loaded.

The keys are the fields of `ModelSection`, `DataSection`, `ReportSection` and `PreferenceConfig`,
and the hyper-parameters of the chosen objective (`beta: 0.1` is `objective_args: {beta: 0.1}`).
A flag reaches into a mapping with a dot: `--lora.r 32`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpo.recipe.checks import check_hyper, check_lora, complete, complete_model
from fastpo.recipe.keys import fields_of_recipe, types_of
from fastpo.recipe.merge import merge, merge_objectives
from fastpo.recipe.reading import read_file, read_flags
from fastpo.recipe.values import RecipeError, checked
from fastpo.redact import redact, refuse_redacted
from fastpo.run.folder import RECIPE, write_sealed
from fastpo.train.sections import DataSection, ModelSection, ReportSection
from fastpo.yaml_text import written

if typing.TYPE_CHECKING:
    from fastpo.train.config import PreferenceConfig

S = typing.TypeVar("S")


@dataclass
class Recipe:
    """A checked recipe.

    Args:
        model: the model section.
        data: the data section.
        report: the report section.
        settings: every key in force that is not a default, in the order of the classes.
        hyper: the hyper-parameters in force, defaults included, by objective.
        places: where each key was set, for messages.
    """

    model: ModelSection
    data: DataSection
    report: ReportSection
    settings: dict[str, Any]
    hyper: dict[str, dict[str, object]]
    places: dict[str, str]

    def config(self) -> PreferenceConfig:
        """Return the trainer's configuration. It picks a device: nothing before this call does.

        Raises:
            RecipeError: a value that only `PreferenceConfig` can judge.
        """
        from fastpo.train.config import PreferenceConfig

        names = {f.name for f in dataclasses.fields(PreferenceConfig) if f.init}
        try:
            return PreferenceConfig(**{k: v for k, v in self.settings.items() if k in names})
        except (TypeError, ValueError) as error:
            raise RecipeError(_placed(str(error), self.places)) from error

    def save(self, folder: str | Path) -> Path:
        """Write recipe.yaml, which trains the same run again, into `folder`; secrets are left out.

        Raises:
            ValueError: a recipe.yaml there that this tool did not write, or that was edited.
        """
        from fastpo.run.record import environment

        path = Path(folder) / RECIPE
        path.parent.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{k} {v}" for k, v in environment()["versions"].items())
        write_sealed(path, f"# {versions}\n{written(redact(self.settings))}")
        return path


def load_recipe(path: str | Path | None, argv: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe: the file first, the flags on top.

    Args:
        path: the YAML file, or None for a run described by flags alone.
        argv: flags as they stand on the command line.

    Raises:
        RecipeError: every unknown key, else the first value that does not fit its key.
    """
    layers = read_file(path) if path is not None else {}, read_flags(argv)
    keys = fields_of_recipe()

    from fastpo.train.config import PreferenceConfig

    default = next(f.default for f in dataclasses.fields(PreferenceConfig) if f.name == "objective")
    beside = None if path is None else Path(path).parent
    objectives, names = merge_objectives(layers, keys, str(default), beside)
    values, problems = merge(layers, keys, str(default), objectives)
    for required in ("model", "dataset"):
        if required not in values:
            named = ", and dataset_name is one of its configurations"
            hint = named if required == "dataset" and "dataset_name" in values else ""
            problems.append(f"{path or 'flags'}: {required} is missing{hint}")
    if problems:
        raise RecipeError("\n".join(problems))

    for name, entry in values.items():
        refuse_redacted(name, entry.value, entry.where)
    settings = {name: checked(name, values[name], keys[name]) for name in keys if name in values}
    hyper = check_hyper(settings, values, objectives)
    # Written out, so that a recipe means the same when a default changes one day.
    mixture = settings.get("objective")
    mixed = isinstance(mixture, dict)
    settings["objective"] = dict(zip(names, mixture.values(), strict=True)) if mixed else names[0]
    settings["objective_args"] = {
        f"{name}.{key}" if len(objectives) > 1 else key: value
        for name, hyper_of in hyper.items()
        for key, value in hyper_of.items()
    }
    places = {name: entry.where for name, entry in values.items()}
    places |= values["objective_args"].parts if "objective_args" in values else {}
    if isinstance(settings.get("lora"), dict):
        settings["lora"] = check_lora(values["lora"])
    try:
        model, data, report = (
            _section(ModelSection, settings),
            _section(DataSection, settings),
            _section(ReportSection, settings),
        )
    except ValueError as error:
        raise RecipeError(_placed(str(error), places)) from error
    complete_model(model, settings, values)
    complete(data, settings, values, Path(path).stem if path is not None else "-".join(objectives))
    return Recipe(model, data, report, settings, hyper, places)


def _section(cls: type[S], settings: Mapping[str, Any]) -> S:
    return cls(**{name: settings[name] for name in types_of(cls) if name in settings})


def _placed(message: str, places: Mapping[str, str]) -> str:
    """Return `message`, which begins with a key, after the place where the key was set."""
    key = re.match(r"(?:--)?(\w*)", message)
    place = places.get(key[1]) if key else None
    return f"{place}: {message}" if place else message
