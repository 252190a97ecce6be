"""Rows are read from every place a user may keep them."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest

from fastpo.data.rows import load_rows

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
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"cannot read .*broken\.jsonl"):
        load_rows(tmp_path / "broken.jsonl")
