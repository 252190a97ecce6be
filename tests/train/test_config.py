"""The configuration: defaults, round trips, and errors that name value and remedy."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers.trainer_utils import IntervalStrategy

from fastpo.data.options import DataOptions
from fastpo.train.config import PreferenceConfig


def test_defaults(tmp_path: Any) -> None:
    made = PreferenceConfig(output_dir=str(tmp_path))
    assert made.learning_rate == 1e-6
    assert made.activation_checkpointing
    assert made.remove_unused_columns is False
    assert made.report_to == []
    assert made.disable_dropout
    assert made.accelerator_config.dispatch_batches is False
    assert made.data_options() == DataOptions(seed=made.seed)


def test_checkpointing_obeys_either_name(tmp_path: Any) -> None:
    with pytest.warns(FutureWarning):
        old = PreferenceConfig(output_dir=str(tmp_path), gradient_checkpointing=False)
    new = PreferenceConfig(output_dir=str(tmp_path), activation_checkpointing=False)
    assert not old.activation_checkpointing
    assert not new.activation_checkpointing


def test_round_trip(config: Any) -> None:
    made = config(
        objective={"dpo": 0.8, "sft": 1.0},
        objective_args={"dpo.beta": 0.2},
        share_prompt=False,
        chat_template_kwargs={"enable_thinking": False},
        max_length=64,
        hub_token="secret",
    )
    resolved = made.to_dict()
    assert "secret" not in json.dumps(resolved)
    from_json = json.loads(json.dumps(resolved))
    from_yaml = yaml.safe_load(yaml.safe_dump(resolved))
    for values in (from_json, from_yaml):
        again = PreferenceConfig.from_dict(values)
        assert again.to_dict() == resolved
    assert again.build_loss().components[0].hyper == {"beta": 0.2}
    assert again.data_options().max_length == 64
    assert again.share_prompt == "false"


def test_objective_as_a_flag_is_json(config: Any) -> None:
    assert config(objective='{"dpo": 1.0, "sft": 0.1}').objective == {"dpo": 1.0, "sft": 0.1}
    assert config(beta=0.3).build_loss().components[0].hyper == {"beta": 0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpoo"}, "'dpoo'.*'dpo'"),
        ({"objective": None}, "objective is None"),
        ({"objective_args": {"bata": 1.0}}, "'bata'.*'beta'"),
        ({"beta": 0.1, "objective_args": {"beta": 0.2}}, "beta=0.1 contradicts .*0.2"),
        ({"reference": "none"}, "'dpo' compares with a reference.*simpo"),
        ({"reference": "stoer"}, "reference='stoer'.*did you mean 'store'"),
        ({"reference": "copy", "reference_store": "x"}, "reference_store='x'.*'store'"),
        ({"objective": "tdpo1", "reference": "store"}, "'tdpo1' needs the .*whole distribution"),
        ({"backend": "cuda"}, "backend='cuda' must be one of auto, torch, triton"),
        ({"share_prompt": "yes"}, "share_prompt='yes'"),
        ({"truncation": "middle"}, "truncation='middle'"),
        ({"list_to_pairs": "best_wrost"}, "did you mean 'best_worst'"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"mlp_tile": 0}, "mlp_tile=0 must be at least 1"),
        ({"mlp_tile": "all"}, "mlp_tile='all' must be an integer at least 1 or auto or null"),
        (
            {"offload_activations": True, "activation_checkpointing": False},
            "needs activation_checkpointing=True",
        ),
        ({"use_liger_kernel": True}, "use_liger_kernel=True.*layer_kernels='liger'"),
        ({"layer_kernels": "ligr"}, "did you mean 'liger'"),
        ({"num_samples": -1}, "num_samples=-1"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1.*objective_args"),
        ({"early_stopping_patience": 2}, "early_stopping_patience=2 needs evaluations"),
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance'.*'group_by_length'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_value_and_remedy(config: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


# Text for a number or a truth, a truth for a number, half a token, a word that there is not.
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_length", "512", "must be an integer at least 1 or null"),
        ("max_length", 512.5, "must be an integer at least 1 or null"),
        ("max_prompt_length", True, "must be an integer at least 1 or null"),
        ("max_response_length", 0, "must be at least 1"),
        ("bos", "maybe", "must be true or false"),
        ("append_eos", "false", "must be true or false"),
        ("truncation", "keep_ends", "must be one of .*; did you mean 'keep_end'?"),
        ("list_to_pairs", "best", "must be one of best_worst, best_rest or null"),
        ("columns", 1, "must be a mapping"),
        ("dialect", None, "must be text"),
    ],
)
def test_both_doors_of_python_refuse_in_the_same_words(
    config: Any, name: str, value: object, words: str
) -> None:
    for door in (config, DataOptions):
        with pytest.raises(ValueError, match=f"^{name}={value!r} {words}"):
            door(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("offload_activations", "no", "must be true or false"),
        ("disable_dropout", "false", "must be true or false"),
        ("bf16", "no", "must be true or false or null"),
        ("reference_store", 1, "must be text or null"),
        ("share_prompt", 1, "must be one of auto, true, false"),
        ("workspace_mib", 0.5, "must be an integer at least 1 or auto"),
        ("objective", ["dpo"], "must be a mapping or text or null"),
    ],
)
def test_types_are_checked(config: Any, name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value!r} {words}')}"):
        config(**{name: value})


def test_numbers_and_paths_of_python_are_taken(config: Any, tmp_path: Path) -> None:
    made = config(
        max_length=np.int64(64),
        sample_tokens=3.0,
        self_check=np.bool_(False),
        reference_store=tmp_path,
        beta=[0.2, 0.1],
        eval_strategy=IntervalStrategy.NO,
    )
    taken = made.max_length, made.sample_tokens, made.self_check, made.reference_store
    assert taken == (64, 3, False, str(tmp_path))
    assert made.self_check is False
    assert json.loads(json.dumps(made.to_dict()))["max_length"] == 64
    assert DataOptions(chat_template_kwargs=None).chat_template_kwargs == {}  # pyright: ignore
    assert made.data_options().max_length == 64


def test_unknown_setting() -> None:
    with pytest.raises(ValueError, match=r"'learning_rat'\. Did you mean 'learning_rate'"):
        PreferenceConfig.from_dict({"learning_rat": 1.0})


@pytest.mark.parametrize("native", [True, False])
def test_bf16_needs_a_cpu_that_has_it(
    config: Any, native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": native})  # as ARM says it
    with caplog.at_level(logging.WARNING, "fastpo.train.config"):
        made = config(bf16=True)
    assert made.bf16 is native
    assert ("bf16 is off" in caplog.text) is not native
    assert config().bf16 is False  # unset: full precision on a CPU
