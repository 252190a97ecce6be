"""Read rows from wherever they are: the Hub, files, folders, globs, or objects already in memory.

JSON is read by `fastpo.data.json_rows`, all else by the `datasets` library; this file finds out
which reader to call. Only functions that read import it, since groups already made are trained on
without it.
"""

from __future__ import annotations

import glob
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from fastpo.data.source_rows import CANNOT, FILE, ROW, TORN, without_nulls
from fastpo.optional import require
from fastpo.reading import REPAIR, told

if TYPE_CHECKING:
    import datasets

    Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

log = logging.getLogger(__name__)

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
    """Return `.jsonl` for `a.jsonl.gz`."""
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


class _CsvOptions(TypedDict, total=False):
    sep: str
    features: datasets.Features
    keep_default_na: bool
    na_values: list[str]


def _csv_options(file: str) -> _CsvOptions:
    """Return how `datasets` reads a CSV or TSV file as text; refuse what pandas would mend."""
    import datasets
    import pandas

    sep = "\t" if _suffix(file) == ".tsv" else ","
    columns = pandas.read_csv(file, sep=sep, nrows=0).columns
    # pandas would make an index of cells beyond the header, and other names of equal ones.
    if not isinstance(pandas.read_csv(file, sep=sep, nrows=1).index, pandas.RangeIndex):
        raise ValueError("its rows have more cells than its header has names")
    names = pandas.read_csv(file, sep=sep, nrows=1, header=None, dtype=str).iloc[0].dropna()
    if len(twice := names[names.duplicated()]):
        raise ValueError(f"it has the column {twice.iloc[0]!r} twice")
    # A guessed type would make the answer "2" a number, and "NA" or "None" a missing one.
    return {
        "sep": sep,
        "features": datasets.Features({name: datasets.Value("string") for name in columns}),
        "keep_default_na": False,
        "na_values": [""],
    }


def _load_file(reader: str, file: str, streaming: bool) -> Any:
    import datasets

    options: _CsvOptions = _csv_options(file) if reader == "csv" else {}
    return datasets.load_dataset(
        reader, data_files=[file], split="train", streaming=streaming, **options
    )


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Name the file in errors of `datasets`, which name none, or one in its cache."""
    try:
        yield
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise ValueError(f"cannot read {file}: it is empty; leave it out") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if str(error).startswith(CANNOT):  # named already
            raise
        reason = told(error.__cause__ or error)
        if "corresponds to no data" in reason:  # a header alone
            reason = "it is empty"
        raise ValueError(f"{CANNOT} {file}: {reason}; {REPAIR}") from error


def _read(reader: str, files: list[str], origin: bool) -> Iterator[Mapping[str, object]]:
    for file in files:
        with _naming(file):
            rows = (
                _read_json(file, origin) if reader == "json" else enumerate(_stream(reader, file))
            )
            for index, row in rows:
                yield {**row, FILE: file, ROW: index} if origin else row


def _read_json(file: str, origin: bool) -> Iterator[tuple[int, Mapping[str, object]]]:
    from fastpo.data.json_rows import read_json

    for index, row, fault, _ in read_json(file):
        if fault and not origin:
            raise ValueError(fault)
        yield index, {TORN: fault} if fault else row


def _refuse_reserved(names: Iterable[str]) -> None:
    if reserved := {FILE, ROW, TORN}.intersection(names):
        raise ValueError(f"the column name {min(reserved)!r} is reserved: give it another")


def _stream(reader: str, file: str) -> Iterator[Mapping[str, object]]:
    # By batches, since row by row a loader's process would take its share of a share.
    for batch in _load_file(reader, file, streaming=True).iter(batch_size=100):
        _refuse_reserved(batch)
        for values in zip(*batch.values(), strict=True):
            yield without_nulls(dict(zip(batch, values, strict=True)))


def _whole_json(files: list[str], origin: bool) -> datasets.Dataset:
    from fastpo.data.json_tables import json_dataset

    rows = json_dataset(files, _naming)
    if not origin and TORN in rows.column_names:
        row: Any = next(row for row in rows.select_columns([FILE, TORN]) if row[TORN])  # pyright: ignore
        raise ValueError(f"{CANNOT} {row[FILE]}: {row[TORN]}; {REPAIR}")
    return rows if origin else rows.remove_columns([FILE, ROW])


def _whole(reader: str, files: list[str], origin: bool) -> datasets.Dataset:
    if reader == "json":
        return _whole_json(files, origin)
    parts: list[datasets.Dataset] = []
    for file in files:
        with _naming(file):
            part = _load_file(reader, file, streaming=False)
            _refuse_reserved(part.column_names)
            # Arrow's readers let text pass that is no UTF-8; it would fail where a row is used.
            part.data.validate(full=True)
        if origin:
            part = part.add_column(FILE, [file] * len(part)).add_column(ROW, [*range(len(part))])
        parts.append(part)
    return _joined(parts)


def _load_files(files: Mapping[str, list[str]], split: str, streaming: bool, origin: bool) -> Rows:
    """Read the rows of `split` from the files of each split."""
    import datasets

    if streaming:
        if split not in files:
            raise ValueError(f"split={split!r}: streamed files have {', '.join(files)} alone")
        reader = _reader(files[split])
        # A list among the arguments is what loader processes divide: each reads files of its own.
        return datasets.IterableDataset.from_generator(
            _read, gen_kwargs={"reader": reader, "files": files[split], "origin": origin}
        )
    wholes = {
        name: _whole(_reader(listed), listed, origin)
        for name, listed in files.items()
        if name in split  # "train[:10%]+test" names two
    }
    lengths = {name: len(wholes.get(name, ())) for name in files}
    slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return _joined([wholes[s.splitname].select(range(s.from_, s.to)) for s in slices])


def _joined(parts: list[datasets.Dataset]) -> datasets.Dataset:
    """Join parts in turn, with types that hold all of them: 1 and 0.5 are floats."""
    import datasets
    import pyarrow

    if all(part.features == parts[0].features for part in parts):
        return datasets.concatenate_datasets(parts)
    schemas = [part.features.arrow_schema.remove_metadata() for part in parts]
    try:
        schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise ValueError(f"the files have columns of different types: {error}") from error
    features = datasets.Features.from_arrow_schema(schema)
    return datasets.concatenate_datasets(
        [part.cast(datasets.Features({k: features[k] for k in part.features})) for part in parts]
    )


def _load_folder(folder: Path, name: str | None, split: str, streaming: bool, origin: bool) -> Rows:
    import datasets

    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    if saved:  # written by Dataset.save_to_disk
        with _naming(str(folder)):
            loaded = datasets.load_from_disk(str(folder))
        rows = _one_split(loaded, split, str(folder))
        return rows.to_iterable_dataset() if streaming else rows
    with _naming(str(folder)):
        files = _folder_files(folder, name)
        if files is None:
            return _load_dataset(str(folder), name, split, streaming)
    return _load_files(files, split, streaming, origin)


def _folder_files(folder: Path, name: str | None) -> dict[str, list[str]] | None:
    """Return the files of each split; None where only `datasets` can read them."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), name=name)
    except ValueError as error:  # further lines list the configurations
        raise ValueError(" ".join(str(error).split())) from None
    config = builder.config
    listed = {str(s): [str(f) for f in each] for s, each in (config.data_files or {}).items()}
    files = [file for each in listed.values() for file in each]
    if name is None:
        _tell_of_others(folder, files)
    if builder.info.features is not None or not all(Path(file).is_file() for file in files):
        return None
    if len({READERS.get(_suffix(file), file) for file in files}) != 1:
        return None
    plain = type(config)()
    plain_sep = "\t" if files and _suffix(files[0]) == ".tsv" else ","
    by_itself = {"name": config.name, "data_files": config.data_files, "sep": plain_sep}
    told_how = {k for k, v in vars(config).items() if v != by_itself.get(k, vars(plain).get(k))}
    return None if told_how else listed


def _tell_of_others(folder: Path, read: list[str]) -> None:
    """Warn of files of rows which are in no split of a folder."""
    known = {Path(file).resolve() for file in read}
    others = [
        str(path)
        for file in sorted(folder.rglob("*"))
        if READERS.get(_suffix(str(path := file.relative_to(folder))))
        and not any(part.startswith((".", "_")) for part in path.parts)
        and file.resolve() not in known
    ]
    if others:
        log.warning("%s: not read, since no split has them: %s", folder, ", ".join(others[:10]))


def _load_dataset(source: str, name: str | None, split: str, streaming: bool) -> Rows:
    import datasets

    rows = datasets.load_dataset(source, name=name, split=split, streaming=streaming)
    if streaming and rows.features is None:  # nothing tells later that Arrow made these rows
        return rows.map(without_nulls)
    return rows


def _each(packed: bytes) -> Iterator[Any]:
    yield from pickle.loads(packed)


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
    """Load the rows of a data set.

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

    Returns:
        Rows whose values are those of the file. A row of an `IterableDataset` has the keys that
        its line has; in a `Dataset` a column that a row lacks is None there.

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
        from fastpo.data.json_tables import objects_dataset

        if streaming:  # packed, since `datasets` takes its time over every object to name the rows
            packed = pickle.dumps(list(source))
            return datasets.IterableDataset.from_generator(_each, gen_kwargs={"packed": packed})
        return objects_dataset(source, mark_torn=origin)

    path = Path(source).expanduser()
    if not str(source):
        raise ValueError("'' names no rows")
    try:
        if path.is_file():
            return _load_files({"train": [str(path)]}, wanted, streaming, origin)
        if path.is_dir():
            if path.resolve() in (Path("/"), Path.home()):  # all their files would be looked at
                raise ValueError(f"{source} is no data set: name a file or a folder in it")
            return _load_folder(path, name, wanted, streaming, origin)
        matches = sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if matches:
            return _load_files({"train": matches}, wanted, streaming, origin)
        # A Hub name is `name` or `owner/name`; anything else can only have meant a file.
        if _suffix(str(path)) in READERS or path.is_absolute() or len(path.parts) > 2:
            raise FileNotFoundError(
                f"no rows at {str(source)!r}: looked for a file, a folder and a glob at "
                f"{path.absolute()}"
            )
        return _load_dataset(str(source), name, wanted, streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"no rows at {str(source)!r}: looked for a file, a folder and a glob at "
            f"{path.absolute()}, and for a data set of that name on the Hugging Face Hub ({error})"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"{CANNOT} {source}: {told(error.__cause__ or error)}") from error
    except ValueError as error:
        if str(source) in str(error) or str(error).startswith(CANNOT):
            raise
        raise ValueError(f"{CANNOT} {source}: {error}") from error
