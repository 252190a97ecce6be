r"""Implicit rewards of single tokens, as JSON lines and as a page that colours every token.

With $r_t = \beta(\log\pi(y_t) - \log\pi_{ref}(y_t))$, the policy of a model that was trained with
DPO is its own optimal action value: $r_t = Q^*(s_t, y_t) - V^*(s_t)$, the advantage of the token,
and the running sum is the value gained since the prompt, $V^*(s_{t+1}) - V^*(s_0)$, which ends at
the implicit reward of the response. From r to Q*, https://arxiv.org/abs/2404.12358
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpo.data.groups import Group
from fastpo.data.show import token_texts
from fastpo.redact import redact
from fastpo.report.templates import fill
from fastpo.run.folder import write_text

SHOWN = 50  # groups on a page: 100 responses of 300 tokens are 4 MB
FULL = 95  # percentile of |reward| from which on the colour is full, so that outliers hide nothing


class TokenRow(TypedDict):
    """Hold the scored tokens of one response; a line of the JSON file."""

    source: str
    row: int
    response: int
    label: bool
    reward: float
    ids: list[int]
    tokens: list[str]
    rewards: list[float]
    values: list[float]


class Shade(NamedTuple):
    """Hold a token on the page: its colour of the style sheet, and how much of it in percent."""

    text: str
    tone: str
    share: int
    title: str


def token_rows(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    beta: float,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[TokenRow]:
    """Yield one row a response, with a list entry for each of its scored tokens.

    Args:
        groups: G groups.
        scores: their `token_logps` and `token_ref_logps` [G, K, T].
        beta: scale of the rewards.
        tokenizer: what makes tokens readable.
    """
    rewards = beta * (scores["token_logps"] - scores["token_ref_logps"])
    values = rewards.cumsum(-1)
    for g, group in enumerate(groups):
        for k, response in enumerate(group.responses):
            ids = response.input_ids[response.loss_mask].tolist()
            yield {
                "source": redact(group.source),
                "row": group.row,
                "response": k,
                "label": k == 0 if response.label is None else response.label,
                "reward": float(values[g, k, -1]),
                "ids": ids,
                "tokens": token_texts(tokenizer, ids),
                "rewards": rewards[g, k, : len(ids)].tolist(),
                "values": values[g, k, : len(ids)].tolist(),
            }


def _shades(row: TokenRow, full: float) -> list[Shade]:
    """Colour a response's tokens; `full` is the reward from which on the colour is full."""
    return [
        Shade(
            text,
            tone="a" if reward > 0 else "b",
            share=round(70 * min(abs(reward) / full, 1.0)),
            title=f"reward {reward:+.4f}, sum {value:+.4f}",
        )
        for text, reward, value in zip(row["tokens"], row["rewards"], row["values"], strict=True)
    ]


def write_page(path: Path, rows: Sequence[TokenRow], total: int) -> None:
    """Write the page of some groups' rows; `total` groups were scored.

    Raises:
        PackageError: jinja2 is not installed.
    """
    every = np.abs(np.concatenate([row["rewards"] for row in rows])) if rows else np.zeros(0)
    full = (float(np.percentile(every, FULL)) if every.size else 0.0) or 1.0
    responses = [
        {
            "title": f"{row['source']}, row {row['row']}, response {row['response']}, "
            f"{'chosen' if row['label'] else 'rejected'}: reward {row['reward']:+.3f}",
            "tokens": _shades(row, full),
        }
        for row in rows
    ]
    shown = len({(row["source"], row["row"]) for row in rows})
    values = {"responses": responses, "shown": shown, "total": total, "full": f"{full:.3g}"}
    write_text(path, fill("tokens.html.j2", **values))
