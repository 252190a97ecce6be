"""Files that commands write: whole under their name, and over another only where asked to."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastpo.run.folder import belongs
from fastpo.run.partial import hold, partial_of


def _plain(path: Path) -> bool:
    return path.is_file() or not path.exists()  # no pipe or device, which has no other content


def check_outputs(
    *outputs: str | Path | None,
    inputs: Sequence[str | None] = (),
    overwrite: bool = False,
    goes_on: bool = False,
) -> None:
    """Refuse files that would be written over, before anything is loaded.

    Args:
        outputs: files to write; None is standard output.
        inputs: files, folders and globs that the command reads; names on the hub are ignored.
        overwrite: write over files that are there; never over an input, a run's or a model's.
        goes_on: whether what a stopped run left beside an output is taken up again.

    Raises:
        ValueError: names the file and the remedy.
    """
    paths = [Path(each) for each in outputs if each is not None]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file to write")
        place = path.resolve()
        around = next(folder for folder in place.parents if folder.exists())
        if _plain(path) and not (around.is_dir() and os.access(around, os.W_OK)):
            raise ValueError(
                f"{path} cannot be written: {around} is no folder to write to; name another file"
            )
        if belongs(place):
            raise ValueError(
                f"{path} would be a file of the run or model in its folder: name another file"
            )
        if sum(place == other.resolve() for other in paths) > 1:
            raise ValueError(f"{path} would be written twice: name two files")
        for source in filter(None, inputs):
            read = Path(source).expanduser()
            if read.is_dir() and place.is_relative_to(read.resolve()):
                raise ValueError(
                    f"{path} lies in {source}, which is read: name a file elsewhere to write"
                )
            files = [read, *map(Path, glob.glob(str(read), recursive=True))]
            if any(place == file.resolve() for file in files) or (
                path.exists() and any(file.exists() and path.samefile(file) for file in files)
            ):
                raise ValueError(f"{path} is read itself: name another file to write")
        for existing in [path] if goes_on else [path, partial_of(path)]:
            if existing.exists() and _plain(existing) and not overwrite:
                raise ValueError(
                    f"{existing} is there already: name another file, remove it, or write over it "
                    "with --overwrite"
                )


@contextmanager
def json_lines(path: str | Path | None, *, over: bool = False) -> Iterator[Callable[[Any], None]]:
    """A function that writes one JSON line, at once, to a file or to standard output.

    The file has its name once it is whole; the rows of a command that stopped stay in PATH.partial.

    Args:
        path: the file; None for standard output.
        over: write over what a stopped command left.
    """
    if path is None:
        yield _writer(sys.stdout)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path) if _plain(path) else path
    done = False
    mode = "w" if partial == path else "a" if over else "x"
    with partial.open(mode, encoding="utf-8") as file:
        if partial != path:
            hold(file, partial)
            file.seek(0)
            file.truncate()
        try:
            yield _writer(file)
            done = True
        finally:
            if not done and partial != path:
                if file.tell():
                    sys.stderr.write(f"fastpo: stopped; the rows so far are in {partial}\n")
                else:
                    partial.unlink()
    if partial != path:
        partial.replace(path)


def _writer(file: TextIO) -> Callable[[Any], None]:
    def write(row: Any) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    return write
