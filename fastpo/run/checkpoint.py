"""Checkpoints that are either complete or invisible.

A checkpoint is written under a temporary name that no reader matches, listed file by file with
sizes and hashes in a manifest, flushed to disk, and renamed last; a rename is atomic. A process
killed at any moment leaves the previous checkpoint and at most one temporary folder, which the next
save replaces.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from safetensors import safe_open
from transformers import TrainerState

from fastpo.reading import told

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOSS_STATE = "loss_state.pt"
TRAINER_STATE = "trainer_state.json"

_NAME = re.compile(r"^checkpoint-(\d+)$")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model_fsdp_0",
)


def staging_dir(run_dir: str | Path, step: int) -> Path:
    """Return a checkpoint's temporary folder: hidden, and not matched by `checkpoint-*`."""
    return Path(run_dir) / f".checkpoint-{step}.partial"


def flush(path: Path) -> None:
    """Have a file, or a folder's names, on disk before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@lru_cache(maxsize=4096)
def _digest(path: Path, modified: int, size: int) -> str:
    # SHA-256 has its own instructions on most CPUs: twice the speed of blake2b there.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: Iterable[Path]) -> list[str]:
    """Return each file's SHA-256, several at a time; a file that did not change is read once."""

    def of(path: Path) -> str:
        status = path.stat()
        return _digest(path, status.st_mtime_ns, status.st_size)

    with ThreadPoolExecutor() as pool:  # hashing gives the interpreter free
        return list(pool.map(of, paths))


def _of_list(files: Mapping[str, object]) -> str:
    """Return the SHA-256 of a manifest's list."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _keep_notes(retired: Path, final: Path) -> None:
    """Move what somebody else put beside the files of a checkpoint to the one in its place."""
    try:
        listed = set(json.loads((retired / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = set()  # without a list all that the new one lacks may be somebody's
    for path in [p for p in retired.rglob("*") if p.is_file()]:
        name = path.relative_to(retired)
        if str(name) not in listed and not (final / name).exists():
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(final / name)


def publish(staging: Path, final: Path) -> None:
    """Write the manifest of `staging`, flush all of it to disk, and rename it to `final`."""
    paths = sorted(p for p in staging.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {
        str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    text = json.dumps({"files": files, "sha256": _of_list(files)}, indent=1)
    (staging / MANIFEST).write_text(text, encoding="utf-8")
    for path in [*paths, staging / MANIFEST]:
        flush(path)
    for folder in [p for p in staging.rglob("*") if p.is_dir()] + [staging]:
        flush(folder)
    if final.exists():  # a resumed run saves the same step again
        retired = final.with_name(f".{final.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
        staging.rename(final)
        _keep_notes(retired, final)
        shutil.rmtree(retired)
    else:
        staging.rename(final)
    flush(final.parent)


def incomplete(checkpoint: str | Path) -> str | None:
    """Return why this folder cannot be resumed from, or None when it can.

    With a manifest every listed file must be there as it was written. A checkpoint of another
    program has none: then there must be weights, and every file must be readable.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "no such folder"
    manifest = folder / MANIFEST
    if not manifest.is_file():
        if not any((folder / name).exists() for name in _WEIGHTS):
            return "no weights"
        if not (folder / TRAINER_STATE).is_file():
            return f"{TRAINER_STATE} is missing"
        return _unreadable(path for path in folder.iterdir() if path.is_file())
    try:
        listed = json.loads(manifest.read_bytes())
        # A release before the hashes listed sizes alone.
        files = {
            folder / name: each if isinstance(each, dict) else {"bytes": each}
            for name, each in listed["files"].items()
        }
        hashed = {path: each["sha256"] for path, each in files.items() if "sha256" in each}
        if not files or (hashed and listed.get("sha256") != _of_list(listed["files"])):
            return f"{MANIFEST} is damaged: the files that it lists are not those that were saved"
        for path, each in files.items():
            if not path.is_file():
                return f"{path.relative_to(folder)} is missing"
            if (size := path.stat().st_size) != each["bytes"]:
                return f"{path.relative_to(folder)} has {size} bytes instead of {each['bytes']}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is unreadable"
    for path, digest in zip(hashed, _digests(hashed), strict=True):
        if digest != hashed[path]:
            return f"{path.relative_to(folder)} is damaged: its bytes are not those that were saved"
    return _unreadable(path for path in files if path not in hashed)


def _unreadable(paths: Iterable[Path]) -> str | None:
    """Return the first file, without a hash, that its own format says is damaged."""
    for path in paths:
        try:
            if path.name == TRAINER_STATE:
                TrainerState.load_from_json(str(path))
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:  # torch.save's form, with checksums
                    if archive.testzip() is not None:
                        return f"{path.name} is damaged"
        except Exception as error:  # of any class: these are libraries' readers
            return f"{path.name} is damaged ({told(error)})"
    return None


def latest_complete(run_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint of a run, or None; log each one skipped with why."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return None
    by_step = [(int(m[1]), p) for p in run_dir.iterdir() if (m := _NAME.match(p.name))]
    for _, path in sorted(by_step, reverse=True):
        reason = incomplete(path)
        if reason is None:
            return str(path)
        log.warning("skipping %s: %s", path, reason)
    return None
