"""Objectives that see the whole batch, by hand: what other pairs contribute is given."""

from __future__ import annotations

import mpmath
from mpmath import exp, log, mpf

from .common import nlsig, smoothed, times


def places(x, batch):
    """Where x stands in a sorted batch; several places if others are equal to it."""
    nearest = min(abs(x - y) for y in batch)
    return [k for k, y in enumerate(batch) if abs(x - y) == nearest]


def mean(x):
    return sum(x) / len(x)


def aot(g, h):
    own = g.S[0] - g.S[1]
    gaps = [own - g.sorted_ref_margin[k] for k in places(own, g.sorted_margin)]
    loss = mean([smoothed(h.beta * d, h.label_smoothing) for d in gaps])
    return {"groups": loss}, [h.beta * (S - R) for S, R in zip(g.S, g.R, strict=True)]


def aot_unpaired(g, h):
    up = [g.u[0] - g.sorted_rejected[k] for k in places(g.u[0], g.sorted_chosen)]
    down = [g.sorted_chosen[k] - g.u[1] for k in places(g.u[1], g.sorted_rejected)]
    up, down = (mean([smoothed(h.beta * d, h.label_smoothing) for d in x]) for x in (up, down))
    return {"groups": (up + down) / 2}, times(h.beta, g.u)


def beta_dpo(g, h):
    (M,), (sd,), n = g.margin_mean, g.margin_std, len(g.draws)
    kept = max(1, int((1 - float(h.rho)) * n))

    def order(D, noise):
        return noise - ((D - M) / sd) ** 2 / 2

    ranked = sorted(g.draws, key=lambda row: -order(*row))
    scale = h.beta * (1 + h.alpha * (mean([D for D, _ in ranked[:kept]]) - M))
    own, uniform = g.u[0] - g.u[1], ((g.key[0] >> 12) % 2**52 + mpf(1) / 2) / 2**52
    noise = -log(-log(uniform))
    last, first_out = order(*ranked[kept - 1]), order(*ranked[min(kept, n - 1)])
    selected = kept == n or order(own, noise) >= (last + first_out) / 2
    loss = nlsig(max(scale, h.beta_min) * own) * n / kept if selected else mpf(0)
    return {"groups": loss}, times(h.beta, g.u)


def alpha_dpo(g, h):
    (mu,), (sd,) = g.margin_mean, g.margin_std
    target = h.gamma_beta_ratio + h.alpha * (g.ub[0] - g.ub[1] - mu) / sd
    z = h.beta * (g.s[0] - g.s[1] - target)
    rewards = [h.beta * (s - h.alpha * ub) for s, ub in zip(g.s, g.ub, strict=True)]
    return {"groups": smoothed(z, h.label_smoothing)}, rewards


def dr_dpo(g, h):
    loss, b, c = (
        smoothed(h.beta * (g.u[0] - g.u[1]), h.label_smoothing),
        h.beta_prime,
        g.log_mean_exp,
    )
    return {"groups": -b * (exp(-loss / b - c) - 1 + c)}, times(h.beta, g.u)


def maxmin(g, h):
    loss = smoothed(h.beta * (g.u[0] - g.u[1]), h.label_smoothing)
    levels = [level for _, level, _ in g.populations]
    if h.reduction == "max":
        total = max(levels)
        weights = [mpf(level == total) / levels.count(total) for level in levels]
    else:
        powers = [exp(level / h.temperature) for level in levels]
        total = h.temperature * log(mean(powers))
        weights = [p / mpmath.fsum(powers) for p in powers]
    for (population, level, share), weight in zip(g.populations, weights, strict=True):
        if population == g.population:
            total += weight / share * (loss - level)
    return {"groups": total}, times(h.beta, g.u)


FORMULAS = {f.__name__: f for f in (aot, aot_unpaired, beta_dpo, alpha_dpo, dr_dpo, maxmin)}
