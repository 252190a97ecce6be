"""References: which one is taken, what it returns, and what it leaves untouched."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    FourierFTConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpo.model.adapters import adapter_off, altered_base
from fastpo.model.load import load_model
from fastpo.model.opening import open_model
from fastpo.reference.live import ModelReference
from fastpo.testing.three_way import assert_three_way
from tests.train import tiny

LN2 = torch.tensor(2.0).log().item()


def lora(seed: int = 0, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(**{"r": 4, "target_modules": targets, "lora_dropout": 0.1, **options})
    return get_peft_model(tiny.model(), config)


def first_loss(made: Any) -> float:
    made.train()
    return next(r["loss"] for r in made.state.log_history if "loss" in r)


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["lora", "lora and head"])
@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_adapter_and_copy_are_the_same_reference(trainer: Any, saved: Any, kind: str) -> None:
    """A trained adapter, head included, is gone from the reference; ln 2 before, not after."""
    model = lora(modules_to_save=saved)
    made = trainer(model=model, reference=kind, max_steps=3)
    assert first_loss(made) == LN2
    batch = made._prepare_inputs(made.data_collator(tiny.pairs(4)))
    reference = made.reference(made.model, batch).states
    logps = (reference.hidden @ reference.head.weight.T).log_softmax(-1)
    base = ModelReference.frozen(tiny.model()).states(made.model, batch)
    expected = (base.hidden @ base.head.weight.T).log_softmax(-1)
    assert torch.equal(logps, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    if saved:
        original = model.base_model.model.lm_head.original_module.weight
        assert torch.equal(reference.head.weight, original)
        assert not torch.equal(original, made.loss.head.weight)


TARGETS = ["q_proj", "v_proj", "up_proj"]
# Whether the model without the fresh adapter is, bit for bit, the model at the start.
FRESH: dict[str, tuple[Any, bool]] = {
    "lora": (lambda: LoraConfig(r=4, target_modules=TARGETS), True),
    "eva": (lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva"), True),
    "pissa": (lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"), False),
    "pissa_niter": (
        lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_4"),
        False,
    ),
    "olora": (lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"), False),
    "orthogonal": (
        lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="orthogonal"),
        False,  # as close as rounding
    ),
    "random": (lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), False),
    "pissa on the head": (
        lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights="pissa"),
        False,
    ),
    "dora": (lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True), True),
    "tokens": (lambda: LoraConfig(target_modules=TARGETS, trainable_token_indices=[5, 6]), True),
    "ia3": (lambda: IA3Config(target_modules=["v_proj"], feedforward_modules=[]), True),
    "vera": (lambda: VeraConfig(r=4, target_modules=["q_proj"]), True),
    "fourier": (lambda: FourierFTConfig(n_frequency=9, target_modules=TARGETS), False),
}

if hasattr(peft, "KasaConfig"):  # of later releases than the oldest
    FRESH["kasa"] = (
        lambda: LoraConfig(r=4, target_modules=TARGETS, kasa_config=peft.KasaConfig()),
        True,
    )


@pytest.mark.parametrize("kind", ["auto", "copy", "store"])
@pytest.mark.parametrize("name", FRESH)
def test_the_reference_is_the_model_at_the_start(trainer: Any, name: str, kind: str) -> None:
    """Whatever initialised the adapter: no drift, and ln 2."""
    config, stays = FRESH[name]
    torch.manual_seed(0)
    made = trainer(model=get_peft_model(tiny.model(), config()), reference=kind, max_steps=1)
    expected = {"auto": "adapter" if stays else "copy"}.get(kind, kind)
    assert made.reference_kind == expected
    made.train()
    first = made.state.log_history[0]
    # float32 log-probs of up to 12 tokens, each near -log V, twice.
    eps = torch.finfo(torch.float32).eps * 12 * math.log(tiny.VOCAB)
    assert abs(first["drift/chosen"]) <= eps
    assert abs(first["loss"] - LN2) <= eps


def trained_adapter(trainer: Any, folder: Path, **options: Any) -> PeftModel:
    """An adapter that a run left on disk, on its base again, to be trained on."""
    made = trainer(model=lora(**options), learning_rate=0.05)
    made.train()
    made.save_model(str(folder))
    return PeftModel.from_pretrained(tiny.model(), folder, is_trainable=True)


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("kind", ["auto", "store"])
def test_a_trained_adapter_is_its_own_reference(
    trainer: Any, tmp_path: Path, init: Any, kind: str
) -> None:
    model = trained_adapter(trainer, tmp_path / "first", init_lora_weights=init)
    made = trainer(model=model, reference=kind, output_dir=str(tmp_path / "second"))
    assert first_loss(made) == LN2
    assert made.reference_kind == {"auto": "copy"}.get(kind, kind)


def test_the_base_model_is_a_reference_for_those_who_ask(
    trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained_adapter(trainer, tmp_path / "first")
    with caplog.at_level(logging.INFO, logger="fastpo"):
        made = trainer(model=model, reference="adapter", output_dir=str(tmp_path / "second"))
    assert "the reference is the base model, not the model at the start" in caplog.text
    assert made.reference_kind == "adapter"
    assert abs(first_loss(made) - LN2) > 1e-3
    caplog.clear()
    for fresh in (lora(), model):
        assert altered_base(fresh) is None
    for stale in (
        lora(init_lora_weights="pissa"),
        trained_adapter(trainer, tmp_path / "third", init_lora_weights="olora"),
    ):
        with pytest.raises(ValueError, match=r"init_lora_weights='\w+' changed .*'auto' or 'copy'"):
            trainer(model=stale, reference="adapter")


def test_a_store_belongs_to_its_adapter(trainer: Any, tmp_path: Path) -> None:
    """An adapter that does something is part of the reference; a fresh one is not."""
    options = {"reference": "store", "reference_store": str(tmp_path / "store")}
    trainer(model=lora(seed=0), **options)
    trainer(model=lora(seed=1), **options)
    with pytest.raises(ValueError, match="model"):
        trainer(model=lora(init_lora_weights=False), **options)


def test_what_was_frozen_stays_frozen(trainer: Any) -> None:
    """The reference switches the adapter off and on; half of it is not to be trained."""
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    made = trainer(model=model, learning_rate=0.05)
    made.train()
    assert made.reference_kind == "adapter"
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_B" in name)
        assert torch.equal(parameter, before[name]) == ("lora_B" not in name), name
        assert "lora_A" not in name or parameter.grad is None
    with adapter_off(model):
        pass
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)


def test_adapter_is_back_after_the_reference(trainer: Any) -> None:
    made = trainer(model=lora(init_lora_weights=False), reference="adapter")
    batch = made._prepare_inputs(made.data_collator(tiny.pairs(2)))
    before = {n: p.requires_grad for n, p in made.model.named_parameters()}
    with torch.no_grad():
        first = made.compute_loss(made.model, batch)
        made.reference(made.model, batch)
        second = made.compute_loss(made.model, batch)
    assert torch.equal(first, second)
    assert first != LN2
    assert {n: p.requires_grad for n, p in made.model.named_parameters()} == before


def test_frozen_copy(trainer: Any) -> None:
    model = tiny.model()
    model.get_input_embeddings().requires_grad_(False)
    made = trainer(model=model, learning_rate=0.1, reference="copy")
    frozen = made.reference.model
    assert frozen is not model
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    # Frozen weights are held once; trained ones twice.
    assert frozen.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert frozen.lm_head.weight is not model.lm_head.weight
    before = frozen.lm_head.weight.clone()
    made.train()
    assert torch.equal(frozen.lm_head.weight, before)
    assert not torch.equal(model.lm_head.weight, before)


def test_given_reference_model(trainer: Any) -> None:
    loss = first_loss(trainer(ref_model=tiny.model(seed=1)))
    assert not math.isclose(loss, LN2, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "adapter"}, "needs a PEFT model, got LlamaForCausalLM"),
        ({"model": "bias", "reference": "auto"}, "is trained too and stays changed"),
        ({"reference": "adapter", "model": "lora", "ref_model": "other"}, "exclude each other"),
    ],
    ids=["no adapter", "trained bias", "two references"],
)
def test_refused(trainer: Any, options: dict, message: str) -> None:
    biased = lora(bias="lora_only", target_modules=["q_proj"])
    biased.base_model.model.model.norm.requires_grad_(True)
    models = {"bias": biased, "lora": lora(), "other": tiny.model()}
    options = {k: models.get(v, v) for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        trainer(**options)


@pytest.mark.parametrize("kind", ["auto", "copy"])
@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    ],
    ids=["prompt", "adaption"],
)
def test_adapters_of_tokens_are_refused(trainer: Any, adapter: Any, kind: str) -> None:
    """By name, whatever the reference: no other one would help."""
    name = f"^{adapter.peft_type.value} puts tokens in front .* use LoRA"
    with pytest.raises(ValueError, match=name):
        trainer(model=get_peft_model(tiny.model(), adapter), reference=kind)


def logits(model: Any) -> Tensor:
    group = tiny.pairs(1)[0]
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(group.prompt_ids).long()[None]).logits


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "norm"], ["mlp"]], ids=str)
def test_saved_modules_of_a_half_precision_base(
    trainer: Any, tmp_path: Path, saved: list[str], bf16: bool
) -> None:
    """They are trained in float32 from ln 2 on, beside a base as it was, and merged as it is."""
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": saved}

    tiny.model().bfloat16().save_pretrained(tmp_path / "base")

    def adapted() -> Any:
        torch.manual_seed(0)
        return load_model(str(tmp_path / "base"), dtype="bfloat16", lora=options)

    run = {"learning_rate": 1e-5, "bf16": bf16, "self_check": True, "num_samples": 1}
    run |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    made = trainer(model=adapted(), **run)
    before = {n: p.clone() for n, p in made.model.named_parameters()}
    assert first_loss(made) == LN2
    for name, parameter in made.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    again = trainer(model=adapted(), **run)
    again.train(resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-2")
    for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    made.save_model(str(tmp_path / "adapter"))
    goes_on = open_model(str(tmp_path / "adapter"), dtype="bfloat16", trainable=True)
    for a, b in zip(made.model.parameters(), goes_on.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
    made.save_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_tied_adapters_are_copied(trainer: Any, tmp_path: Path) -> None:
    """Beside one of two tied adapters peft keeps views of the other."""
    targets = ["q_proj", "embed_tokens", "lm_head"]
    config = LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True)
    model = get_peft_model(tiny.model(tie_word_embeddings=True), config)
    made = trainer(model=model, reference="copy", learning_rate=0.05)
    assert first_loss(made) == LN2
    made.save_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    exact = tiny.model(tie_word_embeddings=True)
    exact.load_state_dict(merged.state_dict())
    assert_three_way(logits(merged), logits(model), logits(exact.double()))


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["lora", "lora and head"])
def test_merged_export(trainer: Any, tmp_path: Path, saved: Any) -> None:
    model = lora(modules_to_save=saved)
    made = trainer(model=model, learning_rate=0.05)
    made.train()
    made.save_merged(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_three_way(logits(merged), logits(model), logits(copy.deepcopy(model).double()))
    assert not torch.allclose(logits(merged), logits(tiny.model()))
    assert isinstance(made.model, PeftModel)  # training could go on


def test_resumed_adapter_ends_with_the_same_bits(trainer: Any, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(model=lora(), **options)
    whole.train()
    again = trainer(model=lora(), **options)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
