"""References: which one is taken, what it returns, and what it leaves untouched."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpo.data.build import GroupStream
from fastpo.train.reference import (
    AdapterReference,
    ModelReference,
    NoReference,
    StoredReference,
)
from tests.numerics import assert_three_way
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


def test_auto(trainer: Any) -> None:
    assert isinstance(trainer(objective="simpo").reference, NoReference)
    assert isinstance(trainer(model=lora()).reference, AdapterReference)
    assert trainer(model=lora(), ref_model=tiny.model()).reference_kind == "copy"
    assert isinstance(trainer().reference, StoredReference)
    assert trainer(ref_model=tiny.model()).reference_kind == "copy"
    stream = GroupStream(tiny.rows(4), tiny.tokenizer(), tiny.config("unused").data_options())
    for options in (
        {"objective": "tdpo1"},
        {"reference_update": {"every": 2, "mixup": 0.6}},
        {"objective": "sparse_po", "token_masks": "common"},
        {"train_dataset": stream},
        {"eval_dataset": {"held out": stream}},
    ):
        assert trainer(**options).reference_kind == "copy", options


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"max_tokens_per_row": 60}, {"num_train_epochs": 1.5, "max_steps": -1}],
    ids=str,
)
def test_a_full_fine_tune_is_its_own_reference(trainer: Any, options: dict) -> None:
    """By log-probs from the batches of the steps: the first loss is ln 2 to the bit."""
    made = trainer(**{"max_steps": 2, **options}, eval_dataset=tiny.pairs(4, seed=5))
    assert made.reference_kind == "store"
    held_out = made.evaluate()
    assert (held_out["eval_loss"], held_out["eval_drift/chosen"]) == (LN2, 0)
    assert first_loss(made) == LN2


def test_a_short_run_scores_what_it_comes_to(trainer: Any) -> None:
    """Not the whole data; a longer run goes on, and other weights have a folder of their own."""
    options = {"train_dataset": tiny.pairs(64), "max_steps": 2}
    made = trainer(**options)
    made.train()
    assert len(made.reference.store) == 3 * 4  # a batch more, which the loader fetches ahead
    longer = trainer(**{**options, "max_steps": 5})
    assert longer.reference.store.path == made.reference.store.path
    assert len(longer.reference.store) == 6 * 4
    other = trainer(**options, model=tiny.model(seed=1))
    assert other.reference.store.path != made.reference.store.path
    assert len(other.reference.store) == 3 * 4


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["lora", "lora and head"])
@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_adapter_and_copy_are_the_same_reference(trainer: Any, saved: Any, kind: str) -> None:
    """A trained adapter, head included, is gone from the reference; ln 2 before, not after."""
    model = lora(modules_to_save=saved)
    made = trainer(model=model, reference=kind, max_steps=3)
    assert first_loss(made) == LN2
    batch = made._prepare_inputs(made.data_collator(tiny.pairs(4)))
    reference = made.reference(made.model, batch)
    logps = (reference["ref_hidden"] @ reference["ref_weight"].T).log_softmax(-1)
    base = ModelReference.frozen(tiny.model())(made.model, batch)
    expected = (base["ref_hidden"] @ base["ref_weight"].T).log_softmax(-1)
    assert torch.equal(logps, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    if saved:
        original = model.base_model.model.lm_head.original_module.weight
        assert torch.equal(reference["ref_weight"], original)
        assert not torch.equal(original, made.loss.head.weight)


def test_adapter_is_back_after_the_reference(trainer: Any) -> None:
    made = trainer(model=lora(init_lora_weights=False))
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


def test_sharded_run_refuses_a_copy(trainer: Any) -> None:
    made = trainer()
    made.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"reference='copy'.*reference='store'"):
        made._refuse_unsupported("copy")


def logits(model: Any) -> Tensor:
    group = tiny.pairs(1)[0]
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(group.prompt_ids).long()[None]).logits


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
