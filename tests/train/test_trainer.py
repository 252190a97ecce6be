"""What of transformers.Trainer a release may change without notice."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import transformers
from transformers import Trainer

from fastpo.train import trainer
from fastpo.train.trainer import TRAINER_PRIVATES, PreferenceTrainer


def theirs() -> dict[str, str]:
    """Return the Trainer's private members: methods with their parameters, attributes without."""
    members = {n: n for n in re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(Trainer))}
    for name, method in inspect.getmembers(Trainer, inspect.isfunction):
        if re.match("_[a-z]", name):
            _, *parameters = inspect.signature(method).parameters
            members[name] = f"{name}({', '.join(parameters)})"
    return members


def used() -> set[str]:
    """Return private names that `PreferenceTrainer` defines, or this package reads of a trainer."""
    names = set(vars(PreferenceTrainer))
    for path in Path(trainer.__file__).parent.glob("*.py"):
        owners = ("trainer", "self", "super") if path.stem == "trainer" else ("trainer",)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.func if isinstance(node.value, ast.Call) else node.value
                if isinstance(owner, ast.Name) and owner.id in owners:
                    names.add(node.attr)
    return names


def test_private_members_are_as_they_were() -> None:
    members = theirs()
    changed = {
        text: members.get(text.partition("(")[0], "gone")
        for text in TRAINER_PRIVATES
        if text not in members.values()
    }
    assert not changed, f"transformers {transformers.__version__} changed {changed}"


def test_private_members_are_listed() -> None:
    members = theirs()
    assert {members[name] for name in used() if name in members} == {*TRAINER_PRIVATES}
    assert list(TRAINER_PRIVATES) == sorted(TRAINER_PRIVATES)
