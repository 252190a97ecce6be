"""Domains beside defaults: what is refused, what must stay allowed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fastpo
import fastpo.objectives.functional
from fastpo.domain import Count, Domain, Misfit, Positive, domain_of, fitted, moved
from fastpo.loss.mixture import resolve
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.elsewhere import OBJECTIVES_ELSEWHERE
from fastpo.segments import Segments

HYPER = [(name, key) for name, o in OBJECTIVES.items() for key in o.hyper]


@pytest.mark.parametrize(("name", "key"), HYPER, ids=lambda v: str(v))
def test_every_number_is_finite_and_keeps_its_default(name: str, key: str) -> None:
    objective = OBJECTIVES[name]
    default = objective.hyper[key]
    assert objective.fitted(key, default) == default
    for wrong in (math.nan, math.inf, -math.inf, "0.1", {"a": 1}, [0.1], [0.1, 0.2, 0.3]):
        with pytest.raises(Misfit):
            objective.fitted(key, wrong)
    if not isinstance(default, bool):
        with pytest.raises(Misfit):
            objective.fitted(key, True)


def test_every_scale_and_rate_declares_more_than_a_type() -> None:
    """The numbers that may be anything are these; give another one a domain: `beta: Positive`."""
    free = {
        (name, key)
        for name, key in HYPER
        if type(OBJECTIVES[name].hyper[key]) in (int, float)
        and domain_of(OBJECTIVES[name].expected(key)) is None
    }
    assert {key for _, key in free} == {
        "alpha_divergence", "alpha", "margin_weight", "anchor", "delta",
    }  # fmt: skip
    assert {name for name, key in free if key == "alpha"} == {"rdpo", "alpha_po"}
    assert {name for name, key in free if key == "delta"} == {"simnpo"}


@pytest.mark.parametrize(
    ("objective", "hyper", "message"),
    [
        ("dpo", {"beta": -0.1}, r"^beta=-0\.1 must be above 0$"),
        ("dpo", {"beta": 0}, r"^beta=0 must be above 0$"),
        ("dpo", {"beta": True}, r"^beta=True must be a number above 0$"),
        ("dpo", {"beta": "0.1"}, r"^beta='0\.1' must be a number above 0$"),
        ("dpo", {"beta": None}, r"^beta=None must be a number above 0$"),
        ("dpo", {"beta": [0.1, -1]}, r"^beta=\[0\.1, -1\] must be above 0$"),
        ("dpo", {"beta": [0.1]}, "must be one number, or two that it moves between"),
        ("dpo", {"label_smoothing": 0.5}, r"must be in \[0, 0\.5\)"),
        ("exo_pair", {"label_smoothing": 0}, r"must be in \(0, 0\.5\)"),
        ("dpo", {"f_divergence": "js_divergence"}, "must be one of reverse_kl, forward_kl, js"),
        ("dpo", {"divergence_clamp": -1}, "must be above 0"),
        ("dpo_shift", {"lam": 1.5}, r"must be in \[0, 1\]"),
        ("beta_dpo", {"rho": 1.0}, r"must be in \[0, 1\)"),
        ("alpha_dpo", {"momentum": 1.0}, r"must be in \[0, 1\)"),
        ("kto", {"desirable_weight": -1}, "must be at least 0"),
        ("kto_humanline", {"log_epsilon_p": 0.5}, "must be below 0"),
        ("infonca", {"alpha": 0}, "must be above 0"),
        ("cispo", {"epsilon_high": 0}, "must be above 0"),
        ("grpo", {"max_length": 0}, "must be at least 1"),
        ("grpo", {"max_length": 1.5}, "must be an integer at least 1"),
        ("ipo", {"average": 1}, "must be true or false"),
        ("cpo", {"loss_type": "simpo"}, "other losses are objectives: objective: simpo"),
        ("simpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "smooths no labels"),
        ("cpo", {"loss_type": "ipo", "label_smoothing": 0.1}, "smooths no labels"),
        ({"dpo": 1, "sft": 0}, {}, "'sft' has weight 0: it must be above 0"),
        ({"dpo": -1}, {}, "'dpo' has weight -1: it must be above 0"),
        ({"dpo": [1, 2]}, {}, "it must be a number above 0"),
        (["dpo"], {}, r"objective=\['dpo'\] is neither a name nor a mapping"),
        ("dpo", {"rpo_alpha": 0.5}, r"Here it is objective: \{dpo: 1, sft: 0\.5\}"),
        ("dpo", {"loss_type": "ipo"}, "Here it is objective: ipo"),
        ("ppo", {}, "it generates while it trains"),
    ],
)  # fmt: skip
def test_refused(objective: Any, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(objective, **hyper)


@pytest.mark.parametrize(
    ("objective", "hyper"),
    [
        ("simpo", {"gamma_beta_ratio": 0}),
        ("cpo", {"cpo_alpha": 0}),
        ("orpo", {"beta": 0}),
        ("kto", {"undesirable_weight": 0}),
        ("rloo", {"beta": 0}),
        ("dro", {"beta": 0}),
        ("rdpo", {"alpha": -0.2}),
        ("alpha_po", {"alpha": -0.5}),
        ("modpo", {"margin_weight": -0.5}),
        ("simnpo", {"delta": -1}),
        ("dpop", {"lam": 0}),
        ("odpo", {"alpha": 0}),
        ("irepo", {"clip": 0}),
        ("tpo", {"tpo_alpha": 0, "gamma": 0}),
        ("dpo", {"divergence_clamp": None}),
        ("dpo_shift", {"lam": [1, 0.5]}),
        ("grpo", {"epsilon_low": 0, "max_length": 3.0}),
        ("dpo", {"beta": np.float64(0.1)}),
    ],
)
def test_allowed(objective: str, hyper: dict[str, Any]) -> None:
    resolve(objective, hyper)


def test_domains_in_words() -> None:
    assert str(Domain(0, 0.5, open_high=True)) == "in [0, 0.5)"
    assert str(Domain(1, besides=-1)) == "at least 1, or -1"
    assert str(Domain()) == "finite"
    assert fitted(3.0, Count) == 3
    assert fitted(None, Count | None) is None
    assert fitted("auto", Count | str) == "auto"
    assert moved([0.1, 1], Positive) == (0.1, 1)


def test_loss_functions_refuse_too() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"beta=-1 must be above 0"):
        fastpo.dpo_loss(x, x, x, x, beta=-1)
    with pytest.raises(ValueError, match=r"gamma_beta_ratio=nan must be at least 0"):
        fastpo.simpo_loss(x, x, gamma_beta_ratio=math.nan)


@pytest.mark.parametrize(
    "beta", ["0.1", None, True, [0.1, 0.2], math.nan, math.inf, 10**400, 1j, torch.ones(2)]
)
def test_what_is_no_finite_number_is_refused(beta: Any) -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^beta=.* must be (a number |finite and )?above 0$"):
        fastpo.dpo_loss(x, x, x, x, beta=beta)
    assert fastpo.dpo_loss(x, x, x, x, beta=torch.tensor(0.1)).losses.isfinite().all()  # pyright: ignore


@pytest.mark.parametrize(
    ("objective", "hyper", "inside", "outside"),
    [
        ("point_sigmoid", {}, 1.0, 1.1),
        ("sppo_soft", {}, 0.0, -0.1),
        ("listnet", {}, 9.0, -1.0),
        ("approx_ndcg", {}, 5.0, -1.0),
        ("lipo", {}, -3.0, 200.0),
        ("lipo", {"normalise": True}, 3.0, -3.0),
        ("odpo", {}, -3.0, math.inf),
        ("odpo", {"offset": "ratio"}, 3.0, 0.0),
        ("irepo", {"clip": 0}, 0.5, 1.0),
    ],
)
def test_grades(objective: str, hyper: dict[str, Any], inside: float, outside: float) -> None:
    loss = PreferenceLoss(objective, torch.nn.Linear(4, 8), **hyper)
    segments = Segments(
        torch.tensor([0, 0, 1]),
        torch.tensor([[0, 1]]),
        torch.tensor([[True, False]]),
        num_responses=2,
    )
    for grade in (inside, outside):
        graded = replace(segments, score=torch.tensor([[inside, grade]]))
        given = (torch.randn(3, 4), torch.tensor([1, 2, 3]), graded)
        if grade == inside:
            loss(*given, ref_logps=torch.zeros(3))
        else:
            with pytest.raises(
                ValueError, match=rf"{objective} takes grades that are .*response 1"
            ):
                loss(*given, ref_logps=torch.zeros(3))


def test_names_of_elsewhere_lead_to_names_here() -> None:
    for name, here in OBJECTIVES_ELSEWHERE.items():
        assert name not in OBJECTIVES, f"{name} is one of ours"
        word = here.lstrip("{").split()[0].rstrip(",:;")
        assert word in OBJECTIVES or here.startswith("nothing: "), (name, here)
