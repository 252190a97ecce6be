"""Which kind a run's reference is, and where its models are while they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastpo.data.stream import GroupStream
from fastpo.reference import build
from fastpo.reference.live import AdapterReference, NoReference, StoredReference
from fastpo.train.trainer import PreferenceTrainer
from tests.reference.test_live import lora
from tests.reference.test_store import stored
from tests.train import tiny


def test_auto(trainer: Any) -> None:
    assert isinstance(trainer(objective="simpo").reference, NoReference)
    assert isinstance(trainer(model=lora()).reference, AdapterReference)
    assert trainer(model=lora(), ref_model=tiny.model()).reference_kind == "copy"
    assert isinstance(trainer().reference, StoredReference)
    assert trainer(ref_model=tiny.model()).reference_kind == "copy"
    stream = GroupStream(tiny.rows(4), tiny.tokenizer(), tiny.config("unused").data_options())
    for options in (
        {"objective": "tdpo1"},
        {"reference_update": {"every": 2, "mixup": 0.6}},
        {"objective": "sparse_po", "token_masks": "common"},
        {"train_dataset": stream},
        {"eval_dataset": {"held out": stream}},
    ):
        assert trainer(**options).reference_kind == "copy", options


def test_given_reference_model_comes_and_goes(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the run's device while it computes, where the caller had it afterwards."""
    given = tiny.model(seed=1)
    where = ["elsewhere"]
    monkeypatch.setattr(type(given), "device", property(lambda self: where[-1]))
    monkeypatch.setattr(
        PreferenceTrainer,
        "_move_model_to_device",
        lambda self, model, device: where.append("here") if model is given else None,
    )
    monkeypatch.setattr(given, "to", where.append)
    fill = build.fill_store

    def filling(*arguments: Any, **options: Any) -> int:
        assert where[-1] == "here"
        return fill(*arguments, **options)

    monkeypatch.setattr("fastpo.reference.build.fill_store", filling)
    stored(trainer, tmp_path / "store", ref_model=given)
    assert where[-1] == "elsewhere"
