"""The keys of a recipe: fields of its sections and of `PreferenceConfig`."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Mapping

from fastpo.domain import in_words
from fastpo.errors import nearest
from fastpo.fields import summary
from fastpo.train.sections import SECTIONS

Keys: typing.TypeAlias = Mapping[str, object]
"""A key -> its type annotation."""

_WIDTH = 100


def types_of(cls: type) -> dict[str, object]:
    """Return the fields of a dataclass and their types, domains included."""
    made = getattr(cls, "annotations", None)  # PreferenceConfig's, with TrainingArguments' domains
    hints = made() if made is not None else typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def fields_of_recipe() -> dict[str, object]:
    """Return every key and its type, the sections' first; imports transformers for the trainer's.

    `beta` is no key of its own, but a hyper-parameter like any other: so a flag wins over the
    file's `objective_args`.
    """
    from fastpo.train.config import PreferenceConfig

    table: dict[str, object] = {}
    for cls in (*SECTIONS, PreferenceConfig):
        for name, kind in types_of(cls).items():
            assert name not in table, f"{cls.__name__}.{name} repeats a key of another section"
            table[name] = kind
    del table["beta"]
    return table


def show_keys(word: str) -> str:
    """Return every key with its default, type and help, or those with `word` in their names.

    Raises:
        ValueError: no key has it.
    """
    from fastpo.train.config import PreferenceConfig

    kinds = fields_of_recipe()
    lines = []
    for cls in (*SECTIONS, PreferenceConfig):
        for field in dataclasses.fields(cls):
            if word.replace("-", "_") in field.name and field.name in kinds:
                missing = field.default is dataclasses.MISSING
                default = "" if missing else f"{getattr(field.default, 'value', field.default)}"
                kind = in_words(kinds[field.name])
                text = field.metadata.get("help", "")
                lines += _entry(field.name, default.replace("None", "null"), kind, text, bool(word))
    if not lines:
        raise ValueError(f"no key has {word!r} in its name.{nearest(word, kinds)}")
    return "\n".join(lines)


def _entry(name: str, default: str, kind: str, text: str, whole: bool) -> list[str]:
    """Return a key's lines: its first sentence, or the whole help of keys that were asked for."""
    head = f"{name:<38}  {default or '-':<20}  {kind}"[: _WIDTH + 40]
    text = " ".join(text.split())
    if not whole:
        return [head, *([f"    {summary(text)}"[:_WIDTH]] if text else [])]
    return [head, *textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")]
