"""Rows as they were written, whatever holds them, and the place that each came from."""

from __future__ import annotations

from functools import partial

import pytest
import torch.utils.data

from fastpo.data.bad_rows import BadField, BadRow
from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.data.rows import load_rows
from fastpo.data.source_rows import SourceRow, exact_rows, good_rows
from fastpo.data.stream import GroupStream
from tests.data.test_rows import as_lines, write, written

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_row_and_its_place():
    row = {"a": 1, "__file__": "d.jsonl", "__row__": 7, "__torn__": None}
    assert SourceRow.of(row, "the glob", 9) == ({"a": 1}, "d.jsonl", 7, None)
    assert SourceRow.of({"a": 1}, "rows", 9) == ({"a": 1}, "rows", 9, None)
    assert SourceRow.of("a", "rows", 9) == ("a", "rows", 9, None)
    broken = SourceRow.of({**row, "__torn__": "line 8 is no JSON"}, "the glob", 9)
    with pytest.raises(BadRow, match=r"d\.jsonl, row 7, field 'line': line 8"), broken.naming():
        raise AssertionError("a broken line has no columns")
    with (
        pytest.raises(BadRow, match=r"rows, row 2, field 'a': odd"),
        SourceRow({}, "rows", 2).naming(),
    ):
        raise BadField("a", "odd")


def test_good_rows_are_the_files_own(caplog):
    rows = [{"a": i, "__file__": "d.csv", "__row__": i + 5} for i in range(4)]

    def even(row):
        if row["a"] % 2:
            raise BadField("a", "odd")
        return row["a"] // 2

    good = good_rows(rows, even, source="d", on_bad_row="skip")
    assert list(good) == [({"a": 0}, 0), ({"a": 2}, 1)]
    assert "2 of 4 rows were skipped" in caplog.text
    with pytest.raises(BadRow, match=r"d\.csv, row 6, field 'a': odd"):
        list(good_rows(rows, even, source="d", on_bad_row="error"))
    with pytest.raises(ValueError, match="d: no usable row; 1 of 1"):
        list(good_rows(rows[1:2], even, source="d", on_bad_row="skip"))


NESTED = [
    {"tools": [{"a": 1}, {"b": {"c": None, "d": [None, 2]}}], "top": None, "p": "x"},
    {"tools": [{"b": {"e": [{"f": 1}, {"g": 2}]}}], "top": "t", "p": "y"},
]
CLEAN = [
    {"tools": [{"a": 1}, {"b": {"d": [None, 2]}}], "top": None, "p": "x"},
    {"tools": [{"b": {"e": [{"f": 1}, {"g": 2}]}}], "top": "t", "p": "y"},
]


# Eager and streamed.
@pytest.mark.parametrize("streaming", [False, True])
def test_null_keys_that_arrow_adds_are_taken_away(tmp_path, streaming):
    dataset = datasets.Dataset.from_list(NESTED)
    assert list(dataset) != NESTED
    assert list(exact_rows(dataset.to_iterable_dataset() if streaming else dataset)) == CLEAN
    assert list(exact_rows(dataset.select([1, 0]))) == CLEAN[::-1]
    dataset.to_parquet(str(tmp_path / "d.parquet"))
    assert list(exact_rows(load_rows(tmp_path / "d.parquet", streaming=streaming))) == CLEAN
    written(tmp_path / "d.jsonl", as_lines(NESTED))
    assert list(exact_rows(load_rows(tmp_path / "d.jsonl", streaming=streaming))) == NESTED
    assert list(exact_rows(load_rows(NESTED, streaming=streaming))) == NESTED
    assert list(exact_rows(NESTED)) == NESTED


def test_null_keys_of_a_stream_without_types(monkeypatch):
    """Which `load_dataset` makes of JSON on the Hub."""

    def load_dataset(path, **kwargs):
        rows = datasets.Dataset.from_list(NESTED)
        return datasets.IterableDataset.from_generator(lambda: iter(list(rows)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_rows("owner/some", streaming=True)) == CLEAN


# Every format of `datasets` that changes types.
@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_the_format_of_a_data_set_changes_no_row(form):
    dataset = datasets.Dataset.from_list([{**row, "n": 1} for row in NESTED])
    expected = [{**row, "n": 1} for row in CLEAN]
    assert list(exact_rows(dataset.with_format(form))) == expected
    two = dataset.with_format(form, columns=["p", "n"])
    assert list(exact_rows(two)) == [{"p": row["p"], "n": 1} for row in CLEAN]
    stream = dataset.to_iterable_dataset(num_shards=2).shuffle(seed=1).with_format(form)
    orders = set()
    for epoch in range(8):
        stream.set_epoch(epoch)
        rows = list(exact_rows(stream))
        assert sorted(rows, key=lambda row: row["p"]) == expected
        orders.add(rows[0]["p"])
    assert orders == {"x", "y"}


def test_a_transform_has_the_last_word():
    dataset = datasets.Dataset.from_dict({"a": [1, 2]})
    own = dataset.with_transform(lambda batch: {"a": [{"b": None} for _ in batch["a"]]})
    assert list(exact_rows(own)) == [{"a": {"b": None}}] * 2


# A row alone, and one in a batch of a hundred.
@pytest.mark.parametrize("size", [1, 250])
def test_an_error_while_a_row_is_read_names_the_row(size):
    dataset = datasets.Dataset.from_dict({"a": [*range(size)]})

    def fails(batch):
        if size - 1 in batch["a"]:
            raise KeyError("lost")
        return batch

    texts = pa.array(["1"] * (size - 1) + ["{"])
    column = pa.ExtensionArray.from_storage(pa.json_(), texts)
    with pytest.raises(ValueError, match=f"cannot read a, row {size - 1}: "):
        list(exact_rows(datasets.Dataset(pa.table({"a": column})), "a"))
    read = exact_rows(dataset.with_transform(fails), "the source")
    with pytest.raises(ValueError, match=f"cannot read the source, row {size - 1}: .*lost"):
        list(read)
    lazy = exact_rows(dataset.to_iterable_dataset().map(lambda row: fails({"a": [row["a"]]})), "s")
    with pytest.raises(ValueError, match=f"cannot read s, row {size - 1}: .*lost"):
        list(lazy)


# Where a row came from


# Each reader, eager and streamed.
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
