"""Tests whose calls need a package that is not installed are skipped, by its name."""

from __future__ import annotations

import importlib.metadata

import pytest

from fastpo import optional


@pytest.fixture(autouse=True)
def absent_packages_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where a user would read what to install; a test that hides a package is no such case."""
    told = optional.missing

    def missing(what: str, package: str, reason: str = "not installed") -> optional.PackageError:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"could not import {package!r}, which {what} needs")
        return told(what, package, reason)

    monkeypatch.setattr(optional, "missing", missing)
