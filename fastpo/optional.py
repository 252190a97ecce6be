"""Packages that only some installations have: a missing or old one is named in one line."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

OLDEST_TRANSFORMERS = "5.23"
"""What training needs; the head, the losses and the kernels run on any release, or on none."""


class PackageError(ImportError):
    """Say that a package is missing or too old, in one line with the command that helps."""


def missing(what: str, package: str, reason: str = "not installed") -> PackageError:
    """Make the error of a call, named by `what`, that cannot go on without a package."""
    return PackageError(f"{what} needs {package} ({reason}): pip install {package}", name=package)


def require(module: str, what: str, package: str = "") -> ModuleType:
    """Import a module for a call, named by `what`, that cannot go on without it.

    Args:
        package: its name on the package index, where that is another.

    Raises:
        PackageError: the module, or one that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(what, package or module, str(error).splitlines()[0]) from error


def require_transformers(what: str) -> None:
    """Make sure that transformers is new enough to train.

    Raises:
        PackageError: it is older; names both releases.
    """
    from packaging.version import Version

    installed = importlib.metadata.version("transformers")
    if Version(installed) < Version(OLDEST_TRANSFORMERS):
        wanted = f"transformers>={OLDEST_TRANSFORMERS}"
        raise PackageError(
            f'{what} needs {wanted}, {installed} is installed: pip install "{wanted}"',
            name="transformers",
        )
