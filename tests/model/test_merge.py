"""Merged and blended models say what was trained, and say so when they do not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fastpo.model.load import add_lora, load_model
from fastpo.model.merge import blend, merged, write_merged
from fastpo.testing.three_way import assert_three_way
from tests.model.tiny import FAMILIES, tiny

IDS = torch.arange(0, 128, 9)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapted(family: str, **lora: Any) -> PeftModel:
    """A model whose adapter is no small one."""
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = add_lora(tiny(kind, **options), {"r": 4, **lora})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


# Untied, tied, and tied under other names, times every kind of adapter that changes the ends.
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"end": "head"},
        {"end": "embeddings"},
        {"end": "both"},
        {"end": "both", "ensure_weight_tying": True},
        {"saved": "head"},
        {"saved": "embeddings"},
        {"use_dora": True},
        {"use_rslora": True},
        {"trainable_token_indices": [3, 9]},
    ],
    ids=lambda lora: "-".join(map(str, lora.values())) or "inside",
)
def test_what_is_written_is_what_was_trained(
    family: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    head, embeddings = ("lm_head", "wte" if family == "gpt2" else "embed_tokens")
    named = {"head": [head], "embeddings": [embeddings], "both": [head, embeddings]}
    inside = ["c_attn" if family == "gpt2" else "q_proj"]
    options = {k: v for k, v in lora.items() if k not in ("end", "saved")}
    options["target_modules"] = inside + named.get(lora.get("end"), [])
    options["modules_to_save"] = named.get(lora.get("saved"))
    if family == "gpt2":
        options["fan_in_fan_out"] = True
    model = adapted(family, **options)
    trained, exact = logits(model), logits(adapted(family, **options).double())
    write_merged(lambda: model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_three_way(logits(again), trained, exact)


def test_a_half_precision_merge_is_within_rounding(tmp_path: Path) -> None:
    model = adapted("qwen2", target_modules=["q_proj", "lm_head"]).bfloat16()
    write_merged(lambda: model, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = PeftModel.merge_and_unload if hasattr(PeftModel, "merge_and_unload") else None
    assert merge is None  # it is the tuner's, which the model hands on

    def shifted(model: Any) -> nn.Module:
        weight = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
        weight.weight.data[0] += 1.0
        return model

    model: Any = adapted("llama")
    tuner = model.base_model
    original = tuner.merge_and_unload
    monkeypatch.setattr(
        tuner, "merge_and_unload", lambda **how: (shifted(model), original(**how))[1]
    )
    with pytest.raises(
        ValueError, match="the merged model differs from the model that was trained"
    ):
        merged(model)
    prompt = get_peft_model(
        tiny("llama", **FAMILIES["llama"][1]),  # pyright: ignore[reportArgumentType]
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters have no weights to merge"):
        merged(prompt)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"peft cannot merge this adapter .*bias.*: keep base"):
        merged(adapted("llama", lora_bias=True, target_modules=["q_proj"]))


def test_a_file_that_holds_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("qwen2", target_modules=["q_proj", "lm_head"])
    save = type(model.get_base_model()).save_pretrained

    def torn(self: Any, folder: Path, **how: Any) -> None:
        self.lm_head.weight.data.zero_()
        save(self, folder, **how)

    monkeypatch.setattr(type(model.get_base_model()), "save_pretrained", torn)
    with pytest.raises(
        ValueError, match=r"the model in .* differs from the model that was trained"
    ):
        write_merged(lambda: model, tmp_path)


def test_a_blend_of_tied_and_untied_models() -> None:
    plain = tiny(FAMILIES["qwen2"][0], **FAMILIES["qwen2"][1])
    model = adapted("qwen2", target_modules=["lm_head"])
    parts = {"a": copy.deepcopy(plain), "b": copy.deepcopy(model)}
    mixed: Any = blend({"a": 0.5, "b": 0.5}, lambda name: parts[name])
    delta = merged(model).get_output_embeddings().weight - plain.get_output_embeddings().weight  # pyright: ignore
    head = plain.get_output_embeddings().weight + 0.5 * delta  # pyright: ignore
    assert torch.allclose(mixed.get_output_embeddings().weight, head, rtol=0, atol=1e-6)
    assert torch.equal(mixed.get_input_embeddings().weight, plain.get_input_embeddings().weight)  # pyright: ignore


def test_blend(tmp_path: Path) -> None:
    """Soups and extrapolations of weights, adapters merged first; the sum is rounded once."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        tiny("llama", seed, **FAMILIES["llama"][1]).save_pretrained(folder)
    a, b = (load_model(str(f), dtype="bfloat16") for f in folders)
    shares = dict(zip(map(str, folders), (1.5, -0.5), strict=True))
    mixed = blend(shares, lambda name: load_model(name, dtype="bfloat16"))
    for name, parameter in mixed.named_parameters():
        p, q = (m.get_parameter(name).float() for m in (a, b))
        assert torch.equal(parameter, (1.5 * p + -0.5 * q).bfloat16())
    adapter = add_lora(load_model(str(folders[0])), {"r": 2, "init_lora_weights": False})
    adapter.save_pretrained(tmp_path / "adapter")
    merged = copy.deepcopy(adapter).merge_and_unload(safe_merge=True)
    only = blend({"it": 1.0}, lambda name: adapter)
    for name, parameter in only.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name))
    with pytest.raises(ValueError, match="must add up to 1"):
        blend({"a": 0.5, "b": 0.6}, lambda name: a)
    other = tiny("llama", **{**FAMILIES["llama"][1], "intermediate_size": 64})
    with pytest.raises(ValueError, match=r"b and a have not the same parameters: model\.layers\.0"):
        blend({"a": 0.5, "b": 0.5}, lambda name: a if name == "a" else other)
