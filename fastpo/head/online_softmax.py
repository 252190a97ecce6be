r"""Token statistics in one pass over the vocabulary, in plain PyTorch and cache-sized chunks.

The state of a token is that of `fastpo.kernels.online`, the target's own column kept apart, so that
the log-prob of a confident token and $1 - p_y$ keep every digit. Beside it, where the gradient of
`logps` to the hidden states is due, the pass sums

    r = sum_{v != y} exp(z_v - m) c_v W_v ,   m = max_{v != y} z_v ,

rescaled whenever m rises. At the end $d \log p_y / dh = (1 - p_y) c_y W_y - q\,r / s$ with
$q = 1 - p_y$ and $s = \sum_{v \ne y} e^{z_v - m}$: two matmuls in all, and no chunk of them leaves
the cache. On two cores with float32, N 1024, D 1024 and V 49152 this takes as long as the two bare
matmuls (`python -m bench.head`), where chunks with all of their columns took 1.4 times that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.head.types import (
    NOTHING_KEPT,
    Kept,
    LogitTransform,
    PassOptions,
    PassTensors,
    accumulator,
    chunks,
    concatenate,
)
from fastpo.head.vocab_parallel import Shard

# 8 MiB of float32 stay in a CPU's cache beside the weight's rows and the states, and in blocks that
# its allocator reuses. With 32 MiB of L3, 1024 tokens take 6 % longer at 16 MiB and 2 % at 4.
LARGEST_CHUNK = 1 << 21
# A GPU's caches hold no chunk worth its launches: 256 MiB are 32 chunks at N 8192, V 131072, where
# 8 MiB would be 1000 of 15 small kernels each, 4 to 5 times the bare matmuls by prediction.
LARGEST_CHUNK_OF_A_GPU = 1 << 26


def online_statistics(
    tensors: PassTensors, options: PassOptions, chunk_tokens: int, keep: Kept = NOTHING_KEPT
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the statistics of one head, and d logps / d hidden [N, D] if it is an early gradient.

    Args:
        tensors: a head and its tokens; a reference is not looked at.
        options: `lse`, `lse_rest` and `logps` come whether wanted or not.
        chunk_tokens: tokens of a chunk, at most.
        keep: to be filled; K is a multiple of `options.chunk_columns`, or V.
    """
    acc, shard, transform = accumulator(tensors.hidden.dtype), options.shard, options.transform
    want, columns, skip_below = options.statistics, options.chunk_columns, options.skip_below
    gradient = None
    if options.early_grads:
        gradient = torch.zeros_like(tensors.hidden, dtype=acc)
    parts = []
    for lo, hi in chunks(tensors.targets.numel(), max(1, chunk_tokens)):
        tokens = tensors.pick(slice(lo, hi))
        if not tokens.hidden.is_cuda:
            # Upcast once for all matmuls; a CPU's half-precision ones are far slower.
            tokens = tokens._replace(hidden=tokens.hidden.to(acc))
        own, state = transform.of(tokens), _State(tokens, want)
        skips = _Skips(tokens, own, shard, skip_below) if skip_below else None
        for i, (first, last) in enumerate(chunks(tensors.weight.shape[0], columns)):
            part = tokens.columns(first, last)
            if not part.hidden.is_cuda:
                lora_b = None if part.lora_b is None else part.lora_b.to(acc)
                part = part._replace(weight=part.weight.to(acc), lora_b=lora_b)
            out = keep.exponentials[i][lo:hi] if i < len(keep.exponentials) else None
            z = own.apply_(part.products(out), part.bias)
            slope = None
            # Without a soft-cap it is one number a token, which can wait for the end.
            if gradient is not None and transform.softcap is not None:
                slope = own.derivative(z)
            if keep.logits is not None and last <= keep.logits.shape[1]:
                keep.logits[lo:hi, first:last] = z
            masses, fade = state.absorb_(z, shard.first + first)
            if out is not None and keep.shifts is not None:
                keep.shifts[i, lo:hi] = state.shift.squeeze(1)
            index = None if skips is None else skips.tokens_above(masses, state)
            if gradient is not None:
                gradient[lo:hi] *= fade
                masses = masses if slope is None else masses.mul_(slope)
                masses = masses if index is None else masses[index]
                part.put_gradient_(gradient[lo:hi], masses, index)
        faded = state.merge(shard)
        stats, others = state.finish(shard.vocab_size)
        if skips is not None:
            late = None if keep.shares is None else keep.shares[:, lo:hi]
            stats["skipped"] = shard.sum(skips.finish(state, others, late, columns))
        if gradient is not None:
            at_target = -stats["logps"][:, None].expm1() * own.derivative(state.target)
            if transform.softcap is None:
                others = others * own.derivative(state.target)
            inside, target_rows, _ = tokens.of_targets(shard.first)
            target_rows = target_rows.to(acc)
            gradient[lo:hi].mul_(-others * faded).addcmul_(at_target * inside[:, None], target_rows)
        parts.append(stats)
    return concatenate(parts), [] if gradient is None else [gradient]


class _Skips:
    """Find chunks of the vocabulary too improbable for a token's gradient; see `linear_stats`."""

    def __init__(
        self, tensors: PassTensors, transform: LogitTransform, shard: Shard, skip_below: float
    ) -> None:
        self.skip_below, self.chunks = skip_below, []
        self.column = (tensors.targets - shard.first)[:, None]
        self.inside, rows, bias = tensors.of_targets(shard.first)
        # The target's logit before its turn: it decides how much the others can be.
        z = transform.apply_(
            (tensors.hidden * rows.to(tensors.hidden.dtype)).sum(1, keepdim=True), bias
        )
        self.target = shard.max(z.masked_fill(~self.inside[:, None], -torch.inf))

    def tokens_above(self, masses: Tensor, state: _State) -> Tensor:
        """Return the tokens for which this chunk may be more than `skip_below`."""
        mass, shift = masses.sum(dim=1, keepdim=True), state.shift
        # What the sum has grown to so far, it will at least be in the end.
        small = mass <= self.skip_below * (state.mass + (self.target - shift).exp())
        self.chunks.append((mass, shift, small))
        return (~small).squeeze(1).nonzero().squeeze(1)

    def finish(self, state: _State, others: Tensor, late: Tensor | None, columns: int) -> Tensor:
        """Return [B] probability that is left out here, or by a backward pass, told in `late`.

        Args:
            state, others: of all chunks and ranks; see `_State.finish`.
            late: [chunks, B] to be filled with probabilities, infinite where the target is.
            columns: of a chunk.
        """
        mass, shift, small = (torch.cat(each, dim=1) for each in zip(*self.chunks, strict=True))
        shares = mass * (shift - state.shift).exp() * others
        if late is not None:
            of_target = self.column.div(columns, rounding_mode="floor").clamp(0, len(late) - 1)
            here = shares.gather(1, of_target).masked_fill(self.inside[:, None], torch.inf)
            late.copy_(shares.scatter(1, of_target, here).T)
            small = self.skip_below >= late.T
        return shares.masked_fill(~small, 0.0).sum(dim=1)


class _State:
    """Hold tokens' running sums over the columns so far, [B, 1]; see `fastpo.kernels.online`."""

    def __init__(self, tensors: PassTensors, want: tuple[str, ...]) -> None:
        self.targets, self.want = tensors.targets[:, None], want
        zero = tensors.hidden.new_zeros(
            len(tensors.targets), 1, dtype=accumulator(tensors.hidden.dtype)
        )
        self.target = self.mass = self.slope = self.square = self.total = zero
        self.high = self.before = torch.full_like(zero, -torch.inf)

    def absorb_(self, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Take in the columns from `first` on.

        Returns:
            exp(z - shift), 0 at the target, in the memory of z; the factor of older sums.
        """
        index = (self.targets - first).clamp(0, z.shape[1] - 1)
        inside = (self.targets >= first) & (self.targets < first + z.shape[1])
        here = z.gather(1, index)
        self.target = torch.where(inside, here, self.target)
        if "mean_logit" in self.want:
            self.total = self.total + z.sum(dim=1, keepdim=True)
        if "top1" in self.want:
            right = torch.arange(first, first + z.shape[1], device=z.device) >= self.targets
            highest = z.masked_fill(right, -torch.inf).amax(dim=1, keepdim=True)
            self.before = torch.maximum(self.before, highest)
        z.scatter_(1, index, here.masked_fill(inside, -torch.inf))
        fade = self._move_to(torch.maximum(self.high, z.amax(dim=1, keepdim=True)))
        z -= self.shift
        shifted = z.clone() if "entropy" in self.want else z
        z.exp_()
        if "entropy" in self.want:
            shifted.masked_fill_(z == 0, 0.0)
            self.slope += torch.linalg.vecdot(z, shifted)[:, None]
        if "log_p2" in self.want:
            self.square = self.square + torch.linalg.vecdot(z, z)[:, None]
        self.mass = self.mass + z.sum(dim=1, keepdim=True)
        return z, fade

    @property
    def shift(self) -> Tensor:
        """Return the running maximum m, clamped to be finite so that -inf - -inf is not NaN."""
        return self.high.clamp(min=torch.finfo(self.high.dtype).min)

    def _move_to(self, high: Tensor) -> Tensor:
        """Rescale the sums as if `high` were subtracted; return what they were multiplied by."""
        before, self.high = self.high, high
        fade = (before - self.shift).exp()
        if "entropy" in self.want:
            moved = self.slope + self.mass * (before - self.shift)
            self.slope = fade * moved.masked_fill(self.mass == 0, 0.0)
        if "log_p2" in self.want:
            self.square = self.square * fade.square()
        self.mass = self.mass * fade
        return fade

    def merge(self, shard: Shard) -> Tensor | float:
        """Take in the columns of all ranks; return what this rank's were multiplied by."""
        if shard.group is None:
            return 1.0
        fade = self._move_to(shard.max(self.high))
        sums = torch.stack([self.mass, self.slope, self.square, self.total, self.target])
        self.mass, self.slope, self.square, self.total, self.target = shard.sum(sums)
        self.before = shard.max(self.before)
        return fade

    def finish(self, vocab_size: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return [B] statistics, and (1 - p_y) / s [B, 1], the others' weight."""
        log_mass = self.mass.log()
        # lse = top + above, both parts exact: logits near 1000 keep their last digits.
        top = torch.maximum(self.high, self.target)
        gap = (self.high - self.target) + log_mass
        tail = (-gap.abs()).exp().log1p()
        above = torch.maximum((self.high - top) + log_mass, self.target - top) + tail
        lse = top + above
        log_p, log_q = -(gap.clamp(min=0) + tail), -((-gap).clamp(min=0) + tail)
        p, q = log_p.exp(), log_q.exp()
        stats = {"lse": lse, "lse_rest": above - (lse - top), "logps": log_p}
        if "entropy" in self.want:
            # Compared with == 0 and not > 0, so that a NaN token stays NaN.
            others = q * (log_mass - self.slope / self.mass - log_q)
            stats["entropy"] = others.masked_fill(q == 0, 0.0) - (p * log_p).masked_fill(p == 0, 0)
        if "log_p2" in self.want:
            of_others = 2 * (log_q - log_mass) + self.square.log()
            of_others = of_others.masked_fill(self.mass == 0, -torch.inf)
            stats["log_p2"] = torch.logaddexp(2 * log_p, of_others)
        if "top1" in self.want:
            first = (self.target > self.before) & (self.target >= self.high)
            stats["top1"] = first.to(lse.dtype)
        if "mean_logit" in self.want:
            stats["mean_logit"] = self.total / vocab_size
        weight = (q / self.mass).masked_fill(self.mass == 0, 0.0)
        return {name: value.squeeze(1) for name, value in stats.items()}, weight
