"""Find objectives of a user's own: a function in a file, named as `my_module:my_loss`.

Only such a name with a colon imports code, and nothing else does.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fastpo.domain import choices, domain_of
from fastpo.errors import did_you_mean

from .base import Family, Objective
from .vocabulary import UNKNOWN, scores_with


class _File(NamedTuple):
    """Hold where a module was found."""

    folder: Path  # what goes on sys.path
    module: str
    path: Path


def is_reference(name: object) -> bool:
    """Return whether a name is one of a function in a file: `my_module:my_loss`.

    >>> [is_reference(name) for name in ("my_module:my_loss", "dpo", '{"dpo": 1}')]
    [True, False, False]
    """
    return isinstance(name, str) and ":" in name and "{" not in name


def load(reference: str, beside: Path | None = None) -> Any:
    """Return what a reference names; its module is imported.

    Args:
        reference: `module:name`, or `path/to/file.py:name`.
        beside: a folder to look in before the working directory.

    Raises:
        ValueError: no such module, file or name, or an import that fails.
    """
    where, name = _parts(reference)
    file = _find(where, _folders(beside))
    if file is None and (where.endswith(".py") or not _importable(where)):
        looked = ", ".join(map(str, _folders(beside)))
        if where.endswith(".py"):
            among, head = "", os.path.dirname(where)
            near = [
                os.path.join(head, p.name)
                for f in _folders(beside)
                for p in (f / head).glob("*.py")
            ]
        else:
            among = " and among installed packages"
            near = [path.stem for f in _folders(beside) for path in f.glob("*.py")]
        hint = _nearest(where, near)
        raise ValueError(
            f"objective {reference!r}: there is no {where}, looked for in {looked}{among}{hint}"
        )
    try:
        module = importlib.import_module(where) if file is None else _import(file)
    except (Exception, SystemExit) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"objective {reference!r}: importing {file.path if file else where} failed: "
            f"{type(error).__name__}: {said}"
        ) from error
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        at = getattr(module, "__file__", None) or where
        raise ValueError(f"objective {reference!r}: {at} has no {name!r}{_nearest(name, public)}")
    return getattr(module, name)


def spelled(reference: str, beside: Path | None) -> str:
    """Return a reference that names the same from the working directory, without `beside`."""
    where, name = _parts(reference)
    file = None if beside is None else _find(where, [beside.resolve()])
    if file is None or _find(where, _folders(None)) == file:
        return reference
    here = Path.cwd()
    inside = file.path.is_relative_to(here)
    return f"{os.path.relpath(file.path, here) if inside else file.path}:{name}"


def same(one: str, other: str) -> bool:
    """Return whether two references can name one function, looked for from two folders.

    >>> same("losses:mine", "/here/losses.py:mine"), same("a.losses:mine", "b.losses:mine")
    (True, False)
    """
    longer, shorter = sorted(map(_path, (one, other)), key=len, reverse=True)
    return longer[-len(shorter) :] == shorter


def _path(reference: str) -> list[str]:
    where, name = _parts(reference)
    return [*where.removesuffix(".py").replace("/", ".").split("."), name]


def described(value: object, reference: str, family: Family | None = None) -> Objective:
    """Return the objective that a function is.

    Args:
        value: a function of scores, or an `Objective`.
        reference: what it is called in messages.
        family: what it compares, unless it is an attribute of the function.

    Raises:
        ValueError: neither a function nor an objective, a family that is unknown or another than
            it says itself, or a signature that cannot be read.
    """
    if not isinstance(value, Objective):
        if not inspect.isfunction(value):
            raise ValueError(
                f"objective {reference!r} is a {type(value).__name__}: name a function of scores, "
                "or an Objective"
            )
        compared: Any = getattr(value, "family", family)
        if compared is None or compared not in get_args(Family):
            name = value.__name__
            said = "does not say what it compares" if compared is None else f"is {compared!r}"
            raise ValueError(
                f"objective {reference!r} {said}: write {name}.family = 'pair' below it ('point' "
                f"or 'list'), or name {name}_objective = Objective({name}, 'pair', name={name!r})"
            )
        value = Objective(value, compared)
    if family not in (None, value.family):
        raise ValueError(
            f"family={family!r}: objective {reference!r} says that it compares {value.family!r}: "
            "leave family out"
        )
    _check_signature(value, reference)
    return value


def _parts(reference: str) -> tuple[str, str]:
    where, _, name = reference.rpartition(":")
    module = where.endswith(".py") or ("/" not in where and all(where.split(".")))
    if not module or not name.isidentifier():
        raise ValueError(
            f"objective {reference!r}: write module:function, such as my_module:my_loss, or "
            "path/to/file.py:my_loss"
        )
    return where, name


def _folders(beside: Path | None) -> list[Path]:
    folders = [] if beside is None else [beside.resolve()]
    return list(dict.fromkeys([*folders, Path.cwd()]))


def _find(where: str, folders: Sequence[Path]) -> _File | None:
    """Return the first file of a module, or of a path."""
    for folder in folders:
        if where.endswith(".py"):
            path = (folder / where).resolve()
            if path.is_file():
                return _File(path.parent, path.stem, path)
            continue
        stem = folder / where.replace(".", "/")
        for path in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if path.is_file():
                return _File(folder, where, path.resolve())
    return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import(file: _File) -> Any:
    """Import a file as a module of its folder, before any other of that name.

    The folder stays on sys.path, as the last: for the module's own imports, and child processes.
    """
    folder = str(file.folder)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(file.module)
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    at = getattr(module, "__file__", None)
    if at is None or Path(at).resolve() != file.path:
        raise ImportError(f"another module is called {file.module!r} ({at}): rename the file")
    return module


def _check_signature(objective: Objective, reference: str) -> None:
    """Refuse a signature that the engine cannot read."""

    def refuse(what: str) -> None:
        raise ValueError(f"objective {reference!r} {what}")

    for parameter in inspect.signature(objective.fn).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            refuse(f"takes {parameter}: name every score and hyper-parameter")
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            refuse(f"has a hyper-parameter {parameter.name!r} without a default: give it one")
        if parameter.kind is not parameter.KEYWORD_ONLY and parameter.default is not (
            parameter.empty
        ):
            refuse(
                f"has a score {parameter.name!r} with a default: put a * before hyper-parameters"
            )
    try:
        scores = objective.scores
    except NameError as error:
        refuse(f"has annotations that cannot be read: {error}")
        return
    known = scores_with(objective.extras)
    for name, score in scores.items():
        if score is UNKNOWN:
            refuse(f"takes {name!r}, which is no score{_hint(name, known)}")
    for name, default in objective.hyper.items():
        expected = objective.expected(name)
        if domain_of(expected) is None and not choices(expected):
            continue  # None or inf may stand for what is not set
        try:
            objective.option(name, default)
        except ValueError as error:
            refuse(f"has a default that its own annotation refuses: {error}")


def _hint(name: str, known: Iterable[str]) -> str:
    """Say what a parameter that is no score may have been meant for."""
    parts = name.split("_")
    for role in ("_".join(parts[:n]) for n in range(1, len(parts))):
        if name in scores_with((role,)):
            return f" of the prompt's own responses: Objective(..., extras=({role!r},)) has it"
    return _nearest(name, known) or (
        ": hyper-parameters come after a *, and a number of the whole batch is a Statistic"
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    question = did_you_mean(name, names)
    return f": {question}" if question else ""
