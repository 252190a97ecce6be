"""Optimisers that leave bfloat16 weights as they are, and those that move them."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import trainer_optimizer

from fastpo import optional
from fastpo.train import optimizers
from fastpo.train.optimizers import lost_steps, refuse_lost_steps, require_optimizer
from tests.reference.test_live import lora
from tests.train import tiny

RATE = 1e-5


def half(dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny.model().to(dtype)


@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", "paged_adamw_8bit", "lion_32bit", "adafactor", "rmsprop"]
)
def test_refused_by_name_with_both_ways_out(config: Any, optim: str) -> None:
    said = rf"^optim={optim} at learning_rate=1e-05 leaves \d\d% .*dtype=float32 .*adamw_torch_8bit"
    with pytest.raises(ValueError, match=said) as caught:
        refuse_lost_steps(half(), config(optim=optim, learning_rate=RATE))
    assert "\n" not in str(caught.value)


def test_let_pass(config: Any) -> None:
    """By weights, by rate, by optimiser, and what is trained beside frozen weights."""
    frozen = half()
    frozen.get_input_embeddings().requires_grad_(False)
    for model, options in (
        (tiny.model(), {}),
        (half(), {"learning_rate": 1e-2}),
        (half(), {"optim": "sgd"}),
        (half(), {"optim": "adamw_torch_8bit"}),
        (half(torch.float16), {"learning_rate": 1e-6}),
        (lora().bfloat16(), {}),
        (frozen, {}),
    ):
        refuse_lost_steps(model, config(**{"learning_rate": RATE, **options}))
    without = config(learning_rate=RATE, optim="adamw_torch_8bit")
    without.optim_args = "bf16_stochastic_round=False"
    with pytest.raises(ValueError, match="or set bf16_stochastic_round=True"):
        refuse_lost_steps(half(), without)


@pytest.mark.parametrize(
    ("dtype", "options", "warns"),
    [
        (torch.bfloat16, {}, "rounds such steps away: load the model with dtype=float32"),
        (torch.bfloat16, {"optim": "sgd"}, "optim=sgd"),
        (torch.float16, {"learning_rate": 1e-7}, "float16 rounds such steps away"),
        (torch.float32, {"learning_rate": 1e-11}, "away: raise learning_rate"),
        (torch.float32, {}, None),
        (torch.bfloat16, {"learning_rate": 0.0}, None),
    ],
)
def test_the_trainer_warns(
    trainer: Any,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    options: dict,
    warns: str | None,
) -> None:
    with caplog.at_level(logging.WARNING, "fastpo"):
        trainer(model=half(dtype), **{"learning_rate": RATE, "objective": "simpo", **options})
    assert (warns in caplog.text) if warns else ("rounds such" not in caplog.text)


def test_adapters_do_not_hide_what_is_trained_beside_them(
    trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(half(), LoraConfig(r=64, modules_to_save=["norm"]))
    with caplog.at_level(logging.WARNING, "fastpo"):
        trainer(model=model, learning_rate=RATE, objective="simpo")
    assert "leaves 100% of the trained bfloat16 weights as they are" in caplog.text


class Kahan(torch.optim.SGD):
    """An optimiser that says, as torch-optimi's do, that it keeps what rounding loses."""

    def __init__(self, params: Any, kahan_sum: bool | None) -> None:
        super().__init__(params, lr=RATE)
        self.defaults["kahan_sum"] = kahan_sum


def test_a_given_optimizer_is_asked(config: Any) -> None:
    model, args = half(), config(learning_rate=RATE)
    plain = torch.optim.AdamW(model.parameters(), lr=RATE)
    found = lost_steps(model, args, plain)
    assert found is not None
    assert "optim=AdamW at" in found.reason
    for kahan, lost in ((None, False), (True, False), (False, True)):
        assert (lost_steps(model, args, Kahan(model.parameters(), kahan)) is None) is not lost
    plain.bf16_stochastic_round = True  # pyright: ignore
    assert lost_steps(model, args, plain) is None


def test_nothing_to_train(config: Any) -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        lost_steps(model, config())


def test_random_rounding_is_on_unless_said_otherwise(config: Any) -> None:
    made = config(optim="adamw_torch_4bit", optim_args="block_size=128")
    assert made.optim_args == "block_size=128,bf16_stochastic_round=True"
    assert type(made).from_dict(made.to_dict()).optim_args == made.optim_args
    off = "bf16_stochastic_round=False"
    assert config(optim="adamw_torch_8bit", optim_args=off).optim_args == off
    assert config().optim_args is None


@pytest.mark.parametrize(
    ("optim", "given", "said"),
    [
        ("adamw_torch_8bit", "block_size=x", "block_size=x must be an integer at least 1"),
        ("adamw_torch_8bit", "blocksize=64", "takes no 'blocksize': did you mean 'block_size'?"),
        ("adamw_torch_8bit", "bf16_stochastic_round=maybe", "must be true or false"),
        ("adamw_torch", "amsgrad=True", "takes no 'amsgrad': it has none, so leave optim_args out"),
        ("adamw_8bit", "eps=1e-6", "takes no 'eps': adam_epsilon is a key of its own"),
        ("sgd", "weight_decay=0.1", "takes no 'weight_decay': weight_decay is a key of its own"),
        ("rmsprop", "momentum=high", "momentum=high must be a number at least 0"),
        ("sgd", "momentum", "'momentum' is no name=value"),
        ("sgd", "momentum=0.9,", "'' is no name=value"),
        ("sgd", {"momentum": 0.9}, "write text, such as"),
    ],
)
def test_arguments_that_an_optimiser_does_not_take(
    config: Any, optim: str, given: Any, said: str
) -> None:
    with pytest.raises(ValueError, match="optim_args") as caught:
        config(optim=optim, optim_args=given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_are_those_that_the_trainer_reads() -> None:
    for name, handler in trainer_optimizer._OPTIMIZER_HANDLERS.items():
        ours = next((o for part, o in optimizers._OPTIONS.items() if part in name), {})
        source = inspect.getsource(handler)
        read = re.findall(r'optim_args\.(?:get|pop)\("(\w+)"|"(\w+)" in ctx\.optim_args', source)
        for keys in re.findall(r"for key in \((.+?)\):", source):
            read += [(key,) for key in re.findall(r'"(\w+)"', keys)]
        if not name.startswith("rmsprop_bnb") and "get_bitsandbytes" not in handler.__name__:
            assert {n for names in read for n in names if n} - {"weight_decay"} == set(ours), name
    ademamix = inspect.getsource(trainer_optimizer._get_bitsandbytes_optimizer)
    assert all(f'"{option}"' in ademamix for option in optimizers._OPTIONS["ademamix"])


@pytest.mark.parametrize(
    ("optim", "given", "handed_on"),
    [
        ("adamw_torch_4bit", "block_size=64", {"block_size": 64, "bf16_stochastic_round": True}),
        ("rmsprop_bnb", "alpha=0.9,momentum=0.5", {"alpha": 0.9, "momentum": 0.5}),
        ("rmsprop", "centered=on", {"centered": True}),
    ],
)
def test_arguments_are_handed_on_as_numbers(
    trainer: Any, optim: str, given: str, handed_on: dict
) -> None:
    made = trainer(optim=optim, optim_args=given, objective="simpo")
    _, keywords = made.get_optimizer_cls_and_kwargs(made.args, made.model)
    assert {name: keywords[name] for name in handed_on} == handed_on
    assert all(type(keywords[name]) is type(value) for name, value in handed_on.items())


def test_missing_packages(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "optimi"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(optional, "missing", lambda *said: optional.PackageError(" ".join(said)))
    with pytest.raises(optional.PackageError, match="optim=adamw_torch_8bit torchao"):
        require_optimizer(config(optim="adamw_torch_8bit"))
    with pytest.raises(optional.PackageError, match="optim=stable_adamw torch-optimi"):
        require_optimizer(config(optim="stable_adamw"))
    for optim, package in (("galore_adamw", "galore-torch"), ("schedule_free_sgd", "schedulefree")):
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
        with pytest.raises(optional.PackageError, match=f"optim={optim} {package}"):
            require_optimizer(config(optim=optim))
    require_optimizer(config())
    monkeypatch.setitem(sys.modules, "optimi", ModuleType("optimi"))
    with pytest.raises(
        ValueError, match=r"Triton kernels, which this CPU cannot.*adamw_torch_8bit"
    ):
        require_optimizer(config(optim="stable_adamw"))


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_torchao_moves_bfloat16_weights(trainer: Any, tmp_path: Any, optim: str) -> None:
    """Forty steps lower the loss, and a resumed run ends with the same bits; not compiled."""
    options = {"max_steps": 40, "logging_steps": 10, "save_strategy": "steps", "save_steps": 20}
    options |= {"learning_rate": RATE, "lr_scheduler_type": "constant", "optim": optim}
    with torch.compiler.set_stance("force_eager"):
        whole = trainer(model=half(), **options)
        whole.train()
        again = trainer(model=half(), **options)
        again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-20")
    losses = [r["loss"] for r in whole.state.log_history if "loss" in r]
    assert losses == sorted(losses, reverse=True)
    for now, resumed, before in zip(
        whole.model.parameters(), again.model.parameters(), half().parameters(), strict=True
    ):
        assert now.dtype is torch.bfloat16
        assert torch.equal(now, resumed)
        if now.dim() == 2:
            assert not torch.equal(now, before)
