r"""Numbers of single tokens from two scorers: how much likelier the better one finds a token.

With $d_t = \ell^+_t - \ell^-_t$ the difference of a target token's log-probs under both scorers
(two models, an adapter and its base, or one model after two prompts):

| rule | column | numbers | paper |
|---|---|---|---|
| `tis` | `token_weights` | $k\,e^{\pm\mu\,\mathrm{clamp}(d_t)}$ | TIS-DPO, arXiv 2410.04350 |
| `critical` | `token_weights` | $c_t$ or $1 - c_t$ | cDPO, arXiv 2411.19943 |
| `treg` | `token_rewards` | $\sigma(d_t) - 1/2$ | T-REG, arXiv 2412.02685 |

The former form is that of desirable responses, the latter (the minus) of all others. $c_t =
\mathrm{softmax}(2 z^+_t - z^-_t)[y_t]$ is the likelihood under the contrast of the two scorers'
logits, which takes both at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastpo.errors import did_you_mean


def tis(
    positive: np.ndarray,  # [n]
    negative: np.ndarray,  # [n]
    label: bool,
    *,
    k: float = 1.0,
    mu: float = 1.0,
    low: float = -1.5,
    high: float = 1.5,
) -> np.ndarray:
    """Return importance weights of TIS-DPO.

    The bounds are those of the official recipe, which maps what lies between them linearly to
    [0.7, 1.3] and not by exp, as the paper does. For `tis_dpo`, or `dpo` with sums alone.

    >>> tis(np.array([-1.0, -1.0]), np.array([-1.0, -9.0]), True).round(2)
    array([1.  , 4.48])
    """
    sign = 1.0 if label else -1.0
    return k * np.exp(sign * mu * np.clip(positive - negative, low, high))


def critical(contrast: np.ndarray, label: bool, *, only_rejected: bool = False) -> np.ndarray:
    """Return critical scores of cDPO from the log-probs [n] under the contrast of both scorers.

    `only_rejected` leaves desirable responses at weight 1. The official code sets the weight of the
    end of sequence to 1; here it is scored like any token. For `critical_dpo`, or `dpo`.

    >>> critical(np.log([0.25, 0.5]), False)
    array([0.75, 0.5 ])
    """
    if not label:
        return -np.expm1(contrast)
    return np.ones_like(contrast) if only_rejected else np.exp(contrast)


def treg(positive: np.ndarray, negative: np.ndarray, label: bool) -> np.ndarray:  # [n] each
    """Return signed rewards of T-REG, in (-1/2, 1/2), for `treg` and `treg_simpo`.

    >>> treg(np.array([-1.0, -1.0]), np.array([-1.0, -60.0]), True)
    array([0. , 0.5])
    """
    return np.tanh((positive - negative) / 2) / 2  # sigmoid(x) - 1/2 without cancellation


class Rule(NamedTuple):
    """Say how two scorers become a column."""

    fn: Callable[..., np.ndarray]  # (scores..., label, **args) -> [n]
    column: str
    absent: float  # of tokens that are not scored
    contrasts: bool = False  # takes log-probs under the contrast of both, not those of each


RULES = {
    "tis": Rule(tis, "token_weights", 1.0),
    "critical": Rule(critical, "token_weights", 1.0, contrasts=True),
    "treg": Rule(treg, "token_rewards", 0.0),
}


def get_rule(name: str, args: Mapping[str, Any]) -> Rule:
    """Return the rule called `name`, its arguments bound.

    Raises:
        ValueError: no such rule or argument, with the nearest name.
    """
    if name not in RULES:
        hint = f"{did_you_mean(name, RULES)} choose from {', '.join(RULES)}"
        raise ValueError(f"unknown rule {name!r}: {hint.strip()}")
    rule = RULES[name]
    known = inspect.getfullargspec(rule.fn).kwonlydefaults or {}
    for key, value in args.items():
        if key not in known:
            raise ValueError(f"rule {name!r} has no {key!r}: it has {', '.join(known) or 'none'}")
        if isinstance(value, bool) is not isinstance(known[key], bool) or not np.isreal(value):
            raise ValueError(f"rule {name!r}: {key}={value!r} is not like {known[key]!r}")

    def fn(*scores: Any) -> np.ndarray:
        return rule.fn(*scores, **args)

    return rule._replace(fn=fn)
