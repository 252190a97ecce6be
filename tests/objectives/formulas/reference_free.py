"""Pairs compared without a reference, by hand."""

from __future__ import annotations

from mpmath import expm1, log

from .common import nll, nlsig, smoothed, times


def simpo(g, h):
    gamma = h.beta * h.gamma_beta_ratio
    z = h.beta * (g.s[0] - g.s[1]) - gamma
    return {"groups": smoothed(z, h.label_smoothing)}, times(h.beta, g.s)


def cpo(g, h):
    preference = smoothed(h.beta * (g.S[0] - g.S[1]), h.label_smoothing)
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": preference, per: h.cpo_alpha * likelihood}, times(h.beta, g.S)


def orpo(g, h):
    odds = [x - log(-expm1(x)) for x in g.s]
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": h.beta * nlsig(odds[0] - odds[1]), per: likelihood}, times(h.beta, g.s)


FORMULAS = {f.__name__: f for f in (simpo, cpo, orpo)}
