"""MLPs in tiles: the same numbers, no extra forward inside a checkpoint, what is left alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpo.data.packing import collate
from fastpo.model.hidden import attach, target_hidden
from fastpo.model.load import add_lora
from fastpo.model.offload import LayerInputOffload
from fastpo.model.tiled_mlp import tile_mlps
from fastpo.testing.three_way import assert_three_way
from tests.model.tiny import LAYERS, PAD, family, groups

BATCH = collate(groups(), share_prompt=True, pad_token_id=PAD)


def gradients(model: Any, batch: dict = BATCH) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = target_hidden(model, batch)
    hidden.cumsum(-1).tanh().sum().backward()  # a norm's sum of squares would be constant
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **grads}


def made(name: str, lora: bool) -> Any:
    model: Any = attach(family(name))
    return add_lora(model, {"r": 2, "init_lora_weights": False}) if lora else model


# MLPs with two and three matrices, fused ones and convolutions, trained whole or by adapters.
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2"])
def test_tiles_are_the_whole(name: str, lora: bool, checkpointed: bool) -> None:
    model = made(name, lora)
    if checkpointed:
        model.activation_checkpointing_enable()
    truth, plain = gradients(copy.deepcopy(model).double()), gradients(copy.deepcopy(model))
    assert tile_mlps(model, 6) == LAYERS  # 41 tokens: the last tile is shorter
    ours = gradients(model)
    assert ours.keys() == plain.keys()
    for what, value in ours.items():
        assert_three_way(value, plain[what], truth[what], what)


def test_bfloat16_weights_are_rounded_once() -> None:
    """800 tiles of one token: as exact as one product of the whole row."""
    mlp = family("llama").model.layers[0].mlp
    x = torch.randn(1, 800, 32, generator=torch.Generator().manual_seed(0))
    model = family("llama").bfloat16()

    def grads(layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        layer.zero_grad()
        given = x.to(torch.bfloat16).to(dtype).requires_grad_()
        layer(given).square().sum().backward()
        return [given.grad, *(p.grad for p in layer.parameters())]  # pyright: ignore

    rounded: Any = model.model.layers[0].mlp
    mlp.load_state_dict(rounded.state_dict())
    truth, plain = grads(mlp.double(), torch.float64), grads(copy.deepcopy(rounded), torch.bfloat16)
    assert tile_mlps(model, 1) == LAYERS
    for value, same, exact in zip(grads(rounded, torch.bfloat16), plain, truth, strict=True):
        assert_three_way(value, same, exact)


# Without and with a norm behind the MLP.
@pytest.mark.parametrize(("name", "runs"), [("llama", 2), ("gemma2", 3)])
def test_a_checkpointed_layer_runs_its_mlp_no_more_often(name: str, runs: int) -> None:
    """Forward and once for the backward; a norm behind the MLP needs its output once more."""
    model = made(name, lora=False)
    model.activation_checkpointing_enable()
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    tile_mlps(model, 6)
    gradients(model)
    assert sum(seen) == runs * LAYERS * BATCH.input_ids.numel()
    assert max(seen) == 6


def test_autocast_reaches_the_second_run() -> None:
    model = made("llama", lora=False)
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda m, a, out: seen.append(out.dtype)
    )
    tile_mlps(model, 20)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = target_hidden(model, BATCH)
    hidden.float().sum().backward()
    assert seen == [torch.bfloat16] * 6


def test_together_with_offload_and_lora() -> None:
    model = made("llama", lora=True)
    model.activation_checkpointing_enable()
    truth, plain = gradients(copy.deepcopy(model).double()), gradients(copy.deepcopy(model))
    tile_mlps(model, 6)
    with LayerInputOffload() as offload:
        ours = gradients(model)
    assert offload.host_bytes
    for what, value in ours.items():
        assert_three_way(value, plain[what], truth[what], what)


def test_a_copy_has_its_own_tiles() -> None:
    model = made("llama", lora=False)
    tile_mlps(model, 6)
    tile_mlps(model, 7)  # the second call changes the tile, nothing else
    twin = copy.deepcopy(model)
    twin.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert not twin.model.layers[0].mlp(torch.ones(1, 9, 32)).any()
    assert model.model.layers[0].mlp(torch.ones(1, 9, 32)).any()


def test_what_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    for name, block in (("mixtral", "MixtralSparseMoeBlock"), ("gpt_oss", "GptOssMLP")):
        with (
            caplog.at_level(logging.INFO, logger="fastpo.model.tiled_mlp"),
            pytest.raises(ValueError, match="has an MLP that sees one token at a time"),
        ):
            tile_mlps(made(name, lora=False), "auto")
        assert f"not in tiles: {block}, a mixture of experts" in caplog.text
    model = made("llama", lora=False)
    with pytest.raises(ValueError, match="mlp_tile=0 must be at least 1"):
        tile_mlps(model, 0)
    noisy = add_lora(family("llama"), {"r": 2, "lora_dropout": 0.1})
    with pytest.raises(ValueError, match=r"LlamaMLP has dropout 0\.1"):
        tile_mlps(noisy, 4)
    tile_mlps(model, "auto")
    assert model.model.layers[0].mlp._tile == model.config.hidden_size
