"""`PreferenceLoss(objective, model)`: the model's own head and facts, against its full logits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from fastpo import Head, PreferenceLoss, linear_logps, read_head, simpo_loss
from fastpo.testing.three_way import assert_three_way
from tests.model.tiny import VOCAB, WIDTH, family

Found = tuple[Tensor, dict[str, Tensor]]


def batch() -> tuple[Tensor, Tensor]:
    """Two chosen rows, then their rejected ones; shifted labels without the prompt."""
    ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(2))
    return ids, ids.masked_fill(torch.arange(12) < 5, -100)[:, 1:]


def gradients(model: nn.Module, loss: Tensor) -> Found:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ours(model: Any, given: Any) -> Found:
    ids, labels = batch()
    hidden = model.get_decoder()(ids).last_hidden_state[:, :-1]
    return gradients(model, PreferenceLoss("simpo", given, beta=2.0)(hidden, labels).loss)


def by_logits(model: Any) -> Found:
    ids, labels = batch()
    logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    means = logps.where(labels >= 0, 0).sum(-1) / (labels >= 0).sum(-1)
    return gradients(model, simpo_loss(*means.chunk(2), beta=2.0).losses.mean())


# A soft-cap, a logit scale, and its inverse.
@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_a_model_brings_its_facts(name: str) -> None:
    plain, truth = by_logits(family(name)), by_logits(family(name).double())
    model = family(name)
    found = ours(model, model)
    terms = 2.0 * math.log(VOCAB)  # beta times a mean log-prob
    assert_three_way(found[0], plain[0], truth[0], "loss", terms=terms)
    assert found[1].keys() == truth[1].keys()
    for key, value in found[1].items():
        assert_three_way(value, plain[1][key], truth[1][key], key)
    # What its bare head cannot tell, and what a user who builds the head must say.
    bare = ours(model, model.lm_head)
    assert (bare[0] - truth[0]).abs() > 1e-2
    by_hand = Head(model.lm_head, **read_head(model).facts())
    assert torch.equal(ours(model, by_hand)[0], found[0])


def wrapped(kind: str) -> Any:
    model: Any = family("granite")
    if kind == "peft":
        config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return get_peft_model(model, config)
    if kind == "compiled":
        return torch.compile(model)
    wrapper = nn.Module()  # as DDP holds its model
    wrapper.module = model
    return wrapper


# Each wrapper that hides the head one attribute deeper.
@pytest.mark.parametrize("kind", ["peft", "compiled", "module"])
def test_wrapped_models(kind: str) -> None:
    model = wrapped(kind)
    head = PreferenceLoss("simpo", model).head
    assert head is not None
    assert head.logit_scale == 0.25
    assert (head.lora is not None) == (kind == "peft")


def refused() -> dict[str, Any]:
    adapted = wrapped("peft").base_model.model.lm_head
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    quantised = SimpleNamespace(weight=nn.Parameter(torch.zeros(8, 4).byte(), requires_grad=False))
    layer = nn.Module()
    layer.weight = quantised.weight
    return {
        "neither a linear layer nor a causal LM": nn.Sequential(nn.Linear(4, 4)),
        "LlamaModel has no output embedding": family("llama").model,
        "is an encoder-decoder": T5ForConditionalGeneration(T5Config(vocab_size=16, **sizes)),
        "give the causal language model, its head": nn.LayerNorm(WIDTH),
        "head=Parameter: give": nn.Parameter(torch.zeros(4, 4)),
        "head=str: give": "model",
        r"head=Linear is more than its weight \(an adapter": adapted,
        "or quantised": layer,
    }


# One model for each refusal.
@pytest.mark.parametrize("message", list(refused()))
def test_what_is_no_head(message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        PreferenceLoss("simpo", refused()[message])
    assert "\n" not in str(raised.value)


def test_a_module_is_no_weight() -> None:
    model = family("gemma2")
    for given in (model, model.lm_head):
        with pytest.raises(ValueError, match=r"fastpo\.read_head\(model\)"):
            linear_logps(torch.zeros(2, WIDTH), given, torch.zeros(2, dtype=torch.long))
