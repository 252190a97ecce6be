"""Pairs compared through their log-ratios, by hand."""

from __future__ import annotations

from mpmath import exp, log, mpf

from .common import nlsig, sigmoid, smoothed, times


def transformed(u, h):
    """f'(e^u) of the f-divergence"""

    def power(p):
        exponent = p * u
        if h.divergence_clamp is not None:
            exponent = min(exponent, h.divergence_clamp)
        return (exp(exponent) - 1) / p

    if h.f_divergence == "reverse_kl" or (h.f_divergence == "alpha" and h.alpha_divergence == 1):
        return u
    if h.f_divergence == "forward_kl":
        return power(mpf(-1))
    if h.f_divergence == "js":
        return log(2) + log(sigmoid(u))
    return power(h.alpha_divergence - 1)


def difference(g, h):
    return transformed(g.u[0], h) - transformed(g.u[1], h)


def mean_difference(g, h):
    """c_w / L_w - c_l / L_l, where u / L is given"""
    chosen, rejected = (transformed(u, h) * ub / u for u, ub in zip(g.u, g.ub, strict=True))
    return chosen - rejected


def dpo(g, h):
    return {"groups": smoothed(h.beta * difference(g, h), h.label_smoothing)}, times(h.beta, g.u)


def robust(g, h):
    z, e = h.beta * difference(g, h), h.label_smoothing
    loss = ((1 - e) * nlsig(z) - e * nlsig(-z)) / (1 - 2 * e)
    return {"groups": loss}, times(h.beta, g.u)


def ipo(g, h):
    margin = mean_difference(g, h) if h.average else difference(g, h)
    return {"groups": (margin - 1 / (2 * h.beta)) ** 2}, times(h.beta, g.u)


def hinge(g, h):
    return {"groups": max(mpf(0), 1 - h.beta * difference(g, h))}, times(h.beta, g.u)


def ln_dpo(g, h):
    z = h.beta * mean_difference(g, h)
    return {"groups": smoothed(z, h.label_smoothing)}, times(h.beta, g.ub)


def exo_pair(g, h):
    z, e = h.beta * difference(g, h), h.label_smoothing
    loss = sigmoid(z) * (-nlsig(z) - log(1 - e)) + sigmoid(-z) * (-nlsig(-z) - log(e))
    return {"groups": loss}, times(h.beta, g.u)


def discopop(g, h):
    z = h.beta * difference(g, h)
    blend = sigmoid(z / h.tau)
    return {"groups": (1 - blend) * nlsig(z) + blend * exp(-z)}, times(h.beta, g.u)


def sppo(g, h):
    target = 1 / (2 * h.beta)
    loss = (g.u[0] - target) ** 2 + (g.u[1] + target) ** 2
    return {"groups": loss / 2 if h.half else loss}, times(h.beta, g.u)


def bco_pair(g, h):
    loss = nlsig(h.beta * g.u[0]) + nlsig(-h.beta * g.u[1])
    return {"groups": loss}, times(h.beta, g.u)


def nca_pair(g, h):
    chosen, rejected = times(h.beta, g.u)
    if h.biased:
        loss = nlsig(chosen) + nlsig(-rejected)
    else:
        loss = nlsig(chosen) + nlsig(-chosen) / 2 + nlsig(-rejected) / 2
    return {"groups": loss}, [chosen, rejected]


def apo_zero(g, h):
    chosen, rejected = times(h.beta, g.u)
    return {"groups": 1 - sigmoid(chosen) + sigmoid(rejected)}, [chosen, rejected]


def apo_down(g, h):
    chosen, rejected = times(h.beta, g.u)
    return {"groups": sigmoid(chosen) + 1 - sigmoid(chosen - rejected)}, [chosen, rejected]


def wpo(g, h):
    preference = smoothed(h.beta * (g.u[0] - g.u[1]), h.label_smoothing)
    chosen, rejected = (exp(s - p2) for s, p2 in zip(g.s, g.mean_log_p2, strict=True))
    weight = chosen * rejected
    return {"groups": (min(weight, 1) if h.clamp else weight) * preference}, times(h.beta, g.u)


def dpop(g, h):
    z = h.beta * (g.u[0] - g.u[1] - h.lam * max(mpf(0), -g.u[0]))
    return {"groups": nlsig(z)}, times(h.beta, g.u)


def rdpo(g, h):
    z = h.beta * (g.u[0] - g.u[1]) + h.alpha * (g.L[0] - g.L[1])
    return {"groups": nlsig(z)}, times(h.beta, g.u)


def dpo_shift(g, h):
    return {"groups": nlsig(h.beta * (g.u[0] - h.lam * g.u[1]))}, times(h.beta, g.u)


def odpo(g, h):
    offset = g.q[0] / g.q[1] if h.offset == "ratio" else g.q[0] - g.q[1]
    z = h.beta * (g.u[0] - g.u[1])
    loss = nlsig(z - h.alpha * log(offset)) if offset > 0 else mpf(0)
    return {"groups": loss}, times(h.beta, g.u)


def gpo(g, h):
    z = h.beta * (g.u[0] - g.u[1])
    loss = {
        "logistic": log(1 + exp(-z)),
        "hinge": max(mpf(0), 1 - z),
        "squared": (1 - z) ** 2,
        "exponential": exp(-z),
        "truncated_quadratic": max(mpf(0), 1 - z) ** 2,
        "savage": 1 / (1 + exp(z)) ** 2,
    }[h.link]
    return {"groups": loss}, times(h.beta, g.u)


def modpo(g, h):
    z = (h.beta * (g.u[0] - g.u[1]) - h.margin_weight * g.margin) / h.w0
    loss = nlsig(z) if h.loss_type == "sigmoid" else max(mpf(0), 1 - z)
    return {"groups": loss}, times(h.beta, g.u)


def selm(g, h):
    optimism = h.alpha * h.beta * g.ref_response_ratio
    return {"groups": nlsig(h.beta * (g.u[0] - g.u[1])) + optimism}, times(h.beta, g.u)


def xpo(g, h):
    margin = g.u[0] - g.u[1]
    square = (margin - 1 / (2 * h.beta)) ** 2
    preference = nlsig(h.beta * margin) if h.loss_type == "sigmoid" else square
    return {"groups": preference + h.alpha * g.ref_response_logps}, times(h.beta, g.u)


FORMULAS = {
    f.__name__: f
    for f in (
        dpo,
        robust,
        ipo,
        hinge,
        ln_dpo,
        exo_pair,
        discopop,
        sppo,
        bco_pair,
        nca_pair,
        apo_zero,
        apo_down,
        wpo,
        dpop,
        rdpo,
        dpo_shift,
        odpo,
        gpo,
        modpo,
        selm,
        xpo,
    )
}
