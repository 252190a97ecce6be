r"""Share prompts without copies: compute attention part by part, merge by the log-sum-exp.

Let part i of a query's keys give the output $o_i$ and the log-sum-exp $\ell_i$ of its scores. Then

$$ \ell = \log \sum_i e^{\ell_i}, \qquad o = \sum_i e^{\ell_i - \ell} \, o_i $$

is attention over all of them. A flash backward forms $p = e^{s - \ell}$ and
$ds = p \, (dp - do \cdot o)$ from the log-sum-exp and the output that it receives. Each part's
backward is therefore called with the merged $\ell$ and $o$, as in ring attention (Liu et al., 2023,
arXiv 2310.01889); then the sum over the parts is exact. Differentiating the merge through the
parts' own log-sum-exp is silently wrong with kernels whose backward drops its gradient, as
`torch.nn.attention.varlen` does.

dQ, dK and dV are summed over the parts in fp32 (fp64 for fp64) and rounded once. No prompt is ever
copied.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.model.attention.shared_row import AttentionOptions, SharedRow, SpanPair


class Band(NamedTuple):
    """Say which keys a query sees; the queries stand at the last positions of the keys.

    Args:
        causal: only keys up to the query's own position.
        left: at most so many keys before that position; any number where negative.
    """

    causal: bool
    left: int


class Kernel(Protocol):
    """Compute attention of n queries and m keys: a forward, a backward that takes its results."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, band: Band
    ) -> tuple[Tensor, Tensor]:
        """Map [n, H, D], [m, Hk, D] and [m, Hk, Dv] to out [n, H, Dv] and log-sum-exp [H, n]."""
        ...

    @staticmethod
    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scaling: float,
        band: Band,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dQ, dK, dV), with probabilities from `lse` and row sums from `out` as passed."""
        ...


class Plain:
    """Run the kernel in plain PyTorch, with a matrix of scores: any device, dtype or window."""

    @staticmethod
    def _scores(query: Tensor, key: Tensor, scaling: float, band: Band) -> Tensor:
        """Return masked scores [Hk, G, n, m], G query heads for each key head."""
        n, m = len(query), len(key)
        position = torch.arange(m - n, m, device=query.device)[:, None]
        keys = torch.arange(m, device=query.device)
        visible = keys <= position if band.causal else torch.ones_like(keys, dtype=torch.bool)
        if band.left >= 0:
            visible = visible & (keys >= position - band.left)
        grouped = query.unflatten(1, (key.shape[1], -1))
        scores = torch.einsum("nhgd,mhd->hgnm", grouped, key) * scaling
        return scores.masked_fill(~visible, -math.inf)

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, band: Band
    ) -> tuple[Tensor, Tensor]:
        """Do as `Kernel` says."""
        scores = Plain._scores(query, key, scaling, band)
        out = torch.einsum("hgnm,mhd->nhgd", scores.softmax(-1), value)
        return out.flatten(1, 2), scores.logsumexp(-1).flatten(0, 1)

    @staticmethod
    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scaling: float,
        band: Band,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do as `Kernel` says."""
        shape = (key.shape[1], -1)
        p = (Plain._scores(query, key, scaling, band) - lse.unflatten(0, shape)[..., None]).exp()
        do, q = grad.unflatten(1, shape), query.unflatten(1, shape)
        dv = torch.einsum("hgnm,nhgd->mhd", p, do)
        row = (grad * out).sum(-1).T.unflatten(0, shape)[..., None]
        ds = p * (torch.einsum("nhgd,mhd->hgnm", do, value) - row) * scaling
        dq = torch.einsum("hgnm,mhd->nhgd", ds, key)
        return dq.flatten(1, 2), torch.einsum("hgnm,nhgd->mhd", ds, q), dv


class Flash:
    """Run the kernel by PyTorch's flash attention: CUDA, half precision."""

    @staticmethod
    def _lengths(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int, int]:
        n, m = len(query), len(key)
        q, k = (torch.tensor([0, x], dtype=torch.int32, device=query.device) for x in (n, m))
        return q, k, n, m

    @staticmethod
    def _window(band: Band) -> dict[str, int]:
        return {"window_size_left": band.left, "window_size_right": 0 if band.causal else -1}

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, band: Band
    ) -> tuple[Tensor, Tensor]:
        """Do as `Kernel` says."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            *Flash._lengths(query, key),
            0.0,
            band.causal and band.left < 0,
            False,
            scale=scaling,
            **Flash._window(band),
        )
        return out, lse

    @staticmethod
    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scaling: float,
        band: Band,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do as `Kernel` says."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            lse.contiguous(),
            *Flash._lengths(query, key),
            0.0,
            band.causal and band.left < 0,
            no_dropout,
            torch.empty(0, device=query.device),
            scale=scaling,
            **Flash._window(band),
        )


class HostFlash:
    """Run PyTorch's flash attention for CPUs: any dtype, equal head widths, no window.

    A causal part must have as many queries as keys, as every causal part here has.
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, band: Band
    ) -> tuple[Tensor, Tensor]:
        """Do as `Kernel` says."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(t.transpose(0, 1)[None] for t in (query, key, value)), 0.0, band.causal, scale=scaling
        )
        return out[0].transpose(0, 1), lse[0]

    @staticmethod
    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scaling: float,
        band: Band,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do as `Kernel` says."""
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.transpose(0, 1)[None] for t in (grad, query, key, value, out)),
            lse[None],
            0.0,
            band.causal,
            scale=scaling,
        )
        dq, dk, dv = (t[0].transpose(0, 1) for t in grads)
        return dq, dk, dv


def _band(pair: SpanPair, window: int | None) -> Band:
    if not pair.gap:
        return Band(True, -1 if window is None else window - 1)
    # A kernel takes the last query to stand at the prompt's last token, `queries` too early.
    queries = pair.queries[1] - pair.queries[0]
    return Band(False, -1 if window is None else window - 1 - queries)


class MergedAttention(torch.autograd.Function):
    """Attend over a row by parts whose results are merged: see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [T, H, D]
        key: Tensor,  # [T, Hk, D]
        value: Tensor,  # [T, Hk, Dv]
        parts: list[tuple[SpanPair, Band]],
        scaling: float,
        kernel: type[Kernel],
    ) -> Tensor:
        """Return [T, H, Dv]."""
        exact = torch.promote_types(query.dtype, torch.float32)
        shape = (*query.shape[:2], value.shape[2])
        out = torch.zeros(shape, dtype=exact, device=query.device)
        lse = torch.full(shape[1::-1], -math.inf, dtype=exact, device=query.device)
        for pair, band in parts:
            q, k = slice(*pair.queries), slice(*pair.keys)
            part, part_lse = kernel.forward(query[q], key[k], value[k], scaling, band)
            merged = torch.logaddexp(lse[:, q], part_lse)
            old, new = ((x - merged).exp().T[..., None] for x in (lse[:, q], part_lse))
            out[q] = old * out[q] + new * part
            lse[:, q] = merged
        # PyTorch 2.11 compiles wrong gradients where what is saved is a cast that casts nothing.
        if out.dtype != query.dtype:
            out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scaling, ctx.kernel = parts, scaling, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        sums = [torch.zeros_like(t, dtype=lse.dtype) for t in (query, key, value)]
        for pair, band in ctx.parts:
            q, k = slice(*pair.queries), slice(*pair.keys)
            inputs = (grad[q], query[q], key[k], value[k], out[q], lse[:, q])
            grads = ctx.kernel.backward(*inputs, ctx.scaling, band)
            for total, span, part in zip(sums, (q, k, k), grads, strict=True):
                total[span] += part
        dq, dk, dv = (s.to(t.dtype) for s, t in zip(sums, (query, key, value), strict=True))
        return dq, dk, dv, None, None, None


def merged_attention(
    row: SharedRow,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    options: AttentionOptions,
) -> Tensor:
    """Compute [1, T, H, Dv] part by part; neither soft-cap nor sinks."""
    window = options.window
    parts = [(pair, _band(pair, window)) for pair in row.span_pairs(window)]
    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    flash = query.device.type == "cpu" and window is None and q.shape[2] == v.shape[2]
    kernel = Flash if query.is_cuda else HostFlash if flash else Plain
    return MergedAttention.apply(q, k, v, parts, scaling, kernel)[None]  # pyright: ignore
