"""Single responses, by hand."""

from __future__ import annotations

from types import SimpleNamespace

from mpmath import mpf

from .common import nlsig, sigmoid, times
from .policy_gradient import responses


def kto(g, h):
    z0, total = max(mpf(0), g.z0), mpf(0)
    for u, good in zip(g.u, g.label, strict=True):
        if good:
            total += h.desirable_weight * (1 - sigmoid(h.beta * (u - z0)))
        else:
            total += h.undesirable_weight * (1 - sigmoid(h.beta * (z0 - u)))
    return {"responses": total}, times(h.beta, g.u)


def kto_humanline(g, h):
    def clipped(x):
        return min(max(x, h.log_epsilon_p), h.log_epsilon_r)

    rows = responses(g, "token_logps", "token_ref_logps", "token_weights")
    u = [sum(a * clipped(x - y) for x, y, a in zip(*row, strict=True)) for row in rows]
    return kto(SimpleNamespace(u=u, label=g.label, z0=g.z0), h)


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


def kto_pair(g, h):
    chosen, rejected = max(mpf(0), g.z_chosen), max(mpf(0), g.z_rejected)
    loss = 1 - sigmoid(h.beta * (g.u[0] - rejected)) + 1 - sigmoid(h.beta * (chosen - g.u[1]))
    return {"responses": loss}, times(h.beta, g.u)


def apo_zero_unpaired(g, h):
    total = mpf(0)
    for u, good in zip(g.u, g.label, strict=True):
        if good:
            total += h.desirable_weight * (1 - sigmoid(h.beta * u))
        else:
            total += h.undesirable_weight * sigmoid(h.beta * u)
    return {"responses": total}, times(h.beta, g.u)


def forgotten(scores, g):
    return [x for x, good in zip(scores, g.label, strict=True) if not good]


def simnpo(g, h):
    losses = [2 / h.beta * nlsig(h.beta * (-s - h.delta)) for s in forgotten(g.s, g)]
    return {"undesirable": sum(losses, mpf(0))}, times(h.beta, g.s)


def ga(g, h):
    score = g.S if h.reduction == "sum" else g.s
    return {"undesirable": sum(forgotten(score, g), mpf(0))}, list(score)


def kto_unlearn(g, h):
    def link(x):
        return sigmoid(x) if h.link == "sigmoid" else -nlsig(x)

    losses = [1 - 2 / h.beta * link(g.z0 - h.beta * u) for u in forgotten(g.u, g)]
    return {"undesirable": sum(losses, mpf(0))}, times(h.beta, g.u)


FORMULAS = {
    f.__name__: f
    for f in (kto, kto_humanline, bco, npo, kto_pair, apo_zero_unpaired, simnpo, ga, kto_unlearn)
}
