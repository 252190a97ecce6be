"""Files of users: what a library makes of a broken one is told in a line with the file's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPAIR = "repair the file or leave it out"
AGAIN = "save or download it again"


def told(error: BaseException) -> str:
    """Return the first line of an error; with its class where that line is only a name."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.object[error.start]:#x} at {error.start})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = str(error).strip().partition("\n")[0][:300].rstrip(".")
    named = isinstance(error, OSError | ValueError | RuntimeError)
    return line if line and named else f"{type(error).__name__}: {line}".removesuffix(": ")


@contextmanager
def reading(place: str | Path, remedy: str = REPAIR) -> Iterator[None]:
    """Run a library's reader of one file or folder; its errors have many classes and no name.

    Raises:
        ValueError: the reader failed; names the place, the reason and the remedy.
    """
    try:
        if (path := Path(place)).exists() and not path.is_file() and not path.is_dir():
            raise ValueError("not a file")  # a pipe would be waited for
        yield
    except (ImportError, MemoryError):  # what is missing here is no fault of the file
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        raise ValueError(f"cannot read {place}: {told(error)}; {remedy}") from error


def read_text(path: str | Path, remedy: str = REPAIR) -> str:
    """Return the text of a UTF-8 file, a byte order mark left out.

    Raises:
        ValueError: no file that can be read, or bytes that are no UTF-8.
    """
    path = Path(path)
    with reading(path, remedy):
        return path.read_text(encoding="utf-8-sig")


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Let a library read a model, tokenizer or adapter: what is broken is named.

    Raises:
        ValueError: a file of it is damaged, or is something else.
        OSError: no such model; libraries name it themselves.
    """
    try:
        with reading(name, AGAIN):
            yield
    except ValueError as error:
        if isinstance(error.__cause__, OSError) and not Path(name).exists():
            raise error.__cause__ from None
        from safetensors import safe_open  # comes with transformers

        for path in sorted(Path(name).glob("*.json")):  # libraries seldom say which file it was
            check_json(path)
        for path in sorted(Path(name).glob("*.safetensors")):
            with reading(path, AGAIN), safe_open(path, "np"):
                pass
        raise


def check_json(path: Path) -> None:
    """Refuse a file that is no JSON with a ValueError that names it; a missing one passes."""
    if path.is_file():
        text = read_text(path, AGAIN)
        with reading(path, AGAIN):
            json.loads(text)


def read_jsonl(path: Path) -> tuple[list[dict[str, object]], int]:
    """Read a file that a kill may have cut short; a missing one has no lines.

    Returns:
        The objects, and the number of lines that are none, such as a torn last one.
    """
    rows: list[dict[str, object]] = []
    torn = 0
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                torn += 1
    return rows, torn
