"""Memory levers through the trainer: the same run, bit for bit or by rounding alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastpo.model.load import add_lora
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.train import tiny

GROUPS = tiny.groups(8, 3)


def trained(folder: Path, model: Any = None, **options: Any) -> tuple[PreferenceTrainer, Tensor]:
    """A run of three steps under SGD, and its weights in one vector."""
    options = {"objective": "plackett_luce", "activation_checkpointing": True, **options}
    args = tiny.config(folder, **{"optim": "sgd", "learning_rate": 0.1, **options})
    model = tiny.model() if model is None else model
    trainer = PreferenceTrainer(
        model, args, train_dataset=GROUPS, processing_class=tiny.tokenizer()
    )
    trainer.train()
    weights = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return trainer, torch.cat(weights)


@pytest.mark.parametrize("reference", ["copy", "store"])
def test_offload_changes_no_bit(tmp_path: Path, reference: str) -> None:
    plain = trained(tmp_path / "plain", reference=reference)[1]
    trainer, ours = trained(tmp_path / "ours", reference=reference, offload_activations=True)
    assert trainer._offload.host_bytes  # pyright: ignore
    assert torch.equal(ours, plain)


def test_all_levers_together_are_rounding_away(tmp_path: Path) -> None:
    truth = trained(tmp_path / "truth", tiny.model().double())[1]
    plain = trained(tmp_path / "plain")[1]
    ours = trained(tmp_path / "ours", offload_activations=True, mlp_tile=5, workspace_mib=1)[1]
    assert not torch.equal(ours, plain)  # tiles sum in another order
    assert_three_way(ours, plain, truth)


def test_reference_and_policy_agree_to_the_bit_before_the_first_step(tmp_path: Path) -> None:
    """Policy and copy run in the same tiles."""
    trainer, _ = trained(tmp_path, mlp_tile=5, max_steps=1, reference="copy")
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0


@pytest.fixture
def quantised(tmp_path: Path) -> Any:
    """A function that makes an NF4 model with an adapter, the same one every time."""
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def make(exact: bool = False) -> Any:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4)
        if exact:
            base = base.dequantize().double()
        torch.manual_seed(1)
        return add_lora(base, {"r": 2, "init_lora_weights": False})

    return make


def test_adapter_on_a_quantised_base(quantised: Any, tmp_path: Path) -> None:
    """The base stays; the adapter is trained as on the dequantised weights in float64."""
    truth = trained(tmp_path / "truth", quantised(exact=True).double())[1]
    plain = trained(tmp_path / "plain", quantised())[1]
    model = quantised()
    ours = trained(tmp_path / "ours", model, mlp_tile=5, offload_activations=True)[1]
    assert_three_way(ours, plain, truth)
    for name, parameter in quantised().named_parameters():
        moved = not torch.equal(parameter, model.get_parameter(name))
        assert moved is ("lora" in name), name


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_in_eight_bits(tmp_path: Path) -> None:
    model = tiny.model(hidden_size=64, intermediate_size=128)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer, _ = trained(tmp_path, model, optim="paged_adamw_8bit", learning_rate=1e-3)
    weight = model.model.layers[0].mlp.up_proj.weight
    state: Any = trainer.optimizer.optimizer.state[weight]  # pyright: ignore
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert not torch.equal(weight, before)
