"""Objectives that regress a margin to a number instead of maximising it, by hand."""

from __future__ import annotations

import mpmath
from mpmath import log, mpf

from .common import nlsig, sigmoid, times


def sppo_soft(g, h):
    wins = (g.q[0], 1 - g.q[0]) if h.single else g.q
    loss = sum((u - (p - mpf(1) / 2) / h.beta) ** 2 for u, p in zip(g.u, wins, strict=True))
    return {"groups": loss / 2 if h.half else loss}, times(h.beta, g.u)


def cal_dpo(g, h):
    target = 1 / (2 * h.beta)
    calibration = (g.u[0] - target) ** 2 + (g.u[1] + target) ** 2
    return {"groups": nlsig(g.u[0] - g.u[1]) + calibration / 2}, list(g.u)


def rebel(g, h):
    loss = ((g.u[0] - g.u[1]) - h.eta * (g.q[0] - g.q[1])) ** 2
    return {"groups": loss}, [u / h.eta for u in g.u]


def irepo(g, h):
    p = min(max(g.q[0], h.clip), 1 - h.clip)
    loss = (h.beta * (g.u[0] - g.u[1]) - log(p / (1 - p))) ** 2
    return {"groups": loss}, times(h.beta, g.u)


def bernoulli_kl(a, b):
    p, q = (sigmoid(a), sigmoid(-a)), (sigmoid(b), sigmoid(-b))
    return sum(x * (log(x) - log(y)) for x, y in zip(p, q, strict=True))


def reward_aware(g, h):
    z, target = h.beta * (g.u[0] - g.u[1]), h.eta * (g.q[0] - g.q[1])
    loss = {
        "bwd": lambda: bernoulli_kl(target, z),
        "fwd": lambda: bernoulli_kl(z, target),
        "sq": lambda: (z - target) ** 2,
    }[h.distance]()
    return {"groups": loss}, times(h.beta, g.u)


def copg(g, h):
    rho = [q - h.beta * u for q, u in zip(g.q, g.u, strict=True)]
    total = sum(((rho[i] - rho[j]) ** 2 for i in range(len(rho)) for j in range(i)), mpf(0))
    return {"groups": total / max(len(rho) - 1, 1)}, times(h.beta, g.u)


def a2po(g, h):
    if not g.q:
        return {"responses": mpf(0)}, []
    mean = sum(mpmath.exp(q / h.beta1) for q in g.q) / len(g.q)
    best = h.beta1 * log(mean)
    loss = sum((h.beta2 * u - (q - best)) ** 2 for u, q in zip(g.u, g.q, strict=True))
    return {"responses": loss}, times(h.beta2, g.u)


FORMULAS = {f.__name__: f for f in (sppo_soft, cal_dpo, rebel, irepo, reward_aware, copg, a2po)}
