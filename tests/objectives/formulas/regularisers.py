"""Likelihood and other regularising terms, by hand."""

from __future__ import annotations

from mpmath import mpf

from .common import gold_nll, nll


def sft(g, h):
    per, likelihood = nll(g, h.reduction)
    return {per: mpf(likelihood)}, list(g.S)


def gold_sft(g, h):
    per, likelihood = gold_nll(g, h.reduction)
    return {per: likelihood if any(g.mask) else mpf(0)}, [mpf(0) for _ in g.mask]


def kl_retain(g, h):
    good = [i for i, desirable in enumerate(g.label) if desirable]
    per = "chosen_tokens" if h.reduction == "token_mean" else "desirable"
    length = [x if h.reduction == "sequence_mean" else mpf(1) for x in g.L]
    return {per: sum((g.F[i] / length[i] for i in good), mpf(0))}, [-x for x in g.F]


def entropy(g, h):
    if h.reduction == "token_mean":
        return {"response_tokens": -sum(g.entropy, mpf(0))}, list(g.mean_entropy)
    return {"responses": -sum(g.mean_entropy, mpf(0))}, list(g.mean_entropy)


FORMULAS = {f.__name__: f for f in (sft, gold_sft, kl_retain, entropy)}
