"""Pairs compared without a reference, by hand."""

from __future__ import annotations

from mpmath import exp, expm1, log, mpf

from .common import gold_nll, nll, nlsig, smoothed, times


def preference(z, h):
    return smoothed(z, h.label_smoothing) if h.loss_type == "sigmoid" else max(mpf(0), 1 - z)


def simpo(g, h):
    gamma = h.beta * h.gamma_beta_ratio
    return {"groups": preference(h.beta * (g.s[0] - g.s[1]) - gamma, h)}, times(h.beta, g.s)


def cpo_preference(g, h):
    if h.loss_type == "ipo":
        return (g.s[0] - g.s[1] - 1 / (2 * h.beta)) ** 2
    return preference(h.beta * (g.S[0] - g.S[1]), h)


def cpo(g, h):
    per, likelihood = nll(g, h.nll_reduction)
    terms = {"groups": cpo_preference(g, h), per: h.cpo_alpha * likelihood}
    return terms, times(h.beta, g.S)


def orpo(g, h):
    odds = [x - log(-expm1(x)) for x in g.s]
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": h.beta * nlsig(odds[0] - odds[1]), per: likelihood}, times(h.beta, g.s)


def alpha_po(g, h):
    rho = [(1 - exp(-h.alpha * x)) / h.alpha for x in g.s]
    z = h.beta * (rho[0] - rho[1]) - h.beta * h.gamma_beta_ratio
    return {"groups": smoothed(z, h.label_smoothing)}, times(h.beta, rho)


def simper(g, h):
    return {"groups": -exp(g.s[0]) + exp(g.s[1])}, [exp(x) for x in g.s]


def slic(g, h):
    ranking = max(mpf(0), h.delta - g.S[0] + g.S[1])
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": ranking, per: h.sft_weight * likelihood}, list(g.S)


def repo(g, h):
    return {"groups": max(mpf(0), h.gamma - (g.s[0] - g.s[1]))}, list(g.s)


def tpo(g, h):
    if h.loss_type == "tpo_l":
        loss = smoothed(h.beta * (g.s[0] - g.s[1]) - h.gamma, h.label_smoothing)
    else:
        loss = cpo_preference(g, h)
    compared = g.s if h.loss_type in ("ipo", "tpo_l") else g.S
    per, likelihood = gold_nll(g, h.nll_reduction)
    terms = {"groups": loss, per: h.tpo_alpha * likelihood}
    if per == "groups":
        terms[per] = loss + h.tpo_alpha * likelihood
    return terms, times(h.beta, compared)


FORMULAS = {f.__name__: f for f in (simpo, cpo, orpo, alpha_po, simper, slic, repo, tpo)}
