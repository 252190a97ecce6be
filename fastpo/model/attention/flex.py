"""Share prompts by FlexAttention: soft-capped scores and sinks without a matrix of scores.

The block mask comes from the segment table, block by block: no mask of [T, T] is ever made. Three
numbers of a token decide which keys it sees: the start of its prompt, the number of its response,
and its position in prompt and response. PyTorch has the forward on every device, the backward on
CUDA only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fastpo.model.attention.shared_row import AttentionOptions, SharedRow

_BLOCK = 128  # FlexAttention's own: it skips or computes blocks of so many queries and keys


def flex_shared_attention(
    row: SharedRow,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    options: AttentionOptions,
) -> Tensor:
    """Compute [1, T, H, Dv] by FlexAttention, compiled on CUDA."""
    device = query.device
    window = options.window
    mask = row.once(("flex", window, device), lambda: block_mask(row, window, device))
    attend: Any = _compiled() if query.is_cuda else flex_attention
    out, aux = attend(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else _softcap(options.softcap),
        block_mask=mask,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if options.sinks is not None:
        # A sink takes the share exp(sink) / (exp(lse) + exp(sink)) of every weight.
        kept_share = torch.sigmoid(aux.lse - options.sinks.to(aux.lse.dtype)[None, :, None])
        out = (out * kept_share[..., None]).to(value.dtype)
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
    """Build a BlockMask: which blocks are computed, and which keys a query sees in them."""
    length = row.layout.length
    prompt, response, position = (torch.empty(length, dtype=torch.int32) for _ in range(3))
    for group in row.layout.groups:
        start, prompt_end = group.prompt
        for number, (a, b) in enumerate((group.prompt, *group.responses)):
            prompt[a:b], response[a:b] = start, number
            position[a:b] = torch.arange(b - a) + (prompt_end - start if number else 0)
    prompt, response, position = (t.to(device) for t in (prompt, response, position))

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = position[q] - position[k]
        same_response = (response[k] == 0) | (response[k] == response[q])
        visible = (prompt[q] == prompt[k]) & same_response & (distance >= 0)
        return visible if window is None else visible & (distance < window)

    num = -(-length // _BLOCK)
    needed = torch.zeros(num, num, dtype=torch.bool)
    block_start = torch.arange(num) * _BLOCK
    for (a, b), (c, d), gap in row.span_pairs(window):
        rows = slice(a // _BLOCK, -(-b // _BLOCK))
        columns = slice(c // _BLOCK, -(-d // _BLOCK))
        first_query = block_start[rows].clamp(min=a)
        last_query = (block_start[rows] + _BLOCK - 1).clamp(max=b - 1)
        first_key = block_start[columns].clamp(min=c)
        last_key = (block_start[columns] + _BLOCK - 1).clamp(max=d - 1)
        visible = last_query[:, None] - first_key - gap >= 0
        if window is not None:
            visible &= first_query[:, None] - last_key - gap < window
        needed[rows, columns] |= visible
    counts = needed.sum(-1, dtype=torch.int32)
    order = needed.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts[None, None].to(device),
        order[None, None].to(device),
        BLOCK_SIZE=_BLOCK,
        mask_mod=attends,
        seq_lengths=(length, length),
    )
