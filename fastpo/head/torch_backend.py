"""The head's walks in plain PyTorch; the formulas stand in `fastpo.head.types`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fastpo.head.backend import forward_by_rows
from fastpo.head.online_softmax import LARGEST_SLAB, LARGEST_SLAB_OF_A_GPU, online_statistics
from fastpo.head.types import (
    NOTHING_KEPT,
    UPCAST_ROWS,
    Coefficients,
    Heads,
    Kept,
    KeptSlice,
    Link,
    accumulator,
    blocks,
)
from fastpo.head.vocab_parallel import Shard


class TorchTiles:
    """Every walk in plain PyTorch: CPU, MPS, XPU, and a head that is cut over ranks everywhere.

    A single head's statistics and the gradient of `logps` come from one pass over the vocabulary
    (`fastpo.head.online_softmax`); a reference, or the gradient of another statistic, needs slabs
    of whole rows.

    Args:
        shard: which rows of the head these are.
        skip_below: see `fastpo.head.linear_stats`.
        device_type: where the tensors are.
    """

    largest_slab: int | None = LARGEST_SLAB
    tile = 1

    def __init__(
        self, shard: Shard | None = None, skip_below: float = 0.0, device_type: str = "cpu"
    ) -> None:
        self.shard, self.skip_below = shard or Shard(None, 0, ()), skip_below
        if device_type != "cpu":
            self.largest_slab = LARGEST_SLAB_OF_A_GPU

    def num_slabs(self, link: Link, want: tuple[str, ...], with_reference: bool) -> int:
        # p and log p; the soft-cap's slope; the entropy's factor; the same again for a reference.
        slabs = 2 + (link.softcap is not None) + ("entropy" in want)
        return slabs + (4 if with_reference else 0)

    def forward(
        self,
        heads: Heads,
        link: Link,
        want: tuple[str, ...],
        grads: tuple[str, ...],
        row_block: int,
        vocab_block: int,
        keep: Kept = NOTHING_KEPT,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        if heads.ref_hidden is None and grads in ((), ("logps",)):
            assert self.largest_slab is not None
            stats, gradient = online_statistics(
                heads,
                link,
                want,
                # The same on every rank, since a row block is where they meet.
                row_block=min(row_block * max(self.shard.rows), self.largest_slab) // vocab_block,
                columns=vocab_block,
                with_gradient=bool(grads),
                keep=keep,
                shard=self.shard,
                skip_below=self.skip_below,
            )
            return stats, [] if gradient is None else [gradient]

        def step(part: Heads, lo: int, hi: int) -> tuple[dict[str, Tensor], list[Tensor]]:
            own, reference = link.of(part), part.reference()
            z = logit_slab(part, own)
            z_ref = None if reference is None else logit_slab(reference, own)
            if keep.logits is not None:
                keep.logits[lo:hi] = z
            if keep.ref_logits is not None and z_ref is not None:
                keep.ref_logits[lo:hi] = z_ref
            return self._from_logits(z, z_ref, part.labels, own, want, grads)

        return forward_by_rows(step, heads, grads, row_block)

    def coefficients(
        self,
        heads: Heads,
        link: Link,
        stats: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        first: int,
        vocab_size: int,
        kept: KeptSlice | None = None,
        spend: bool = False,
    ) -> Coefficients:
        link = link.of(heads)
        if p_alone(heads, link, cotangents):
            return _of_exponentials(heads, link, stats, cotangents, first, kept)
        if kept is None:
            reference = heads.reference()
            kept = KeptSlice(
                logit_slab(heads, link), None if reference is None else logit_slab(reference, link)
            )
        # Nothing in place: a graph kept by the caller may be walked twice.
        log_p = (kept.logits - stats["lse"][:, None]).sub_(stats["lse_rest"][:, None])
        p, slope, ref = log_p.exp(), link.derivative(kept.logits), None
        if kept.ref_logits is not None:
            log_ref = kept.ref_logits - stats["ref_lse"][:, None]
            log_ref -= stats["ref_lse_rest"][:, None]
            ref = log_ref.exp(), log_ref
        c = _coefficients_(
            p, log_p, ref, heads.labels, stats, cotangents, slope, first, vocab_size, link.jsd_beta
        )
        return Coefficients(c)

    def _from_logits(
        self,
        z: Tensor,
        z_ref: Tensor | None,
        labels: Tensor,
        link: Link,
        want: tuple[str, ...],
        grads: tuple[str, ...],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Statistics and unit-cotangent coefficients of a slab of logits, which it overwrites."""
        slope = link.derivative(z) if grads else 1.0
        stats, p, log_p = self._log_softmax_(z, labels, want)
        ref = None
        if z_ref is not None:
            ref_stats, p_ref, log_ref = self._log_softmax_(z_ref, labels, ())
            stats |= {f"ref_{name}": value for name, value in ref_stats.items()}
            ref = p_ref, log_ref
            difference = log_ref - log_p
            stats["kl_ref_policy"] = self._dot(p_ref, difference)
            stats["kl_policy_ref"] = -self._dot(p, difference)
            if "jsd" in want:
                beta, mixture = link.jsd_beta, log_mixture_(difference.clone(), link.jsd_beta)
                stats["kl_policy_mix"] = -self._dot(p, mixture)
                # In its own right: as a difference it would keep the rounding of log(pref / p).
                mixture = log_mixture_(difference.neg_(), 1 - beta)
                of_reference = -self._dot(p_ref, mixture)
                stats["jsd"] = beta * of_reference + (1 - beta) * stats["kl_policy_mix"]
        one = torch.ones_like(stats["logps"])
        rest = slope, self.shard.first, self.shard.vocab_size, link.jsd_beta
        coefficients = []
        for name in grads:
            mine = p if name == grads[-1] else p.clone()
            coefficients.append(_coefficients_(mine, log_p, ref, labels, stats, {name: one}, *rest))
        return stats, coefficients

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """[B] sums of a b over the whole vocabulary."""
        return self.shard.sum(torch.linalg.vecdot(a, b))

    def _log_softmax_(
        self, z: Tensor, labels: Tensor, want: tuple[str, ...]
    ) -> tuple[dict, Tensor, Tensor]:
        """(statistics, p, log p) of a slab; z's memory becomes log p."""
        shard, stats = self.shard, {}
        if "mean_logit" in want:
            stats["mean_logit"] = shard.sum(z.sum(dim=1)) / self.shard.vocab_size
        own_top, place = z.max(dim=1)
        top = shard.max(own_top)
        column, inside = _label_columns(labels, shard.first, z.shape[1])
        label_logit = shard.sum(z.gather(1, column).masked_fill(~inside, 0.0)).squeeze(1)
        z -= top[:, None]
        p = z.exp()
        label_exp = p.gather(1, column)
        # The other columns' sum on its own keeps every digit of 1 - p_y and of log p_y when the
        # label is nearly certain: log(1 + 1e-5) in fp32 has lost 0.6 % of its value, log1p nothing.
        others = p.scatter_(1, column, label_exp.masked_fill(inside, 0.0)).sum(dim=1)
        p.scatter_(1, column, label_exp)
        others = shard.sum(others)
        total = others + (label_logit - top).exp()
        log_total = total.log()
        stats["lse"] = top + log_total
        # What the rounding of lse lost: without it a recomputed row of probabilities sums to
        # 1 + eps * |lse|, an error that all V columns of the gradient share.
        stats["lse_rest"] = log_total - (stats["lse"] - top)
        stats["logps"] = torch.where(
            label_logit == top, -others.log1p(), (label_logit - top) - log_total
        )
        if "top1" in want:
            # The first of the largest: of all ranks the lowest column.
            far = torch.iinfo(place.dtype).max
            first = -shard.max(-(place + shard.first).masked_fill(own_top < top, far))
            stats["top1"] = (first == labels).to(z.dtype)
        p /= total[:, None]
        z -= log_total[:, None]
        if "entropy" in want:
            stats["entropy"] = -self._dot(p, z)
        if "log_p2" in want:
            stats["log_p2"] = self._dot(p, p).log()
        return stats, p, z


def logit_slab(heads: Heads, link: Link) -> Tensor:
    """[B, V] logits z in the accumulator dtype."""
    hidden, vocab_size = heads.hidden, heads.weight.shape[0]
    acc = accumulator(hidden.dtype)
    if hidden.dtype == acc or hidden.is_cuda:
        products = heads.products()
    else:
        heads = heads._replace(hidden=hidden.to(acc))
        products = heads.hidden.new_empty(hidden.shape[0], vocab_size)
        for lo, hi in blocks(vocab_size, UPCAST_ROWS):
            products[:, lo:hi] = heads.columns(lo, hi).products()
    return link.apply_(products, heads.bias)


def p_alone(heads: Heads, link: Link, grads: Collection[str]) -> bool:
    """Whether C is p times a number for each token, off the labels, and a CPU is to form it.

    On a GPU products take the coefficients in half precision, rounded with all of their factors.
    """
    alone = link.softcap is None and heads.ref_hidden is None and {"logps", "lse"}.issuperset(grads)
    return alone and not heads.hidden.is_cuda


def _of_exponentials(
    heads: Heads,
    link: Link,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    first: int,
    kept: KeptSlice | None,
) -> Coefficients:
    """C where it is `p_alone`, from kept exponentials or in the place of logits."""
    shift = stats["lse"] if kept is None or kept.shift is None else kept.shift
    zero = torch.zeros_like(shift)
    g_logps, g_lse = (cotangents.get(name, zero) for name in ("logps", "lse"))
    slope = link.derivative(shift[:, None])
    scale = ((g_lse - g_logps) * (shift - stats["lse"] - stats["lse_rest"]).exp())[:, None] * slope
    # 1 - p_y from log p_y: the difference itself would lose every digit of a confident token.
    at_label = g_lse * stats["logps"].exp() - g_logps * stats["logps"].expm1()
    at_label = at_label[:, None] * slope
    if kept is None:
        c = logit_slab(heads, link).sub_(shift[:, None]).exp_().mul_(scale)
        _put_at_labels_(c, heads.labels, first, at_label)
        return Coefficients(c)
    column, inside = _label_columns(heads.labels, first, heads.weight.shape[0])
    tokens = inside.squeeze(1).nonzero().squeeze(1)
    return Coefficients(kept.logits, scale, (tokens, column.squeeze(1)[tokens], at_label[tokens]))


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
    jsd_beta: float,
) -> Tensor:
    """The formula of `fastpo.head.types`, in the accumulator dtype; p's memory becomes C."""
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
    if "jsd" in g:
        assert ref is not None
        excess = log_mixture_(ref[1] - log_p, jsd_beta).add_(stats["kl_policy_mix"][:, None])
        factor = excess.mul_(g["jsd"] * (jsd_beta - 1)).add_(factor)
    if "logps" in g:
        index, _ = _label_columns(labels, first, p.shape[1])
        # 1 - p_y from log p_y: the difference itself would lose every digit of a confident token.
        at_label = p.gather(1, index) * factor.expand_as(p).gather(1, index)
        at_label -= g["logps"] * stats["logps"][:, None].expm1()
        p *= factor - g["logps"]
        _put_at_labels_(p, labels, first, at_label)
    else:
        p *= factor
    if "kl_ref_policy" in g:
        assert ref is not None
        p.addcmul_(ref[0], g["kl_ref_policy"], value=-1)
    if "mean_logit" in g:
        p += g["mean_logit"] / vocab_size
    return p.mul_(slope)


def _put_at_labels_(slab: Tensor, labels: Tensor, first: int, values: Tensor) -> None:
    """Write [N, 1] values into the labels' columns of a slice that starts at column `first`."""
    index, inside = _label_columns(labels, first, slab.shape[1])
    slab.scatter_(1, index, torch.where(inside, values, slab.gather(1, index)))


def _label_columns(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """[N, 1] labels' columns in a slice that starts at `first`, and whether they lie inside."""
    column = (labels - first)[:, None]
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns)


def log_mixture_(difference: Tensor, beta: float) -> Tensor:
    """log(m / p) from log(pref / p), which it overwrites; m = beta pref + (1 - beta) p."""
    own = difference.new_tensor(math.log1p(-beta))
    return torch.logaddexp(difference.add_(math.log(beta)), own, out=difference)
