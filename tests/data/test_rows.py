"""Rows are read from every place a user may keep them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from functools import partial

import pytest
import torch.utils.data

from fastpo.data.build import BadRow, DataOptions, GroupStream, build_groups
from fastpo.data.formats import BadField, read_row
from fastpo.data.rows import load_rows

datasets = pytest.importorskip("datasets")

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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz"])
def test_torn_line_is_named(tmp_path, name, streaming):
    write(tmp_path / "a.jsonl")
    (tmp_path / name).write_bytes(gzip.compress(TORN, mtime=0) if name.endswith("gz") else TORN)
    message = rf"cannot read .*/{name}: line 3 is not JSON \(.*; got '{{\"prompt\": '; repair"
    with pytest.raises(ValueError, match=message):
        list(load_rows(tmp_path / "*", streaming=streaming))


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
    where = rf"{name}, row 1, field 'line': line 3 is not JSON \(.*; got '{{\"prompt\": '"
    with pytest.raises(BadRow, match=where):
        list(build(rows, tokenizers()))
    groups = build(rows, tokenizers(), DataOptions(on_bad_row="skip"))
    assert [(g.row, g.weight) for g in groups][3:] == [(0, 1.0), (2, 1.0), (4, 2.0)]
    assert [bad.row for bad in groups.skipped] == [1, 3]
    assert "line 5 is not a JSON object; got '3'" in str(groups.skipped[1])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", "", "it is empty"),
        ("ragged.csv", "prompt,chosen\na,b\na,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("text.parquet", "PAR", "Parquet"),
        ("empty.csv", "", "No columns"),
        ("latin.jsonl", '{"prompt": "\u00e9"}'.encode("latin-1"), "not UTF-8 text"),
        ("wide.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "not UTF-8 text|not JSON"),
        ("wide.csv", "prompt,chosen\na,b\n".encode("utf-16"), "not UTF-8 text"),
        ("binary.jsonl", bytes(range(256)), "not UTF-8 text"),
        ("torn.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:30], "ended before"),
        ("flipped.jsonl.gz", b"\x1f\x8b" + bytes(60), "compression method"),
        ("text.jsonl.gz", b'{"prompt": "a"}\n', "Not a gzipped file"),
        ("no_list.json", '{"prompt": 3', ""),
        ("number.json", "3", ""),
        ("null.json", "null", "begins with null"),
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
    with pytest.raises(ValueError, match=r"cannot read .*folder"):
        load_rows(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_first_line_of_null_is_a_bad_row(tmp_path, streaming):
    """Arrow would end the process."""
    write(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text("null\n" + (tmp_path / "d.jsonl").read_text())
    first, *others = load_rows(tmp_path / "d.jsonl", streaming=streaming, origin=True)
    assert "line 1 is not a JSON object; got 'null'" in first["__torn__"]
    assert len(others) == len(ROWS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("broken", ["", "3\n"])
def test_a_byte_order_mark_is_left_out(tmp_path, streaming, broken):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + broken, encoding="utf-8-sig")
    first, *others = load_rows(path, streaming=streaming, origin=True)
    assert (first["prompt"], first["__row__"]) == (ROWS[0]["prompt"], 0)
    assert len(others) == bool(broken)


# What files do to values


CELLS = """\
prompt,chosen,rejected,weight,margin,score_chosen,chosen_spans
"1 + 1 =", 2,3,0.5,,4,"[[1, 2, 0.5]]"
Is it set?,NA,None,,1,,
"[{""role"": ""user"", ""content"": ""hi""}]","[{""role"": ""assistant"", ""content"": ""a""}]",\
"[{""role"": ""assistant"", ""content"": ""b""}]",,,,
Extract:,"[{""name"": ""Ann""}]",[],,,,
"""


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


# Where a row came from


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_bad_rows_name_their_file(tmp_path, suffix, streaming, tokenizers):
    """The second file's second row, not the glob's fifth."""
    rows = [{"prompt": "Say", "chosen": " a", "rejected": " b"}] * 3
    write(tmp_path / f"a{suffix}", rows)
    write(tmp_path / f"b{suffix}", [rows[0], {**rows[0], "rejected": " a"}, rows[1]])
    loaded = load_rows(tmp_path / f"*{suffix}", streaming=streaming, origin=True)
    bad = rf"{tmp_path}/b{suffix}, row 1, field 'rejected': identical to chosen"
    build = GroupStream if streaming else partial(build_groups, progress=False)
    with pytest.raises(BadRow, match=bad):
        list(build(loaded, tokenizers(), source="the glob"))
    groups = build(loaded, tokenizers(), DataOptions(on_bad_row="skip"), source="the glob")
    assert [(g.source[-len(suffix) - 1 :][0], g.row) for g in groups] == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 2),
    ]  # fmt: skip
    assert [(b.source, b.row) for b in groups.skipped] == [(f"{tmp_path}/b{suffix}", 1)]


def test_workers_read_files_of_their_own(tmp_path, tokenizers):
    rows = [{"prompt": "Say", "chosen": " a", "rejected": " b"}] * 2
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", rows)
    stream = GroupStream(load_rows(tmp_path / "*", streaming=True, origin=True), tokenizers())
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    found = sorted((g.source, g.row) for g in loader)
    assert found == [(f"{tmp_path}/{name}.jsonl", row) for name in "abc" for row in (0, 1)]


def test_files_of_several_types(tmp_path):
    write(tmp_path / "a.jsonl", [{**ROWS[0], "margin": 1, "chosen": [{"role": "user"}]}])
    write(tmp_path / "b.jsonl", [{**ROWS[0], "margin": 0.5, "weight": 2, "chosen": []}])
    a, b = load_rows(tmp_path / "*")
    assert (a["margin"], b["margin"], a["weight"], b["weight"]) == (1.0, 0.5, None, 2)
    assert list(load_rows(tmp_path / "*", split="train[:1]+train[1:]")) == [a, b]
    write(tmp_path / "c.jsonl", [{**ROWS[0], "margin": "x"}])
    with pytest.raises(ValueError, match="columns of different types"):
        load_rows(tmp_path / "*")
    with pytest.raises(ValueError, match="split='test': streamed files"):
        load_rows(tmp_path / "*", split="test", streaming=True)
