"""Single responses, by hand."""

from __future__ import annotations

from mpmath import mpf

from .common import nlsig, sigmoid, times


def kto(g, h):
    z0, total = max(mpf(0), g.z0), mpf(0)
    for u, good in zip(g.u, g.label, strict=True):
        if good:
            total += h.desirable_weight * (1 - sigmoid(h.beta * (u - z0)))
        else:
            total += h.undesirable_weight * (1 - sigmoid(h.beta * (z0 - u)))
    return {"responses": total}, times(h.beta, g.u)


def bco(g, h):
    total = mpf(0)
    for u, good in zip(g.u, g.label, strict=True):
        z = h.beta * u - g.shift
        total += nlsig(z) if good else nlsig(-z)
    return {"responses": total}, times(h.beta, g.u)


def npo(g, h):
    forget = [u for u, good in zip(g.u, g.label, strict=True) if not good]
    loss = sum((2 / h.beta * nlsig(-h.beta * u) for u in forget), mpf(0))
    return {"undesirable": loss}, times(h.beta, g.u)


FORMULAS = {f.__name__: f for f in (kto, bco, npo)}
