"""Rows are read from every place a user may keep them."""

from __future__ import annotations

import bz2
import csv
import datetime
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch.utils.data

from fastpo.data import json_tables
from fastpo.data.bad_rows import BadField, BadRow
from fastpo.data.dataset import build_groups
from fastpo.data.formats import read_row
from fastpo.data.json_rows import read_json
from fastpo.data.options import DataOptions
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

LONG = "".join(json.dumps({"prompt": f"{i * i:x}"}) + "\n" for i in range(999)).encode()
ROWS = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows=ROWS):
    dataset = datasets.Dataset.from_list(rows)
    suffix = path.suffix
    if suffix == ".csv":
        dataset.to_csv(str(path), index=False)
    elif suffix == ".tsv":
        dataset.to_csv(str(path), index=False, sep="\t")
    elif suffix == ".parquet":
        dataset.to_parquet(str(path))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if suffix == ".gz" else text.encode())
    return path


# Every reader, compressed once, eager and streamed.
@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "d.ndjson"]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_files(tmp_path, name, streaming):
    rows = load_rows(write(tmp_path / name), streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset) is streaming
    assert list(rows) == ROWS


def test_folder_with_splits_and_glob(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", ROWS[:1])
    assert list(load_rows(str(folder))) == ROWS
    assert list(load_rows(folder, split="test")) == ROWS[:1]
    assert list(load_rows(str(folder / "t*.jsonl"))) == ROWS[:1] + ROWS  # in order of the names
    assert list(load_rows(folder / "train.jsonl", split="train[1:]")) == ROWS[1:]


def test_saved_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert list(load_rows(tmp_path / "saved")) == ROWS
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert list(load_rows(tmp_path / "splits", split="test", streaming=True)) == ROWS
    with pytest.raises(ValueError, match=r"splits has no split 'train', it has test"):
        load_rows(tmp_path / "splits")


def test_objects():
    dataset = datasets.Dataset.from_list(ROWS)
    assert load_rows(dataset) is dataset
    assert load_rows({"test": dataset}, split="test") is dataset
    assert list(load_rows(ROWS)) == ROWS
    assert list(load_rows(ROWS, streaming=True)) == ROWS
    with pytest.raises(ValueError, match="split='test' needs"):
        load_rows(dataset, split="test")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file, a folder and a glob at .*none\.jsonl"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"looked for .*no-such-rows-here"):
        load_rows("./a/b/no-such-rows-here")


# Three spellings of folders whose files nobody means.
@pytest.mark.parametrize("place", ["~", "/", "~/../.."])
def test_a_folder_of_everything(place):
    with pytest.raises(ValueError, match="is no data set: name a file or a folder in it"):
        load_rows(place)


def test_hub_name_not_found(monkeypatch):
    def load_dataset(path, **kwargs):
        assert (path, kwargs["split"], kwargs["name"]) == ("owner/none", "train", "en")
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"glob at .*owner/none, and .* on the Hugging"):
        load_rows("owner/none", name="en")


def test_unreadable(tmp_path):
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(ValueError, match=r"d\.txt: the files must share one format"):
        load_rows(tmp_path / "d.txt")
    write(tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match="must share one format"):
        load_rows(tmp_path / "d.*")


TORN = b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n{"prompt": "c"}\n'


# A plain and a compressed file, eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz"])
def test_torn_line_is_named(tmp_path, name, streaming):
    write(tmp_path / "a.jsonl")
    (tmp_path / name).write_bytes(gzip.compress(TORN, mtime=0) if name.endswith("gz") else TORN)
    message = rf"cannot read .*/{name}: line 3 is not JSON \(.*; got '{{\"prompt\": '; repair"
    with pytest.raises(ValueError, match=message):
        list(load_rows(tmp_path / "*", streaming=streaming))


# A plain and a compressed file, eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz"])
def test_broken_lines_are_bad_rows(tmp_path, name, streaming, tokenizers):
    """A kill in mid-line, and a number: told by line, and the rest of the file is read."""
    write(tmp_path / "a.jsonl")
    good = json.dumps(ROWS[0])
    text = "\n".join([good, "", '{"prompt": ', good, "3", good[:-1] + ', "weight": 2}']).encode()
    (tmp_path / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith("gz") else text)
    rows = load_rows(tmp_path / "*", streaming=streaming, origin=True)
    build = GroupStream if streaming else partial(build_groups, progress=False)
    where = rf"{name}, row 2, field 'line': line 3 is not JSON \(.*; got '{{\"prompt\": '"
    with pytest.raises(BadRow, match=where):
        list(build(rows, tokenizers()))
    groups = build(rows, tokenizers(), DataOptions(on_bad_row="skip"))
    assert [(g.row, g.weight) for g in groups][3:] == [(0, 1.0), (3, 1.0), (5, 2.0)]
    assert [bad.row for bad in groups.skipped] == [2, 4]
    assert "line 5 is not a JSON object; got '3'" in str(groups.skipped[1])


# A fault of each reader, times eager or streamed, times with places or without.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", "", "it is empty"),
        ("ragged.csv", "prompt,chosen\na,b\na,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("text.parquet", "PAR", "Parquet"),
        ("empty.csv", "", "No columns"),
        ("wider.csv", "prompt,chosen\na,b,c\nd,e,f\n", "more cells than its header"),
        ("twice.csv", "prompt,chosen,chosen\na,b,c\n", "has the column 'chosen' twice"),
        ("reserved.csv", "prompt,__row__\na,b\n", "'__row__' is reserved: give it another"),
        ("blank.jsonl", "\n \r\n", "it is empty"),
        ("empty.json", "[]", "it is empty"),
        ("wide.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("wide.csv", "prompt,chosen\na,b\n".encode("utf-16"), "not UTF-8 text"),
        ("torn.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:30], "ended before"),
        ("flipped.jsonl.gz", b"\x1f\x8b" + bytes(60), "compression method"),
        ("text.jsonl.gz", b'{"prompt": "a"}\n', "Not a gzipped file"),
        ("torn.jsonl.zst", pa.compress(LONG, "zstd", asbytes=True)[:-20], "Truncated"),
        ("torn.jsonl.xz", lzma.compress(LONG)[:-20], "ended before"),
        ("torn.jsonl.bz2", bz2.compress(LONG)[:-20], "ended before"),
        ("torn.json", '[\n{"prompt": "a"},\n{"prompt', "line 3 is not JSON"),
        ("wrong.json", '[\n{"prompt": "a"},\n{"prompt" 1}, {}]', "line 3 is not JSON .*delimiter"),
        ("comma.json", '[\n{"prompt": "a"},\n]', "line 3 is not JSON"),
        ("no_comma.json", '[\n{"prompt": "a"}\n{"prompt": "a"}]', "line 3 is not JSON"),
        ("two.json", '[\n{"prompt": "a"}]\n[]', "line 3 goes on after the end of the list"),
        ("deep.json", "[{},\n" + "[" * 99999, "line 2 is not JSON .nested too deep"),
        ("object.json", '{\n"prompt": 3}', "an object over several lines"),
        (
            "rows.json",
            '{\n"n": 1, "rows": [{}]}',
            "whose key 'rows' holds rows: write that list alone",
        ),
    ],
)
@pytest.mark.parametrize("origin", [False, True])
def test_unreadable_file_is_named(tmp_path, name, content, reason, streaming, origin):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"cannot read .*/{name}: .*({reason})") as caught:
        list(load_rows(tmp_path / name, streaming=streaming, origin=origin))
    assert "\n" not in str(caught.value)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(b"\xff\xff\n")
    with pytest.raises(ValueError, match=r"cannot read .*folder/train.jsonl: line 1 is not UTF-8"):
        load_rows(folder)


# A good file, and one whose later line is broken, eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("broken", ["", "3\n"])
def test_a_byte_order_mark_is_left_out(tmp_path, streaming, broken):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + broken, encoding="utf-8-sig")
    first, *others = load_rows(path, streaming=streaming, origin=True)
    assert (first["prompt"], first["__row__"]) == (ROWS[0]["prompt"], 0)
    assert len(others) == bool(broken)


# JSON says what it says


STRANGE = [
    {"prompt": "a", "kwargs": {"a": 1}, "tools": None, "score": 1},
    {"prompt": "b", "kwargs": {"b": 2}, "score": 1.5, "ids": [12345678901234567890123, -1]},
    {"prompt": [{"role": "user", "content": "c"}, {"role": "user", "content": [{"text": "d"}]}]},
    {"tools": [{"name": "t", "arguments": '{"x": 1}'}, {"name": "t", "arguments": {"x": None}}]},
    {"prompt": "line\u2028of \x85 one", "kwargs": {}, "tools": [], "score": "high"},
    {"prompt": "\U0001f600", "score": 0.1 + 0.2, "late": True},
]


def without_none(row):
    return {name: value for name, value in row.items() if value is not None}


def written(path, text):
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    packed[".zst"] = partial(pa.compress, codec="zstd", asbytes=True)
    path.write_bytes(packed.get(path.suffix, bytes)(text.encode()))
    return path


def as_lines(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


# Each compression, times escaped and raw letters.
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.ndjson.bz2", "d.jsonl.zst"])
@pytest.mark.parametrize("ascii", [False, True])
def test_every_row_is_what_its_line_says(tmp_path, name, ascii):
    path = written(tmp_path / name, as_lines(STRANGE, ensure_ascii=ascii).replace("}\n", "}\r\n"))
    assert list(load_rows(path, streaming=True)) == STRANGE
    rows = load_rows(path)
    assert [without_none(row) for row in rows] == [without_none(row) for row in STRANGE]
    assert set(rows.column_names) == {key for row in STRANGE for key in row}


# A list in a file that is compressed or called lines, times compact and indented.
@pytest.mark.parametrize("name", ["d.json", "d.json.xz", "d.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_every_row_is_what_its_element_says(tmp_path, monkeypatch, name, indent):
    """The window on the text is small, so that it cuts everything somewhere."""
    path = written(tmp_path / name, "\n" + json.dumps(STRANGE, indent=indent, ensure_ascii=False))
    for chunk in range(20, 90):
        monkeypatch.setattr("fastpo.data.json_rows.CHUNK", chunk)
        assert [row.row for row in read_json(str(path))] == STRANGE
    assert list(load_rows(path, streaming=True)) == STRANGE
    assert [without_none(row) for row in load_rows(path)] == [*map(without_none, STRANGE)]


def test_numbers_cut_by_the_window(tmp_path, monkeypatch):
    path = written(tmp_path / "d.json", "[" + ",".join(["12345"] * 20) + "]")
    for chunk in range(1, 9):
        monkeypatch.setattr("fastpo.data.json_rows.CHUNK", chunk)
        faults = [row.fault for row in read_json(str(path))]
        assert len(faults) == 20
        assert all(fault.endswith("is not a JSON object; got '12345'") for fault in faults)


# Batches of 1, 2 and 5 rows: the late column begins in, at the end of, or after a batch.
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_columns_that_begin_late(tmp_path, monkeypatch, rows):
    """In a later batch of the table than the first, and of another kind there."""
    monkeypatch.setattr("fastpo.data.json_tables.BATCH", (rows, 1 << 20))
    read = load_rows(written(tmp_path / "d.jsonl", as_lines(STRANGE)))
    assert [without_none(row) for row in read] == [*map(without_none, STRANGE)]


BROKEN = {
    b'{"a": 1, "chosen": " a", "chosen": " b"}': "has the key 'chosen' twice",
    b'{"a": [{"b": {"c": 1, "c": 1}}]}': "has the key 'c' twice",
    b'{"a": "\\ud83d"}': "has '\\ud83d', half of a character",
    b'{"a": {"\\uDE00": 1}}': "has '\\ude00', half of a character",
    b'{"a": "\xff"}': "is not UTF-8 text",
    b"[1]": "is not a JSON object; got '[1]'",
    b"null": "is not a JSON object; got 'null'",
    b'{"__row__": 1}': "has the key '__row__', which is reserved",
}
NO_JSON = {
    b'{"a": ': "is not JSON (Expecting value at column ",
    b'{"a": ' + b"[" * 99999: "is nested too deep",
    b'{"a": ' + b"1" * 5000 + b"}": "is not JSON (Exceeds",
}


# Each fault in the first line, which decides the columns, and in a later one.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(("line", "reason"), [*BROKEN.items(), *NO_JSON.items()])
def test_a_broken_line_is_its_own_fault(tmp_path, line, reason, at, streaming):
    lines = [b'{"a": "\\ud83d\\ude00"}', b" ", b'{"a": 2}']
    lines.insert(at, line)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = list(load_rows(path, streaming=streaming, origin=True))
    assert [row["__row__"] for row in rows] == [0, 1, 3]
    (bad,) = [row for row in rows if row.get("__torn__")]
    assert bad["__torn__"].startswith(f"line {at + 1} {reason}")
    assert [row["a"] for row in rows if row is not bad] == ["\U0001f600", 2]
    with pytest.raises(ValueError, match=rf"cannot read .*d.jsonl: line {at + 1} ") as caught:
        list(load_rows(path, streaming=streaming))
    assert reason in str(caught.value)


# Each fault of an element, eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("element", "reason"), BROKEN.items())
def test_a_broken_element_is_its_own_fault(tmp_path, element, reason, streaming):
    path = tmp_path / "d.json"
    path.write_bytes(b'[\n{"a": 1},\n' + element + b'\n, {"a": "\xc3\xa9"}\n]')
    first, bad, last = load_rows(path, streaming=streaming, origin=True)
    assert (first["a"], last["a"], last["__row__"]) == (1, "\u00e9", 2)
    assert bad["__torn__"].startswith(f"element 2 (line 3) {reason}")


def test_a_file_is_read_again_once_it_changes(tmp_path):
    path = written(tmp_path / "d.jsonl", as_lines(ROWS))
    assert list(load_rows(path)) == ROWS == list(load_rows(path))
    (table,) = (tmp_path / "cache" / "fastpo").glob("*.arrow")
    written(path, as_lines(ROWS[:1]))
    assert list(load_rows(path)) == ROWS[:1]
    assert len([*table.parent.glob("*.arrow")]) == 2


def test_columns_of_one_type_stay_arrows_own(tmp_path):
    rows = load_rows(written(tmp_path / "d.jsonl", as_lines(STRANGE[:1] * 3 + ROWS)))
    assert [str(rows.features[name].dtype) for name in ("prompt", "score")] == ["string", "int64"]
    assert rows.sort("score").num_rows == len(rows)


def test_a_dataset_goes_on_as_any_other(tmp_path):
    rows = load_rows(written(tmp_path / "d.jsonl", as_lines(STRANGE)))
    assert rows["kwargs"] == [{"a": 1}, {"b": 2}, None, None, {}, None]
    assert (
        rows.filter(lambda row: row["kwargs"] == {"b": 2})[0]["ids"][0] == 12345678901234567890123
    )
    mapped = rows.map(lambda row: {"size": len(str(row["kwargs"]))})
    assert mapped["kwargs"] == rows["kwargs"]
    assert pickle.loads(pickle.dumps(rows))[:3] == rows[:3]
    assert list(rows.shuffle(seed=0).select([0])) == list(rows.shuffle(seed=0))[:1]
    assert list(rows.to_iterable_dataset()) == list(rows)
    assert len(datasets.concatenate_datasets([rows, mapped])) == 2 * len(rows)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1)
    assert list(loader) == list(rows)


# Eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_json_is_read_like_files(tmp_path, streaming):
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "train-a.jsonl", as_lines(STRANGE[:3]) + "3\n")
    written(folder / "train-b.json", json.dumps(STRANGE[3:]))
    written(folder / "test.jsonl", as_lines(ROWS))
    assert list(load_rows(folder, split="test", streaming=streaming)) == ROWS
    *rows, last = load_rows(folder, streaming=streaming, origin=True)
    assert [row["__row__"] for row in rows] == [0, 1, 2, 3, 0, 1]
    assert (rows[3]["__torn__"][:6], last["score"]) == ("line 4", 0.1 + 0.2)
    assert last["__file__"] == str(folder / "train-b.json")
    with pytest.raises(ValueError, match=r"cannot read .*/train-a.jsonl: line 4 is not"):
        list(load_rows(folder, streaming=streaming))
    with pytest.raises(ValueError, match="validation"):
        list(load_rows(folder, split="validation", streaming=streaming))


# Each reader of tables, eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_folder_of_tables_is_read_like_files(tmp_path, suffix, streaming):
    """So "2" and "NA" are an answer's text there too, and rows know their file."""
    rows = [{"prompt": "1", "chosen": "2", "rejected": "NA"}]
    write(tmp_path / f"train-a{suffix}", rows)
    write(tmp_path / f"train-b{suffix}", rows)
    write(tmp_path / f"test{suffix}", ROWS)
    assert list(load_rows(tmp_path, split="test", streaming=streaming)) == ROWS
    found = list(load_rows(tmp_path, streaming=streaming, origin=True))
    where = [(str(tmp_path / f"train-{name}{suffix}"), 0) for name in "ab"]
    assert [(row.pop("__file__"), row.pop("__row__")) for row in found] == where
    assert found == rows * 2


def test_files_of_a_folder_that_no_split_has_are_told(tmp_path, caplog):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    write(folder / "train.jsonl")
    assert list(load_rows(folder)) == ROWS
    assert not caplog.records
    write(folder / "extra.jsonl")
    write(folder / "more" / "rows.csv")
    (folder / ".hidden.jsonl").write_text("")
    assert list(load_rows(folder)) == ROWS
    (record,) = caplog.records
    assert record.getMessage().endswith("since no split has them: extra.jsonl, more/rows.csv")


def test_slices_of_the_splits_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])
    assert list(load_rows(tmp_path, split="train[1:]+test")) == [*ROWS[1:], ROWS[0]]
    assert len(load_rows(tmp_path, split="train[:67%]")) == 2
    with pytest.raises(ValueError, match="split='train\\[1:\\]': streamed files have"):
        load_rows(tmp_path, split="train[1:]", streaming=True)


def test_a_folder_with_a_card_says_itself_what_it_holds(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", ROWS[:1])
    config = "configs:\n- config_name: small\n  data_files:\n  - {split: train, path: b.jsonl}"
    (tmp_path / "README.md").write_text(f"---\n{config}\n---\n")
    assert list(load_rows(tmp_path, name="small")) == ROWS[:1]
    card = f"---\n{config}\n- config_name: all\n  data_files: a.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(ValueError, match=r"available configs: \['small', 'all'\]"):
        load_rows(tmp_path)


# A typing error, one in a slice, and a slice that is torn.
@pytest.mark.parametrize("split", ["tset", "tset[:1]", "train["])
def test_a_wrong_split_is_told_with_the_file(tmp_path, split):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=rf"cannot read {path}: .*(split \"tset\"|train\[)"):
        load_rows(path, split=split)
    with pytest.raises(ValueError, match="'' names no rows"):
        load_rows("")


def test_an_older_file_of_the_same_size_and_time_is_another(tmp_path):
    path = written(tmp_path / "d.jsonl", as_lines([{"a": 1}]))
    (row,) = load_rows(path)
    old = path.stat()
    written(path, as_lines([{"a": 2}]))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert [row["a"], *load_rows(path)["a"]] == [1, 2]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "d.jsonl", as_lines([{"a": 1}] * 9))
    make = json_tables._table

    def overwriting(rows, features):
        written(path, as_lines([{"a": 2}]))
        return make(rows, features)

    with monkeypatch.context() as patched:
        patched.setattr(json_tables, "_table", overwriting)
        with pytest.raises(ValueError, match=f"cannot read {path}: it changed while it was read"):
            load_rows(path)
    assert list(load_rows(path)) == [{"a": 2}]


def test_a_table_that_is_there_needs_no_lock(tmp_path, monkeypatch):
    """So that a folder of somebody else's will do."""
    path = written(tmp_path / "d.jsonl", as_lines(ROWS))
    assert list(load_rows(path)) == ROWS
    monkeypatch.setattr(json_tables, "FileLock", None)
    assert list(load_rows(path)) == ROWS


def test_a_full_or_forbidden_cache_is_told(tmp_path, monkeypatch):
    path = written(tmp_path / "d.jsonl", as_lines(ROWS))

    def fail(rows, features):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = tmp_path / "cache" / "fastpo"
    told = r"cannot read .*d.jsonl: its rows .* in {}/fastpo \({}\): .* HF_DATASETS_CACHE"
    with monkeypatch.context() as full:
        full.setattr(json_tables, "_table", fail)
        with pytest.raises(ValueError, match=told.format(kept.parent, "No space left on device")):
            load_rows(path)
    assert not [*kept.glob("*.partial")]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    with pytest.raises(ValueError, match=told.format(path, "Not a directory")):
        load_rows(path)


# Eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
def test_dicts_keep_their_own_keys(streaming):
    assert [without_none(row) for row in load_rows(STRANGE, streaming=streaming)] == [
        *map(without_none, STRANGE)
    ]


def test_dicts_of_other_objects():
    rows = [{"a": np.arange(2), "day": datetime.date(2026, 1, day)} for day in (1, 2)]
    first, second = load_rows(rows)
    assert (first["a"], second["day"]) == ([0, 1], datetime.date(2026, 1, 2))
    with pytest.raises(ValueError, match="row 1 is str, not a dict"):
        load_rows([{"a": 1}, "b"])
    with pytest.raises(ValueError, match=r"row 0 has .*half of a character"):
        load_rows([{"a": "\ud83d"}])
    torn, good = load_rows([{"a": "\ud83d"}, {"a": "b"}], origin=True)
    assert "half of a character" in torn["__torn__"]
    assert good["a"] == "b"
    with pytest.raises(ValueError, match=r"row 0 has the key 1, which is not text"):
        load_rows([{1: "a"}])
    deep: list = []
    for _ in range(50_000):
        deep = [deep]
    endless: list = []
    endless.append(endless)
    for value in (deep, endless):
        with pytest.raises(ValueError, match="row 0 is nested too deep, or in itself"):
            load_rows([{"a": value}])
    day = datetime.date(2026, 1, 1)
    assert list(load_rows([{"day": day}])) == [{"day": day}]
    with pytest.raises(ValueError, match=r"column 'day' holds what neither JSON nor Arrow has"):
        load_rows([{"day": day}, {"day": [1]}])


PEAK = """
import resource, sys
from fastpo.data.rows import load_rows

def read(path, streaming):
    count = sum(1 for _ in load_rows(path, streaming=streaming, origin=True))
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)

small, big = sys.argv[1:]
for path, streaming in ((small, True), (small, False), (big, True), (big, False)):
    read(path, streaming)
"""


# Lines and one list are read by different code. Streamed first, since a peak never falls.
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_big_file_is_not_held_in_memory(tmp_path, suffix):
    """120 MB: 0 to 6 MiB more than for one row when streamed, 153 to 168 with a mapped table."""
    row = {"prompt": "x y " * 6000, "chosen": [{"role": "assistant", "content": "z " * 3000}]}
    text, count = json.dumps(row), 4000
    path, small = tmp_path / f"d{suffix}", tmp_path / "small.jsonl"
    small.write_text(text)
    with path.open("w") as file:
        file.write("[\n" if suffix == ".json" else "")
        file.writelines(
            f"{text},\n" if suffix == ".json" else f"{text}\n" for _ in range(count - 1)
        )
        file.write(f"{text}]" if suffix == ".json" else text)
    assert path.stat().st_size > 120e6
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "other")}
    command = [sys.executable, "-c", PEAK, str(small), str(path)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    counts, peaks = zip(*(map(int, line.split()) for line in out.stdout.splitlines()), strict=True)
    assert counts == (1, 1, count, count)
    _, before, streamed, whole = peaks
    assert streamed - before < 60
    assert whole - before < 240


# What files do to values


CELLS = """\
prompt,chosen,rejected,weight,margin,score_chosen,chosen_spans
"1 + 1 =", 2,3,0.5,,4,"[[1, 2, 0.5]]"
Is it set?,NA,None,,1,,
"[{""role"": ""user"", ""content"": ""hi""}]","[{""role"": ""assistant"", ""content"": ""a""}]",\
"[{""role"": ""assistant"", ""content"": ""b""}]",,,,
Extract:,"[{""name"": ""Ann""}]",[],,,,
"""


# Commas and tabs, eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("sep", [",", "\t"])
def test_cells_are_what_they_say(tmp_path, sep, streaming):
    """Numbers and NA stay text where text is meant, and text becomes what its column needs."""
    path = tmp_path / ("d.csv" if sep == "," else "d.tsv")
    table = list(csv.reader(io.StringIO(CELLS.replace("\\\n", ""))))
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=sep).writerows(table)
    number, missing, chat, extract = map(read_row, load_rows(path, streaming=streaming))
    assert number.responses == [" 2", "3"]
    assert (number.weight, number.margin, number.scores) == (0.5, None, [4.0, None])
    assert number.spans == [[(1, 2, 0.5)], []]
    assert missing.responses == ["NA", "None"]
    assert (missing.weight, missing.margin) == (1.0, 1.0)
    assert chat.prompt == [{"role": "user", "content": "hi"}]
    assert chat.responses[1] == [{"role": "assistant", "content": "b"}]
    assert extract.responses == ['[{"name": "Ann"}]', "[]"]  # JSON as an answer


def test_a_header_without_rows_is_told(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,chosen\n")
    with pytest.raises(ValueError, match=r"cannot read .*d.csv: it is empty"):
        load_rows(tmp_path / "d.csv")


# Texts that pandas would read as an integer, one of other digits, a float and a boolean.
@pytest.mark.parametrize(("good", "bad"), [("2", "3"), ("007", "7"), ("1.0", "1"), ("True", "NA")])
def test_a_column_of_cells_is_not_typed(tmp_path, good, bad):
    path = tmp_path / "d.csv"
    path.write_text(f"prompt,chosen,rejected\n1,{good},{bad}\n")
    (row,) = map(read_row, load_rows(path))
    assert (row.prompt, row.responses) == ("1", [good, bad])


def test_lists_and_labels_in_cells(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('prompt,responses,scores\np,"[""a"", ""b""]","[1, 2.5]"\n')
    (row,) = map(read_row, load_rows(path))
    assert row.responses == ["b", "a"]
    assert row.scores == [2.5, 1.0]
    path.write_text("prompt,completion,label,score\np,a,True,1\np,b,false,2\np,c,2,3\n")
    *rows, bad = load_rows(path)
    assert [read_row(row).labels for row in rows] == [[True], [False]]
    with pytest.raises(BadField, match="neither true nor false"):
        read_row(bad)


def test_files_of_several_types(tmp_path):
    write(tmp_path / "a.jsonl", [{**ROWS[0], "margin": 1, "chosen": [{"role": "user"}]}])
    write(tmp_path / "b.jsonl", [{**ROWS[0], "margin": 0.5, "weight": 2, "chosen": []}])
    a, b = load_rows(tmp_path / "*")
    assert (a["margin"], b["margin"], a["weight"], b["weight"]) == (1.0, 0.5, None, 2)
    assert list(load_rows(tmp_path / "*", split="train[:1]+train[1:]")) == [a, b]
    write(tmp_path / "c.jsonl", [{**ROWS[0], "margin": "x"}])
    assert load_rows(tmp_path / "*")["margin"] == [1, 0.5, "x"]
    for name, margin in (("a", 1), ("b", 0.5), ("c", "x")):
        write(tmp_path / f"{name}.parquet", [{"prompt": "p", "margin": margin}])
    assert load_rows(tmp_path / "[ab].parquet")["margin"] == [1.0, 0.5]
    with pytest.raises(ValueError, match="columns of different types"):
        load_rows(tmp_path / "*.parquet")
    with pytest.raises(ValueError, match="split='test': streamed files"):
        load_rows(tmp_path / "*", split="test", streaming=True)
