"""Rows from wherever they are: the Hub, files, folders, globs, or objects already in memory.

Reading is the `datasets` library's work; this file only finds out which of its readers to call.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}


def _suffix(path: str) -> str:
    """`a.jsonl.gz` -> `.jsonl`."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _load_files(files: list[str], split: str, streaming: bool) -> Rows:
    readers = {READERS.get(_suffix(file)) for file in files}
    reader = readers.pop()
    if readers or reader is None:
        raise ValueError(
            f"cannot read {', '.join(files[:5])}: the files must share one format of "
            f"{', '.join(READERS)} (or compressed: {', '.join(sorted(COMPRESSIONS))})"
        )
    options: dict[str, Any] = {"sep": "\t"} if _suffix(files[0]) == ".tsv" else {}
    return datasets.load_dataset(
        reader, data_files=files, split=split, streaming=streaming, **options
    )


def _load_folder(folder: Path, name: str | None, split: str, streaming: bool) -> Rows:
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    if saved:  # written by Dataset.save_to_disk
        rows = _one_split(datasets.load_from_disk(str(folder)), split, str(folder))
        return rows.to_iterable_dataset() if streaming else rows
    return datasets.load_dataset(str(folder), name=name, split=split, streaming=streaming)


def _one_split(loaded: Any, split: str, source: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        raise ValueError(f"{source} has no split {split!r}, it has {', '.join(loaded)}")
    return loaded[split]


def load_rows(
    source: str | Path | Rows | Mapping[str, Rows] | Sequence[Mapping[str, Any]],
    *,
    split: str | None = None,
    name: str | None = None,
    streaming: bool = False,
) -> Rows:
    """Loads the rows of a data set.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet, Arrow, also compressed), a glob of files, a
            folder of them (splits are inferred from file names; also one written by
            `save_to_disk`), a data set's name on the Hub, a `datasets.Dataset`, `IterableDataset`
            or dict of splits, or a list of dicts. An existing path wins over a Hub name.
        split: which split, slices such as "train[:10%]" included; None means "train".
        name: configuration of a Hub data set or folder.
        streaming: read lazily, as an IterableDataset.

    Raises:
        FileNotFoundError: nothing there; the message lists every place that was tried.
        ValueError: unknown file format, mixed formats, unknown split, or an unreadable file.
    """
    wanted = split or "train"
    if isinstance(source, Mapping):
        return _one_split(source, wanted, "the dict of splits")
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        if split is not None:
            raise ValueError(f"split={split!r} needs a path, a name or a dict of splits")
        return source
    if not isinstance(source, (str, Path)):
        # Dataset.from_list would keep only the columns of the first row.
        columns = dict.fromkeys(key for row in source for key in row)
        rows = datasets.Dataset.from_dict(
            {key: [row.get(key) for row in source] for key in columns}
        )
        return rows.to_iterable_dataset() if streaming else rows

    path = Path(source).expanduser()
    try:
        if path.is_file():
            return _load_files([str(path)], wanted, streaming)
        if path.is_dir():
            return _load_folder(path, name, wanted, streaming)
        matches = sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if matches:
            return _load_files(matches, wanted, streaming)
        # A Hub name is `name` or `owner/name`; anything else can only have meant a file.
        if _suffix(str(path)) in READERS or path.is_absolute() or len(path.parts) > 2:
            raise FileNotFoundError(
                f"no rows at {str(source)!r}: looked for a file, a folder and a glob at "
                f"{path.absolute()}"
            )
        return datasets.load_dataset(str(source), name=name, split=wanted, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"no rows at {str(source)!r}: looked for a file, a folder and a glob at "
            f"{path.absolute()}, and for a data set of that name on the Hugging Face Hub ({error})"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"cannot read {source}: {error.__cause__ or error}") from error
