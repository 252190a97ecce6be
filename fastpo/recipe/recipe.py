"""Recipes: one flat YAML mapping, `--flag value` on top of it, checked before anything is loaded.

The keys are the fields of `ModelSection`, `DataSection`, `ReportSection` and `PreferenceConfig`,
and the hyper-parameters of the chosen objective (`beta: 0.1` is `objective_args: {beta: 0.1}`).
A flag reaches into a mapping with a dot: `--lora.r 32`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastpo.model.lora import NUMBERS, lora_faults
from fastpo.objectives.domain import Misfit, Positive
from fastpo.reading import read_text, told
from fastpo.recipe.values import Entry, RecipeError, checked, describe
from fastpo.redact import is_secret, learn, redact, refuse_redacted
from fastpo.run.folder import RECIPE, write_sealed
from fastpo.train.elsewhere import unknown
from fastpo.train.sections import SECTIONS, DataSection, ModelSection, ReportSection
from fastpo.yaml_text import parse, scalar, written

if typing.TYPE_CHECKING:
    from fastpo.objectives.base import Objective
    from fastpo.train.config import PreferenceConfig


@dataclass
class Recipe:
    """A checked recipe.

    Args:
        model: the model section.
        data: the data section.
        report: the report section.
        given: every key that the file or a flag set, in the order of the classes.
        hyper: the hyper-parameters in force, defaults included, by objective.
        places: where each key was set, for messages.
    """

    model: ModelSection
    data: DataSection
    report: ReportSection
    given: dict[str, Any]
    hyper: dict[str, dict[str, Any]]
    places: dict[str, str]

    def config(self) -> PreferenceConfig:
        """The trainer's configuration. It picks a device, so nothing before this call does.

        Raises:
            RecipeError: a value that only `PreferenceConfig` can judge.
        """
        from fastpo.train.config import PreferenceConfig

        own = {f.name for f in dataclasses.fields(PreferenceConfig) if f.init}
        try:
            return PreferenceConfig(**{k: v for k, v in self.given.items() if k in own})
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
        given = redact(self.given)
        write_sealed(path, f"# {versions}\n{written(given)}")
        return path


def _placed(message: str, places: Mapping[str, str]) -> str:
    """`message`, which begins with a key, after the place where the key was set."""
    key = re.match(r"(?:--)?(\w*)", message)
    place = places.get(key[1]) if key else None
    return f"{place}: {message}" if place else message


def read_file(path: str | Path) -> dict[str, Entry]:
    """The keys of a recipe file with their line numbers.

    Raises:
        RecipeError: no such file, not YAML, not a mapping, or a key that occurs twice.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except ValueError as error:
        reason = told(error.__cause__ or error)
        raise RecipeError(f"{path}: {reason}; a recipe is a UTF-8 text file") from error
    try:
        root, values = parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        at_fault = text.splitlines()[mark.line : mark.line + 1] if mark else []
        key = "".join(at_fault).partition(":")[0].strip()
        if is_secret(key):  # the reason may quote a part of it
            reason = f"put the value of {key} in quotes"
        raise RecipeError(f"{path}{line}: not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {root.id}")  # type: ignore[union-attr]
    learn(values)
    lines = _lines(root, str(path))
    entries = {}
    for name, value in values.items():
        parts = {k.partition(".")[2]: v for k, v in lines.items() if k.startswith(f"{name}.")}
        entries[str(name)] = Entry(value, lines.get(str(name), f"{path}:1"), parts=parts)
    return entries


def _lines(mapping: yaml.MappingNode, path: str, prefix: str = "") -> dict[str, str]:
    """Place of every key; `lora.r` for a key of a mapping inside."""
    lines: dict[str, str] = {}
    for key, value in mapping.value:
        name, place = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
        if name in lines:
            before = lines[name].rpartition(":")[2]
            raise RecipeError(f"{place}: {name!r} was already set in line {before}")
        lines[name] = place
        if isinstance(value, yaml.MappingNode):
            lines |= _lines(value, path, f"{name}.")
    return lines


def read_flags(argv: Sequence[str]) -> dict[str, Entry]:
    """`--key value`, `--key=value`, `--key a b` (a list) and `--key` (true), dashes as in shells.

    Raises:
        RecipeError: a value with no flag before it, or a flag twice.
    """
    entries: dict[str, Entry] = {}
    words = list(argv)
    learn(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise RecipeError(f"{word!r} follows no flag; flags look like --learning_rate 5e-7")
        flag, equals, text = word.partition("=")
        given = [text] if equals else []
        while not equals and words and not words[0].startswith("--"):
            given.append(words.pop(0))
        key, dot, rest = flag[2:].partition(".")
        key = key.replace("-", "_") + dot + rest
        if key in entries:
            raise RecipeError(f"{flag} is given twice: give it once")
        if len(given) == 1:
            entries[key] = Entry(scalar(given[0]), flag, given[0])
        else:
            entries[key] = Entry([scalar(w) for w in given] if given else True, flag)
    learn({key: entry.value for key, entry in entries.items()})
    return entries


def _types(cls: type) -> dict[str, Any]:
    own = getattr(cls, "annotations", None)  # PreferenceConfig's, with TrainingArguments' domains
    hints = own() if own is not None else typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def fields_of_recipe() -> dict[str, Any]:
    """Every key and its type, the sections' first; imports transformers for the trainer's."""
    from fastpo.train.config import PreferenceConfig

    table: dict[str, Any] = {}
    for cls in (*SECTIONS, PreferenceConfig):
        for name, kind in _types(cls).items():
            assert name not in table, f"{cls.__name__}.{name} repeats a key of another section"
            table[name] = kind
    # A hyper-parameter like any other here, so that a flag wins over objective_args in the file.
    del table["beta"]
    return table


def _objectives_of(
    entry: Entry, default: str, beside: Path | None
) -> tuple[dict[str, Objective], dict[str, str]]:
    """Return the objectives that a recipe names, and how a run names them, by their own names.

    Args:
        entry: the recipe's value.
        default: the objective of a recipe without.
        beside: the recipe's folder, where files of a user's own may lie.
    """
    from fastpo.objectives import get_objective
    from fastpo.objectives.user import is_reference, spelled

    value = default if entry.value is None else entry.value
    weights = value if isinstance(value, Mapping) else {value: 1.0}
    objectives: dict[str, Objective] = {}
    references: dict[str, str] = {}
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
        references[objective.name] = spelled(name, beside) if is_reference(name) else name
    if not weights:
        raise RecipeError(f"{entry.where}: objective = {{}} names no objective")
    return objectives, references


def _place_hyper(
    entries: Mapping[str, Entry], objectives: Mapping[str, Objective], keys: Iterable[str]
) -> dict[str, Entry]:
    """Rewrite `beta` and `dpo.beta` as `objective_args.beta` and `objective_args.dpo.beta`."""
    keys = set(keys)
    placed: dict[str, Entry] = {}
    for key, entry in entries.items():
        head = key.partition(".")[0]
        if head not in keys and (
            head in objectives or any(key in o.hyper for o in objectives.values())
        ):
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


def _merge(values: dict[str, Entry], entries: Mapping[str, Entry], keys: Mapping[str, Any]) -> None:
    """Lay `entries` over `values`; dotted keys change one item of a mapping."""
    for key, entry in entries.items():
        head, dot, rest = key.partition(".")
        if not dot:
            values[head] = entry
            continue
        if head in keys and not any(
            (typing.get_origin(a) or a) is dict for a in (*typing.get_args(keys[head]), keys[head])
        ):
            raise RecipeError(
                f"{entry.where}: {head} takes {describe(keys[head])} and has no part {rest!r}"
            )
        before = values.get(head)
        if head == "objective" and before is not None and isinstance(before.value, str):
            before = Entry({before.value: 1.0}, before.where)  # --objective.sft 0.1 adds to it
        if before is not None and isinstance(before.value, Mapping):
            where = ", ".join(dict.fromkeys((*before.where.split(", "), entry.where)))
            parts = {**before.parts, rest: entry.where}
            values[head] = Entry({**before.value, rest: entry.value}, where, parts=parts)
        else:
            values[head] = Entry({rest: entry.value}, entry.where, parts={rest: entry.where})


def _forget_particulars(values: dict[str, Entry], flags: Mapping[str, Entry]) -> None:
    """`--beta 0.2` wins over `dpo.beta: 0.1` of a file, although the particular one would."""
    before = values.get("objective_args")
    if before is not None and isinstance(before.value, Mapping):
        kept = {
            key: value
            for key, value in before.value.items()
            if f"objective_args.{str(key).rpartition('.')[2]}" not in flags
        }
        values["objective_args"] = before._replace(value=kept)


def load_recipe(path: str | Path | None, argv: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe: the file first, the flags on top.

    Args:
        path: the YAML file, or None for a run described by flags alone.
        argv: flags as they stand on the command line.

    Raises:
        RecipeError: every unknown key, else the first value that does not fit its key.
    """
    file_entries = read_file(path) if path is not None else {}
    flag_entries = read_flags(argv)
    keys = fields_of_recipe()

    from fastpo.train.config import PreferenceConfig

    default = next(f.default for f in dataclasses.fields(PreferenceConfig) if f.name == "objective")
    values: dict[str, Entry] = {}
    for entries in (file_entries, flag_entries):
        _merge(
            values, {k: e for k, e in entries.items() if k.partition(".")[0] == "objective"}, keys
        )
    if "objective" in values:
        checked("objective", values["objective"], keys["objective"])
    chosen = values.get("objective", Entry(None, "default"))
    beside = None if path is None else Path(path).parent
    objectives, references = _objectives_of(chosen, str(default), beside)

    problems: list[str] = []
    for entries in (file_entries, flag_entries):
        placed = _place_hyper(entries, objectives, keys)
        problems += [
            f"{entry.where}: {unknown(key, entry.value, keys, objectives)}"
            for key, entry in placed.items()
            if key.partition(".")[0] not in keys
        ]
        if entries is flag_entries:
            _forget_particulars(values, placed)
        _merge(values, {k: e for k, e in placed.items() if k.partition(".")[0] in keys}, keys)
    for required in ("model", "dataset"):
        if required not in values:
            named = ", and dataset_name is one of its configurations"
            hint = named if required == "dataset" and "dataset_name" in values else ""
            problems.append(f"{path or 'flags'}: {required} is missing{hint}")
    if problems:
        raise RecipeError("\n".join(problems))

    for name, entry in values.items():
        refuse_redacted(name, entry.value, entry.where)
    given = {name: checked(name, values[name], keys[name]) for name in keys if name in values}
    hyper = _check_hyper(given, values, objectives)
    # Written out, so that a recipe means the same when a default changes one day.
    mixture, names = given.get("objective"), list(references.values())
    if isinstance(mixture, dict):
        given["objective"] = dict(zip(names, mixture.values(), strict=True))
    else:
        given["objective"] = names[0]
    given["objective_args"] = {
        f"{name}.{key}" if len(objectives) > 1 else key: value
        for name, hyper_of in hyper.items()
        for key, value in hyper_of.items()
    }
    places = {name: entry.where for name, entry in values.items()}
    places |= values["objective_args"].parts if "objective_args" in values else {}
    if isinstance(given.get("lora"), dict):
        given["lora"] = _checked_lora(values["lora"])
    try:
        sections = [
            cls(**{name: given[name] for name in _types(cls) if name in given}) for cls in SECTIONS
        ]
    except ValueError as error:
        raise RecipeError(_placed(str(error), places)) from error
    recipe = Recipe(*sections, given=given, hyper=hyper, places=places)  # type: ignore[arg-type]
    _complete_model(recipe, values)
    _complete(recipe, Path(path).stem if path is not None else "-".join(objectives), values)
    return recipe


def _complete_model(recipe: Recipe, values: Mapping[str, Entry]) -> None:
    """What the folders say that the recipe names; refused here, before a model is read."""
    from fastpo.model.load import check_place, trained_adapter

    model, given = recipe.model, recipe.given
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
            "reference": given.get("reference") == "adapter",
        }
        for key in (key for key, needed in needs.items() if needed and not model.lora):
            raise RecipeError(
                f"{values[key].where}: {key} = {given[key]!r} needs an adapter: add lora: true (or "
                "its arguments)"
            )
        if not model.lora and model.dtype == "auto":
            # Of bfloat16 weights a step of 1e-5 changes hardly any.
            model.dtype = given["dtype"] = "float32"
        return
    if model.lora:
        raise RecipeError(
            f"{values['lora'].where}: lora = {model.lora!r}, but {model.model} is an adapter, and "
            "that one is trained on: drop lora, or merge it first with `fastpo merge`"
        )
    if adapter.gguf_file is not None:
        model.gguf_file = given.setdefault("gguf_file", adapter.gguf_file)


def _complete(recipe: Recipe, name: str, values: Mapping[str, Entry]) -> None:
    """Fill in what follows from other keys, and refuse what the Trainer would refuse much later."""
    given = recipe.given
    given.setdefault("output_dir", f"runs/{name}")
    given.setdefault("num_samples", 3)
    stops_early = given.get("early_stopping_patience") is not None
    if stops_early and recipe.data.evaluates:
        given.setdefault("load_best_model_at_end", True)
    best = given.get("load_best_model_at_end", False)
    if recipe.data.evaluates:
        if given.setdefault("eval_strategy", "steps") == "steps":
            # Below one, the Trainer reads eval_steps as a share of the run: five evaluations.
            given.setdefault("eval_steps", given.get("save_steps", 0.2) if best else 0.2)
        if best:  # among the checkpoints, so each evaluation has one
            given.setdefault("save_strategy", given["eval_strategy"])
            if "eval_steps" in given:
                given.setdefault("save_steps", given["eval_steps"])
    else:
        for key, unset in (
            ("eval_strategy", "no"),
            ("load_best_model_at_end", False),
            ("early_stopping_patience", None),
        ):
            if given.get(key, unset) != unset:
                raise RecipeError(
                    f"{values[key].where}: {key} = {given[key]!r}, but no rows are held out: give "
                    "eval_dataset, eval_split or eval_fraction"
                )
    if recipe.data.streaming and given.get("max_steps", -1) < 1:
        raise RecipeError("streaming = true needs max_steps: a stream has no length")


def _check_hyper(
    given: dict[str, Any], values: Mapping[str, Entry], objectives: Mapping[str, Objective]
) -> dict[str, dict[str, Any]]:
    """The hyper-parameters in force by objective: objective_args over the defaults."""
    in_force = {name: dict(o.hyper) for name, o in objectives.items()}
    args = given.get("objective_args") or {}
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


def _checked_lora(entry: Entry) -> dict[str, Any]:
    from peft import LoraConfig

    for name, fault in lora_faults(entry.value):
        raise RecipeError(f"{entry.place(name)}: {fault}")
    # Some initialisations are patterns, pissa_niter_4: peft itself judges them.
    types = typing.get_type_hints(LoraConfig) | NUMBERS | {"init_lora_weights": Any}
    return {
        name: checked(f"lora.{name}", Entry(value, entry.place(name)), types[name])
        for name, value in entry.value.items()
    }
