"""Means over a logging window; the distance to the reference, and the budget that ends a run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fastpo.head.functional import linear_logps
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.segments import Segments
from fastpo.testing.three_way import assert_three_way
from fastpo.train.metrics import MetricWindow, read_metrics
from tests.train import tiny

SEGMENTS = Segments(
    response=torch.tensor([0, 0, 0, 1, 1, 2, 3, 3]),
    grid=torch.tensor([[0, 1], [2, 3]]),
    label=torch.tensor([[True, False], [True, False]]),
    num_responses=4,
)
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.5, 1.0, 1.0])


def distances(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The engine's metrics, and the same by hand over the tokens of each kind of response."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=rng).to(dtype) for n in (8, 11))
    labels, ref = torch.arange(8), -torch.rand(8, generator=rng).to(dtype)
    out = PreferenceLoss("dpo")(
        hidden, labels, SEGMENTS, weight=weight, ref_logps=ref, token_weights=WEIGHTS.to(dtype)
    )
    gap = linear_logps(hidden, weight, labels) - ref
    good = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).to(dtype)
    by_hand = {}
    for name, values in (
        ("drift", gap * WEIGHTS.to(dtype)),
        ("kl", gap.square() / 2 * (WEIGHTS != 0)),
    ):
        by_hand[f"{name}/chosen"] = (values * good).sum() / 2
        by_hand[f"{name}/rejected"] = (values * (1 - good)).sum() / 2
    return out.metrics, by_hand


def test_distances_are_means_over_responses_of_each_kind() -> None:
    (ours, plain), (_, truth) = distances(torch.float32), distances(torch.float64)
    for name in truth:
        assert_three_way(ours[name], plain[name], truth[name], name)


def test_a_run_starts_at_its_reference_and_drifts(trainer: Any) -> None:
    made = trainer(learning_rate=1e-2, max_steps=3)
    made.train()
    first, *_, last = (r for r in read_metrics(made.args.output_dir) if "loss" in r)
    for side in ("chosen", "rejected"):
        assert first[f"kl/{side}"] == 0.0 < last[f"kl/{side}"]
    assert last["drift/chosen"] > last["drift/rejected"]


@pytest.mark.parametrize("budget", [1e-6, 1e6])
def test_the_budget_ends_the_run_and_says_so(
    trainer: Any, caplog: pytest.LogCaptureFixture, budget: float
) -> None:
    made = trainer(learning_rate=1e-2, max_steps=4, kl_budget=budget)
    with caplog.at_level(logging.WARNING, "fastpo.train.metrics"):
        made.train()
    spent = [
        max(r["kl/chosen"], r["kl/rejected"])
        for r in read_metrics(made.args.output_dir)
        if "loss" in r
    ]
    assert [value > budget for value in spent[:-1]] == [False] * (made.state.global_step - 1)
    if budget < 1:
        assert spent[-1] > budget
        assert made.state.global_step < 4
        assert f"kl_budget is {budget:g}: training ends" in caplog.text
    else:
        assert made.state.global_step == 4
        assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_budget": 0.0}, "kl_budget=0.0 must be above 0"),
        ({"kl_budget": 2.0, "objective": "simpo"}, "'simpo' compares with no reference"),
    ],
)
def test_budgets_that_cannot_be_kept(options: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **options)


def test_a_window_weighs_means_by_their_counts() -> None:
    window = MetricWindow()
    window.add({"a": 1.0, "b": torch.tensor(7.0), "never": 5.0}, {"a": 1, "b": 2, "never": 0})
    window.add({"a": torch.tensor(4.0), "b": 9.0}, {"a": torch.tensor(3), "b": 0})
    assert window.means() == {"a": (1 * 1 + 3 * 4) / 4, "b": 7.0}


def test_window_is_weighted_by_observations(trainer: Any) -> None:
    """Two steps of 4 and 1 groups in one record: the mean over five groups, not of two means."""
    options: dict[str, Any] = {
        "train_dataset": tiny.pairs(5),
        "ref_model": tiny.model(seed=1),
        "num_train_epochs": 1,
        "max_steps": -1,
        "learning_rate": 0.0,
    }
    every = trainer(**options)
    every.train()
    each = [r for r in read_metrics(every.args.output_dir) if "loss" in r]
    whole = trainer(logging_steps=2, **options)
    whole.train()
    record = read_metrics(whole.args.output_dir)[0]
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        expected = (4 * each[0][name] + each[1][name]) / 5
        assert record[name] == pytest.approx(expected, rel=1e-6)  # float32 sums in another order


def test_window_keeps_nan_but_not_absence() -> None:
    window = MetricWindow()
    window.add({"a": torch.tensor(float("nan")), "b": 1.0}, {"a": 0, "b": 1})
    window.add({"a": torch.tensor(3.0), "b": float("nan")}, {"a": torch.tensor(2), "b": 1})
    means = window.means()
    assert means["a"] == 3.0
    assert means["b"] != means["b"]
    assert window.means() == {}
