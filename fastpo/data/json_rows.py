"""Read rows of JSON files, each exactly what its own text says.

The JSON reader of `datasets` guesses one type for all rows from the first of them: it refuses what
comes later, and gives every object the keys of all others. Here Python's parser reads row by row.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastpo.data.source_rows import FILE, ROW, TORN
from fastpo.reading import told

CHUNK = 1 << 20  # characters of a list that are read at once


class JsonRow(NamedTuple):
    """Hold a row of a file, its number there, from 0, and what is wrong with it or ""."""

    index: int
    row: dict[str, object]
    fault: str
    size: int  # characters, or bytes


# --- bytes and text ------------------------------------------------------------------------------


def _open_zstd(file: str) -> IO[bytes]:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(file), "zstd"))  # pyright: ignore


OPENERS: dict[tuple[str, bytes], Callable[[str], Any]] = {
    (".gz", b"\x1f\x8b"): gzip.open,
    (".bz2", b"BZh"): bz2.open,
    (".xz", b"\xfd7zXZ\0"): lzma.open,
    (".zst", b"(\xb5/\xfd"): _open_zstd,
}
"""(suffix, first bytes) -> how a compressed file is opened."""


def _open(file: str) -> IO[bytes]:
    """Open the bytes of a file, which a suffix or its first bytes call compressed."""
    with open(file, "rb") as opened:
        head = opened.read(8)
    for (suffix, magic), opener in OPENERS.items():
        if file.lower().endswith(suffix) or head.startswith(magic):
            return opener(file)
    return open(file, "rb")


class _Decoder(json.JSONDecoder):
    """Parse as Python does, and keep the first key that an object has twice."""

    def __init__(self):
        self.twice: str | None = None
        super().__init__(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs) and self.twice is None:
            self.twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return made

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.twice = None
        return super().raw_decode(s, idx)


def _plain(value: Any) -> Any:
    """Make Python's of arrays and numbers of NumPy and PyTorch, which users' objects hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


encode = json.JSONEncoder(ensure_ascii=False, default=_plain).encode


def half_pair(value: Any) -> str:
    """Find the first half of a surrogate pair, which no UTF-8 text can hold, or ""."""
    try:
        encode(value).encode()
    except UnicodeEncodeError as error:
        return str(error.object[error.start])
    except TypeError:  # of an object, which Arrow may know
        pass
    return ""


def _fault(value: Any, text: str, twice: str | None) -> str:
    """Say what is wrong with a row that was parsed, or ""."""
    if not isinstance(value, dict):
        return f"is not a JSON object; got {_start(text)!r}"
    if twice is not None:
        return f"has the key {twice!r} twice"
    if reserved := {FILE, ROW, TORN} & value.keys():
        return f"has the key {min(reserved)!r}, which is reserved: give it another name"
    # Only an escape can write what is no character; a search is quicker than encoding every row.
    if re.search(r"\\u[dD][89a-fA-F]", text) and (half := half_pair(value)):
        return f"has {half!r}, half of a character of two (a surrogate pair)"
    return ""


# --- lines and lists -----------------------------------------------------------------------------


def _line(index: int, line: bytes, decoder: _Decoder) -> JsonRow:
    row, fault, text = {}, "", ""
    try:
        text = line.decode()
        row = decoder.decode(text)
        fault = _fault(row, text, decoder.twice)
    except UnicodeDecodeError as error:
        fault = f"is {told(error)}"
    except json.JSONDecodeError as error:
        fault = f"is not JSON ({error.msg} at column {error.pos + 1}); got {_start(text)!r}"
    except ValueError as error:  # a number of thousands of digits
        fault = f"is not JSON ({told(error)})"
    except RecursionError:
        fault = "is nested too deep"
    return JsonRow(index, row, f"line {index + 1} {fault}" if fault else "", len(line))


def _lines(opened: Iterable[bytes]) -> Iterator[JsonRow]:
    """Yield rows of JSON lines; blank lines are none, but counted."""
    decoder = _Decoder()
    for index, line in enumerate(opened):  # of bytes: text is divided at other characters too
        if index == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield _line(index, line, decoder)


def _start(text: str) -> str:
    return text.rstrip("\r\n")[:200]


_BLANK = re.compile(r"[ \t\r\n]*")


class _Text:
    """Hold a window of a text, which grows with the value that is read from it.

    Bytes that are no UTF-8 become halves of surrogate pairs.
    """

    def __init__(self, opened: IO[bytes]):
        self.file = io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline="\n")
        self.text, self.at, self.ended = "", 0, False
        self._lines_before = 0

    @property
    def line(self) -> int:
        """Return the number, from 1, of the line that is read next."""
        return self._lines_before + self.text.count("\n", 0, self.at) + 1

    def grow(self) -> None:
        """Forget what was read, and hold at least twice as much of what follows."""
        self._lines_before = self.line - 1
        left = self.text[self.at :]
        more = self.file.read(max(CHUNK, len(left)))
        self.text, self.at, self.ended = left + more, 0, not more

    def peek(self) -> str:
        """Return the next character that is not blank; "" at the end."""
        while True:
            self.at = _BLANK.match(self.text, self.at).end()  # pyright: ignore
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def value(self, decoder: _Decoder) -> tuple[Any, str]:
        """Read the next value, and its text.

        Raises:
            ValueError: not JSON; names the line.
        """
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number might go on
                    text, self.at = self.text[self.at : end], end
                    return value, text
            except json.JSONDecodeError as error:
                # The end of the window cuts values: only what is wrong well before it is wrong.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if self.ended or not cut:
                    self.at = min(error.pos, len(self.text))
                    raise ValueError(f"line {self.line} is not JSON ({error.msg})") from None
            except (ValueError, RecursionError) as error:
                reason = "nested too deep" if isinstance(error, RecursionError) else told(error)
                raise ValueError(f"the value at line {self.line} is not JSON ({reason})") from None
            self.grow()


def _elements(text: _Text) -> Iterator[JsonRow]:
    """Yield rows of one list of objects.

    Raises:
        ValueError: the list is not JSON, or something follows it; names the line.
    """
    decoder = _Decoder()
    text.peek()
    text.at += 1
    index = 0
    while index or text.peek() != "]":
        value, source = text.value(decoder)
        fault = _fault(value, source, decoder.twice)
        if not source.isascii() and half_pair(source):
            fault = "is not UTF-8 text"
        if fault:
            line = text.line - source.count("\n")
            fault = f"element {index + 1} (line {line}) {fault}"
        yield JsonRow(index, value, fault, len(source))
        index += 1
        separator = text.peek()
        if separator == "]":
            break
        if separator != ",":
            raise ValueError(f"line {text.line} is not JSON (a list goes on with ',' or ends)")
        text.at += 1
    text.at += 1
    if text.peek():
        raise ValueError(f"line {text.line} goes on after the end of the list")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_one_object(file: str) -> None:
    """Refuse a file whose first object is spread over several lines; others pass.

    Raises:
        ValueError: such a file; says which key holds rows, where one does.
    """
    try:
        with _open(file) as opened:
            value, source = _Text(opened).value(_Decoder())
    except ValueError:
        return  # lines, of which the first is broken
    if "\n" not in source:
        return
    reason = "it holds an object over several lines: write each row in a line of its own"
    keys = [
        key
        for key, rows in value.items()
        if rows and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    ]
    if len(keys) == 1:
        reason = f"it holds one object, whose key {keys[0]!r} holds rows: write that list alone"
    raise ValueError(reason)


def read_json(file: str) -> Iterator[JsonRow]:
    """Yield rows of a file of JSON lines, or of one list of objects; compressed ones too.

    Raises:
        ValueError: the file as a whole cannot be read as either, or holds no rows.
        OSError, EOFError and other errors of the libraries that decompress.
    """
    with _open(file) as opened:
        head = opened.read(1 << 16)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("not UTF-8 text but UTF-16 (save it as UTF-8)")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().decode(errors="replace")
    first, _, others = start.partition("\n")
    one_value = len(first) < len(start) and not _is_json(first)
    any_json = ".json" in Path(file.lower()).suffixes
    if start.startswith("{") and any_json and one_value:
        _refuse_one_object(file)
    # A list in a line of its own, with more lines after it, is a broken line of JSON lines.
    opens = r"\[" if any_json else r"\[\s*\{"
    is_list = re.match(opens, start) and (one_value or not others.strip())
    empty = True
    with _open(file) as opened:
        for row in _elements(_Text(opened)) if is_list else _lines(opened):
            empty = False
            yield row
    if empty:
        raise ValueError("it is empty")
