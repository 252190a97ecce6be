"""The functional forms: the same numbers and defaults as the table's functions."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from fastpo.objectives import OBJECTIVES, functional
from fastpo.objectives.lipo import tie_keys

PAIR_FORMS = ["dpo", "robust", "ipo", "hinge", "sppo", "bco_pair", "simpo", "cpo", "orpo"]
TOKEN_FORMS = ["tdpo1", "tdpo2"]
POINT_FORMS = ["kto", "bco", "npo"]
LIST_FORMS = ["lipo", "plackett_luce", "logo"]
FORMS = [*PAIR_FORMS, *TOKEN_FORMS, *POINT_FORMS, *LIST_FORMS]


def form(name: str):
    return getattr(functional, f"{name}_loss")


def logps(*shape: int, seed: int) -> Tensor:
    return -10 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FORMS)
def test_defaults_are_the_objectives(name: str) -> None:
    """Every option of a form has the table's default; what a form leaves out is about its NLL."""
    table = OBJECTIVES[name].hyper
    own = {
        p.name: p.default
        for p in inspect.signature(form(name)).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in ("mask", "tie_key")
    }
    assert own == {key: table[key] for key in own}
    left_out = {"cpo_alpha", "sft_weight", "nll_reduction", "average", "loss_type"}
    left_out |= {"f_divergence", "alpha_divergence", "divergence_clamp"}
    left_out |= {"normalise", "scale_by_size"}
    assert table.keys() - own.keys() <= left_out


def test_every_form_is_tested() -> None:
    losses = {n for n in vars(functional) if n.endswith("_loss") and not n.startswith("_")}
    assert losses == {f"{name}_loss" for name in FORMS}


@pytest.mark.parametrize("name", PAIR_FORMS + TOKEN_FORMS)
def test_pair_form(name: str) -> None:
    """Same losses and rewards as the objective on stacked scores; gradient to each argument."""
    chosen, rejected, ref_chosen, ref_rejected = logps(4, 5, seed=0).requires_grad_()
    policy, reference = (chosen, rejected), (ref_chosen, ref_rejected)
    u = torch.stack((chosen - ref_chosen, rejected - ref_rejected), -1)
    logp = torch.stack(policy, -1)
    kl = -logps(2, 5, seed=1)
    named = {
        "ratio": u,
        "mean_ratio": u,
        "logps": logp,
        "mean_logps": logp,
        "kl": kl.T,
        "mask": torch.ones(5, 2).bool(),
        "label": torch.tensor([[True, False]]).expand(5, 2),
    }
    objective = OBJECTIVES[name]
    outcome = objective.fn(**{key: named[key] for key in objective.needs})
    arguments = policy if name in ("simpo", "cpo", "orpo") else policy + reference
    arguments += tuple(kl) if name in TOKEN_FORMS else ()
    loss = form(name)(*arguments)
    assert torch.equal(loss.losses, outcome.terms[0].values)
    assert torch.equal(loss.chosen_rewards, outcome.rewards[:, 0])
    assert torch.equal(loss.rejected_rewards, outcome.rewards[:, 1])
    assert loss.losses.requires_grad
    assert not loss.chosen_rewards.requires_grad


@pytest.mark.parametrize("name", POINT_FORMS)
def test_point_form(name: str) -> None:
    policy, reference = logps(2, 6, seed=2)
    label = torch.tensor([True, False, True, True, False, False])
    statistic = {"kto": (torch.tensor(1.5),), "bco": (torch.tensor(-0.25),), "npo": ()}[name]
    labels = () if name == "npo" else (label,)
    named = {
        "ratio": (policy - reference)[:, None],
        "label": label[:, None] & (name != "npo"),
        "mask": torch.ones(6, 1).bool(),
        "z0": torch.tensor(1.5),
        "shift": torch.tensor(-0.25),
    }
    objective = OBJECTIVES[name]
    outcome = objective.fn(**{key: named[key] for key in objective.needs})
    loss = form(name)(policy, reference, *labels, *statistic)
    assert torch.equal(loss.losses, outcome.terms[0].values)
    assert torch.equal(loss.rewards, outcome.rewards[:, 0])
    assert loss.losses.shape == loss.rewards.shape == (6,)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", LIST_FORMS)
def test_list_form(name: str, ragged: bool) -> None:
    scores, grades = logps(4, 3, seed=3), -logps(4, 3, seed=4) / 10
    mask = torch.ones(4, 3).bool()
    mask[1:3, 2] = not ragged
    named = {
        "ratio": scores,
        "logps": scores,
        "mean_logps": scores,
        "score": grades,
        "rank": grades.argsort(-1),
        "tie_key": tie_keys(torch.arange(4), 3),
        "label": torch.tensor([[True, False, False]]).expand(4, 3),
        "mask": mask,
    }
    objective = OBJECTIVES[name]
    outcome = objective.fn(**{key: named[key] for key in objective.needs})
    second = {"lipo": (grades,), "plackett_luce": (named["rank"],), "logo": ()}[name]
    loss = form(name)(scores, *second, mask=mask if ragged else None)
    assert torch.equal(loss.losses, outcome.terms[0].values)
    assert torch.equal(loss.rewards, outcome.rewards)


def test_lipo_form_takes_a_tie_key() -> None:
    zeros, grades = torch.zeros(1, 3), torch.tensor([[1.0, 0.5, 0.0]])
    forward, backward = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]])
    losses = [
        functional.lipo_loss(zeros, grades, tie_key=key).losses for key in (forward, backward)
    ]
    assert losses[0] != losses[1]
