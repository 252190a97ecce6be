"""Modules by the names that they had before."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import FunctionType

import pytest

from fastpo.moved import MOVED

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_imports_with_one_line_and_the_same_objects(old, recwarn):
    sys.modules.pop(old, None)
    exec(f"import {old}")
    module = sys.modules[old]
    (warning,) = [w for w in recwarn if w.category is FutureWarning]
    assert str(warning.message) == f"{old} is {' and '.join(MOVED[old])} now"
    assert warning.filename == "<string>"  # whoever imports, no frame of the import system
    for new in map(importlib.import_module, MOVED[old]):
        own = [v for v in vars(new).values() if isinstance(v, type | FunctionType)]
        defined = [v for v in own if v.__module__ == new.__name__]
        assert defined
        for value in defined:
            assert getattr(module, value.__name__) is value


def test_no_module_of_the_package_uses_an_old_name():
    for path in (CHANGELOG.parent / "fastpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not MOVED.keys() & set(names), path


def test_the_changelog_lists_every_move():
    listed = dict(re.findall(r"^\| `(fastpo[\w.]+)` \| (.+?) \|$", CHANGELOG.read_text(), re.M))
    assert listed == {old: ", ".join(f"`{n}`" for n in new) for old, new in MOVED.items()}
