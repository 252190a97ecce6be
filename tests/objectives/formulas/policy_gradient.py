"""Policy-gradient objectives, by hand."""

from __future__ import annotations

from mpmath import exp, log, mpf, sqrt

from .common import sigmoid, times

STD_EPSILON = mpf(1e-4)  # the double that is added in code


def advantages(q, scale):
    centred = [x - sum(q) / len(q) for x in q]
    if scale == "none":
        return centred
    std = sqrt(sum(x**2 for x in centred) / (len(q) - 1))
    return [x / (std + STD_EPSILON) for x in centred]


def clip(x, low, high):
    return min(max(x, low), high)


def surrogate(ratio, a, low, high, delta=None):
    bounded = ratio if delta is None else min(ratio, delta)
    return -min(bounded * a, clip(ratio, 1 - low, 1 + high) * a)


def responses(g, *names):
    """The named token scores of each response, cut to the tokens it has."""
    for i, here in enumerate(g.token_mask):
        scores = (getattr(g, name)[i] for name in names)
        yield [[x for x, there in zip(row, here, strict=True) if there] for row in scores]


def aggregate(losses, how, max_length=1):
    """losses: of every response the list of its tokens'."""
    if how == "sequence_mean":
        return {"responses": sum(sum(row) / len(row) for row in losses)}
    if how == "token_mean":
        return {"response_tokens": sum(sum(row) for row in losses)}
    return {"responses": sum(sum(row) for row in losses) / max_length}


def clipped(g, h, *, importance="token", how="sequence_mean", max_length=1, delta=None):
    losses = []
    rows = responses(g, "token_logps", "token_old_logps", "token_weights")
    for (new, old, weights), a in zip(rows, advantages(g.q, h.scale_rewards), strict=True):
        ratios = [exp(x - y) for x, y in zip(new, old, strict=True)]
        if importance != "token":
            ratios = [exp((sum(new) - sum(old)) / len(new))] * len(new)
        losses.append(
            [
                w * surrogate(ratio, a, h.epsilon_low, h.epsilon_high, delta)
                for w, ratio in zip(weights, ratios, strict=True)
            ]
        )
    return aggregate(losses, how, max_length), g.q


def grpo(g, h):
    return clipped(
        g,
        h,
        importance=h.importance,
        how=h.aggregation,
        max_length=h.max_length,
        delta=h.delta,
    )


def dr_grpo(g, h):
    return clipped(g, h, how="fixed_length", max_length=h.max_length)


def dapo(g, h):
    return clipped(g, h, how="token_mean")


def gspo(g, h):
    return clipped(g, h, importance="sequence")


def luspo(g, h):
    return clipped(g, h, importance="sequence", how="sum")


def cispo(g, h):
    losses = []
    rows = responses(g, "token_logps", "token_old_logps", "token_weights")
    for row, a in zip(rows, advantages(g.q, h.scale_rewards), strict=True):
        losses.append(
            [-w * min(exp(x - y), h.epsilon_high) * a * x for x, y, w in zip(*row, strict=True)]
        )
    return aggregate(losses, "token_mean"), g.q


def sapo(g, h):
    losses = []
    rows = responses(g, "token_logps", "token_old_logps", "token_weights")
    for row, a in zip(rows, advantages(g.q, h.scale_rewards), strict=True):
        tau = h.temperature_pos if a > 0 else h.temperature_neg
        # 60 digits cannot tell the sigmoid from 1 far below 10^4
        losses.append(
            [
                -w * 4 / tau * sigmoid(min(tau * (exp(x - y) - 1), mpf(10) ** 4)) * a
                for x, y, w in zip(*row, strict=True)
            ]
        )
    return aggregate(losses, "sequence_mean"), g.q


def vespo(g, h):
    losses = []
    rows = responses(g, "token_logps", "token_old_logps", "token_weights")
    for (new, old, weights), a in zip(rows, advantages(g.q, h.scale_rewards), strict=True):
        k, lam = (h.k_pos, h.lambda_pos) if a >= 0 else (h.k_neg, h.lambda_neg)
        ratio = exp(sum(new) - sum(old))
        # far beyond what any float can hold, and what mpmath can raise e to
        phi = mpf(0) if ratio > 10**5 else ratio**k * exp(lam * (1 - ratio))
        losses.append([-w * phi * a * x for w, x in zip(weights, new, strict=True)])
    return aggregate(losses, "token_mean"), g.q


def gmpo(g, h):
    total = mpf(0)
    rows = responses(g, "token_logps", "token_old_logps")
    for row, a in zip(rows, advantages(g.q, h.scale_rewards), strict=True):
        product = mpf(1)
        for x, y in zip(*row, strict=True):
            ratio = exp(x - y)
            product *= abs(
                min(ratio * a, clip(ratio, exp(-h.epsilon_low), exp(h.epsilon_high)) * a)
            )
        sign = 1 if a > 0 else -1
        total -= sign * exp(log(product) / len(row[0]))
    return {"responses": total}, g.q


def shaped(g, h):
    rows = zip(g.q, g.old_logps, g.R, strict=True)
    return [q - h.beta * (old - ref) for q, old, ref in rows]


def ratios(g):
    return [exp(new - old) for new, old in zip(g.S, g.old_logps, strict=True)]


def rloo(g, h):
    r, total = shaped(g, h), mpf(0)
    for i, ratio in enumerate(ratios(g)):
        others = r[:i] + r[i + 1 :]
        a = r[i] - sum(others) / len(others)
        total += surrogate(ratio, a, h.epsilon_low, h.epsilon_high)
    return {"responses": total}, r


def p3o(g, h):
    r, rho = shaped(g, h), ratios(g)
    a, e = r[0] - r[1], h.epsilon
    if h.clipping == "joint":
        loss = surrogate(rho[0] / rho[1], a, e, e) / 2
    else:
        loss = (surrogate(rho[0], a, e, e) + surrogate(rho[1], -a, e, e)) / 2
    return {"groups": loss}, r


def nash_md(g, h):
    total = mpf(0)
    rows = responses(g, "token_logps", "token_ref_logps")
    for row, s, q in zip(rows, g.S, g.q, strict=True):
        total += h.beta * sum((x - y) * x for x, y in zip(*row, strict=True)) - (q - mpf(1) / 2) * s
    return {"responses": total}, g.q


def dro(g, h):
    losses = []
    rows = responses(g, "token_logps", "token_old_logps", "token_weights")
    for row, a in zip(rows, advantages(g.q, h.scale_rewards), strict=True):
        losses.append(
            [-w * (x * a - h.beta / 2 * (x - y) ** 2) for x, y, w in zip(*row, strict=True)]
        )
    return aggregate(losses, h.aggregation), g.q


def step_dapo(g, h):
    losses = [(u - a / h.beta) ** 2 / 2 for u, a in zip(g.u, g.q, strict=True)]
    return {"responses": sum(losses)}, times(h.beta, g.u)


def kl_penalty(g, h):
    losses = []
    for new, ref in responses(g, "token_logps", "token_ref_logps"):
        gaps = [y - x for x, y in zip(new, ref, strict=True)]
        losses.append([d**2 / 2 if h.estimator == "k2" else exp(d) - d - 1 for d in gaps])
    return aggregate(losses, h.aggregation), g.u


FORMULAS = {
    f.__name__: f
    for f in (
        grpo,
        dr_grpo,
        dapo,
        gspo,
        luspo,
        cispo,
        sapo,
        vespo,
        gmpo,
        rloo,
        p3o,
        nash_md,
        dro,
        step_dapo,
        kl_penalty,
    )
}
FORMULAS["bnpo"] = dapo
