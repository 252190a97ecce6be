"""A file that is not whole yet: what it is called, and how one process keeps it to itself."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO, TextIO


def partial_of(path: Path) -> Path:
    """Return where a file is written before it has its name."""
    return path.with_name(f"{path.name}.partial")


def hold(file: TextIO | BinaryIO, path: Path) -> None:
    """Keep other processes from writing this file too, until it is closed.

    Raises:
        ValueError: another process writes it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path} is being written by another process: let it end, or name another file"
        ) from None
    except OSError:  # a file system without locks
        return
