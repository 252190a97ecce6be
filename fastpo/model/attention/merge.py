r"""Shared prompts without copies: attention part by part, merged by the log-sum-exp.

Let part i of a query's keys give the output $o_i$ and the log-sum-exp $\ell_i$ of its scores. Then

$$ \ell = \log \sum_i e^{\ell_i}, \qquad o = \sum_i e^{\ell_i - \ell} \, o_i $$

is attention over all of them. Its backward is not the sum of the parts' own: a flash backward forms
$p = e^{s - \ell}$ and $ds = p \, (dp - do \cdot o)$ from the log-sum-exp and the output that it is
given, so each part's backward must be called with the merged $\ell$ and $o$, as ring attention does
(Liu et al., 2023, arXiv 2310.01889); then it is exact. Differentiating the merge through the parts'
returned log-sum-exp is silently wrong with kernels whose backward drops the gradient of it, as
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

from fastpo.model.attention.shared_row import Part, Rule, SharedRow


class Band(NamedTuple):
    """Which keys a query sees: up to its own place, queries being the last of the keys, where
    `causal`; and at most `left` before that place, where `left` >= 0.
    """

    causal: bool
    left: int


class Kernel(Protocol):
    """Attention of n queries and m keys with its log-sum-exp, and its backward given both."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, band: Band
    ) -> tuple[Tensor, Tensor]:
        """[n, H, D], [m, Hk, D], [m, Hk, Dv]: out [n, H, Dv] and its log-sum-exp [H, n]."""
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
        """(dQ, dK, dV), probabilities taken from `lse` and row sums from `out`, whatever they are
        of."""
        ...


class Plain:
    """The kernel in plain PyTorch, scores and all: any device and dtype, and the oracle."""

    @staticmethod
    def _scores(query: Tensor, key: Tensor, scaling: float, band: Band) -> Tensor:
        """[Hk, G, n, m], G query heads for each key head."""
        n, m = len(query), len(key)
        place = torch.arange(m - n, m, device=query.device)[:, None]
        keys = torch.arange(m, device=query.device)
        seen = keys <= place if band.causal else torch.ones_like(keys, dtype=torch.bool)
        if band.left >= 0:
            seen = seen & (keys >= place - band.left)
        grouped = query.unflatten(1, (key.shape[1], -1))
        scores = torch.einsum("nhgd,mhd->hgnm", grouped, key) * scaling
        return scores.masked_fill(~seen, -math.inf)

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, band: Band
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
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
        """See Kernel."""
        shape = (key.shape[1], -1)
        p = (Plain._scores(query, key, scaling, band) - lse.unflatten(0, shape)[..., None]).exp()
        do, q = grad.unflatten(1, shape), query.unflatten(1, shape)
        dv = torch.einsum("hgnm,nhgd->mhd", p, do)
        row = (grad * out).sum(-1).T.unflatten(0, shape)[..., None]
        ds = p * (torch.einsum("nhgd,mhd->hgnm", do, value) - row) * scaling
        dq = torch.einsum("hgnm,mhd->nhgd", ds, key)
        return dq.flatten(1, 2), torch.einsum("hgnm,nhgd->mhd", ds, q), dv


class Flash:
    """The kernel by PyTorch's flash attention: CUDA, half precision."""

    @staticmethod
    def _limits(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int, int]:
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
        """See Kernel."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            *Flash._limits(query, key),
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
        """See Kernel."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            lse.contiguous(),
            *Flash._limits(query, key),
            0.0,
            band.causal and band.left < 0,
            no_dropout,
            torch.empty(0, device=query.device),
            scale=scaling,
            **Flash._window(band),
        )


class HostFlash:
    """The kernel by PyTorch's flash attention for CPUs: any dtype, equal head widths, no window.

    A causal part must have as many queries as keys, which ours have.
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, band: Band
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
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
        """See Kernel."""
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.transpose(0, 1)[None] for t in (grad, query, key, value, out)),
            lse[None],
            0.0,
            band.causal,
            scale=scaling,
        )
        dq, dk, dv = (t[0].transpose(0, 1) for t in grads)
        return dq, dk, dv


def _band(part: Part, window: int | None) -> Band:
    if not part.gap:
        return Band(True, -1 if window is None else window - 1)
    # The last query stands at the prompt's last token here and len(queries) behind it in truth.
    queries = part.queries[1] - part.queries[0]
    return Band(False, -1 if window is None else window - 1 - queries)


class MergedAttention(torch.autograd.Function):
    """Attention over a row by parts, whose results are merged: see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [T, H, D]
        key: Tensor,  # [T, Hk, D]
        value: Tensor,  # [T, Hk, Dv]
        parts: list[tuple[Part, Band]],
        scaling: float,
        kernel: type[Kernel],
    ) -> Tensor:
        """[T, H, Dv]."""
        exact = torch.promote_types(query.dtype, torch.float32)
        shape = (*query.shape[:2], value.shape[2])
        out = torch.zeros(shape, dtype=exact, device=query.device)
        lse = torch.full(shape[1::-1], -math.inf, dtype=exact, device=query.device)
        for part, band in parts:
            q, k = slice(*part.queries), slice(*part.keys)
            more, more_lse = kernel.forward(query[q], key[k], value[k], scaling, band)
            total = torch.logaddexp(lse[:, q], more_lse)
            old, new = ((each - total).exp().T[..., None] for each in (lse[:, q], more_lse))
            out[q] = old * out[q] + new * more
            lse[:, q] = total
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
        for part, band in ctx.parts:
            q, k = slice(*part.queries), slice(*part.keys)
            given = (grad[q], query[q], key[k], value[k], out[q], lse[:, q])
            grads = ctx.kernel.backward(*given, ctx.scaling, band)
            for total, where, each in zip(sums, (q, k, k), grads, strict=True):
                total[where] += each
        dq, dk, dv = (s.to(t.dtype) for s, t in zip(sums, (query, key, value), strict=True))
        return dq, dk, dv, None, None, None


def merged_attention(
    row: SharedRow,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    rule: Rule,
) -> Tensor:
    """[1, T, H, Dv]; neither soft-cap nor sinks."""
    parts = [(part, _band(part, rule.window)) for part in row.parts(rule.window)]
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    flash = query.device.type == "cpu" and rule.window is None and q.shape[2] == v.shape[2]
    kernel = Flash if query.is_cuda else HostFlash if flash else Plain
    return MergedAttention.apply(q, k, v, parts, scaling, kernel)[None]  # pyright: ignore
