"""Every objective once more, by hand: one group, Python numbers, 60 digits, no torch.

A formula gets the live candidates of one group as lists under the papers' letters (`Scores`) and
the hyper-parameters; it returns what the group adds to each sum, and the rewards. It is the
equation as printed, with none of the care that floats need.
"""

from __future__ import annotations

from types import SimpleNamespace

import mpmath
from mpmath import expm1, log, log1p, mpf

DIGITS = 60
mpmath.mp.dps = DIGITS

# letter in a formula -> score
LETTERS = {
    "S": "logps",
    "s": "mean_logps",
    "u": "ratio",
    "ub": "mean_ratio",
    "F": "kl",
    "q": "score",
    "rank": "rank",
    "key": "tie_key",
    "label": "label",
    "z0": "z0",
    "shift": "shift",
}


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def nlsig(x):
    """-log sigmoid(x)"""
    return log1p(mpmath.exp(-x))


def smoothed(z, e):
    return (1 - e) * nlsig(z) + e * nlsig(-z)


def times(beta, x):
    return [beta * value for value in x]


def nll(g, reduction):
    per, score = {
        "token_mean": ("chosen_tokens", g.S),
        "sequence_mean": ("desirable", g.s),
        "sum": ("desirable", g.S),
    }[reduction]
    return per, -sum(x for x, good in zip(score, g.label, strict=True) if good)


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


def sppo(g, h):
    target = 1 / (2 * h.beta)
    loss = (g.u[0] - target) ** 2 + (g.u[1] + target) ** 2
    return {"groups": loss / 2 if h.half else loss}, times(h.beta, g.u)


def bco_pair(g, h):
    loss = nlsig(h.beta * g.u[0]) + nlsig(-h.beta * g.u[1])
    return {"groups": loss}, times(h.beta, g.u)


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


def tdpo1(g, h):
    z = h.beta * ((g.u[0] - g.u[1]) - (g.F[1] - g.F[0]))
    return {"groups": nlsig(z)}, [h.beta * (u + f) for u, f in zip(g.u, g.F, strict=True)]


def tdpo2(g, h):
    z = h.beta * ((g.u[0] - g.u[1]) - h.alpha * (g.F[1] - g.F[0]))
    return {"groups": nlsig(z)}, [h.beta * (u + f) for u, f in zip(g.u, g.F, strict=True)]


def lipo(g, h):
    s = times(h.beta, g.u)
    order = sorted(range(len(s)), key=lambda i: (-s[i], g.key[i]))
    base = 2 if h.discount == "log2" else mpmath.e
    inverse = {i: 1 / log(2 + place, base) for place, i in enumerate(order)}
    total = mpf(0)
    for i in range(len(s)):
        for j in range(len(s)):
            if g.q[i] > g.q[j]:
                gain = mpf(2) ** g.q[i] - mpf(2) ** g.q[j]
                total += abs(gain) * abs(inverse[i] - inverse[j]) * nlsig(s[i] - s[j])
    return {"groups": total}, s


def plackett_luce(g, h):
    s = times(h.beta, g.u)
    total = mpf(0)
    for i in range(len(s)):
        below = [mpmath.exp(s[j] - s[i]) for j in range(len(s)) if g.rank[j] > g.rank[i]]
        total += log1p(sum(below, mpf(0)))
    return {"groups": total}, s


def logo(g, h):
    gamma = h.beta * h.gamma_beta_ratio
    z = h.beta * (g.s[0] - sum(g.s[1:]) / len(g.s[1:])) - gamma
    per, likelihood = nll(g, h.nll_reduction)
    return {"groups": nlsig(z), per: h.sft_weight * likelihood}, times(h.beta, g.s)


def sft(g, h):
    per, likelihood = nll(g, h.reduction)
    return {per: mpf(likelihood)}, list(g.S)


FORMULAS = {
    f.__name__: f
    for f in (
        dpo, robust, ipo, hinge, simpo, cpo, orpo, sppo, bco_pair, kto, bco, npo, tdpo1, tdpo2,
        lipo, plackett_luce, logo, sft,
    )
}  # fmt: skip


def hyper_numbers(hyper: dict) -> SimpleNamespace:
    """Hyper-parameters as the doubles that they are, so that 0.1 is what Python multiplies by."""
    return SimpleNamespace(**{k: mpf(v) if type(v) is float else v for k, v in hyper.items()})
