"""Read recipe files and flags: keys with their values and the places where they were set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from fastpo.reading import read_text, told
from fastpo.recipe.values import Entry, RecipeError
from fastpo.redact import is_secret, learn
from fastpo.yaml_text import parse, scalar


def read_file(path: str | Path) -> dict[str, Entry]:
    """Read the keys of a recipe file with their line numbers.

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
    """Return the place of every key; `lora.r` for a key of a mapping inside."""
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
    """Read `--key value`, `--key=value`, `--key a b` (a list) and `--key` (true).

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
        typed = [text] if equals else []
        while not equals and words and not words[0].startswith("--"):
            typed.append(words.pop(0))
        key = flag_key(flag)
        if key in entries:
            raise RecipeError(f"{flag} is given twice: give it once")
        if len(typed) == 1:
            entries[key] = Entry(scalar(typed[0]), flag, typed[0])
        else:
            entries[key] = Entry([scalar(w) for w in typed] if typed else True, flag)
    learn({key: entry.value for key, entry in entries.items()})
    return entries


def flag_key(flag: str) -> str:
    """Return the key that a flag sets: `-` and `_` are one, but for what follows a dot.

    >>> flag_key("--chat-template-kwargs.enable-thinking")
    'chat_template_kwargs.enable-thinking'
    """
    key, dot, part = flag.removeprefix("--").partition(".")
    return key.replace("-", "_") + dot + part
