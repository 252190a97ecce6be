"""References that follow the policy: the recurrence, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpo.reference.moving import FILE, UpdateRule
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.reference.test_live import lora
from tests.train import tiny

MIX = {"every": 2, "mixup": 0.3}
BEMA = {"rule": "bema", "every": 2, "rho": 3.0}


class Weights(TrainerCallback):
    """The policy's trained weights after every step, the first entry before all steps."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def _add(self, model: Any) -> None:
        self.seen.append(flat(p for p in model.parameters() if p.requires_grad))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
        self._add(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
        self._add(model)


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in parameters])


def by_recurrence(seen: list[Tensor], rule: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The reference after the last step, as the papers write it."""
    r = UpdateRule.of(rule)
    thetas = [theta.to(dtype) for theta in seen]
    reference = average = thetas[0]
    for t in range(r.every, len(thetas), r.every):
        if r.rule == "mix":
            reference = r.mixup * thetas[t] + (1 - r.mixup) * reference
        else:
            b, alpha = ((r.rho + r.gamma * t) ** -power for power in (r.kappa, r.eta))
            average = (1 - b) * average + b * thetas[t]
            reference = alpha * (thetas[t] - thetas[0]) + average
    return reference


def moving(made: PreferenceTrainer) -> Tensor:
    assert made._update is not None
    return flat(reference for _, reference in made._update.pairs.values())


@pytest.mark.parametrize("rule", [MIX, BEMA, {"every": 3, "mixup": 1.0}], ids=str)
@pytest.mark.parametrize("adapter", [False, True])
def test_recurrence(trainer: Any, rule: dict[str, Any], adapter: bool) -> None:
    weights = Weights()
    model = lora() if adapter else tiny.model()
    made = trainer(
        model=model, reference_update=rule, max_steps=7, learning_rate=1e-2, callbacks=[weights]
    )
    assert made.reference_kind == "copy"
    made.train()
    plain, truth = (by_recurrence(weights.seen, rule, d) for d in (torch.float32, torch.float64))
    assert_three_way(moving(made), plain, truth, "reference")
    assert not torch.equal(moving(made), weights.seen[0])


def test_the_next_step_compares_with_the_moved_reference(trainer: Any) -> None:
    """A copy after each step: every loss is that of a policy which equals its reference."""
    rule = {"every": 1, "mixup": 1.0}
    made = trainer(reference_update=rule, max_steps=4, learning_rate=1e-2)
    made.train()
    losses = {r["loss"] for r in made.state.log_history if "loss" in r}
    assert losses == {torch.tensor(2.0).log().item()}


@pytest.mark.parametrize("rule", [MIX, BEMA], ids=["mix", "bema"])
def test_resumed_reference_has_the_same_bits(trainer: Any, tmp_path: Path, rule: Any) -> None:
    options = {"reference_update": rule, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(**options, learning_rate=1e-2)
    whole.train()
    folder = Path(whole.args.output_dir)
    assert (folder / "checkpoint-3" / FILE).is_file()
    resumed = trainer(**options, learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert torch.equal(moving(resumed), moving(whole))
    assert torch.equal(flat(resumed.model.parameters()), flat(whole.model.parameters()))


def test_refused(trainer: Any, config: Any) -> None:
    for rule, message in (
        ({"evry": 3}, "reference_update has no 'evry': it has every, rule"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"every": True}, "every=True must be an integer at least 1"),
        ({"mixup": "half"}, "mixup='half' must be a number in"),
        ({"mixup": 0.0}, r"mixup=0.0 must be in \(0, 1\]"),
        ({"rule": "ema"}, "rule='ema' must be one of mix, bema"),
        ({"rule": "bema", "eta": 0}, "eta=0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(reference_update=rule)
    for options in ({"objective": "simpo"}, {"reference": "store"}, {"reference": "adapter"}):
        with pytest.raises(ValueError, match="needs a reference that can move"):
            config(reference_update=MIX, **options)
    with pytest.raises(ValueError, match="use the policy's own architecture"):
        trainer(reference_update=MIX, ref_model=tiny.model(hidden_size=64, num_attention_heads=8))
    plain = trainer(max_steps=2, save_strategy="steps", save_steps=1)
    plain.train()
    with pytest.raises(ValueError, match="was saved without reference_update"):
        trainer(reference_update=MIX, max_steps=3).train(
            resume_from_checkpoint=str(Path(plain.args.output_dir) / "checkpoint-2")
        )
