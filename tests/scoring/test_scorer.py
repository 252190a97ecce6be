"""A frozen scorer, and the same model with its adapter switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.model.load import load_model, load_tokenizer
from fastpo.scoring.scorer import AdapterOff, Packer, Scorer
from tests.scoring.plain import sources


def test_an_adapter_that_is_off_leaves_the_base_model(tiny: Path) -> None:
    place: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    name, lora = str(tiny / "model"), {"r": 2, "init_lora_weights": False}
    adapted = Scorer(load_model(name, lora=lora, **place))
    base = Scorer(load_model(name, **place))
    tokenizer = load_tokenizer(name)
    groups = build_groups(sources(tiny), tokenizer, DataOptions()).groups
    batch = Packer([adapted, base], groups, tokenizer)(groups)
    assert torch.equal(AdapterOff(adapted)(batch), base(batch))
    assert not torch.equal(adapted(batch), base(batch))
