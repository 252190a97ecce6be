"""What the formulas share: the papers' letters, and the links in 60 digits."""

from __future__ import annotations

from types import SimpleNamespace

import mpmath
from mpmath import log1p, mpf

DIGITS = 60
mpmath.mp.dps = DIGITS

# score -> its letter in the papers; a score without one goes by its name
LETTERS = {
    "logps": "S",
    "mean_logps": "s",
    "ref_logps": "R",
    "ratio": "u",
    "mean_ratio": "ub",
    "length": "L",
    "kl": "F",
    "kl_reverse": "G",
    "score": "q",
    "tie_key": "key",
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


def gold_nll(g, reduction):
    per = "gold_tokens" if reduction == "token_mean" else "groups"
    return per, -(g.gold_mean_logps if reduction == "sequence_mean" else g.gold_logps)


def hyper_numbers(hyper: dict) -> SimpleNamespace:
    """Hyper-parameters as the doubles that they are, so that 0.1 is what Python multiplies by."""
    return SimpleNamespace(**{k: mpf(v) if type(v) is float else v for k, v in hyper.items()})
