"""Checkpoints that are either complete or invisible.

A checkpoint is written under a temporary name that no reader matches, listed file by file in a
manifest, flushed to disk, and renamed last; a rename is atomic. A process killed at any moment
leaves the previous checkpoint and at most one temporary folder, which the next save replaces.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

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
    """The temporary folder of a checkpoint: hidden, and not matched by `checkpoint-*`."""
    return Path(run_dir) / f".checkpoint-{step}.partial"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep_notes(retired: Path, final: Path) -> None:
    """Move what somebody else put beside the files of a checkpoint to the one in its place."""
    try:
        listed = json.loads((retired / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError):
        return
    for path in [p for p in retired.rglob("*") if p.is_file()]:
        name = path.relative_to(retired)
        if str(name) not in listed and not (final / name).exists():
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(final / name)


def publish(staging: Path, final: Path) -> None:
    """Write the manifest of `staging`, flush all of it to disk, and rename it to `final`."""
    files = sorted(p for p in staging.rglob("*") if p.is_file() and p.name != MANIFEST)
    sizes = {str(p.relative_to(staging)): p.stat().st_size for p in files}
    (staging / MANIFEST).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    for path in [*files, staging / MANIFEST]:
        _fsync(path)
    for folder in [p for p in staging.rglob("*") if p.is_dir()] + [staging]:
        _fsync(folder)
    if final.exists():  # a resumed run saves the same step again
        retired = final.with_name(f".{final.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
        staging.rename(final)
        _keep_notes(retired, final)
        shutil.rmtree(retired)
    else:
        staging.rename(final)
    _fsync(final.parent)


def incomplete(checkpoint: str | Path) -> str | None:
    """Why this folder cannot be resumed from, or None when it can.

    With a manifest every listed file must be there in its full size. A checkpoint of another
    program has none: then the weights and a readable trainer state must be there.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "no such folder"
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        except (json.JSONDecodeError, KeyError):
            return f"{MANIFEST} is unreadable"
        for name, size in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return None
    try:
        json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return f"{TRAINER_STATE} is missing or torn"
    if not any((folder / name).exists() for name in _WEIGHTS):
        return "no weights"
    for name in ("optimizer.pt", "scheduler.pt"):
        path = folder / name
        if path.is_file() and path.stat().st_size == 0:
            return f"{name} is empty"
    return None


def latest_complete(run_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None; each one skipped is logged with why."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return None
    found = [(int(m[1]), p) for p in run_dir.iterdir() if (m := _NAME.match(p.name))]
    for _, path in sorted(found, reverse=True):
        reason = incomplete(path)
        if reason is None:
            return str(path)
        log.warning("skipping %s: %s", path, reason)
    return None
