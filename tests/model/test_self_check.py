"""The check at the start of a run: it must pass right models and see wrong ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from fastpo.batch import GroupSpan, Layout
from fastpo.data.packing import collate
from fastpo.head.head import Head
from fastpo.model import hidden
from fastpo.model.attention.dispatch import NAME, shared_prompt_attention
from fastpo.model.attention.shared_row import SharedRow
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import attach, target_hidden
from fastpo.model.load import add_lora, load_model
from fastpo.model.self_check import SelfCheckError, can_share_prompt, self_check
from tests.model.tiny import FAMILIES, PAD, UNSHARED, family, group, groups, tiny


# Every family, in an exact and in a coarse dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_right_models_pass(name: str, dtype: torch.dtype) -> None:
    model = family(name).to(dtype)
    assert can_share_prompt(model)[0]
    found = self_check(model, read_head(model), groups(), PAD)
    assert found.share_prompt, found
    assert found.sharing_error is not None
    assert found.sharing_error > 0  # two different computations were compared
    assert found.gradient_error == 0.0
    assert model.training
    frozen = self_check(model.requires_grad_(False), read_head(model), groups(), PAD)
    assert frozen.gradient_error is None


def leak(module: Any, *tensors: Any, fastpo_layout: SharedRow, **kwargs: Any) -> Any:
    """The wrong rule: a group's responses as one."""
    row = fastpo_layout
    joined = tuple(
        GroupSpan(g.prompt, ((g.responses[0][0], g.responses[-1][1]),)) for g in row.layout.groups
    )
    row.calls += 1
    row.windowed += bool(kwargs.get("sliding_window"))
    layout = Layout(joined, row.layout.length)
    return shared_prompt_attention(module, *tensors, fastpo_layout=layout, **kwargs)


# A leak must stand out from bfloat16's rounding too; experts are the noisiest.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_leak_between_responses_falls_back(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, leak)
    model = family(name).to(dtype)
    with caplog.at_level(logging.WARNING, logger="fastpo.model.self_check"):
        found = self_check(model, read_head(model), groups(), PAD)
    assert not found.share_prompt
    assert found.sharing_error > found.sharing_bound
    assert len(caplog.records) == 1
    assert f"{found.sharing_error:.2e}" in caplog.text


# The temperature is the caller's choice and no fact of the model: both sides take it.
@pytest.mark.parametrize("head", [{"logit_scale": 1.01}, {"softcap": 10.0}], ids=str)
def test_a_wrong_head_stops(head: dict[str, float]) -> None:
    model = family("llama")
    with pytest.raises(SelfCheckError, match="differs from the model's own logits by"):
        self_check(model, Head(model.lm_head, **head), groups(), PAD)


def test_the_hidden_state_before_the_final_norm_stops() -> None:
    model = family("llama")
    model.model.norm.weight.data.mul_(3)
    head = read_head(model)
    decoder = model.model
    original = decoder.forward

    def unnormed(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if not calls:
            output.last_hidden_state = output.last_hidden_state / 3
        return output

    calls: list[int] = []
    own = type(model).forward

    def mark(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        try:
            return own(model, *args, **kwargs)
        finally:
            calls.pop()

    decoder.forward = unnormed
    model.forward = mark
    with pytest.raises(RuntimeError, match="differs from the model's own logits by"):
        self_check(model, head, groups(), PAD)


def test_a_broken_model_is_named_before_anything_else(caplog: pytest.LogCaptureFixture) -> None:
    model = family("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[3, 3] = float("nan")
    with pytest.raises(SelfCheckError, match=f"gives NaN: 1 of its weights .* first is {name}"):
        self_check(model, read_head(model), groups(), PAD)
    model = family("llama")
    model.lm_head.weight.data.fill_(3e38)
    with pytest.raises(SelfCheckError, match=r"finite weights: torch\.float32 overflows"):
        self_check(model, read_head(model), groups(), PAD)
    assert not caplog.records  # nothing about shared prompts


# Seeds whose rounding came closest to the bound, of fifty.
@pytest.mark.parametrize("seed", [14, 15, 24, 33, 39])
def test_small_weights_are_no_wrong_head(seed: int) -> None:
    """Untrained, log-probs are near -log V and the logits near 0: the sums round, not those."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", dtype="float32", **FAMILIES["llama"][1])
    model = AutoModelForCausalLM.from_config(config)
    assert self_check(model, read_head(model), groups(), PAD).share_prompt


# Every family that cannot share a prompt.
@pytest.mark.parametrize("name", UNSHARED)
def test_families_that_cannot(name: str) -> None:
    model_type, config, word = UNSHARED[name]
    model = tiny(model_type, **config)
    able, reason = can_share_prompt(model)
    assert not able
    assert word in reason
    found = self_check(model, read_head(model), groups(), PAD)
    assert not found.share_prompt
    assert found.reason == reason


# Configurations whose attention rule the function is never told.
@pytest.mark.parametrize(
    ("model_type", "options", "word"),
    [
        # The window is in transformers' mask only: the attention function never hears of it.
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5}, "1 layers have a sliding"),
        ("phimoe", {"sliding_window": 5}, "2 layers have a sliding window, but 0"),
        ("nemotron", {}, "no segment table"),  # drops the keyword argument
        ("doge", {}, "mask of its own"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv layers"),
        ("llama4_text", {"intermediate_size_mlp": 32, "head_dim": 8}, "chunked_attention"),
    ],
)
def test_rules_that_never_reach_the_function_fall_back(
    model_type: str, options: dict[str, Any], word: str
) -> None:
    _, base = FAMILIES["llama"]
    experts = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16}
    model = tiny(model_type, **{**base, **experts, **options})
    found = self_check(model, read_head(model), groups(), PAD)
    assert not found.share_prompt
    assert word in found.reason


def test_under_an_adapter_and_long_groups() -> None:
    model = add_lora(family("mistral-window"), {"r": 2, "init_lora_weights": False})
    found = self_check(model, read_head(model), [group(300, [90, 80], 5), group(2, [1], 6)], PAD)
    assert found.share_prompt
    off = self_check(model, read_head(model), groups(), PAD, share_prompt=False)
    assert not off.share_prompt
    assert off.sharing_error is None
    with pytest.raises(ValueError, match="at least one group"):
        self_check(model, read_head(model), [], PAD)


def one_way(module: Any, *tensors: Any, fastpo_layout: SharedRow, **kwargs: Any) -> Any:
    """The right numbers with a wrong gradient: none flows to the values."""
    query, key, value, *rest = tensors
    outputs = shared_prompt_attention(
        module, query, key, value.detach(), *rest, fastpo_layout=fastpo_layout, **kwargs
    )
    return outputs


# An exact and a coarse dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_of_shared_prompts_falls_back(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, one_way)
    model = add_lora(family("llama").to(dtype), {"r": 2})
    with caplog.at_level(logging.WARNING, logger="fastpo.model.self_check"):
        found = self_check(model, read_head(model), groups(), PAD)
    assert not found.share_prompt
    assert found.sharing_error <= found.sharing_bound  # no log-prob shows it
    assert "gradients of shared and padded prompts differ by" in found.reason
    assert found.reason in caplog.text


class Repacked(nn.Linear):
    """What a library makes of a layer: from its first forward in evaluation mode, no gradient."""

    packed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.packed |= not self.training
        return super().forward(input.detach() if self.packed else input)


# Whole models and adapters, with recomputation or without.
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_forward_that_changes_gradients_stops(adapter: bool, checkpointing: bool) -> None:
    model: Any = family("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Repacked
    if adapter:
        model = add_lora(model, {"r": 2, "target_modules": ["q_proj"]})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SelfCheckError, match="evaluation mode changed gradients by"):
        self_check(model, read_head(model), groups(), PAD)
    assert model.is_gradient_checkpointing == checkpointing


def nf4(folder: Path) -> nn.Module:
    """Plain gradients flow through its four-bit layers; wide enough for the packed kernel."""
    family("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return load_model(str(folder), quantization="nf4", dtype="float32", device="cpu", lora={"r": 2})


def norm(model: nn.Module) -> float:
    """Of all gradients of one batch, in training mode."""
    model.train().zero_grad()
    batch = collate(groups(), share_prompt=False, pad_token_id=PAD)
    read_head(model).logps(target_hidden(model, batch), batch.tokens.targets).mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.stack([g.norm() for g in grads]).norm().item()


def test_four_bit_weights_keep_their_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU has no avx512_bf16, without which bitsandbytes repacks nothing")
    model = attach(nf4(tmp_path))
    before = norm(model)
    with torch.no_grad():
        model.eval()(torch.arange(3, 20)[None])
    assert norm(model) == before
    found = self_check(model, read_head(model), groups(), PAD)
    assert found.share_prompt
    assert found.gradient_error == 0.0
    assert norm(model) == before

    monkeypatch.setattr(hidden, "keep_trainable", lambda model: None)
    blind = attach(nf4(tmp_path))
    with pytest.raises(SelfCheckError, match="evaluation mode changed gradients by"):
        self_check(blind, read_head(blind), groups(), PAD)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"_proj.*: bitsandbytes repacked .* load the model again"):
        attach(blind)
    attach(blind.requires_grad_(False))  # what only scores may stay as it is
