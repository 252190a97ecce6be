"""The same run through the fused head and through whole logits, for every objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.loss import preference_loss
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.base import Objective
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.train import tiny
from tests.train.plain import dense_stats

CANDIDATES = {"pair": 2, "point": 2, "list": 3}
# A policy that equals its reference is where these are least: nothing would be trained.
AT_REST = ("kl_penalty", "kl_retain")
# At log-probs of -40 a token its published beta leaves a gradient of 1e-9.
SETTINGS = {"simnpo": {"beta": 0.05}}


def run(
    folder: Path, objective: Any, steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor]:
    """([steps] losses, all final weights)."""
    names = [objective] if isinstance(objective, str) else list(objective)
    family = max((OBJECTIVES[name].family for name in names), key=CANDIDATES.__getitem__)
    extras = tuple({role for name in names for role in OBJECTIVES[name].extras})
    model = tiny.model().to(dtype)
    two = PreferenceLoss(objective).needs_second_reference
    short = options.get("reference_prompt") == "short_prompt"
    groups = tiny.groups(8, CANDIDATES[family], extras=extras, short_prompt=short)
    if any(domain.high == 1 for _, domain in PreferenceLoss(objective).grade_domains):
        for response in (r for group in groups for r in group.responses):
            response.score = (response.score or 0) / CANDIDATES[family]
    trainer = PreferenceTrainer(
        model,
        # A copy runs in every step, by the same head as the policy.
        tiny.config(
            folder, objective=objective, max_steps=steps, optim="sgd", reference="copy", **options
        ),
        train_dataset=groups,
        ref_model=None if names[0] not in AT_REST else tiny.model(seed=1).to(dtype),
        ref_model2=tiny.model(seed=2).to(dtype) if two else None,
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.tensor(losses, dtype=dtype), weights


def assert_same_trajectory(
    folder: Path, objective: Any, steps: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    ours = run(folder / "ours", objective, steps, **options)
    monkeypatch.setattr(preference_loss, "token_statistics", dense_stats)
    # Packed and padded rows round differently: one of them alone may be lucky.
    packed = run(folder / "packed", objective, steps, **options)
    padded = run(folder / "padded", objective, steps, **{**options, "share_prompt": "false"})
    truth = run(folder / "truth", objective, steps, torch.float64, **options)
    for what, a, b, c, d in zip(("losses", "weights"), ours, packed, padded, truth, strict=True):
        assert_three_way(a, [b, c], d, f"{objective} {what}")
    before = torch.cat([p.detach().flatten() for p in tiny.model().parameters()])
    assert not torch.equal(ours[1], before), "nothing was trained"


def steps_of(name: str) -> int:
    """Return 20 for the first objective that asks the head for its statistics, 2 for the others."""

    def asks(objective: Objective) -> tuple[object, ...]:
        scores = objective.scores.values()
        statistics = sorted({score.statistic or "" for score in scores})
        tokens = any(score.shape == "[G, K, T]" for score in scores)
        return objective.family, objective.extras, objective.needs_reference, tokens, statistics

    first = next(n for n, o in OBJECTIVES.items() if asks(o) == asks(OBJECTIVES[name]))
    return 20 if name == first else 2


# Every objective, because each has its own way through packing, references and extras. The two
# runs share its function: the head's statistics differ. So one objective of each set of statistics
# drifts apart for 20 steps (25 of 89); for the others 2 steps show that they are wired.
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_same_steps(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = PreferenceLoss(objective).needs
    if not needs.isdisjoint(("old_logps", "token_old_logps", "error", "ref_error")):
        with pytest.raises(ValueError, match="from your own loop"):
            tiny.config(tmp_path, objective=objective)
        return
    settings = SETTINGS.get(objective, {})
    assert_same_trajectory(tmp_path, objective, steps_of(objective), monkeypatch, **settings)


def test_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = {"dpo": 0.8, "sft": 1.0}
    assert_same_trajectory(
        tmp_path,
        mixture,
        3,
        monkeypatch,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )


SHORT = {"reference_prompt": "short_prompt"}


@pytest.mark.parametrize("objective", ["dpo", "tdpo2"])
def test_short_prompt(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference after another prompt, by log-probs and by its whole distribution."""
    assert_same_trajectory(tmp_path, objective, 20, monkeypatch, **SHORT)


@pytest.mark.parametrize(
    ("objective", "options"), [("dpo", {}), ("svco", {}), ("dpo", SHORT)], ids=str
)
def test_shared_and_padded_rows(objective: str, options: dict, tmp_path: Path) -> None:
    """One copy of each prompt or one a response: the same losses and weights."""
    shared = run(tmp_path / "shared", objective, 3, **options)
    options = {**options, "share_prompt": "false"}
    padded = run(tmp_path / "padded", objective, 3, **options)
    truth = run(tmp_path / "truth", objective, 3, torch.float64, **options)
    for what, a, b, c in zip(("losses", "weights"), shared, padded, truth, strict=True):
        assert_three_way(a, b, c, what)
