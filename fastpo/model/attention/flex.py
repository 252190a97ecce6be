"""Shared prompts by FlexAttention: soft-capped scores and sinks without a matrix of scores.

The block mask comes from the segment table, block by block: a mask of [T, T] is never made. Each
token carries the start of its context, the number of its response and its distance from the start
of prompt + own response, and sees what the first two allow at a distance from 0 to the window.
PyTorch has the forward on every device, the backward on CUDA only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fastpo.model.attention.shared_row import Rule, SharedRow

_BLOCK = 128  # rows and columns of a block that is skipped or computed as one: Flex's own


def flex_rule_attention(
    row: SharedRow,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    rule: Rule,
) -> Tensor:
    """[1, T, H, Dv]."""
    device = query.device
    mask = row.once(("flex", rule.window, device), lambda: block_mask(row, rule.window, device))
    attend: Any = _compiled() if query.is_cuda else flex_attention
    out, aux = attend(
        query,
        key,
        value,
        score_mod=None if rule.softcap is None else _softcap(rule.softcap),
        block_mask=mask,
        scale=rule.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if rule.sinks is not None:
        # A sink takes the share exp(sink) / (exp(lse) + exp(sink)) of every weight.
        kept = torch.sigmoid(aux.lse - rule.sinks.to(aux.lse.dtype)[None, :, None])
        out = (out * kept[..., None]).to(value.dtype)
    return out.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _softcap(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def block_mask(row: SharedRow, window: int | None, device: torch.device) -> BlockMask:
    """The rule as a BlockMask: which blocks hold a pair that attends, and the rule within them."""
    length = row.layout.length
    context, response, place = (torch.empty(length, dtype=torch.int32) for _ in range(3))
    for start, spans in ((g.prompt[0], (g.prompt, *g.responses)) for g in row.layout.groups):
        prompt = spans[0][1] - start
        for number, (a, b) in enumerate(spans):
            context[a:b], response[a:b] = start, number
            place[a:b] = torch.arange(b - a) + (prompt if number else 0)
    context, response, place = (t.to(device) for t in (context, response, place))

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = place[q] - place[k]
        own = (response[k] == 0) | (response[k] == response[q])
        seen = (context[q] == context[k]) & own & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    num = -(-length // _BLOCK)
    touched = torch.zeros(num, num, dtype=torch.bool)
    low = torch.arange(num) * _BLOCK
    for (a, b), (c, d), gap in row.parts(window):
        rows = slice(a // _BLOCK, -(-b // _BLOCK))
        columns = slice(c // _BLOCK, -(-d // _BLOCK))
        first, last = low[rows].clamp(min=a), (low[rows] + _BLOCK - 1).clamp(max=b - 1)
        left, right = low[columns].clamp(min=c), (low[columns] + _BLOCK - 1).clamp(max=d - 1)
        seen = last[:, None] - left - gap >= 0
        if window is not None:
            seen &= first[:, None] - right - gap < window
        touched[rows, columns] |= seen
    counts = touched.sum(-1, dtype=torch.int32)
    order = touched.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts[None, None].to(device),
        order[None, None].to(device),
        BLOCK_SIZE=_BLOCK,
        mask_mod=attends,
        seq_lengths=(length, length),
    )
