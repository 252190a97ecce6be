"""A model, a tokenizer and preference groups small enough for a laptop's test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastpo.data.groups import Group
from fastpo.train.config import PreferenceConfig
from fastpo.train.trainer import PreferenceTrainer
from tests.absent import absent_packages_skip  # noqa: F401
from tests.train import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture
def groups() -> list[Group]:
    return tiny.pairs(16)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., PreferenceConfig]:
    def make(**options: Any) -> PreferenceConfig:
        return tiny.config(options.pop("output_dir", tmp_path / "run"), **options)

    return make


@pytest.fixture
def trainer(config: Callable[..., PreferenceConfig]) -> Callable[..., PreferenceTrainer]:
    """A trainer on tiny data: keyword arguments of the trainer, or else of the configuration."""

    def make(**options: Any) -> PreferenceTrainer:
        own = ("model", "train_dataset", "eval_dataset", "callbacks", "optimizers")
        own = (*own, "ref_model", "ref_model2")
        given = {name: options.pop(name) for name in own if name in options}
        given.setdefault("model", tiny.model())
        given.setdefault("train_dataset", tiny.pairs(16))
        return PreferenceTrainer(args=config(**options), processing_class=tiny.tokenizer(), **given)

    return make
