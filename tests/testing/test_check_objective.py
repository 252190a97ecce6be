"""The battery for users' own objectives: what is right passes, each fault has its sentence."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

from fastpo import OBJECTIVES, Objective, Outcome, Statistic, Term
from fastpo.domain import Count, Domain, FlipRate, ProperShare
from fastpo.objectives.links import live, logistic
from fastpo.objectives.pairwise import dpo, margin_of, pair_outcome
from fastpo.objectives.vocabulary import scores_with
from fastpo.testing import check_objective
from fastpo.testing.scores import cases_of, make_scores


def right(ratio: Tensor, mask: Tensor, *, beta: float = 0.1, square: bool = False) -> Outcome:
    z = beta * margin_of(ratio, mask)
    return pair_outcome(z.square() if square else logistic(z), beta * ratio, mask)


def attached(ratio, mask):
    outcome = dpo(ratio, mask)
    return outcome._replace(rewards=live(ratio, mask))


def single(ratio, mask):
    outcome = dpo(ratio, mask)
    return outcome._replace(terms=(Term(outcome.terms[0].values.float()),))


def overflows(ratio, mask):
    return pair_outcome(torch.log1p((-margin_of(ratio, mask)).exp()), ratio, mask)


def detached(ratio, mask):
    z = margin_of(ratio, mask)
    return pair_outcome(z * z.data, ratio, mask)


def by_place(ratio, mask):
    z = margin_of(ratio, mask)
    return pair_outcome(z * torch.arange(len(z)), ratio, mask)


def unmasked(ratio, mask):
    return Outcome((Term((1 - ratio[:, 0] + ratio[:, 1]).square()),), ratio.detach())


def masked_wrong(ratio, mask):
    z = live(ratio, mask)
    return Outcome((Term((1 - z[:, 0] + z[:, 1]).square()),), z.detach())


def constant(ratio, mask):
    return pair_outcome(margin_of(ratio, mask).detach(), ratio, mask)


def mixed(ratio, mask):
    z = margin_of(ratio, mask)
    return pair_outcome(z - z.mean(), ratio, mask)


def swallows(ratio, mask):
    return pair_outcome(margin_of(ratio, mask).nan_to_num(), ratio, mask)


def writes(ratio, mask):
    ratio.data[~mask] = 0
    ratio.data *= 1.5
    return dpo(ratio, mask)


FAULTS = {
    attached: "returns rewards with gradient",
    single: "returns losses in torch.float32 for scores in torch.float64",
    overflows: "at scores up to 1e4: float32 gives inf where the exact value is",
    constant: "has no gradient to any score",
    detached: "gradients are not those of its losses",
    by_place: "a group's loss per groups depends on its place",
    unmasked: "rewards are not 0 where `mask` is False",
    masked_wrong: "without responses has a loss that is not 0",
    mixed: "depends on its place|what is padded changes|loss of another group",
    swallows: "NaN in ratio.* is lost",
    writes: "writes into 'ratio'",
}


def test_what_is_right_passes() -> None:
    check_objective(right, family="pair")
    check_objective(OBJECTIVES["grpo"].fn, delta=1.5)
    check_objective(dpo, beta=0.3)


def test_statistics_of_ones_own() -> None:
    def centred(ratio, middle, mask, *, beta=0.1):
        return pair_outcome(logistic(beta * (margin_of(ratio, mask) - middle)), beta * ratio, mask)

    middle = Statistic(lambda s, h: (margin_of(s["ratio"], s["mask"]), s["mask"].all(-1)))
    check_objective(Objective(centred, "pair", statistics={"middle": middle}))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_fault_has_a_sentence(fault) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_objective(fault, family="pair")


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="has no hyper-parameter 'bet': it has beta, square"):
        check_objective(right, family="pair", bet=0.1)
    with pytest.raises(ValueError, match="beta='a' must be a number"):
        check_objective(right, family="pair", beta="a")
    with pytest.raises(ValueError, match=r"beta=\[0.1, 0.2\] must be a number"):
        check_objective(right, family="pair", beta=[0.1, 0.2])
    with pytest.raises(ValueError, match="no hyper-parameter 'beta': it has none"):
        check_objective(attached, family="pair", beta=0.1)
    with pytest.raises(ValueError, match="family='list': objective 'dpo'"):
        check_objective(dpo, family="list")
    with pytest.raises(ValueError, match="does not say what it compares"):
        check_objective(right)


def test_settings_stay_in_their_domains() -> None:
    def many(
        ratio,
        mask,
        *,
        share: ProperShare = 0.9,
        rate: FlipRate = 0.0,
        least: Annotated[float, Domain(1, 1)] = 1.0,
        count: Count = 3,
        flag: bool = False,
        kind: Literal["a", "b"] | None = None,
    ) -> Outcome:
        raise NotImplementedError

    objective = Objective(many, "pair")
    default, moved, *others = cases_of(objective)
    assert default.hyper == objective.hyper
    assert moved.hyper == {**objective.hyper, "share": 0.655, "rate": 0.04, "count": 7}
    assert [repr(case) for case in others] == ["many-flag=True", "many-kind=a", "many-kind=b"]
    assert all(objective.option(name, value) == value for name, value in moved.hyper.items())


def test_every_score_can_be_made() -> None:
    roles = ("gold", "a_role_of_ones_own")
    for name in scores_with(roles):
        objective = Objective(right, "pair", extras=roles)
        objective.__dict__["needs"] = (name,)
        shape = scores_with(roles)[name].shape
        value = make_scores(objective, [2, 2])[name]
        assert value.dim() == {"[G, K]": 2, "[G]": 1, "[G, K, T]": 3}[shape], name
