"""Make of JSON rows a `datasets.Dataset`, whose table keeps values of mixed kinds as their text."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpo.data.json_rows import encode, half_pair, read_json
from fastpo.data.source_rows import CANNOT, FILE, ROW, TORN
from fastpo.reading import REPAIR, told

if TYPE_CHECKING or importlib.util.find_spec("datasets") is not None:
    import datasets.config
    import pyarrow as pa
    from datasets import Json
    from filelock import FileLock
else:  # `load_rows` says that it is missing
    Json = object

VERSION = 1
"""Of the tables in the cache: raise it where a reader must not take older ones."""
BATCH = 1000, 8 << 20  # most rows, and about the most characters, of a batch in a table

_decode = json.JSONDecoder().raw_decode


class ExactJson(Json):
    """Keep values as JSON text, read by Python's parser.

    That of `datasets` knows no whole numbers of more than 64 bits. Saved, it is `datasets.Json`.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Json)  # so that both kinds of tables can be joined

    def encode_example(self, example_data: Any) -> str | None:
        return None if example_data is None else encode(example_data)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else _decode(example_data)[0]


KINDS = {str: "string", int: "int64", float: "float64", bool: "bool"}
"""Types whose columns are Arrow's own, so that sorting and exports of `datasets` know them."""


def _widen(kinds: dict[str, str | None], rows: Iterable[Mapping[str, Any]]) -> None:
    """Bring the kinds of columns up to what holds the rows too; None: null so far."""
    for row in rows:
        for name, value in row.items():
            kind = kinds.setdefault(name, None)
            if kind == "json" or value is None:
                continue
            value_kind = KINDS.get(type(value), "json")
            if value_kind == "int64" and not -(2**63) <= value < 2**63:
                value_kind = "json"
            if kind != value_kind:
                kinds[name] = value_kind if kind is None else "json"


def _features(kinds: Mapping[str, str | None]) -> datasets.Features:
    return datasets.Features(
        {
            name: ExactJson() if kind in (None, "json") else datasets.Value(kind)
            for name, kind in kinds.items()
        }
    )


def _table(rows: Sequence[Mapping[str, Any]], features: datasets.Features) -> pa.Table:
    schema = features.arrow_schema
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if isinstance(features[field.name], ExactJson):
            texts = [None if value is None else encode(value) for value in values]
            column = pa.ExtensionArray.from_storage(field.type, pa.array(texts, pa.string()))
        else:
            column = pa.array(values, field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _batches(
    files: Sequence[str], naming: Callable[[str], Any]
) -> Iterator[list[dict[str, object]]]:
    """Yield the rows of files in lists; `naming(file)` is a context in which a file is read."""
    batch: list[dict[str, object]] = []
    size = 0
    for file in files:
        with naming(file):
            for index, row, fault, length in read_json(file):
                batch.append({**({TORN: fault} if fault else row), FILE: file, ROW: index})
                size += length
                if len(batch) == BATCH[0] or size > BATCH[1]:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def _write(path: Path, files: Sequence[str], naming: Callable[[str], Any]) -> None:
    """Write rows as one table; again where the first rows did not show all columns."""
    kinds: dict[str, str | None] = {}
    _widen(kinds, next(_batches(files, naming)))
    while True:
        features = _features(written := dict(kinds))
        with path.open("wb") as out, pa.ipc.new_stream(out, features.arrow_schema) as writer:
            for batch in _batches(files, naming):
                _widen(kinds, batch)
                if kinds == written:
                    writer.write_table(_table(batch, features))
        if kinds == written:
            return


def json_dataset(files: Sequence[str], naming: Callable[[str], Any]) -> datasets.Dataset:
    """Return the rows of JSON files, with `FILE`, `ROW`, and `TORN` where a row is broken.

    Values are those that Python's parser reads. A row without a column of others holds None there.
    The table lies in the cache of `datasets`, where the files are found again until they change.

    Args:
        naming: makes of a file's name the context in which it is read; errors may be named there.
    """
    versions = [*map(_version, files)]
    digest = hashlib.sha256(repr([VERSION, *versions]).encode()).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE) / "fastpo" / f"{digest}.arrow"
    if not path.exists():  # what is there may be somebody else's, whom no lock is asked of
        try:
            _fill(path, files, versions, naming)
        except OSError as error:
            raise ValueError(
                f"{CANNOT} {files[0]}: its rows cannot be kept in {path.parent} ({told(error)}): "
                "make room there, or name another folder in HF_DATASETS_CACHE"
            ) from error
    return _exactly(datasets.Dataset.from_file(str(path)))


def _version(file: str) -> tuple[str | int, ...]:
    """Return what changes with a file; a copy may keep size and `mtime` of what it replaces."""
    status = Path(file).stat()
    full = str(Path(file).absolute())
    return file, full, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _fill(path: Path, files: Sequence[str], versions: Any, naming: Callable[[str], Any]) -> None:
    """Write the table of files, if no other process did, and none of them changes meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with FileLock(f"{path}.lock"):  # of several processes one reads the files
        if path.exists():
            return
        try:
            _write(partial, files, naming)
            for file, version in zip(files, versions, strict=True):
                with naming(file):
                    if _version(file) != version:
                        raise ValueError("it changed while it was read")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _exactly(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the data set with exact JSON columns, where its table says `datasets.Json`."""
    features = {
        name: ExactJson() if isinstance(feature, Json) else feature
        for name, feature in rows.features.items()
    }
    rows.info.features = datasets.Features(features)
    return rows


def objects_dataset(rows: Sequence[Any], mark_torn: bool) -> datasets.Dataset:
    """Make a data set of rows in memory, whose values are the rows' own.

    Args:
        mark_torn: a row that is no dict, or holds what is no text, becomes one of `TORN` alone.

    Raises:
        ValueError: such a row, without `mark_torn`; names its number.
    """
    good: list[Mapping[str, Any]] = []
    for index, row in enumerate(rows):
        fault = ""
        if not isinstance(row, Mapping):
            fault = f"row {index} is {type(row).__name__}, not a dict; got {row!r:.200}"
        elif (key := next((key for key in row if not isinstance(key, str)), None)) is not None:
            fault = f"row {index} has the key {key!r}, which is not text"
        else:
            try:
                if half := half_pair(row):
                    fault = f"row {index} has {half!r}, half of a character of two"
            except (RecursionError, ValueError):
                fault = f"row {index} is nested too deep, or in itself"
        if fault and not mark_torn:
            raise ValueError(f"{fault}; {REPAIR}")
        good.append({TORN: fault} if fault else row)
    kinds: dict[str, str | None] = {}
    _widen(kinds, good)
    foreign = {n: [row.get(n) for row in good] for n in kinds if not _all_json(good, n)}
    simple = {name: kind for name, kind in kinds.items() if name not in foreign}
    parts = [_exactly(datasets.Dataset(_table(good, _features(simple))))] if simple else []
    for name, values in foreign.items():  # dates, images: what Arrow makes of them
        try:
            parts.append(datasets.Dataset.from_dict({name: values}))
        except (TypeError, ValueError) as error:  # as those of Arrow are
            raise ValueError(
                f"the column {name!r} holds what neither JSON nor Arrow has ({told(error)}): "
                "make text or numbers of it"
            ) from error
    return datasets.concatenate_datasets(parts, axis=1) if parts else datasets.Dataset.from_list([])


def _all_json(rows: Iterable[Mapping[str, Any]], name: str) -> bool:
    try:
        for row in rows:
            encode(row.get(name))
    except TypeError:
        return False
    return True
