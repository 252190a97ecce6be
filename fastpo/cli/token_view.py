r"""Implicit rewards of single tokens, as JSON lines and as a page that colours every token.

With $r_t = \beta(\log\pi(y_t) - \log\pi_{ref}(y_t))$, the policy of a model that was trained with
DPO is its own optimal action value: $r_t = Q^*(s_t, y_t) - V^*(s_t)$, the advantage of the token,
and the running sum is the value gained since the prompt, $V^*(s_{t+1}) - V^*(s_0)$, which ends at
the implicit reward of the response. From r to Q*, https://arxiv.org/abs/2404.12358
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpo.data.groups import Group
from fastpo.data.show import token_texts
from fastpo.redact import redact
from fastpo.report.page import STYLE
from fastpo.run.folder import write_text

SHOWN = 50  # groups on a page: 100 responses of 300 tokens are 4 MB
FULL = 95  # percentile of |reward| from which on the colour is full, so that outliers hide nothing


def token_rows(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    beta: float,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[dict[str, Any]]:
    """One row a response, with a list entry for each of its scored tokens.

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


def write_page(path: Path, rows: Sequence[Mapping[str, Any]], total: int) -> None:
    """The page of some groups' rows; `total` groups were scored."""
    every = np.abs(np.concatenate([row["rewards"] for row in rows])) if rows else np.zeros(0)
    full = (float(np.percentile(every, FULL)) if every.size else 0.0) or 1.0
    shown = len({(row["source"], row["row"]) for row in rows})

    def span(text: str, reward: float, value: float) -> str:
        share = round(70 * min(abs(reward) / full, 1.0))
        tone = "a" if reward > 0 else "b"
        return (
            f'<span style="background:color-mix(in srgb,var(--{tone}) {share}%,transparent)" '
            f'title="reward {reward:+.4f}, sum {value:+.4f}">{html.escape(text)}</span>'
        )

    blocks = []
    for row in rows:
        tokens = zip(row["tokens"], row["rewards"], row["values"], strict=True)
        blocks.append(
            f"<div class='card sample'><div class=prompt>{html.escape(str(row['source']))}, row "
            f"{row['row']}, response {row['response']}, "
            f"{'chosen' if row['label'] else 'rejected'}: reward {row['reward']:+.3f}</div>"
            f"<div class=text style='padding:12px 16px'>{''.join(span(*t) for t in tokens)}</div>"
            "</div>"
        )
    write_text(
        path,
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>Token rewards</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Token rewards</h1><p class=sub>The first {shown} of {total} groups. "
        "<span class=key style='color:var(--a)'>the policy likes the token more than its "
        "reference</span> <span class=key style='color:var(--b)'>less</span>; full colour from "
        f"{full:.3g} on. Hover over a token for its numbers.</p>{''.join(blocks)}"
        "</main></body></html>",
    )
