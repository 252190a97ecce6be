"""Pairs compared through their log-ratios, by hand."""

from __future__ import annotations

from mpmath import mpf

from .common import nlsig, smoothed, times


def dpo(g, h):
    z = h.beta * (g.u[0] - g.u[1])
    return {"groups": smoothed(z, h.label_smoothing)}, times(h.beta, g.u)


def robust(g, h):
    z, e = h.beta * (g.u[0] - g.u[1]), h.label_smoothing
    loss = ((1 - e) * nlsig(z) - e * nlsig(-z)) / (1 - 2 * e)
    return {"groups": loss}, times(h.beta, g.u)


def ipo(g, h):
    x = g.ub if h.average else g.u
    return {"groups": (x[0] - x[1] - 1 / (2 * h.beta)) ** 2}, times(h.beta, g.u)


def hinge(g, h):
    return {"groups": max(mpf(0), 1 - h.beta * (g.u[0] - g.u[1]))}, times(h.beta, g.u)


def sppo(g, h):
    target = 1 / (2 * h.beta)
    loss = (g.u[0] - target) ** 2 + (g.u[1] + target) ** 2
    return {"groups": loss / 2 if h.half else loss}, times(h.beta, g.u)


def bco_pair(g, h):
    loss = nlsig(h.beta * g.u[0]) + nlsig(-h.beta * g.u[1])
    return {"groups": loss}, times(h.beta, g.u)


FORMULAS = {f.__name__: f for f in (dpo, robust, ipo, hinge, sppo, bco_pair)}
