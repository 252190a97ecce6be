"""The head in plain PyTorch; the formulas stand in `fastpo.head.types`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastpo.head.backend import forward_by_tokens
from fastpo.head.online_softmax import LARGEST_CHUNK, LARGEST_CHUNK_OF_A_GPU, online_statistics
from fastpo.head.schedule import Traits, Workload
from fastpo.head.types import (
    NOTHING_KEPT,
    UPCAST_ROWS,
    Coefficients,
    Kept,
    KeptChunk,
    LogitTransform,
    PassOptions,
    PassTensors,
    accumulator,
    chunks,
)
from fastpo.head.vocab_parallel import Shard


class TorchBackend:
    """Compute in plain PyTorch: CPU, MPS, XPU, and everywhere a head that is cut over ranks.

    A single head's statistics and the gradient of `logps` come from one pass over the vocabulary
    (`fastpo.head.online_softmax`). A reference, or the gradient of another statistic, needs chunks
    with all columns of their tokens.
    """

    largest_chunk = LARGEST_CHUNK
    largest_chunk_of_a_gpu = LARGEST_CHUNK_OF_A_GPU

    def traits(self, work: Workload, device_type: str) -> Traits:
        # p and log p; the soft-cap's slope; the entropy's factor; the same again for a reference.
        count = 2 + (work.softcap is not None) + ("entropy" in work.want)
        count += 4 if work.with_reference else 0
        return Traits(count, self._largest(device_type))

    def _largest(self, device_type: str) -> int:
        return self.largest_chunk if device_type == "cpu" else self.largest_chunk_of_a_gpu

    def keeps_exponentials(self, tensors: PassTensors, options: PassOptions) -> bool:
        """Return whether C is p times a number for each token, off the targets, and on a CPU.

        On a GPU matmuls take the coefficients in half precision, rounded with all of their factors.
        """
        alone = options.softcap is None and tensors.ref_hidden is None
        alone = alone and {"logps", "lse"}.issuperset(options.grads)
        return alone and not tensors.hidden.is_cuda

    def forward(
        self, tensors: PassTensors, options: PassOptions, keep: Kept = NOTHING_KEPT
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        if tensors.ref_hidden is None and options.early_grads in ((), ("logps",)):
            # The same on every rank, since ranks meet after each chunk of tokens.
            most = options.chunk_tokens * max(options.rows)
            most = min(most, self._largest(tensors.hidden.device.type))
            return online_statistics(tensors, options, most // options.chunk_columns, keep)

        def step(part: PassTensors, index: slice) -> tuple[dict[str, Tensor], list[Tensor]]:
            transform, reference = options.transform.of(part), part.reference()
            z = logit_chunk(part, transform)
            z_ref = None if reference is None else logit_chunk(reference, transform)
            if keep.logits is not None:
                keep.logits[index] = z
            if keep.ref_logits is not None and z_ref is not None:
                keep.ref_logits[index] = z_ref
            return _from_logits(z, z_ref, part.targets, transform, options)

        return forward_by_tokens(step, tensors, options)

    def coefficients(
        self,
        tensors: PassTensors,
        options: PassOptions,
        stats: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        first: int,
        kept: KeptChunk | None = None,
        spend: bool = False,
    ) -> Coefficients:
        transform = options.transform.of(tensors)
        if self.keeps_exponentials(tensors, options):
            return _of_exponentials(tensors, transform, stats, cotangents, first, kept)
        if kept is None:
            reference = tensors.reference()
            ref_logits = None if reference is None else logit_chunk(reference, transform)
            kept = KeptChunk(logit_chunk(tensors, transform), ref_logits)
        # Nothing in place: a graph that the caller keeps may be gone through twice.
        log_p = (kept.logits - stats["lse"][:, None]).sub_(stats["lse_rest"][:, None])
        p, slope, ref = log_p.exp(), transform.derivative(kept.logits), None
        if kept.ref_logits is not None:
            log_ref = kept.ref_logits - stats["ref_lse"][:, None]
            log_ref -= stats["ref_lse_rest"][:, None]
            ref = log_ref.exp(), log_ref
        c = _coefficients_(p, log_p, ref, tensors.targets, stats, cotangents, slope, first, options)
        return Coefficients(c)


def _from_logits(
    z: Tensor,
    z_ref: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    options: PassOptions,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return statistics and unit-cotangent coefficients of logits [B, V], which it overwrites."""
    grads, shard, want = options.early_grads, options.shard, options.statistics
    slope = transform.derivative(z) if grads else 1.0
    stats, p, log_p = _log_softmax_(z, targets, shard, want)
    ref = None
    if z_ref is not None:
        ref_stats, p_ref, log_ref = _log_softmax_(z_ref, targets, shard, ())
        stats |= {f"ref_{name}": value for name, value in ref_stats.items()}
        ref = p_ref, log_ref
        difference = log_ref - log_p
        stats["kl_ref_policy"] = _dot(p_ref, difference, shard)
        stats["kl_policy_ref"] = -_dot(p, difference, shard)
        if "jsd" in want:
            beta, mixture = options.jsd_beta, log_mixture_(difference.clone(), options.jsd_beta)
            stats["kl_policy_mix"] = -_dot(p, mixture, shard)
            # In its own right: as a difference it would keep the rounding of log(pref / p).
            mixture = log_mixture_(difference.neg_(), 1 - beta)
            of_reference = -_dot(p_ref, mixture, shard)
            stats["jsd"] = beta * of_reference + (1 - beta) * stats["kl_policy_mix"]
    one = torch.ones_like(stats["logps"])
    coefficients = []
    for name in grads:
        own = p if name == grads[-1] else p.clone()
        unit = {name: one}
        coefficients.append(
            _coefficients_(own, log_p, ref, targets, stats, unit, slope, shard.first, options)
        )
    return stats, coefficients


def _dot(a: Tensor, b: Tensor, shard: Shard) -> Tensor:
    """Return [B] sums of a b over the whole vocabulary."""
    return shard.sum(torch.linalg.vecdot(a, b))


def _log_softmax_(
    z: Tensor, targets: Tensor, shard: Shard, want: tuple[str, ...]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return (statistics, p, log p) of logits; z's memory becomes log p."""
    stats: dict[str, Tensor] = {}
    if "mean_logit" in want:
        stats["mean_logit"] = shard.sum(z.sum(dim=1)) / shard.vocab_size
    own_top, place = z.max(dim=1)
    top = shard.max(own_top)
    column, inside = _target_columns(targets, shard.first, z.shape[1])
    target_logit = shard.sum(z.gather(1, column).masked_fill(~inside, 0.0)).squeeze(1)
    z -= top[:, None]
    p = z.exp()
    target_exp = p.gather(1, column)
    # The other columns' sum on its own keeps every digit of 1 - p_y and of log p_y when the
    # target is nearly certain: log(1 + 1e-5) in fp32 has lost 0.6 % of its value, log1p nothing.
    others = p.scatter_(1, column, target_exp.masked_fill(inside, 0.0)).sum(dim=1)
    p.scatter_(1, column, target_exp)
    others = shard.sum(others)
    total = others + (target_logit - top).exp()
    log_total = total.log()
    stats["lse"] = top + log_total
    # What the rounding of lse lost: without it a recomputed row of probabilities sums to
    # 1 + eps * |lse|, an error that all V columns of the gradient share.
    stats["lse_rest"] = log_total - (stats["lse"] - top)
    stats["logps"] = torch.where(
        target_logit == top, -others.log1p(), (target_logit - top) - log_total
    )
    if "top1" in want:
        # The first of the largest: of all ranks the lowest column.
        far = torch.iinfo(place.dtype).max
        first = -shard.max(-(place + shard.first).masked_fill(own_top < top, far))
        stats["top1"] = (first == targets).to(z.dtype)
    p /= total[:, None]
    z -= log_total[:, None]
    if "entropy" in want:
        stats["entropy"] = -_dot(p, z, shard)
    if "log_p2" in want:
        stats["log_p2"] = _dot(p, p, shard).log()
    return stats, p, z


def logit_chunk(tensors: PassTensors, transform: LogitTransform) -> Tensor:
    """Return [B, V] logits z in the accumulator dtype."""
    hidden, vocab_size = tensors.hidden, tensors.weight.shape[0]
    acc = accumulator(hidden.dtype)
    if hidden.dtype == acc or hidden.is_cuda:
        products = tensors.products()
    else:
        tensors = tensors._replace(hidden=hidden.to(acc))
        products = tensors.hidden.new_empty(hidden.shape[0], vocab_size)
        for lo, hi in chunks(vocab_size, UPCAST_ROWS):
            products[:, lo:hi] = tensors.columns(lo, hi).products()
    return transform.apply_(products, tensors.bias)


def _of_exponentials(
    tensors: PassTensors,
    transform: LogitTransform,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    first: int,
    kept: KeptChunk | None,
) -> Coefficients:
    """Return C where `keeps_exponentials`: from these, or in the place of logits."""
    shift = stats["lse"] if kept is None or kept.shift is None else kept.shift
    zero = torch.zeros_like(shift)
    g_logps, g_lse = (cotangents.get(name, zero) for name in ("logps", "lse"))
    slope = transform.derivative(shift[:, None])
    scale = ((g_lse - g_logps) * (shift - stats["lse"] - stats["lse_rest"]).exp())[:, None] * slope
    # 1 - p_y from log p_y: the difference itself would lose every digit of a confident token.
    at_target = g_lse * stats["logps"].exp() - g_logps * stats["logps"].expm1()
    at_target = at_target[:, None] * slope
    if kept is None:
        c = logit_chunk(tensors, transform).sub_(shift[:, None]).exp_().mul_(scale)
        _put_at_targets_(c, tensors.targets, first, at_target)
        return Coefficients(c)
    column, inside = _target_columns(tensors.targets, first, tensors.weight.shape[0])
    tokens = inside.squeeze(1).nonzero().squeeze(1)
    return Coefficients(kept.logits, scale, (tokens, column.squeeze(1)[tokens], at_target[tokens]))


def _coefficients_(
    p: Tensor,
    log_p: Tensor,
    ref: tuple[Tensor, Tensor] | None,
    targets: Tensor,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    slope: Tensor | float,
    first: int,
    options: PassOptions,
) -> Tensor:
    """Return C by the formula of `fastpo.head.types`; p's memory becomes C."""
    g = {name: value[:, None] for name, value in cotangents.items()}
    beta, factor = options.jsd_beta, p.new_zeros(p.shape[0], 1)
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
        excess = log_mixture_(ref[1] - log_p, beta).add_(stats["kl_policy_mix"][:, None])
        factor = excess.mul_(g["jsd"] * (beta - 1)).add_(factor)
    if "logps" in g:
        index, _ = _target_columns(targets, first, p.shape[1])
        # 1 - p_y from log p_y: the difference itself would lose every digit of a confident token.
        at_target = p.gather(1, index) * factor.expand_as(p).gather(1, index)
        at_target -= g["logps"] * stats["logps"][:, None].expm1()
        p *= factor - g["logps"]
        _put_at_targets_(p, targets, first, at_target)
    else:
        p *= factor
    if "kl_ref_policy" in g:
        assert ref is not None
        p.addcmul_(ref[0], g["kl_ref_policy"], value=-1)
    if "mean_logit" in g:
        p += g["mean_logit"] / options.shard.vocab_size
    return p.mul_(slope)


def _put_at_targets_(c: Tensor, targets: Tensor, first: int, values: Tensor) -> None:
    """Write [N, 1] values into the targets' columns of a chunk that starts at column `first`."""
    index, inside = _target_columns(targets, first, c.shape[1])
    c.scatter_(1, index, torch.where(inside, values, c.gather(1, index)))


def _target_columns(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return [N, 1] targets' columns in a chunk from `first` on, and whether they lie inside."""
    column = (targets - first)[:, None]
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns)


def log_mixture_(difference: Tensor, beta: float) -> Tensor:
    """Return log(m / p) from log(pref / p), overwritten; m = beta pref + (1 - beta) p."""
    own = difference.new_tensor(math.log1p(-beta))
    return torch.logaddexp(difference.add_(math.log(beta)), own, out=difference)
