"""The comparison to the bit sees one bit, and nothing of the clock."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.bits import cases, differences, digest_of


def left(folder: Path, *, weight: float = 1.0, loss: float = 0.5, seconds: float = 1.0) -> Path:
    """What a run leaves, in a folder of its own."""
    folder.mkdir()
    record = {"step": 1, "loss": loss, "time": seconds, "train_runtime": seconds}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    save_file({"w": np.array([weight, 2.0], np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({}, []),
        ({"seconds": 2.0}, []),
        ({"loss": 0.5 + 2**-53}, ["metrics 0"]),
        ({"weight": 1.0 + 2**-23}, ["model.safetensors w (2,) #0"]),
    ],
)
def test_what_differs_is_named(tmp_path: Path, change: dict[str, float], seen: list[str]) -> None:
    was, now = digest_of(left(tmp_path / "was")), digest_of(left(tmp_path / "now", **change))
    assert differences(was, now) == seen


def test_what_is_missing_differs() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == ["a", "c"]


def test_every_mode_has_six_objectives_but_for_what_cannot_be() -> None:
    names = list(cases())
    assert len(names) == 6 * 5 - 3 + 2
    assert list(cases("two ranks")) == ["dpo two ranks", "lipo two ranks"]
