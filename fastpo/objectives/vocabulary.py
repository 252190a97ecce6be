r"""Name the scores that objectives are written in: one table.

`fastpo.loss.scores` computes them, with token weights $a_t$ (default 1), mask $m_t$ and
$L = \sum_t m_t [a_t \ne 0]$. A name with `mean_` in front is divided by L, one with `token_` in
front is the token's own number. An extra response has them under its role: `mismatched_ratio`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from torch import Tensor

from fastpo.domain import Domain

Shape = Literal["[G, K]", "[G]", "[G, K, T]"]

# Grades of responses. 2^100 is what float32 still multiplies by a discount.
Probabilities = Annotated[Tensor, Domain(0, 1)]
NonNegatives = Annotated[Tensor, Domain(0)]
Exponents = Annotated[Tensor, Domain(high=100)]
Gains = Annotated[Tensor, Domain(0, 100)]

_LOGPS = "pass ref_logps (per target token) or ref_hidden"
_DISTRIBUTION = "pass ref_hidden: the divergence needs the reference's whole distribution"
_IMAGES = "denoising errors are no scores of a language model: call the objective's function"
_SAMPLED = "log-probs of the sampling policy"


@dataclass(frozen=True)
class Score:
    """Say what a name stands for, and what it takes to have it.

    Args:
        definition: the formula, for documentation.
        shape: G groups, K candidates, T tokens.
        statistic: the head's token statistic that it is made of.
        reference: how many references' log-probs it needs, counted up to the one it reads.
        distribution: whether it needs the reference's whole distribution.
        own_loop: whether only a loop of one's own can supply it.
        remedy: how a caller of `PreferenceLoss` obtains it where it is missing.
        column: what a row needs that lacks it, to end "kto needs ..."; None: no row brings it.
        words: what the catalogue says is needed; empty for what comes with every batch.
    """

    definition: str
    shape: Shape = "[G, K]"
    statistic: str | None = None
    reference: Literal[0, 1, 2] = 0
    distribution: bool = False
    own_loop: bool = False
    remedy: str = "see the objective's documentation"
    column: str | None = None
    words: str = ""


_SUMS: dict[str, Score] = {
    "logps": Score(r"$\sum_t a_t \log\pi(y_t)$", statistic="logps"),
    "kl": Score(
        r"$\sum_t a_t KL(\pi_{ref} \| \pi)_t$",
        statistic="kl_ref_policy",
        reference=1,
        distribution=True,
        remedy=_DISTRIBUTION,
    ),
    "kl_reverse": Score(
        r"$\sum_t a_t KL(\pi \| \pi_{ref})_t$",
        statistic="kl_policy_ref",
        reference=1,
        distribution=True,
        remedy=_DISTRIBUTION,
    ),
    "log_p2": Score(r"$\sum_t a_t \log\sum_v \pi(v)^2$", statistic="log_p2"),
    "entropy": Score(r"$\sum_t a_t H_t$", statistic="entropy"),
    "ref_logps": Score(r"$\sum_t a_t \log\pi_{ref}(y_t)$", reference=1, remedy=_LOGPS),
    "ref2_logps": Score(
        r"$\sum_t a_t \log\pi_{ref2}(y_t)$",
        reference=2,
        remedy="pass ref2_logps (per target token), of the second reference",
    ),
    "old_logps": Score(
        r"$\sum_t a_t \log\pi_{old}(y_t)$, of the policy that drew the responses",
        own_loop=True,
        remedy="pass old_logps (per target token), of the policy that drew the responses",
        words=_SAMPLED,
    ),
    "ratio": Score("`logps - ref_logps`", reference=1, remedy=_LOGPS),
    "ratio2": Score(
        "`logps - ref2_logps`",
        reference=2,
        remedy="pass ref2_logps (per target token), of the second reference",
    ),
}
_OTHERS: dict[str, Score] = {
    "length": Score("L"),
    "kl_estimate": Score(
        r"$\sum_t [a_t \ne 0] (\log\pi(y_t) - \log\pi_{ref}(y_t))^2 / 2$, detached",
        reference=1,
        remedy=_LOGPS,
    ),
    "mask": Score("whether the group has such a candidate"),
    "label": Score("whether the response is a desirable one"),
    "score": Score(
        "the response's grade",
        remedy="give every response a grade: a `scores` column, or Segments(score=...)",
        column="a grade of every response: a `scores` column (higher is better)",
        words="score",
    ),
    "rank": Score(
        "its rank, 0 the best",
        remedy="rank the responses: a `ranks` or `scores` column, or Segments(rank=...)",
        words="rank",
    ),
    "tie_key": Score("a random key of each candidate, by which ties are broken"),
    "margin": Score(
        "how much better the first response is than the second",
        shape="[G]",
        remedy="say how much better the chosen response is: a `margin` column, or "
        "Segments(margin=)",
        column="a `margin` column: how much better the chosen response is",
        words="margin",
    ),
    "population": Score(
        "the population that the row comes from",
        shape="[G]",
        remedy="name each row's population: a `group` column, or Segments(population=...)",
        column="a `group` column: the population that the row comes from",
        words="group",
    ),
    "error": Score("denoising error", own_loop=True, remedy=_IMAGES, words="denoising errors"),
    "ref_error": Score(
        "denoising error of the reference",
        own_loop=True,
        remedy=_IMAGES,
        words="the reference's denoising errors",
    ),
    "token_mask": Score("whether the token's weight is not 0", shape="[G, K, T]"),
    "token_weights": Score("$a_t$", shape="[G, K, T]"),
    "token_kl_weights": Score("$a_t$ of the divergences", shape="[G, K, T]"),
    "token_rewards": Score(
        "the token's own reward",
        shape="[G, K, T]",
        remedy="pass token_rewards (per target token): a `token_rewards` column",
        column="a `token_rewards` column, a signed number for every token: "
        "`fastpo weigh --rule treg` writes one",
        words="token rewards",
    ),
}
MEANS = ("logps", "ratio", "log_p2", "entropy")
"""Scores that are also there divided by L."""

SCORES: dict[str, Score] = {
    **_SUMS,
    **{f"mean_{n}": replace(_SUMS[n], definition=f"`{n}` / L") for n in MEANS},
    **{
        f"token_{n}": replace(score, definition=f"the token's part of `{n}`", shape="[G, K, T]")
        for n, score in _SUMS.items()
        if n not in ("ratio", "ratio2")
    },
    **_OTHERS,
}
"""Name -> score."""

STATISTIC_OF = {name: score.statistic for name, score in _SUMS.items() if score.statistic}
"""Score -> the token statistic that it sums."""

UNKNOWN = Score("a name that is not in the table")


@functools.cache
def scores_with(roles: tuple[str, ...]) -> Mapping[str, Score]:
    """Return all names where groups bring extra responses in these roles, with scores [G] each.

    >>> scores_with(("gold",))["gold_mean_logps"].definition, "gold_logps" in scores_with(())
    ('`logps` / L', False)
    """
    names = (*_SUMS, *(f"mean_{name}" for name in MEANS), "length", "kl_estimate")
    sums = {name: SCORES[name] for name in names}
    extra = {f"{role}_{n}": replace(s, shape="[G]") for role in roles for n, s in sums.items()}
    return {**SCORES, **extra}
