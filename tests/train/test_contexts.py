"""Prompts of the reference's own, further prompts of the policy, and second references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.data.groups import Group, Response
from fastpo.objectives import OBJECTIVES
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.train import tiny
from tests.train.test_steps import Gradients
from tests.train.test_trajectory import CANDIDATES, SHORT

MORE = {"dpo": SHORT, "svco": {}, "d2o": SHORT}
"""One objective for each thing that a batch may carry beside a prompt and a reference."""


def make(folder: Path, objective: str, dtype: torch.dtype, **options: Any) -> PreferenceTrainer:
    described = OBJECTIVES[objective]
    options = {"objective": objective, "optim": "sgd", **MORE[objective], **options}
    short = options.get("reference_prompt") == "short_prompt"
    return PreferenceTrainer(
        tiny.model().to(dtype),
        tiny.config(folder, **options),
        train_dataset=tiny.groups(
            8, CANDIDATES[described.family], extras=described.extras, short_prompt=short
        ),
        ref_model=tiny.model(seed=1).to(dtype),
        ref_model2=tiny.model(seed=2).to(dtype) if objective == "d2o" else None,
        processing_class=tiny.tokenizer(),
        callbacks=[Gradients()],
    )


def train(made: PreferenceTrainer, resume: str | None = None) -> tuple[Tensor, Tensor]:
    """(losses of the steps, final weights)."""
    made.train(resume_from_checkpoint=resume)
    losses = [record["loss"] for record in made.state.log_history if "loss" in record]
    weights = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    return torch.tensor(losses, dtype=weights.dtype), weights


# The reference's own prompt


def by_hand(groups: list[Group], dtype: torch.dtype) -> Tensor:
    """DPO of one model with itself, read after the short prompt: a loop over whole logits."""
    model = tiny.model().to(dtype)

    def log_prob(prompt: Any, response: Response) -> Tensor:
        ids = torch.tensor([*prompt, *response.input_ids])
        logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, ids[1:, None])[len(prompt) - 1 :].sum()

    losses = []
    for group in groups:
        chosen, rejected = (
            log_prob(group.prompt_ids, r) - log_prob(group.short_prompt_ids, r)
            for r in group.responses
        )
        losses.append(-logsigmoid(0.1 * (chosen - rejected)))
    return torch.stack(losses).mean().detach()


@pytest.mark.parametrize("share_prompt", ["true", "false"])
@pytest.mark.parametrize("kind", ["copy", "adapter", "store"])
def test_every_reference_sees_the_short_prompt(trainer: Any, kind: str, share_prompt: str) -> None:
    groups = tiny.groups(4, short_prompt=True)
    model: Any = tiny.model()
    if kind == "adapter":  # starts at zero: the same model, but the reference is it without
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    made = trainer(
        model=model,
        train_dataset=groups,
        reference=kind,
        share_prompt=share_prompt,
        max_steps=1,
        **SHORT,
    )
    (loss,) = train(made)[0]
    assert_three_way(loss, by_hand(groups, torch.float32), by_hand(groups, torch.float64), "loss")


def test_a_prompt_of_the_references_own_is_a_setting(trainer: Any, config: Any) -> None:
    with pytest.raises(ValueError, match=r"row 0: reference_prompt='short_prompt' needs a `short"):
        trainer(**SHORT)
    with pytest.raises(ValueError, match="compares with no reference: drop it"):
        config(objective="simpo", **SHORT)
    with pytest.raises(ValueError, match="reference_prompt='shrt' must be one of"):
        config(reference_prompt="shrt")


# Two references


def test_second_reference_is_asked_for_and_not_ignored(trainer: Any) -> None:
    lists = tiny.groups(4, 3)
    with pytest.raises(ValueError, match=r"objective='d2o' compares with two.*ref_model2"):
        trainer(objective="d2o", train_dataset=lists)
    with pytest.raises(ValueError, match="ref_model2 is given, but objective='dpo'"):
        trainer(ref_model2=tiny.model())


def test_second_reference_is_its_own_model(trainer: Any) -> None:
    """Neither the first reference nor the policy: against plain logits of that model."""
    second = tiny.model(seed=2)
    made = trainer(objective="d2o", train_dataset=tiny.groups(4, 3), ref_model2=second)
    batch = made._prepare_inputs(made.data_collator(tiny.groups(4, 3)))
    found = made.reference(made.model, batch).tokens.ref2_logps

    def plain(dtype: torch.dtype) -> Tensor:
        model = tiny.model(seed=2).to(dtype)
        each = []
        for group in tiny.groups(4, 3):
            for response in group.responses:
                ids = torch.tensor([*group.prompt_ids, *response.input_ids])
                logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
                each.append(logps.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :, 0])
        return torch.cat(each).detach()

    assert_three_way(found, plain(torch.float32), plain(torch.float64), "ref2_logps")
    assert not any(p.requires_grad for p in second.parameters())


# Training


@pytest.mark.parametrize("objective", MORE)
def test_store_is_the_live_reference(objective: str, tmp_path: Path) -> None:
    live = train(make(tmp_path / "live", objective, torch.float32, reference="copy"))
    stored = train(make(tmp_path / "store", objective, torch.float32, reference="store"))
    truth = train(make(tmp_path / "truth", objective, torch.float64, reference="copy"))
    for what, a, b, c in zip(("losses", "weights"), stored, live, truth, strict=True):
        assert_three_way(a, b, c, what)
    folders = {p.name for p in (tmp_path / "store").glob("reference*")}
    assert folders == {"reference", *(["reference-2"] if objective == "d2o" else [])}


@pytest.mark.parametrize("objective", MORE)
def test_cut_into_micro_batches(objective: str, tmp_path: Path) -> None:
    """1x2 = 2x1: loss and gradients."""

    def step(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        made = make(
            tmp_path / f"{batch} {dtype}",
            objective,
            dtype,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2 // batch,
            max_steps=1,
            max_grad_norm=0.0,
        )
        losses, _ = train(made)
        (gradients,) = (c for c in made.callback_handler.callbacks if isinstance(c, Gradients))
        assert gradients.flat is not None
        return losses, gradients.flat

    one, two, truth = step(1, torch.float32), step(2, torch.float32), step(2, torch.float64)
    for what, a, b, c in zip(("loss", "gradients"), one, two, truth, strict=True):
        assert_three_way(a, b, c, what)


@pytest.mark.parametrize("objective", MORE)
@pytest.mark.parametrize("kind", ["copy", "store"])
def test_resumed_run_ends_with_the_same_bits(objective: str, kind: str, tmp_path: Path) -> None:
    options = {"reference": kind, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, whole = train(make(tmp_path, objective, torch.float32, **options))
    again = make(tmp_path, objective, torch.float32, **options)
    _, resumed = train(again, resume=f"{tmp_path}/checkpoint-2")
    assert torch.equal(whole, resumed)
