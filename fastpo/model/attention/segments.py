"""Share prompts by ordinary attention calls, one per segment: the backend that runs everywhere.

A group's prompt and first response are neighbours in the row, so they are one ordinary causal
sequence: one call, no mask, no copy. Each further response attends to [prompt; own response],
bottom-right causal. That costs one copy of the prompt's keys and values and an [R, P + R] mask at
most (none on CUDA); no mask is ever quadratic in the row. Autograd sums the prompt's dK and dV over
the responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from fastpo.model.attention.shared_row import AttentionOptions, SharedRow

# Queries per block where scores are materialised (soft-cap, sinks): 32 heads of 512 queries
# against 8192 keys are 512 MiB of fp32 scores.
_EAGER_BLOCK = 512


def segment_attention(
    row: SharedRow,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    options: AttentionOptions,
) -> Tensor:
    """Compute [1, T, H, Dv] with one attention call for each response."""
    attend = _CausalAttention(row, options)
    outputs = []
    for group in row.layout.groups:
        start, prompt_end = group.prompt
        first_end = group.responses[0][1] if group.responses else prompt_end
        first = slice(start, first_end)
        outputs.append(attend(query[:, :, first], key[:, :, first], value[:, :, first]))
        # A window hides all but the prompt's last window - 1 tokens from any further response.
        visible = start
        if options.window is not None:
            visible = max(start, prompt_end - options.window + 1)
        for a, b in group.responses[1:]:
            if a == b:
                continue
            k = torch.cat([key[:, :, visible:prompt_end], key[:, :, a:b]], dim=2)
            v = torch.cat([value[:, :, visible:prompt_end], value[:, :, a:b]], dim=2)
            outputs.append(attend(query[:, :, a:b], k, v))
    return torch.cat(outputs, dim=1)


@dataclass
class _CausalAttention:
    """Attend causally with queries that stand at the last positions of their keys."""

    row: SharedRow
    options: AttentionOptions

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with [1, H, n, D] to [1, Hk, m, D], m >= n; return [1, n, H, Dv]."""
        n, m = query.shape[2], key.shape[2]
        options = self.options
        eager = options.softcap is not None or options.sinks is not None
        window = options.window if options.window is not None and options.window < m else None
        size = min(window or n, _EAGER_BLOCK if eager else n)
        if size >= n:
            return self._block(query, key, value, window, eager).transpose(1, 2)
        # Each block of queries meets only the keys that it can see: under a window memory is linear
        # in n. Materialised scores exist one block at a time; backward computes the others again.
        outputs = []
        for a in range(0, n, size):
            b = min(a + size, n)
            first = 0 if window is None else max(0, m - n + a - window + 1)
            keys = slice(first, m - n + b)
            inputs = (query[:, :, a:b], key[:, :, keys], value[:, :, keys], window, eager)
            if eager and torch.is_grad_enabled():
                block = checkpoint(
                    self._block, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                block = self._block(*inputs)
            outputs.append(block.transpose(1, 2))  # pyright: ignore[reportOptionalMemberAccess]
        return torch.cat(outputs, dim=1)

    def _block(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, eager: bool
    ) -> Tensor:
        n, m = query.shape[2], key.shape[2]
        if eager:
            mask = self.row.mask(n, m, window, query.device)
            return _eager(query, key, value, mask, self.options)
        mask, causal = None, False
        if window is None and n == m:
            causal = True
        elif window is None and query.is_cuda:
            # Reaches the flash kernel, whose causal mask is bottom-right, without a mask in memory.
            mask = causal_lower_right(n, m)
        else:
            mask = self.row.mask(n, m, window, query.device)
        groups = query.shape[1] // key.shape[1]
        native = groups == 1 or _has_grouped_kernel(query, key, value, masked=type(mask) is Tensor)
        if not native:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=self.options.scaling,
            enable_gqa=native and groups > 1,
        )


def _has_grouped_kernel(query: Tensor, key: Tensor, value: Tensor, masked: bool) -> bool:
    """Return whether a fused kernel takes fewer key heads than query heads.

    Where none does, SDPA would materialise scores. On a CPU one always does. On CUDA only the flash
    kernel does: half precision, no mask, equal head widths up to 256.
    """
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and not masked and key.shape[-1] == value.shape[-1] <= 256


# Autocast would round scores and their products to half precision.
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,  # [n, m]
    options: AttentionOptions,
) -> Tensor:
    """Compute attention with materialised scores in fp32 (fp64 for fp64), where SDPA cannot."""
    heads, n, width = query.shape[1:]
    kv_heads = key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(1, kv_heads, heads // kv_heads, n, width)
    scores = grouped.to(exact) @ key.to(exact).transpose(2, 3).unsqueeze(2)
    scores = scores * (width**-0.5 if options.scaling is None else options.scaling)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sink = options.sinks.to(exact).reshape(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return (weights.to(value.dtype) @ value.unsqueeze(2)).reshape(1, heads, n, value.shape[-1])
