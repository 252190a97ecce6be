"""Likelihood terms, by hand."""

from __future__ import annotations

from mpmath import mpf

from .common import nll


def sft(g, h):
    per, likelihood = nll(g, h.reduction)
    return {per: mpf(likelihood)}, list(g.S)


FORMULAS = {f.__name__: f for f in (sft,)}
