"""The lower bounds of setup.py as pip's constraints: `make test-oldest` installs exactly these."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
UNTESTED = ("flash",)  # compiled for a GPU


def requirements() -> dict[str, str]:
    """Read (package, its lower bound) of every extra from setup.py.

    Raises:
        ValueError: a requirement without a lower bound, or two bounds of one package.
    """
    told: dict[str, Any] = {}
    tools: Any = ModuleType("setuptools")  # not every Python brings the real one
    tools.setup, tools.find_namespace_packages = told.update, lambda **_: []
    with mock.patch.dict(sys.modules, setuptools=tools):
        runpy.run_path(str(SETUP))
    extras = [lines for name, lines in told["extras_require"].items() if name not in UNTESTED]
    found: dict[str, str] = {}
    for line in sum(extras, told["install_requires"]):
        bound = re.match(r"([\w-]+)[>=]=([\w.]+)", line)
        if bound is None:
            raise ValueError(f"{line!r} has no lower bound")
        name, version = bound.groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name} has two lower bounds: {found[name]} and {version}")
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in requirements().items()))
