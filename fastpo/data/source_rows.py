"""Yield rows one after the other, each as it was written, and with the place that it came from.

A row's file, its number there and the fault of a broken line are columns of the data set: those of
Arrow and of a stream alone survive `select`, `shuffle`, `map` and a loader's processes. They are
columns no longer once a row is a `SourceRow`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from fastpo.data.bad_rows import BadRow, OnBadRow, naming, report
from fastpo.reading import REPAIR, told

log = logging.getLogger(__name__)

T = TypeVar("T")

FILE, ROW = "__file__", "__row__"
"""Columns that say which file a row was read from, and its number there, from 0."""
TORN = "__torn__"
"""Column of a row that stands for a broken line of JSON lines: what is wrong with it."""
CANNOT = "cannot read"
"""Errors that begin with it name the file already."""


class SourceRow(NamedTuple):
    """Hold a row's own columns, and where it stands."""

    columns: Any  # a dict, unless the rows in memory are something else
    source: str  # its file, or the name of the data
    index: int  # its number there, from 0
    fault: str | None = None  # what is wrong with the line that it stands for

    @classmethod
    def of(cls, row: Any, source: str, index: int) -> SourceRow:
        """Take a row's place out of its columns.

        Args:
            row: as `load_rows` has it.
            source, index: the place of a row that does not know its own.
        """
        if not isinstance(row, Mapping):
            return cls(row, source, index)
        if row.get(FILE) is not None:
            source, index = row[FILE], row[ROW]
        columns = {name: value for name, value in row.items() if name not in (FILE, ROW, TORN)}
        return cls(columns, source, index, row.get(TORN))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Make a `BadRow` of whatever goes wrong with the row inside, and of a broken line."""
        if self.fault is not None:
            raise BadRow(self.source, self.index, "line", self.fault)
        with naming(self.source, self.index):
            yield


def source_rows(rows: Iterable[Any], source: str = "rows") -> Iterator[SourceRow]:
    """Yield rows with their places; args and errors as those of `exact_rows`."""
    for index, row in enumerate(exact_rows(rows, source)):
        yield SourceRow.of(row, source, index)


def good_rows(
    rows: Iterable[Any],
    check: Callable[[Mapping[str, Any]], T],
    *,
    source: str,
    on_bad_row: OnBadRow,
) -> Iterator[tuple[Mapping[str, Any], T]]:
    """Yield rows, as the file has them, and what `check` makes of each: work without groups.

    Raises:
        BadRow: for a broken line or a BadField of `check`, unless `on_bad_row` is "skip".
        ValueError: no good row.
    """
    skipped: list[BadRow] = []
    num_rows = 0
    for row in source_rows(rows, source):
        try:
            with row.naming():
                checked = check(row.columns)
        except BadRow as bad:
            if on_bad_row == "error":
                raise
            skipped.append(bad)
        else:
            yield row.columns, checked
        num_rows += 1
    if len(skipped) == num_rows:
        raise ValueError(f"{source}: no usable row; {report(skipped, num_rows, 10)}")
    if skipped:
        log.warning("%s: %s", source, report(skipped, num_rows, 10))


def exact_rows(rows: Iterable[Any], source: str = "rows") -> Iterator[Any]:
    """Yield rows in turn, without the null keys that Arrow gave to dicts within their columns.

    Null columns stay. So do nulls that a JSON file, or a list of dicts, holds itself.

    Args:
        rows: dicts, such as `load_rows` returns, or a data set of the user's.
        source: name of the data for messages.

    Raises:
        ValueError: a row cannot be read; names the source, the row, the reason and the remedy.
    """
    rows = _unformatted(rows)
    features = getattr(rows, "features", None)
    formatted = getattr(rows, "format", None)
    if isinstance(formatted, Mapping) and formatted.get("type") == "custom":
        features = None  # a transform's values are the user's
    plain = isinstance(formatted, Mapping) and formatted.get("type") is None
    iterator, index = _by_batches(rows) if plain else iter(rows), 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            if str(error).startswith(CANNOT):
                raise
            reason = told(error.__cause__ or error)
            raise ValueError(f"{CANNOT} {source}, row {index}: {reason}; {REPAIR}") from error
        yield without_nulls(row, features) if isinstance(features, Mapping) else row
        index += 1


def _unformatted(rows: Any) -> Any:
    """Return a data set of Python's values, where `set_format` made arrays or tables of them."""
    formatted = getattr(rows, "format", None)  # of a Dataset
    if isinstance(formatted, Mapping) and formatted.get("type") not in (None, "custom"):
        return rows.with_format(None, columns=formatted["columns"])
    if getattr(rows, "_formatting", None) is not None:  # of an IterableDataset
        plain = rows.with_format(None)
        plain.set_epoch(rows.epoch)
        return plain
    return rows


def _by_batches(rows: Any, size: int = 100) -> Iterator[Any]:
    """Yield the rows of a `datasets.Dataset`, several times faster than one by one."""
    for start in range(0, len(rows), size):
        numbers = range(start, min(start + size, len(rows)))
        try:
            batch = rows[numbers.start : numbers.stop]
        except Exception:
            yield from (rows[number] for number in numbers)  # the one that fails shows itself
        else:
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def without_nulls(row: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> Any:
    """Return a row of known features or unknown ones without null keys, as `exact_rows` says."""
    return {name: _strip(value, (features or {}).get(name)) for name, value in row.items()}


def _strip(value: Any, feature: Any) -> Any:
    if hasattr(feature, "decode_example"):  # JSON text, images: not Arrow's dicts
        return value
    if isinstance(value, dict):
        inner = feature if isinstance(feature, dict) else {}
        return {k: _strip(item, inner.get(k)) for k, item in value.items() if item is not None}
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_strip(item, inner) for item in value]
    return value
