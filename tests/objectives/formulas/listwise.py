"""Lists, by hand."""

from __future__ import annotations

import mpmath
from mpmath import log, log1p, mpf

from .common import nll, nlsig, times


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


FORMULAS = {f.__name__: f for f in (lipo, plackett_luce, logo)}
