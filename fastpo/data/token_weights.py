r"""Weights of single tokens: what a sequence score sums, $S_a = \sum_t a_t \log\pi(y_t)$.

Spans and `token_weights` come with the rows; a scheme derives weights from a group alone. All are
used on policy and reference alike, and multiply. Tokens that are not scored keep weight 1, which
nothing reads.

| scheme | weights | paper |
|---|---|---|
| `ld: alpha` | alpha beyond the shorter response's length | LD-DPO, arXiv 2409.06411 |
| `decay: gamma` | gamma^t, t = 1, 2, ... along a response | D2PO, arXiv 2502.14340 |
| `sampo: true` | 0 on all but T random tokens, T the shorter length | SamPO, arXiv 2406.10957 |
| `diff: gamma` | gamma on tokens that the other response lacks | RLHF-V's DDPO, arXiv 2312.00849 |

Mask-DPO (arXiv 2503.02846) is spans of weight 0. Codes differ: TRL up to 0.24 and LLaMA-Factory
apply LD to the policy alone; SamPO's official code draws anew for the reference, here one draw, a
function of seed and row, serves both.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.example import Span
from fastpo.data.groups import Response
from fastpo.errors import did_you_mean

Responses: TypeAlias = Sequence[Response]


def span_weights(
    offsets: np.ndarray, spans: Sequence[Span], length: int, name: str
) -> np.ndarray | None:
    """Return weights [R] float32 of a response's tokens; None where it has no spans.

    A token that touches a span has its weight, the last span's where spans overlap; others have 1.

    Args:
        offsets: [R, 2] characters of each token in the response's text.
        spans: what the row says.
        length: characters of the text.
        name: the field, for messages.

    Raises:
        BadField: a span reaches beyond the text.
    """
    if not spans:
        return None
    weights = np.ones(len(offsets), dtype=np.float32)
    for span in spans:
        if span.stop > length:
            raise BadField(
                f"{name} spans", f"reach beyond the text's {length} characters", list(span)
            )
        weights[(offsets[:, 0] < span.stop) & (offsets[:, 1] > span.start)] = span.weight
    return weights


def check_length(values: np.ndarray, response: Response, column: str, name: str) -> None:
    """Refuse numbers of a column that are not one a token of the response called `name`.

    Raises:
        BadField: not as many numbers as tokens.
    """
    if len(values) != len(response.input_ids):
        raise BadField(
            column,
            f"{len(values)} numbers for the {len(response.input_ids)} tokens of {name}, end of "
            "sequence included: compute them with this tokenizer and chat template",
        )


def _shortest(responses: Responses) -> int:
    return min(int(r.loss_mask.sum()) for r in responses)


def _place(response: Response) -> np.ndarray:
    """Count 1, 2, ... [R] over the scored tokens."""
    return np.cumsum(response.loss_mask)


def _ld(responses: Responses, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    shortest = _shortest(responses)
    return [np.where(_place(r) <= shortest, 1.0, alpha) for r in responses]


def _decay(responses: Responses, gamma: float, rng: np.random.Generator) -> list[np.ndarray]:
    return [gamma ** _place(r).astype(np.float64) for r in responses]


def _sampo(responses: Responses, on: float, rng: np.random.Generator) -> list[np.ndarray]:
    shortest, weights = _shortest(responses), []
    for response in responses:
        scored = np.flatnonzero(response.loss_mask)
        kept = np.zeros(len(response.loss_mask))
        kept[rng.choice(scored, shortest, replace=False)] = 1.0
        weights.append(kept)
    return weights


def _diff(responses: Responses, gamma: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Weigh changed tokens; shorter common runs than three are changed, as in the official code."""
    if len(responses) != 2:
        raise BadField("responses", f"diff compares two responses, not {len(responses)}")
    ids = [r.input_ids.tolist() for r in responses]
    weights = [np.full(len(i), gamma) for i in ids]
    matches = difflib.SequenceMatcher(None, *ids, autojunk=False).get_matching_blocks()
    for a, b, size in matches:
        if size >= 3:
            weights[0][a : a + size] = 1.0
            weights[1][b : b + size] = 1.0
    return weights


Scheme = Callable[[Responses, float, np.random.Generator], list[np.ndarray]]
SCHEMES: dict[str, Scheme] = {"ld": _ld, "decay": _decay, "sampo": _sampo, "diff": _diff}


def check_schemes(schemes: Mapping[str, Any]) -> None:
    """Refuse an unknown scheme, or a value that it cannot have, with ValueError."""
    for name, value in schemes.items():
        if name not in SCHEMES:
            hint = f"{did_you_mean(name, SCHEMES)} choose from {', '.join(SCHEMES)}"
            raise ValueError(f"token_weights: unknown scheme {name!r}: {hint.strip()}")
        if isinstance(value, bool) is not (name == "sampo") or not isinstance(value, int | float):
            wanted = "true or false" if name == "sampo" else "a number"
            raise ValueError(f"token_weights: {name} takes {wanted}, not {value!r}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"token_weights: {name}={value} must be finite and not negative")


def weighted(
    responses: Responses, schemes: Mapping[str, float], seed: int, row: int
) -> list[Response]:
    """Return a group's responses with the schemes' weights times those that they had.

    Args:
        responses: the group's candidates.
        schemes: scheme -> its parameter.
        seed, row: of SamPO's draw; the row's number.

    Raises:
        BadField: a scheme that compares two responses, of another number of them.
    """
    for name, value in schemes.items():
        if name == "sampo" and not value:
            continue
        weights = SCHEMES[name](responses, float(value), np.random.default_rng([seed, row]))
        responses = [
            replace(r, token_weights=multiplied(r.token_weights, factor))
            for r, factor in zip(responses, weights, strict=True)
        ]
    return list(responses)


def multiplied(before: np.ndarray | None, weights: np.ndarray) -> np.ndarray:
    """Return weights [R] float32 times those that a response had, if any."""
    return (weights if before is None else before * weights).astype(np.float32)
