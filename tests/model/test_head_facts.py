"""read_head: the fused head gives the model's own log-softmax, or the model is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastpo.head.functional import linear_logps
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import attach
from fastpo.model.load import add_lora
from fastpo.testing.three_way import assert_three_way
from tests.model.tiny import LAYERS, VOCAB, WIDTH, family, tiny

# What the family does to its logits, as Head puts it.
FACTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # tied
    "gpt2": {},
    "gemma2": {"softcap": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logit_scale": 0.25},
}


# One family for each fact of a head.
@pytest.mark.parametrize("name", FACTS)
def test_fused_is_the_models_log_softmax(name: str) -> None:
    model = attach(family(name)).eval()
    head = read_head(model)
    neutral = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, "vocab_size": None}
    assert head.facts() == {**neutral, **FACTS[name]}
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        hidden = model(input_ids=ids, fastpo_hidden=True)
        # The same hidden states through the model's own end; all of it, since heads may be tied.
        exact = model_end(model.double(), hidden.double())
        model.float()
        plain = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).flatten()
        truth = exact.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).flatten()
        ours = linear_logps(
            hidden[:, :-1].flatten(0, 1), head.weight, ids[:, 1:].flatten(), **head.facts()
        )
    assert_three_way(ours, plain, truth, what="logps")


def model_end(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The logits that the model's own forward makes of these hidden states."""
    handle = model.model if hasattr(model, "model") else model.transformer
    hook = handle.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=hidden)
    )
    try:
        return model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long)).logits
    finally:
        hook.remove()


def test_bias_and_later_weights_are_read_at_every_call() -> None:
    head = read_head(tiny("phi", **BASE))
    assert head.bias is not None
    with torch.no_grad():
        head.module.weight.fill_(2.0)
    assert (head.weight == 2).all()


BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}


# The same key divides in one family and multiplies in another.
@pytest.mark.parametrize(
    ("model_type", "options", "scale"),
    [
        ("hyperclovax", {"logits_scaling": 4.0}, 4.0),  # multiplies where Granite divides
        ("granite", {"logits_scaling": 4.0}, 0.25),
        ("cohere2", {"logit_scale": 0.5}, 0.5),
    ],
)
def test_one_name_means_what_its_family_means(
    model_type: str, options: dict[str, Any], scale: float
) -> None:
    assert read_head(tiny(model_type, **BASE, **options)).logit_scale == scale


def test_unmodelled_logits_are_refused_by_name() -> None:
    model = tiny("llama", **BASE)
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match=r"config\.logits_scaling=8\.0"):
        read_head(model)


ON_HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "r": 2}


def test_lora_on_the_head_is_read_as_a_delta() -> None:
    """Values and the delta's gradients are those of the model's own logits, adapter on and off."""
    model = add_lora(attach(family("llama")), {**ON_HEAD, "init_lora_weights": False}).eval()
    ids = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    hidden = model(input_ids=ids, fastpo_hidden=True)[0].detach()
    head, labels = read_head(model), ids[0]
    outer = model.get_base_model().lm_head

    def theirs(dtype: torch.dtype) -> Tensor:
        return outer.to(dtype)(hidden.to(dtype)).log_softmax(-1).gather(1, labels[:, None])[:, 0]

    def check() -> None:
        ours = linear_logps(hidden, head.weight, labels, lora=head.lora, **head.facts())
        found = [ours, theirs(torch.float32)]
        leaves = [p for n, p in outer.named_parameters() if "lora_" in n]
        if head.lora is None:
            return assert_three_way(*found, theirs(torch.float64))
        grads = [torch.autograd.grad(x.sum(), leaves) for x in found]
        truth = theirs(torch.float64)
        wide = torch.autograd.grad(truth.sum(), leaves)
        outer.float()
        assert_three_way(*found, truth)
        for name, mine, same, true in zip(("A", "B"), *grads, wide, strict=True):
            assert_three_way(mine, same, true, f"d{name}")

    check()
    with model.disable_adapter():
        assert head.lora is None
        check()


def test_adapters_on_the_head_are_refused_by_name() -> None:
    options = ON_HEAD
    dropped = get_peft_model(tiny("llama", **BASE), LoraConfig(**options, lora_dropout=0.1))
    with pytest.raises(ValueError, match="more than LoRA"):
        read_head(dropped)
    with pytest.raises(ValueError, match="adapter on the head"):
        read_head(add_lora(tiny("llama", **BASE), {**options, "use_dora": True}))
    tied = tiny("llama", **BASE, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="trainable tokens"):
        read_head(add_lora(tied, {"r": 2, "trainable_token_indices": [3, 4]}))


def test_quantised_heads_are_refused_by_name() -> None:
    model = tiny("llama", **BASE)
    packed = torch.zeros(WIDTH * VOCAB // 2, 1, dtype=torch.uint8)
    model.lm_head.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="quantised head"):
        read_head(model)
