"""Rows from wherever they are: the Hub, files, folders, globs, or objects already in memory.

Reading is the `datasets` library's work; this file only finds out which of its readers to call.
Only functions that read import it, since groups already made are trained on without it.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastpo.optional import require
from fastpo.reading import REPAIR, told

if TYPE_CHECKING:
    import datasets

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
FILE, ROW = "__file__", "__row__"
"""Columns that say which file a row was read from, and its number there, from 0."""
BOM = "\ufeff"
TORN = "__torn__"
"""Column of a row that stands for a broken line of JSON lines: what is wrong with it."""


def _suffix(path: str) -> str:
    """`a.jsonl.gz` -> `.jsonl`."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _reader(files: list[str]) -> str:
    readers = {READERS.get(_suffix(file)) for file in files}
    reader = readers.pop()
    if readers or reader is None:
        raise ValueError(
            f"cannot read {', '.join(files[:5])}: the files must share one format of "
            f"{', '.join(READERS)} (or compressed: {', '.join(sorted(COMPRESSIONS))})"
        )
    return reader


def _refuse_null(file: str) -> None:
    """Arrow's reader of JSON ends the process where the first value is null."""
    import fsspec

    with fsspec.open(file, "rb", compression="infer") as opened:
        if opened.read(4096).lstrip().startswith(b"null"):  # pyright: ignore
            raise ValueError("it begins with null, not with a JSON object")


def _load_file(reader: str, file: str, streaming: bool) -> Any:
    import datasets
    import pandas

    if reader == "json":
        _refuse_null(file)
    options: dict[str, Any] = {}
    if reader == "csv":
        sep = "\t" if _suffix(file) == ".tsv" else ","
        columns = pandas.read_csv(file, sep=sep, nrows=0).columns
        # A guessed type would make the answer "2" a number, and "NA" or "None" a missing one.
        options = {
            "sep": sep,
            "features": datasets.Features({name: datasets.Value("string") for name in columns}),
            "keep_default_na": False,
            "na_values": [""],
        }
    return datasets.load_dataset(
        reader, data_files=[file], split="train", streaming=streaming, **options
    )


def _lines(file: str) -> Iterator[tuple[str, str]]:
    """(line, what is wrong with it or "") of a file of JSON lines; none of other files."""
    if _suffix(file) not in (".jsonl", ".ndjson"):
        return
    import datasets

    # The text reader undoes every compression that the other ones undo.
    lines = datasets.load_dataset("text", data_files=[file], split="train", streaming=True)
    for number, line in enumerate(lines, 1):
        text, reason = line["text"].removeprefix(BOM), ""
        try:
            if text.strip() and not isinstance(json.loads(text), dict):
                reason = "not a JSON object"
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({error})"
        yield text, f"line {number} is {reason}; got {text[:200]!r}" if reason else ""


def _mended(file: str) -> str | None:
    """A copy in the cache of `datasets` whose broken lines are `{TORN: reason}`; None of others.

    A byte order mark, which Arrow takes for a broken line, is left out.
    """
    import datasets.config

    status = Path(file).stat()
    version = f"{Path(file).absolute()} {status.st_mtime_ns} {status.st_size}"
    name = hashlib.sha256(version.encode()).hexdigest()
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "mended" / f"{name}.jsonl"
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial, torn = copy.with_suffix(f".{os.getpid()}.partial"), _marked(file)
    try:
        with partial.open("w", encoding="utf-8") as out:
            for text, reason in _lines(file):
                torn = torn or bool(reason)
                if text.strip():  # no row, and an error to some releases
                    out.write(f"{json.dumps({TORN: reason}) if reason else text}\n")
        if torn:
            os.replace(partial, copy)
            return str(copy)
    except Exception:  # no lines to tell apart; whoever asks has an error already
        return None
    finally:
        partial.unlink(missing_ok=True)
    return None


def _marked(file: str) -> bool:
    with open(file, "rb") as opened:
        return opened.read(3) == BOM.encode()


def _broken_line(file: str) -> str | None:
    """What is wrong with the first broken line of JSON lines, where lines can be told apart."""
    try:
        return next((reason for _, reason in _lines(file) if reason), None)
    except UnicodeDecodeError as error:
        return told(error)
    except Exception:  # whoever asks has an error already
        return None


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors of `datasets`, of many classes, name no file, or one in its cache."""
    try:
        yield
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise ValueError(f"cannot read {file}: it is empty; leave it out") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = _broken_line(file) or told(error.__cause__ or error)
        raise ValueError(f"cannot read {file}: {reason}; {REPAIR}") from error


def _streamed(reader: str, file: str, read: str) -> Iterator[dict[str, Any]]:
    """The rows of `read`, which is `file` or stands for it."""
    with _naming(file):
        # By batches, since row by row a loader's process would take its share of a share.
        for batch in _load_file(reader, read, streaming=True).iter(batch_size=100):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def _read(reader: str, files: list[str], origin: bool) -> Iterator[dict[str, Any]]:
    for file in files:
        done = 0
        try:
            for row in _streamed(reader, file, file):
                yield {**row, FILE: file, ROW: done} if origin else row
                done += 1
        except ValueError:
            mended = _mended(file) if origin else None
            if mended is None:
                raise
            rows = enumerate(_streamed(reader, file, mended))
            for index, row in itertools.islice(rows, done, None):
                yield {**row, FILE: file, ROW: index}


def _load_files(files: list[str], split: str, streaming: bool, origin: bool) -> Rows:
    import datasets

    reader = _reader(files)
    if streaming:
        if split != "train":
            raise ValueError(f"split={split!r}: streamed files have the split 'train' alone")
        # A list among the arguments is what loader processes divide: each reads files of its own.
        return datasets.IterableDataset.from_generator(
            _read, gen_kwargs={"reader": reader, "files": files, "origin": origin}
        )
    parts: list[datasets.Dataset] = []
    for file in files:
        with _naming(file):
            try:
                part = _load_file(reader, file, streaming=False)
            except Exception:
                mended = _mended(file) if origin else None
                if mended is None:
                    raise
                part = _load_file(reader, mended, streaming=False)
            # Arrow's readers let text pass that is no UTF-8; it would fail where a row is used.
            part.data.validate(full=True)
        if origin:
            part = part.add_column(FILE, [file] * len(part)).add_column(ROW, [*range(len(part))])
        parts.append(part)
    rows = _joined(parts)
    slices = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return datasets.concatenate_datasets([rows.select(range(s.from_, s.to)) for s in slices])


def _joined(parts: list[datasets.Dataset]) -> datasets.Dataset:
    """The parts in turn, with types that hold all of them: 1 and 0.5 are floats."""
    import datasets
    import pyarrow

    if len(parts) == 1:
        return parts[0]
    schemas = [part.features.arrow_schema.remove_metadata() for part in parts]
    try:
        schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise ValueError(f"the files have columns of different types: {error}") from error
    features = datasets.Features.from_arrow_schema(schema)
    return datasets.concatenate_datasets(
        [part.cast(datasets.Features({k: features[k] for k in part.features})) for part in parts]
    )


def _load_folder(folder: Path, name: str | None, split: str, streaming: bool) -> Rows:
    import datasets

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
    origin: bool = False,
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
        origin: add the columns `FILE` and `ROW` to rows of a file or a glob, which messages about
            bad rows then name; a broken line of JSON lines is then a row that says so in `TORN`.

    Raises:
        FileNotFoundError: nothing there; the message lists every place that was tried.
        ValueError: unknown file format, mixed formats, unknown split, or an unreadable file.
        PackageError: `datasets` is not installed.
    """
    require("datasets", "reading rows")
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

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
            return _load_files([str(path)], wanted, streaming, origin)
        if path.is_dir():
            if path.resolve() in (Path("/"), Path.home()):  # all their files would be looked at
                raise ValueError(f"{source} is no data set: name a file or a folder in it")
            with _naming(str(source)):
                return _load_folder(path, name, wanted, streaming)
        matches = sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if matches:
            return _load_files(matches, wanted, streaming, origin)
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
        raise ValueError(f"cannot read {source}: {told(error.__cause__ or error)}") from error
