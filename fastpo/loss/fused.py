r"""Run an objective's own kernel where it has one: one launch gives loss and gradient.

An entry turns an objective's hyper-parameters into a kernel call, or None where no kernel has them.
The pure function stays the specification: it says which terms an outcome has, checks the
hyper-parameters, and runs wherever kernels do not. Entries are keyed by that function and not by
name, so that an objective of a user's own never runs as another one.

Likelihood terms (CPO, ORPO, SLiC, PRO, RRHF, LOGO) come from `regularisers.nll` as they always do.

This module imports triton: load it only where a kernel can run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace as Hyper
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastpo.kernels.listwise import MAX_CANDIDATES, ListForm, list_losses
from fastpo.kernels.pairwise import PairForm, pair_losses
from fastpo.objectives import lipo, listwise, pairwise, reference_free, regression
from fastpo.objectives.base import Objective, Outcome, Term
from fastpo.objectives.regularisers import nll


@dataclass(frozen=True)
class Fused:
    """Hold the constants and the names of a kernel call.

    Args:
        form: the kernel's constants.
        score: name of the scores that carry the gradient.
        beside: name of what is read beside them: grades, ranks, labels, lengths, margins.
        reward_of: name of the scores that rewards are of, where those are others.
        nll_by_pairs: whether the likelihood term of a list is multiplied by (K - 1)^2.
    """

    form: PairForm | ListForm
    score: str = "ratio"
    beside: str | None = None
    reward_of: str | None = None
    nll_by_pairs: bool = False


def _margin(beta: float, **form: Any) -> PairForm:
    """Return the form z = beta (c_w - c_l), with rewards of the same beta."""
    return PairForm(**{"chosen": beta, "rejected": beta, "reward": beta, **form})


def _transformed(h: Hyper, form: PairForm) -> PairForm:
    """Return the form with the transform that `pairwise.divergence_margin` applies."""
    power = {"forward_kl": -1.0, "alpha": h.alpha_divergence - 1}.get(h.f_divergence, 0.0)
    if power:
        return form._replace(transform="power", power=power, clamp=h.divergence_clamp)
    return form._replace(transform="twice sigmoid") if h.f_divergence == "js" else form


def _on_divergence(h: Hyper, **form: Any) -> Fused:
    return Fused(_transformed(h, _margin(h.beta, **form)))


def _ipo(h: Hyper) -> Fused | None:
    form = _transformed(h, PairForm(link="squared", target=1 / (2 * h.beta), reward=h.beta))
    if not h.average:
        return Fused(form)
    # c / L of another divergence has a gradient through both the sum and the mean.
    return Fused(form, "mean_ratio", reward_of="ratio") if form.transform == "none" else None


def _ln_dpo(h: Hyper) -> Fused | None:
    form = _margin(h.beta, rate=h.label_smoothing)
    return Fused(form, "mean_ratio") if _transformed(h, form) == form else None


def _robust(h: Hyper) -> Fused:
    return _on_divergence(h, rate=-h.label_smoothing / (1 - 2 * h.label_smoothing))


def _squares(h: Hyper, **form: Any) -> PairForm:
    half = 0.5 if getattr(h, "half", False) else 1.0
    options = {"link": "none", "side_scale": half, "reward": h.beta, **form}
    return PairForm(sides="squares", side_target=1 / (2 * h.beta), **options)


def _nca_pair(h: Hyper) -> Fused:
    return Fused(_margin(h.beta, link="none", sides="logistic", mix=0.0 if h.biased else 0.5))


def _dpo_shift(h: Hyper) -> Fused:
    return Fused(PairForm(chosen=h.beta, rejected=h.beta * h.lam, reward=h.beta))


def _rdpo(h: Hyper) -> Fused:
    return Fused(_margin(h.beta, given="difference", given_scale=h.alpha), beside="length")


def _odpo(h: Hyper) -> Fused:
    offset = "log difference" if h.offset == "difference" else "log ratio"
    return Fused(_margin(h.beta, given=offset, given_scale=-h.alpha), beside="score")


def _modpo(h: Hyper) -> Fused:
    shift = {"given": "margin", "given_scale": -h.margin_weight / h.w0}
    form = _margin(h.beta / h.w0, **_hinge_or_logistic(h), **shift, reward=h.beta)
    return Fused(form, beside="margin")


def _hinge_or_logistic(h: Hyper) -> Mapping[str, object]:
    """Return the link that `links.sigmoid_or_hinge` chooses."""
    if h.loss_type == "hinge":
        return {"link": "hinge"}
    return {"rate": getattr(h, "label_smoothing", 0.0)}


def _simpo(h: Hyper) -> Fused:
    shift = -h.beta * h.gamma_beta_ratio
    return Fused(_margin(h.beta, **_hinge_or_logistic(h), shift=shift), "mean_logps")


def _cpo(h: Hyper) -> Fused:
    if h.loss_type == "ipo":
        form = PairForm(link="squared", target=1 / (2 * h.beta), reward=h.beta)
        return Fused(form, "mean_logps", reward_of="logps")
    return Fused(_margin(h.beta, **_hinge_or_logistic(h)), "logps")


def _orpo(h: Hyper) -> Fused:
    return Fused(PairForm(transform="log odds", scale=h.beta, reward=h.beta), "mean_logps")


def _alpha_po(h: Hyper) -> Fused:
    shape = {"transform": "power", "power": -h.alpha} if h.alpha else {}
    shift = -h.beta * h.gamma_beta_ratio
    form = _margin(h.beta, **shape, shift=shift, rate=h.label_smoothing, transformed_reward=True)
    return Fused(form, "mean_logps")


def _sppo_soft(h: Hyper) -> Fused:
    return Fused(_squares(h, given="chosen wins" if h.single else "wins"), beside="score")


def _cal_dpo(h: Hyper) -> Fused:
    return Fused(_squares(h, link="logistic", side_scale=0.5, reward=1.0))


def _rebel(h: Hyper) -> Fused:
    target = {"given": "difference", "given_scale": -h.eta, "target": 0.0}
    return Fused(PairForm(link="squared", **target, reward=1 / h.eta), beside="score")


def _reward_aware(h: Hyper) -> Fused | None:
    if h.distance != "sq":
        return None
    target = {"given": "difference", "given_scale": -h.eta, "target": 0.0}
    return Fused(_margin(h.beta, link="squared", **target), beside="score")


def _lipo(h: Hyper) -> Fused:
    options = {"log2": h.discount == "log2", "normalise": h.normalise}
    size_power = 1 if h.scale_by_size else 0
    form = ListForm("logistic", h.beta, lambda_weights=True, size_power=size_power, **options)
    return Fused(form, beside="score")


def _graded(form: str, **options: Any) -> Callable[[Hyper], Fused]:
    """Make the call of a form that reads the log-ratios times beta, and the grades."""
    return lambda h: Fused(ListForm(form, h.beta, **options), beside="score")


def _softmax(form: str, temperature: str) -> Callable[[Hyper], Fused]:
    """Make the same call with a softmax of the grades, whose temperature has that name."""

    def build(h: Hyper) -> Fused:
        options = {"temperature": getattr(h, temperature), "targets": "softmax"}
        return Fused(ListForm(form, h.beta, **options), beside="score")

    return build


def _exo_pref(h: Hyper) -> Fused:
    rate = h.label_smoothing
    return Fused(
        ListForm("exo", h.beta, temperature=1 / math.log((1 - rate) / rate)), beside="label"
    )


def _approx_ndcg(h: Hyper) -> Fused:
    options = {"temperature": h.temperature, "log2": True, "normalise": True}
    return Fused(ListForm("smooth rank", h.beta, **options), beside="score")


FUSED: dict[Callable[..., Outcome], Callable[[Hyper], Fused | None]] = {
    pairwise.dpo: lambda h: _on_divergence(h, rate=h.label_smoothing),
    pairwise.robust: _robust,
    pairwise.ipo: _ipo,
    pairwise.hinge: lambda h: _on_divergence(h, link="hinge"),
    pairwise.sppo: lambda h: Fused(_squares(h)),
    pairwise.bco_pair: lambda h: Fused(_margin(h.beta, link="none", sides="logistic")),
    pairwise.ln_dpo: _ln_dpo,
    pairwise.exo_pair: lambda h: _on_divergence(h, link="kl", rate=h.label_smoothing),
    pairwise.discopop: lambda h: _on_divergence(h, link="modulated", tau=h.tau),
    pairwise.nca_pair: _nca_pair,
    pairwise.apo_zero: lambda h: Fused(_margin(h.beta, link="none", sides="sigmoid")),
    pairwise.apo_down: lambda h: Fused(_margin(h.beta, link="sigmoid", sides="chosen sigmoid")),
    pairwise.dpop: lambda h: Fused(_margin(h.beta, penalty=h.lam)),
    pairwise.rdpo: _rdpo,
    pairwise.dpo_shift: _dpo_shift,
    pairwise.odpo: _odpo,
    pairwise.gpo: lambda h: Fused(_margin(h.beta, link=h.link)),
    pairwise.modpo: _modpo,
    reference_free.simpo: _simpo,
    reference_free.cpo: _cpo,
    reference_free.orpo: _orpo,
    reference_free.alpha_po: _alpha_po,
    reference_free.simper: lambda h: Fused(
        PairForm(link="linear", transform="exp", transformed_reward=True), "mean_logps"
    ),
    reference_free.slic: lambda h: Fused(PairForm(link="hinge", target=h.delta), "logps"),
    reference_free.repo: lambda h: Fused(PairForm(link="hinge", target=h.gamma), "mean_logps"),
    regression.sppo_soft: _sppo_soft,
    regression.cal_dpo: _cal_dpo,
    regression.rebel: _rebel,
    regression.reward_aware: _reward_aware,
    regression.copg: _graded("squared", size_power=-1),
    lipo.lipo: _lipo,
    lipo.plackett_luce: lambda h: Fused(ListForm("below", h.beta, ascending=True), beside="rank"),
    lipo.list_mle: _graded("below"),
    lipo.point_mse: _graded("point squared"),
    lipo.point_sigmoid: _graded("point logistic"),
    lipo.pair_hinge: _graded("hinge", delta=1.0),
    lipo.pair_logistic: _graded("logistic"),
    lipo.pair_mse: _graded("squared"),
    lipo.listnet: _graded("softmax", targets="share"),
    lipo.approx_ndcg: _approx_ndcg,
    listwise.logo: lambda h: Fused(
        ListForm("first", h.beta, delta=h.gamma_beta_ratio), "mean_logps"
    ),
    listwise.infonca: _softmax("softmax", "alpha"),
    listwise.nca: _softmax("nca", "alpha"),
    listwise.exo_rw: _softmax("exo", "beta_r"),
    listwise.exo_pref: _exo_pref,
    listwise.dpo_rw: _softmax("softmax", "beta_r"),
    listwise.pro: lambda h: Fused(ListForm("contrast"), "mean_logps", "score", nll_by_pairs=True),
    listwise.rrhf: lambda h: Fused(ListForm("hinge"), "mean_logps", "score"),
}
"""An objective's function -> its kernel call, of its hyper-parameters."""


class _Losses(Function):
    """Make losses [G] with gradient to the scores, and rewards [G, K] without."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, fused: Fused, named: Mapping[str, Tensor]) -> Any:
        beside = None if fused.beside is None else named[fused.beside]
        if isinstance(fused.form, PairForm):
            reward_of = None if fused.reward_of is None else named[fused.reward_of]
            losses, grads, rewards = pair_losses(
                fused.form, score, named["mask"], reward_of=reward_of, given=beside
            )
        else:
            losses, grads, rewards = list_losses(
                fused.form, score, named["mask"], grade=beside, tie_key=named.get("tie_key")
            )
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(rewards)
        return losses, rewards

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (grads,) = ctx.saved_tensors
        return cotangents[0][:, None] * grads, None, None


class _Prepared(NamedTuple):
    """Hold what an objective's kernel needs, prepared once for its hyper-parameters."""

    call: Fused | None  # None: no kernel has them
    terms: tuple[Term, ...]  # as the pure function returns them of no groups


_PREPARED: dict[tuple, _Prepared] = {}


def _prepare(
    objective: Objective, hyper: Mapping[str, Any], named: Mapping[str, Tensor]
) -> _Prepared:
    """Return the kernel call, and the terms of the pure function's outcome."""
    build = FUSED.get(objective.fn)
    if build is None:
        return _Prepared(None, ())
    no_groups = {name: named[name][:0] for name in objective.needs}
    terms = objective(no_groups, **hyper).terms  # raises what it raises
    return _Prepared(build(Hyper(**{**objective.hyper, **hyper})), terms)


def evaluate(
    objective: Objective, hyper: Mapping[str, Any], named: Mapping[str, Tensor]
) -> Outcome | None:
    """Return what `objective.fn` does, by its kernel; None where it has none.

    Args:
        objective: of the catalogue or a user's own.
        hyper: its hyper-parameters, as far as they are not the defaults.
        named: the scores on one device, fp32 or fp64.

    Raises:
        ValueError: what the objective itself says about its hyper-parameters.
    """
    key = (objective.fn, *sorted(hyper.items()))
    if key not in _PREPARED:
        _PREPARED[key] = _prepare(objective, hyper, named)
    fused, terms = _PREPARED[key]
    mask = named["mask"]
    if fused is None or mask.shape[-1] > MAX_CANDIDATES:
        return None
    losses, rewards = _Losses.apply(named[fused.score], fused, named)
    preference, *likelihood = terms
    outcome_terms = [preference._replace(values=losses)]
    if likelihood:
        reduction = {**objective.hyper, **hyper}["nll_reduction"]
        scores = (named[name] for name in ("logps", "mean_logps", "label", "mask"))
        values = nll(*scores, reduction=reduction).values
        if fused.nll_by_pairs:
            values = values * (mask.sum(-1) - 1).square()
        outcome_terms += [term._replace(values=values) for term in likelihood]
    return Outcome(tuple(outcome_terms), rewards)
