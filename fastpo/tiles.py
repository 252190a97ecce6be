r"""Slabs of logits: statistics out of them, coefficients in their place, by either backend.

The logits of N label tokens are an [N, V] matrix that never exists whole. It is produced a slab at
a time, reduced to statistics, and where a gradient is due turned in place into coefficients

    C[t, v] = d(loss) / d(h_t . W_v + b_v),   so that   dH = C W   and   dW = C^T H.

With $z_v = softcap(s (W_v \cdot h + b_v)) / T$, $c_v = (s/T)(1 - tanh^2)$ and cotangents g:

    C_v = c_v ( g_logps (1[v=y] - p_v) + g_lse p_v + g_mean/V - g_entropy p_v (log p_v + H)
              + g_klf (p_v - pref_v) + g_klr p_v (log p_v - log pref_v - KLr) ).

C is formed in fp32, the label's column included, and rounded to the inputs' dtype once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DIFFERENTIABLE = ("logps", "lse", "entropy", "mean_logit", "kl_ref_policy", "kl_policy_ref")
DIVERGENCES = ("kl_ref_policy", "kl_policy_ref")
OF_REFERENCE = (*DIVERGENCES, "ref_logps")  # these need a second head
STATISTICS = (*DIFFERENTIABLE, "log_p2", "top1", "ref_logps")

# Below this many rows a matrix product no longer fills a GPU; the fused kernel then wins.
_THIN_SLAB = 128
# Rows of a half-precision matrix that a CPU turns into float32 at a time: 16 MiB at D = 4096.
_UPCAST_ROWS = 1024


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Half-open intervals of `size` that cover range(total)."""
    return ((lo, min(lo + size, total)) for lo in range(0, total, size))


def concatenate(parts: list[dict[str, Tensor]], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Row blocks' statistics as one [N] tensor a name."""
    return {name: torch.cat([part[name] for part in parts]) for name in names}


class Link(NamedTuple):
    """z = softcap((h.W + b) * logit_scale) / temperature."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def apply_(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Turn raw products h.W into logits z, in place."""
        if bias is not None:
            products += bias
        if self.softcap is None:
            scale = self.logit_scale / self.temperature
            return products if scale == 1.0 else products.mul_(scale)
        return (
            products.mul_(self.logit_scale / self.softcap)
            .tanh_()
            .mul_(self.softcap / self.temperature)
        )

    def derivative(self, z: Tensor) -> Tensor | float:
        """dz / d(h.W): a slab with a soft-cap, otherwise one number."""
        slope = self.logit_scale / self.temperature
        if self.softcap is None:
            return slope
        tanh = z * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1).mul_(slope)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the result in the accumulator dtype; nothing is rounded to half on the way."""
    acc = accumulator(a.dtype)
    if a.dtype == b.dtype == acc:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=acc)
    # Half-precision products on CPUs without AMX are 5-25 times slower than float32 ones.
    return a.to(acc) @ b.to(acc)


def add_matmul_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b in out's accumulator dtype; `a`, a coefficient slab, is rounded to b's once."""
    if b.dtype == out.dtype:
        return out.addmm_(a, b)
    if b.is_cuda:
        return out.add_(torch.mm(a.to(b.dtype), b, out_dtype=out.dtype))
    for lo, hi in blocks(b.shape[0], _UPCAST_ROWS):
        out.addmm_(a[:, lo:hi].to(out.dtype), b[lo:hi].to(out.dtype))
    return out


class Heads(NamedTuple):
    """The tensors of one pass: compacted label tokens, and the reference's if there is one."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    labels: Tensor  # [N] int64, all within [0, V)
    ref_hidden: Tensor | None = None  # [N, D']
    ref_weight: Tensor | None = None  # [V, D']
    ref_bias: Tensor | None = None

    def rows(self, lo: int, hi: int) -> Heads:
        """The pass restricted to label tokens lo:hi."""
        ref = None if self.ref_hidden is None else self.ref_hidden[lo:hi]
        return self._replace(hidden=self.hidden[lo:hi], labels=self.labels[lo:hi], ref_hidden=ref)

    def columns(self, lo: int, hi: int) -> Heads:
        """The pass restricted to vocabulary columns lo:hi (labels keep their global numbers)."""
        parts = (self.weight, self.bias, self.ref_weight, self.ref_bias)
        weight, bias, ref_weight, ref_bias = (None if p is None else p[lo:hi] for p in parts)
        assert weight is not None
        return self._replace(weight=weight, bias=bias, ref_weight=ref_weight, ref_bias=ref_bias)


class Tiles(Protocol):
    """The three steps that a backend supplies; schedules are the same for every backend.

    Attributes:
        keeps: statistics that `coefficients` wants back.
    """

    keeps: tuple[str, ...]

    def num_slabs(self, link: Link, want: tuple[str, ...], with_reference: bool) -> int:
        """Accumulator slabs alive at once.

        It may depend on what is asked for, never on whether a gradient is due: the same row blocks
        give the same bits, so that policy and reference agree exactly at step 0.
        """
        ...

    def statistics(
        self, heads: Heads, link: Link, want: tuple[str, ...], row_block: int
    ) -> dict[str, Tensor]:
        """[N] statistics of every row, forward only."""
        ...

    def statistics_and_coefficients(
        self, heads: Heads, link: Link, want: tuple[str, ...], grads: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Statistics of one row block, and for each name in `grads` C [B, V] at unit cotangent."""
        ...

    def coefficients(
        self,
        heads: Heads,
        link: Link,
        stats: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        first: int,
        vocab_size: int,
        logits: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """C [N, Vs] of the vocabulary slice that starts at `first`; `logits` if they were kept."""
        ...


def logit_slab(hidden: Tensor, weight: Tensor, bias: Tensor | None, link: Link) -> Tensor:
    """[B, V] logits z in the accumulator dtype."""
    acc = accumulator(hidden.dtype)
    if hidden.dtype == acc or hidden.is_cuda:
        products = matmul(hidden, weight.T)
    else:
        hidden = hidden.to(acc)
        products = hidden.new_empty(hidden.shape[0], weight.shape[0])
        for lo, hi in blocks(weight.shape[0], _UPCAST_ROWS):
            torch.mm(hidden, weight[lo:hi].to(acc).T, out=products[:, lo:hi])
    return link.apply_(products, bias)


def _log_softmax_(z: Tensor, labels: Tensor, want: tuple[str, ...]) -> tuple[dict, Tensor, Tensor]:
    """(statistics, p, log p) of a slab; z's memory becomes log p."""
    stats: dict[str, Tensor] = {}
    if "mean_logit" in want:
        stats["mean_logit"] = z.mean(dim=1)
    top, first = z.max(dim=1)
    column = labels[:, None]
    label_logit = z.gather(1, column).squeeze(1)
    z -= top[:, None]
    p = z.exp()
    label_exp = p.gather(1, column)
    # The other columns' sum on its own keeps every digit of 1 - p_y and of log p_y when the label
    # is nearly certain: log(1 + 1e-5) in fp32 has lost 0.6 % of its value, log1p(1e-5) nothing.
    others = p.scatter_(1, column, 0).sum(dim=1)
    p.scatter_(1, column, label_exp)
    total = others + label_exp.squeeze(1)
    log_total = total.log()
    stats["lse"] = top + log_total
    # What the rounding of lse lost: without it a recomputed row of probabilities sums to
    # 1 + eps * |lse|, an error that all V columns of the gradient share.
    stats["lse_rest"] = log_total - (stats["lse"] - top)
    stats["logps"] = torch.where(
        label_logit == top, -others.log1p(), (label_logit - top) - log_total
    )
    if "top1" in want:
        stats["top1"] = (first == labels).to(z.dtype)
    p /= total[:, None]
    z -= log_total[:, None]
    if "entropy" in want:
        stats["entropy"] = -torch.linalg.vecdot(p, z)
    if "log_p2" in want:
        stats["log_p2"] = torch.linalg.vecdot(p, p).log()
    return stats, p, z


def _coefficients_(
    p: Tensor,
    log_p: Tensor,
    ref: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    slope: Tensor | float,
    first: int,
    vocab_size: int,
) -> Tensor:
    """The formula of the module docstring, in the accumulator dtype; p's memory becomes C."""
    g = {name: value[:, None] for name, value in cotangents.items()}
    factor: Tensor = p.new_zeros(p.shape[0], 1)
    for name in ("lse", "kl_ref_policy"):
        if name in g:
            factor = factor + g[name]
    if "entropy" in g:
        factor = (log_p + stats["entropy"][:, None]).mul_(-g["entropy"]).add_(factor)
    if "kl_policy_ref" in g:
        assert ref is not None
        difference = log_p - ref[1]
        difference -= stats["kl_policy_ref"][:, None]
        factor = difference.mul_(g["kl_policy_ref"]).add_(factor)
    if "logps" in g:
        index = (labels - first).clamp(0, p.shape[1] - 1)[:, None]
        inside = ((labels >= first) & (labels < first + p.shape[1]))[:, None]
        # 1 - p_y from log p_y: the difference itself would lose every digit of a confident token.
        at_label = p.gather(1, index) * factor.expand_as(p).gather(1, index)
        at_label -= g["logps"] * stats["logps"][:, None].expm1()
        p *= factor - g["logps"]
        p.scatter_(1, index, torch.where(inside, at_label, p.gather(1, index)))
    else:
        p *= factor
    if "kl_ref_policy" in g:
        assert ref is not None
        p.addcmul_(ref[0], g["kl_ref_policy"], value=-1)
    if "mean_logit" in g:
        p += g["mean_logit"] / vocab_size
    return p.mul_(slope)


class TorchTiles:
    """Every step in plain PyTorch: CPU, MPS, XPU, and the divergences everywhere."""

    keeps: tuple[str, ...] = ("lse", "lse_rest", "logps")

    def num_slabs(self, link: Link, want: tuple[str, ...], with_reference: bool) -> int:
        # p and log p; the soft-cap's slope; the entropy's factor; the same again for a reference.
        slabs = 2 + (link.softcap is not None) + ("entropy" in want)
        return slabs + (4 if with_reference else 0)

    def statistics(
        self, heads: Heads, link: Link, want: tuple[str, ...], row_block: int
    ) -> dict[str, Tensor]:
        parts = [
            self.statistics_and_coefficients(heads.rows(lo, hi), link, want, ())[0]
            for lo, hi in blocks(heads.labels.numel(), row_block)
        ]
        return concatenate(parts, want)

    def statistics_and_coefficients(
        self, heads: Heads, link: Link, want: tuple[str, ...], grads: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        z = logit_slab(heads.hidden, heads.weight, heads.bias, link)
        z_ref = self.reference_logits(heads, link)
        return self.from_logits(z, z_ref, heads.labels, link, want, grads)

    @staticmethod
    def reference_logits(heads: Heads, link: Link) -> Tensor | None:
        if heads.ref_hidden is None:
            return None
        assert heads.ref_weight is not None
        return logit_slab(heads.ref_hidden, heads.ref_weight, heads.ref_bias, link)

    @staticmethod
    def from_logits(
        z: Tensor,
        z_ref: Tensor | None,
        labels: Tensor,
        link: Link,
        want: tuple[str, ...],
        grads: tuple[str, ...],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Statistics and unit-cotangent coefficients of a slab of logits, which it overwrites."""
        slope = link.derivative(z) if grads else 1.0
        stats, p, log_p = _log_softmax_(z, labels, want)
        ref = None
        if z_ref is not None:
            ref_stats, p_ref, log_ref = _log_softmax_(z_ref, labels, ())
            stats |= {f"ref_{name}": value for name, value in ref_stats.items()}
            ref = p_ref, log_ref
            difference = log_ref - log_p
            stats["kl_ref_policy"] = torch.linalg.vecdot(p_ref, difference)
            stats["kl_policy_ref"] = -torch.linalg.vecdot(p, difference)
        one = torch.ones_like(stats["logps"])
        coefficients = []
        for name in grads:
            mine = p if name == grads[-1] else p.clone()
            coefficients.append(
                _coefficients_(mine, log_p, ref, labels, stats, {name: one}, slope, 0, p.shape[1])
            )
        return stats, coefficients

    def coefficients(
        self,
        heads: Heads,
        link: Link,
        stats: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        first: int,
        vocab_size: int,
        logits: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        if logits is None:
            z = logit_slab(heads.hidden, heads.weight, heads.bias, link)
            z_ref = self.reference_logits(heads, link)
        else:
            # Cloned, because a graph kept by the caller may be walked twice.
            z, z_ref = logits[0].clone(), (logits[1].clone() if len(logits) > 1 else None)
        slope = link.derivative(z)
        log_p = z.sub_(stats["lse"][:, None]).sub_(stats["lse_rest"][:, None])
        ref = None
        if z_ref is not None:
            log_ref = z_ref.sub_(stats["ref_lse"][:, None]).sub_(stats["ref_lse_rest"][:, None])
            ref = log_ref.exp(), log_ref
        return _coefficients_(
            log_p.exp(), log_p, ref, heads.labels, stats, cotangents, slope, first, vocab_size
        )


class TritonTiles:
    """The same steps by the kernels of `fastpo.kernels`; products stay with the vendor's BLAS."""

    keeps: tuple[str, ...] = ("lse", "lse_rest", "logps")

    def num_slabs(self, link: Link, want: tuple[str, ...], with_reference: bool) -> int:
        return 2  # the products in fp32, the coefficients in the inputs' dtype

    def statistics(
        self, heads: Heads, link: Link, want: tuple[str, ...], row_block: int
    ) -> dict[str, Tensor]:
        if row_block < min(_THIN_SLAB, heads.labels.numel()):
            from fastpo.kernels.linear_stats import linear_stats

            stats = linear_stats(
                heads.hidden, heads.weight, heads.labels, heads.bias, **link._asdict(), want=want
            )
            return {name: stats[name] for name in want}
        parts = [
            self.statistics_and_coefficients(heads.rows(lo, hi), link, want, ())[0]
            for lo, hi in blocks(heads.labels.numel(), row_block)
        ]
        return concatenate(parts, want)

    def statistics_and_coefficients(
        self, heads: Heads, link: Link, want: tuple[str, ...], grads: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        from fastpo.kernels.logits_epilogue import logits_epilogue

        products = matmul(heads.hidden, heads.weight.T)
        stats: dict[str, Tensor] = {}
        coefficients: list[Tensor] = []
        for name in grads or (None,):
            found, coefficient = logits_epilogue(
                products,
                heads.labels,
                heads.bias,
                **link._asdict(),
                want=want,
                coefficient_of=name,
                out=None if name is None else torch.empty_like(products, dtype=heads.hidden.dtype),
            )
            stats = stats or found
            if coefficient is not None:
                coefficients.append(coefficient)
        return stats, coefficients

    def coefficients(
        self,
        heads: Heads,
        link: Link,
        stats: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        first: int,
        vocab_size: int,
        logits: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        assert logits is None, "kept logits are the plain backend's business"
        from fastpo.kernels.linear_coefficients import linear_coefficients

        return linear_coefficients(
            heads.hidden,
            heads.weight,
            heads.labels,
            heads.bias,
            v_start=first,
            vocab_size=vocab_size,
            lse=stats["lse"],
            lse_rest=stats["lse_rest"],
            logps=stats["logps"],
            entropy=stats.get("entropy"),
            **{f"grad_{name}": value for name, value in cotangents.items()},
            **link._asdict(),
            out_dtype=heads.hidden.dtype,
        )
