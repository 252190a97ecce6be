"""Objectives on token statistics, by hand."""

from __future__ import annotations

from mpmath import mpf

from .common import nlsig, sigmoid, times


def tdpo1(g, h):
    z = h.beta * ((g.u[0] - g.u[1]) - (g.F[1] - g.F[0]))
    return {"groups": nlsig(z)}, [h.beta * (u + f) for u, f in zip(g.u, g.F, strict=True)]


def tdpo2(g, h):
    z = h.beta * ((g.u[0] - g.u[1]) - h.alpha * (g.F[1] - g.F[0]))
    return {"groups": nlsig(z)}, [h.beta * (u + f) for u, f in zip(g.u, g.F, strict=True)]


def tokens(g, *names):
    """Of each response the list of its tokens, each the tuple of the named scores."""
    for i, here in enumerate(g.token_mask):
        rows = zip(*(getattr(g, name)[i] for name in names), strict=True)
        yield [scores for scores, there in zip(rows, here, strict=True) if there]


def sparse_po(g, h):
    terms, rewards = tdpo1(g, h)
    norm, kl_norm = (
        sum(abs(a) for row in tokens(g, name) for (a,) in row)
        for name in ("token_weights", "token_kl_weights")
    )
    price = h.l1_weight * norm + h.kl_l1_weight * kl_norm
    return {"groups": terms["groups"] + price}, rewards


def tis_dpo(g, h):
    z = h.beta * ((g.u[0] - g.u[1]) - h.alpha * (g.G[0] - g.G[1]))
    rewards = [h.beta * (u - h.alpha * kl) for u, kl in zip(g.u, g.G, strict=True)]
    return {"groups": nlsig(z)}, rewards


def critical_dpo(g, h):
    rows = tokens(g, "token_weights", "token_logps", "token_ref_logps")
    w, lost = ([a * (new - ref) for a, new, ref in row] for row in rows)
    longest = max(len(w), len(lost))
    w, lost = (x + [mpf(0)] * (longest - len(x)) for x in (w, lost))
    links = [nlsig(h.beta * (x - y)) for x, y in zip(w, lost, strict=True)]
    return {"groups": sum(links) / longest}, times(h.beta, g.u)


def _regularised(g, h, z):
    costs = []
    for row in tokens(g, "token_rewards", "token_logps"):
        cost = -sum(h.beta * r * logp for r, logp in row)
        costs.append(cost / len(row) if h.average else cost)
    return {"groups": nlsig(z) + h.alpha * sigmoid(-z) * sum(costs)}


def treg(g, h):
    return _regularised(g, h, h.beta * (g.u[0] - g.u[1])), times(h.beta, g.u)


def treg_simpo(g, h):
    z = h.beta * (g.s[0] - g.s[1]) - h.beta * h.gamma_beta_ratio
    return _regularised(g, h, z), times(h.beta, g.s)


FORMULAS = {
    f.__name__: f for f in (tdpo1, tdpo2, sparse_po, tis_dpo, critical_dpo, treg, treg_simpo)
}
