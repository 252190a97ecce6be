"""LiPO's family, by hand."""

from __future__ import annotations

import mpmath
from mpmath import exp, log, log1p, mpf

from .common import nlsig, sigmoid, times


def graded_pairs(q):
    return [(i, j) for i in range(len(q)) for j in range(len(q)) if q[i] > q[j]]


def gain(q):
    return mpf(2) ** q - 1


def ideal_dcg(q, base):
    ordered = sorted(q, reverse=True)
    return sum((gain(x) / log(2 + place, base) for place, x in enumerate(ordered)), mpf(0))


def lipo(g, h):
    s = times(h.beta, g.u)
    order = sorted(range(len(s)), key=lambda i: (-s[i], g.key[i]))
    base = 2 if h.discount == "log2" else mpmath.e
    inverse = {i: 1 / log(2 + place, base) for place, i in enumerate(order)}
    total = mpf(0)
    for i, j in graded_pairs(g.q):
        swap = abs(gain(g.q[i]) - gain(g.q[j])) * abs(inverse[i] - inverse[j])
        total += swap * nlsig(s[i] - s[j])
    if h.normalise and s:
        total /= ideal_dcg(g.q, base)
    return {"groups": total * len(s) if h.scale_by_size else total}, s


def plackett_luce(g, h):
    s = times(h.beta, g.u)
    total = mpf(0)
    for i in range(len(s)):
        below = [exp(s[j] - s[i]) for j in range(len(s)) if g.rank[j] > g.rank[i]]
        total += log1p(sum(below, mpf(0)))
    return {"groups": total}, s


def list_mle(g, h):
    s = times(h.beta, g.u)
    order, total = sorted(range(len(s)), key=lambda i: -g.q[i]), mpf(0)
    for place, i in enumerate(order):
        rest = order[place + 1 :]
        total += log1p(sum((exp(s[j] - s[i]) for j in rest), mpf(0)))
    return {"groups": total}, s


def point_mse(g, h):
    s = times(h.beta, g.u)
    return {"groups": sum(((x - q) ** 2 for x, q in zip(s, g.q, strict=True)), mpf(0))}, s


def point_sigmoid(g, h):
    s = times(h.beta, g.u)
    losses = [q * nlsig(x) + (1 - q) * nlsig(-x) for x, q in zip(s, g.q, strict=True)]
    return {"groups": sum(losses, mpf(0))}, s


def pair_hinge(g, h):
    s = times(h.beta, g.u)
    losses = [max(mpf(0), 1 - (s[i] - s[j])) for i, j in graded_pairs(g.q)]
    return {"groups": sum(losses, mpf(0))}, s


def pair_logistic(g, h):
    s = times(h.beta, g.u)
    return {"groups": sum((nlsig(s[i] - s[j]) for i, j in graded_pairs(g.q)), mpf(0))}, s


def pair_mse(g, h):
    s = times(h.beta, g.u)
    pairs = [(i, j) for i in range(len(s)) for j in range(i)]
    losses = [((s[i] - s[j]) - (g.q[i] - g.q[j])) ** 2 for i, j in pairs]
    return {"groups": sum(losses, mpf(0))}, s


def cross_entropy(t, s):
    """-sum_i t_i log softmax(s)_i"""
    losses = [t[i] * log1p(rest(s, i)) for i in range(len(s))]
    return sum(losses, mpf(0))


def rest(s, i):
    """The odds of all others against i, so that -log softmax(s)_i = log(1 + odds)."""
    return sum((exp(x - s[i]) for j, x in enumerate(s) if j != i), mpf(0))


def listnet(g, h):
    s = times(h.beta, g.u)
    return {"groups": cross_entropy([q / sum(g.q) for q in g.q], s)}, s


def approx_ndcg(g, h):
    s, total = times(h.beta, g.u), mpf(0)
    for i, q in enumerate(g.q):
        others = [sigmoid((x - s[i]) / h.temperature) for j, x in enumerate(s) if j != i]
        total += gain(q) / log(2 + sum(others, mpf(0)), 2)
    return {"groups": -total / ideal_dcg(g.q, 2) if s else mpf(0)}, s


FORMULAS = {
    f.__name__: f
    for f in (
        lipo,
        plackett_luce,
        list_mle,
        point_mse,
        point_sigmoid,
        pair_hinge,
        pair_logistic,
        pair_mse,
        listnet,
        approx_ndcg,
    )
}
