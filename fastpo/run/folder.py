"""Folders that others use too: only what this tool wrote is ever written over or removed.

`run.json` is the first file of a run's folder and lists the others; a checkpoint is known by its
manifest, and what people may edit (recipe.yaml, report and model card) by the seal in its last
line. A run of an earlier version, whose run.json has no list, is known by the names that it writes.
Whatever else bears a name that would be written is refused before anything is loaded.

Every file appears whole: it is written beside its place, flushed to disk, and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from fastpo.reading import read_text
from fastpo.redact import redact
from fastpo.run.checkpoint import MANIFEST, flush

log = logging.getLogger(__name__)

RUN = "run.json"
LOCK = ".fastpo.lock"
STAGING = ".model.partial"
RECIPE = "recipe.yaml"
CARD, REPORT = "README.md", "report.html"
CONFIG = "preference_config.yaml"
RECORDS = (
    CONFIG,
    "metrics.jsonl",
    "samples.jsonl",
    "skipped.jsonl",
    "trainer_state.json",
    RUN,  # last, so that a removal that was killed is taken up again
)
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_*.safetensors", "adapter_*.json")
_MODEL = (
    *_WEIGHTS,
    "config.json",
    "generation_config.json",
    "training_args.bin",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.*",
)
_ANY_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Sealed files, and the form of those of earlier versions and of peft's empty card.
_SEALED = {
    CARD: re.compile(
        r"\A---\n(?:.+\n)*tags:\n- fastpo\n- preference-optimization\n"
        r"|# Model Card for Model ID\s+<!-- Provide a quick summary .*-->\s+## Model Details"
    ),
    REPORT: re.compile(r"<span class=mono>fastpo report</span> draws it again"),
    RECIPE: re.compile(r"\A# fastpo \S+, torch \S+"),
}
_SEAL = re.compile(r"^(?:<!--|#) fastpo ([0-9a-f]{16})(?: -->)?$", re.MULTILINE)


# --- files -----------------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a name to write to; on leaving, the file has its own name, or after an error none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""


def _untouched(path: Path) -> bool:
    """Return whether a sealed file is as this tool wrote it.

    In the folder of an earlier version, whose run.json has no list, its form is enough.
    """
    text = _text(path)
    seals = [*_SEAL.finditer(text)]
    if seals and not text[seals[-1].end() :].strip():
        return _digest(text[: seals[-1].start()]) == seals[-1][1]
    listed = "files" in (_mapping(path.parent / RUN) or {})
    return not seals and not listed and _SEALED[path.name].search(text) is not None


def write_sealed(path: Path, text: str) -> None:
    """Write a report, card or recipe over none, or over one that nobody has changed.

    Raises:
        ValueError: the file there is another's, or was edited.
    """
    if os.path.lexists(path) and not _untouched(path):
        raise ValueError(f"{path} {_whose(path)}: rename it, or remove it, and run this again")
    begin, end = ("#", "") if path.name == RECIPE else ("<!--", " -->")
    text = f"{text.rstrip()}\n"
    write_text(path, f"{text}{begin} fastpo {_digest(text)}{end}\n")


def _whose(path: Path) -> str:
    edited = path.name in _SEALED and _SEAL.search(_text(path)) is not None
    return "was edited since fastpo wrote it" if edited else "was not written by fastpo"


# --- checkpoints -------------------------------------------------------------------------------


def _mapping(path: Path) -> dict[str, object] | None:
    """Read a JSON mapping; None where it is none."""
    try:
        mapping = json.loads(read_text(path))
    except (OSError, ValueError):
        return None
    return mapping if isinstance(mapping, dict) else None


def _listed(mapping: Mapping[str, object]) -> set[str]:
    """Return the names under `files` that stay in their folder: a list may come from elsewhere."""
    files = mapping.get("files", ())
    return {
        name
        for name in (files if isinstance(files, list | dict) else ())
        if isinstance(name, str) and not PurePath(name).is_absolute() and ".." not in name
    }


def is_own_checkpoint(path: Path) -> bool:
    """Return whether this tool wrote the checkpoint, as its manifest says."""
    if path.is_symlink() or not (path / MANIFEST).is_file():
        return False
    manifest = _mapping(path / MANIFEST)
    return manifest is None or "files" in manifest  # an unreadable one is a damaged one of ours


def own_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that this tool wrote, oldest step first."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
    return sorted(filter(is_own_checkpoint, checkpoints), key=lambda p: int(p.name.split("-")[1]))


def _prune(folder: Path) -> None:
    """Remove the empty folders in `folder`, and itself."""
    for each in [*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder]:
        with suppress(OSError):
            each.rmdir()


def discard(checkpoint: Path) -> None:
    """Remove the files that a checkpoint's manifest lists; what else lies there stays."""
    manifest = _mapping(checkpoint / MANIFEST)
    if manifest is None:  # nobody knows any more whose the files are
        return
    for name in _listed(manifest):
        (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / MANIFEST).unlink()
    _prune(checkpoint)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` of this tool's checkpoints, and the best one; 0 or None keeps all."""
    own = own_checkpoints(folder)
    if not limit or limit < 0 or len(own) <= limit:
        return
    kept = {own[-1], *([Path(best)] if best else [])}
    spare = [path for path in own if path not in kept]
    for path in spare[: len(own) - max(limit, len(kept))]:
        discard(path)


# --- a run's folder ------------------------------------------------------------------------------


class RunFolder:
    """Hold what this tool wrote into a folder, and what run.json says.

    Attributes:
        path: the folder; it may not exist yet.
        files: the files of this tool, by their path in the folder.
        facts: what run.json says beside them; a damaged one may say anything.
        known: whether a run of this tool lies there.
        recipe: the recipe that a run was given, which is left alone wherever it lies.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: set[str] = set()
        self.facts: dict[str, object] = {}
        self.recipe: Path | None = None
        self.read()

    @staticmethod
    def at(path: str | Path) -> RunFolder:
        """Return the folder as this process claimed it, or as it lies on disk."""
        claimed = _CLAIMED.get(Path(path).resolve())
        if claimed is None:
            return RunFolder(path)
        claimed.path = Path(path)  # it may be relative, and the working directory another one now
        return claimed

    def read(self) -> None:
        """Read run.json again."""
        run = _mapping(self.path / RUN)
        ours = run is not None and ("files" in run or {"status", "command"} <= run.keys())
        self.known = ours or (run is None and (self.path / CONFIG).is_file())
        self.facts = {k: v for k, v in run.items() if k != "files"} if run and ours else {}
        if run is not None and "files" in run:
            self.files = _listed(run)
        else:  # a run of an earlier version wrote all that has such a name; anything else nothing
            names = (*RECORDS, *_MODEL) if self.known else ()
            self.files = {p.name for name in names for p in self.path.glob(name) if p.is_file()}

    def save(self, **facts: object) -> None:
        """Write run.json with these facts added; secrets are left out."""
        self.facts |= facts
        run = redact({**self.facts, "files": sorted(self.files)})
        text = json.dumps(run, indent=1, ensure_ascii=False, default=str)
        write_text(self.path / RUN, f"{text}\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, which appears whole."""
        self.add(name)
        write_text(self.path / name, text)

    def add(self, *names: str) -> None:
        """List files that are about to be written.

        Raises:
            ValueError: one is there and is not this tool's.
        """
        fresh = [name for name in (RUN, *names) if name not in self.files]
        for name in fresh:
            if os.path.lexists(self.path / name):
                raise ValueError(self._refusal(name))
        if fresh:
            self.files |= set(fresh)
            self.save()

    def _refusal(self, name: str, others: int = 0) -> str:
        more = f" (and {others} more)" if others else ""
        return (
            f"{self.path} holds {name}{more}, which {_whose(self.path / name)} and would be "
            f"written over or taken for the run's: move it away, or name another folder, such as "
            f"{self._another()}"
        )

    def _another(self) -> Path:
        if self.path.name in ("", ".."):
            return self.path / "runs" / "1"
        tried = (self.path.with_name(f"{self.path.name}-{n}") for n in itertools.count(2))
        return next(path for path in tried if not path.exists())

    def in_the_way(self) -> list[str]:
        """Return files of others that a run would write over, or that would pass for its own."""
        names = []
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else []:
            name = path.name
            if self.leaves(path) or name in self.files or (name in _SEALED and _untouched(path)):
                continue
            reserved = name in (*RECORDS, *_SEALED) or any(path.match(p) for p in _MODEL)
            weights = path.is_file() and any(path.match(p) for p in _ANY_WEIGHTS)
            checkpoint = _CHECKPOINT.fullmatch(name) and not is_own_checkpoint(path)
            if reserved or weights or checkpoint:
                names.append(name)
        return names

    def leaves(self, path: Path) -> bool:
        """Return whether this is the recipe that was given."""
        recipe = self.recipe
        return recipe is not None and path.exists() and recipe.exists() and path.samefile(recipe)

    def refuse_others(self, *, alone: bool = False) -> None:
        """Refuse a folder in which a run would meet files of others.

        Args:
            alone: whether anything else is refused too, since the folder will be published.

        Raises:
            ValueError: names the file, and another folder.
        """
        if self.path.is_file() or (self.path.is_symlink() and not self.path.exists()):
            raise ValueError(f"{self.path} is no folder: name another, such as {self._another()}")
        if self.path.resolve() in (Path("/"), Path.home()):
            raise ValueError(
                f"{self.path} is not only for a run: name a folder in it, such as "
                f"{self.path / 'runs' / '1'}"
            )
        if names := self.in_the_way():
            raise ValueError(self._refusal(names[0], len(names) - 1))
        if alone and not self.known and self.path.is_dir():
            others = sorted(p.name for p in self.path.iterdir() if p.name != LOCK)
            if others:
                raise ValueError(
                    f"push_to_hub would publish {self.path / others[0]}, which is not of the run: "
                    f"name another output_dir, such as {self._another()}"
                )

    def _removable(self) -> set[str]:
        """Return the files that `forget` removes, beside checkpoints."""
        files = self.files | {name for name in _SEALED if _untouched(self.path / name)}
        return {name for name in files if not self.leaves(self.path / name)}

    def refuse_removal(self, reads: Sequence[str]) -> None:
        """Refuse to remove what the next run reads.

        Args:
            reads: files, folders and names; names that are no path are ignored.

        Raises:
            ValueError: names what would be removed.
        """
        files, checkpoints = self._removable(), own_checkpoints(self.path)
        removed = {p.resolve() for p in [*checkpoints, *(self.path / name for name in files)]}
        if any(PurePath(name).match(model) for name in files for model in _MODEL):
            removed.add(self.path.resolve())
        for name in reads:
            if Path(name).resolve() in removed:
                raise ValueError(
                    f"--overwrite would remove {name}, which this run reads: take another "
                    "output_dir"
                )

    def forget(self) -> None:
        """Remove what an earlier run wrote: its checkpoints, model and records, nothing else."""
        files = self._removable()
        for path in own_checkpoints(self.path):
            discard(path)
        for path in [self.path / STAGING, *self.path.glob(".checkpoint-*.partial")]:
            shutil.rmtree(path, ignore_errors=True)
        for name in [*sorted(files - {RUN}), RUN]:
            (self.path / name).unlink(missing_ok=True)
            for partial in self.path.glob(f".{name}.*.partial"):
                partial.unlink()
        for name in {PurePath(name).parts[0] for name in files if len(PurePath(name).parts) > 1}:
            _prune(self.path / name)
        self.read()

    def start_over(self) -> None:
        """Remove what an earlier run wrote; what this process writes next is its own."""
        self.forget()
        self.files |= {*RECORDS}
        self.save()

    @contextmanager
    def placing(self) -> Iterator[Path]:
        """Give a folder to save a model into; on leaving, its files lie in this one.

        Weights that this tool saved here before and did not save now are removed.

        Raises:
            ValueError: a file of that name is not this tool's; the model stays where it was saved.
        """
        self.refuse_others()
        staging = self.path / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            with suppress(OSError):
                self.path.rmdir()
            raise
        saved = [str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file()]
        if CARD in saved:  # peft's empty one
            saved.remove(CARD)
            if not os.path.lexists(self.path / CARD):
                write_sealed(self.path / CARD, _text(staging / CARD))
        try:
            self.add(*sorted(saved))
        except ValueError as error:
            raise ValueError(f"{error}; the model was saved to {staging}") from error
        stale = [n for n in self.files - {*saved} if any(PurePath(n).match(p) for p in _WEIGHTS)]
        for name in saved:
            flush(staging / name)
            (self.path / name).parent.mkdir(exist_ok=True, parents=True)
            (staging / name).replace(self.path / name)
        for name in stale:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(staging)
        if stale:
            self.files -= {*stale}
            self.save()


def belongs(path: Path) -> bool:
    """Return whether a file would be taken for one of the run, checkpoint or model around it."""
    folder = RunFolder(path.parent)
    if path.name in folder.files or (folder.known and path.name in _SEALED):
        return True
    if is_own_checkpoint(path.parent) and path.exists():
        return True
    configs = ("config.json", "adapter_config.json")
    holds_model = any((path.parent / name).is_file() for name in configs)
    return holds_model and any(path.match(p) for p in (*_MODEL, *_ANY_WEIGHTS))


# --- one run at a time ---------------------------------------------------------------------------

_CLAIMED: dict[Path, RunFolder] = {}  # by resolved path, for the life of this process
_HANDLES: dict[Path, int] = {}


@functools.cache
def _let_children_go() -> None:
    """Have a forked child, such as a loader's, keep no lock: it may outlive a killed run."""

    def release() -> None:
        for handle in _HANDLES.values():
            os.close(handle)
        _HANDLES.clear()
        _CLAIMED.clear()

    os.register_at_fork(after_in_child=release)


def _lock(folder: Path) -> None:
    """Hold the folder's lock until this process ends, however it ends.

    Raises:
        ValueError: another process holds it; names the process.
    """
    path, place = folder / LOCK, folder.resolve()
    locked = _HANDLES.get(place)
    if locked is not None:
        if path.exists() and os.fstat(locked).st_ino == path.stat().st_ino:
            return
        os.close(_HANDLES.pop(place))  # the folder was removed in between
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(
                f"{folder} is in use by {holder}: let it end, stop it, or take another output_dir"
            ) from None
        log.warning("%s cannot be locked (%s): start no second run there", folder, error.strerror)
        return
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _HANDLES[place] = handle
    _let_children_go()


def claim(
    path: str | Path,
    *,
    recipe: str | Path | None = None,
    alone: bool = False,
    **facts: object,
) -> RunFolder:
    """Take a folder for a run of this process; it holds run.json afterwards.

    Args:
        path: the folder, created when missing.
        recipe: the recipe that was given, which is left alone wherever it lies.
        alone: whether the folder may hold nothing else, since it will be published.
        facts: what run.json says at first; of a run that goes on it stays as it is.

    Raises:
        ValueError: a file of another in the way, another process in the folder, or no place to
            write to; names the remedy.
    """
    folder = RunFolder.at(path)
    folder.read()
    if recipe is not None:
        folder.recipe = Path(recipe)
    folder.refuse_others(alone=alone)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _lock(folder.path)
        folder.read()  # as the last run left it
        known, listed = folder.known, set(folder.files)
        folder.files |= {*RECORDS}
        # Before run.json has a list, after which the form of an earlier version counts no more.
        for each in (folder.path / name for name in _SEALED):
            if known and _untouched(each) and not _SEAL.search(_text(each)):
                write_sealed(each, _text(each))
        if not known or folder.files != listed:
            folder.save(**({} if known else facts))
    except OSError as error:
        raise ValueError(
            f"{folder.path} cannot be written to ({error.strerror or error}): take another "
            "output_dir"
        ) from error
    _CLAIMED[folder.path.resolve()] = folder
    return folder
