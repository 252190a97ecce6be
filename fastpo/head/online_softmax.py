r"""Token statistics in one pass over the vocabulary, in plain PyTorch and cache-sized slabs.

The state of a row is that of `fastpo.kernels.online`, the label's own column kept apart, so that
the log-prob of a confident token and $1 - p_y$ keep every digit. Beside it, where the gradient of
`logps` to the hidden states is due, the pass sums

    r = sum_{v != y} exp(z_v - m) c_v W_v ,   m = max_{v != y} z_v ,

rescaled whenever m rises. At the end $d \log p_y / dh = (1 - p_y) c_y W_y - q\,r / s$ with
$q = 1 - p_y$ and $s = \sum_{v \ne y} e^{z_v - m}$: two products in all, and no slab of them leaves
the cache. On two cores with float32, N 1024, D 1024 and V 49152 this takes as long as the two bare
products (`python -m bench.head`), where slabs of whole rows took 1.4 times that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.head.types import NOTHING_KEPT, Heads, Kept, Link, accumulator, blocks, concatenate
from fastpo.head.vocab_parallel import Shard

# 8 MiB of float32 stay in a CPU's cache beside the weight's rows and the states, and in blocks that
# its allocator reuses. With 32 MiB of L3, 1024 tokens take 6 % longer at 16 MiB and 2 % at 4.
LARGEST_SLAB = 1 << 21
# A GPU's caches hold no slab worth its launches: 256 MiB are 32 slabs at N 8192, V 131072, where
# 8 MiB would be 1000 of 15 small kernels each, 4 to 5 times the bare products by prediction.
LARGEST_SLAB_OF_A_GPU = 1 << 26


def online_statistics(
    heads: Heads,
    link: Link,
    want: tuple[str, ...],
    *,
    shard: Shard,
    row_block: int,
    columns: int,
    with_gradient: bool = False,
    keep: Kept = NOTHING_KEPT,
    skip_below: float = 0.0,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics of every row; with a gradient also d logps / d hidden, [N, D] in the accumulator.

    Args:
        heads: the policy's head and tokens; a reference is not looked at.
        link: the head's facts.
        want: names of single-head statistics; `lse`, `lse_rest` and `logps` always come.
        shard: which rows of the head these are.
        row_block, columns: shape of a slab, at most.
        with_gradient: whether to form d logps / d hidden.
        keep: to be filled; K is a multiple of `columns`, or V.
        skip_below: a slice of smaller probability is left out of a row's gradient.
    """
    acc = accumulator(heads.hidden.dtype)
    gradient = torch.zeros_like(heads.hidden, dtype=acc) if with_gradient else None
    parts = []
    for lo, hi in blocks(heads.labels.numel(), max(1, row_block)):
        some = heads.rows(lo, hi)
        if not some.hidden.is_cuda:
            # Upcast once for all products; a CPU's half-precision ones are far slower.
            some = some._replace(hidden=some.hidden.to(acc))
        own, state = link.of(some), _State(some, want)
        skips = _Skips(some, own, shard, skip_below) if skip_below else None
        for i, (first, last) in enumerate(blocks(heads.weight.shape[0], columns)):
            part = some.columns(first, last)
            if not part.hidden.is_cuda:
                lora_b = None if part.lora_b is None else part.lora_b.to(acc)
                part = part._replace(weight=part.weight.to(acc), lora_b=lora_b)
            out = keep.exponentials[i][lo:hi] if i < len(keep.exponentials) else None
            z = own.apply_(part.products(out), part.bias)
            # Without a soft-cap it is one number a row, which can wait for the end.
            slope = own.derivative(z) if with_gradient and link.softcap is not None else None
            if keep.logits is not None and last <= keep.logits.shape[1]:
                keep.logits[lo:hi, first:last] = z
            masses, fade = state.absorb_(z, shard.first + first)
            if out is not None and keep.shifts is not None:
                keep.shifts[i, lo:hi] = state.shift.squeeze(1)
            rows = None if skips is None else skips.rows_above(masses, state)
            if gradient is not None:
                gradient[lo:hi] *= fade
                masses = masses if slope is None else masses.mul_(slope)
                masses = masses if rows is None else masses[rows]
                part.put_gradient_(gradient[lo:hi], masses, rows)
        faded = state.merge(shard)
        stats, others = state.finish(shard.vocab_size)
        if skips is not None:
            late = None if keep.shares is None else keep.shares[:, lo:hi]
            stats["skipped"] = shard.sum(skips.finish(state, others, late, columns))
        if gradient is not None:
            at_label = -stats["logps"][:, None].expm1() * own.derivative(state.label)
            others = others if link.softcap is not None else others * own.derivative(state.label)
            inside, label_rows, _ = some.of_labels(shard.first)
            label_rows = label_rows.to(acc)
            gradient[lo:hi].mul_(-others * faded).addcmul_(at_label * inside[:, None], label_rows)
        parts.append(stats)
    return concatenate(parts), gradient


class _Skips:
    """Slices of the vocabulary too improbable for a row's gradient; see `linear_stats`."""

    def __init__(self, heads: Heads, link: Link, shard: Shard, skip_below: float) -> None:
        self.skip_below, self.slices = skip_below, []
        self.column = (heads.labels - shard.first)[:, None]
        self.inside, rows, bias = heads.of_labels(shard.first)
        # The label's logit before its turn: it decides how much the others can be.
        z = link.apply_((heads.hidden * rows.to(heads.hidden.dtype)).sum(1, keepdim=True), bias)
        self.label = shard.max(z.masked_fill(~self.inside[:, None], -torch.inf))

    def rows_above(self, masses: Tensor, state: _State) -> Tensor:
        """The rows of which this slice may be more than `skip_below`."""
        mass, shift = masses.sum(dim=1, keepdim=True), state.shift
        # What the sum has grown to so far, it will at least be in the end.
        small = mass <= self.skip_below * (state.mass + (self.label - shift).exp())
        self.slices.append((mass, shift, small))
        return (~small).squeeze(1).nonzero().squeeze(1)

    def finish(self, state: _State, others: Tensor, late: Tensor | None, columns: int) -> Tensor:
        """[B] probability that is left out here, or by a backward pass that is told in `late`.

        Args:
            state, others: of all slices and ranks; see `_State.finish`.
            late: [slices, B] to be filled with probabilities, infinite where the label is.
            columns: of a slice.
        """
        mass, shift, small = (torch.cat(each, dim=1) for each in zip(*self.slices, strict=True))
        shares = mass * (shift - state.shift).exp() * others
        if late is not None:
            of_label = self.column.div(columns, rounding_mode="floor").clamp(0, len(late) - 1)
            here = shares.gather(1, of_label).masked_fill(self.inside[:, None], torch.inf)
            late.copy_(shares.scatter(1, of_label, here).T)
            small = self.skip_below >= late.T
        return shares.masked_fill(~small, 0.0).sum(dim=1)


class _State:
    """Rows' running sums over the columns seen so far, [B, 1] each; see `fastpo.kernels.online`."""

    def __init__(self, heads: Heads, want: tuple[str, ...]) -> None:
        self.labels, self.want = heads.labels[:, None], want
        zero = heads.hidden.new_zeros(len(heads.labels), 1, dtype=accumulator(heads.hidden.dtype))
        self.label = self.mass = self.slope = self.square = self.total = zero
        self.high = self.before = torch.full_like(zero, -torch.inf)

    def absorb_(self, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Takes in the columns from `first` on.

        Returns:
            exp(z - shift), 0 at the label, in the memory of z; what older sums are to be multiplied
            by.
        """
        index = (self.labels - first).clamp(0, z.shape[1] - 1)
        inside = (self.labels >= first) & (self.labels < first + z.shape[1])
        here = z.gather(1, index)
        self.label = torch.where(inside, here, self.label)
        if "mean_logit" in self.want:
            self.total = self.total + z.sum(dim=1, keepdim=True)
        if "top1" in self.want:
            right = torch.arange(first, first + z.shape[1], device=z.device) >= self.labels
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
        """What is subtracted: m, which is finite while all columns are at -inf, lest it be NaN."""
        return self.high.clamp(min=torch.finfo(self.high.dtype).min)

    def _move_to(self, high: Tensor) -> Tensor:
        """Sums as if `high` were subtracted; returns what they were multiplied by."""
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
        """Takes in the columns of all ranks; returns what this rank's were multiplied by."""
        if shard.group is None:
            return 1.0
        fade = self._move_to(shard.max(self.high))
        sums = torch.stack([self.mass, self.slope, self.square, self.total, self.label])
        self.mass, self.slope, self.square, self.total, self.label = shard.sum(sums)
        self.before = shard.max(self.before)
        return fade

    def finish(self, vocab_size: int) -> tuple[dict[str, Tensor], Tensor]:
        """[B] statistics, and (1 - p_y) / s [B, 1], the weight of the others' exponentials."""
        log_mass = self.mass.log()
        # lse = top + above, both parts exact: a row of logits near 1000 keeps its last digits.
        top = torch.maximum(self.high, self.label)
        gap = (self.high - self.label) + log_mass
        tail = (-gap.abs()).exp().log1p()
        above = torch.maximum((self.high - top) + log_mass, self.label - top) + tail
        lse = top + above
        log_p, log_q = -(gap.clamp(min=0) + tail), -((-gap).clamp(min=0) + tail)
        p, q = log_p.exp(), log_q.exp()
        stats = {"lse": lse, "lse_rest": above - (lse - top), "logps": log_p}
        if "entropy" in self.want:
            # Compared with == 0 and not > 0, so that a NaN row stays NaN.
            others = q * (log_mass - self.slope / self.mass - log_q)
            stats["entropy"] = others.masked_fill(q == 0, 0.0) - (p * log_p).masked_fill(p == 0, 0)
        if "log_p2" in self.want:
            rest = 2 * (log_q - log_mass) + self.square.log()
            stats["log_p2"] = torch.logaddexp(
                2 * log_p, rest.masked_fill(self.mass == 0, -torch.inf)
            )
        if "top1" in self.want:
            first = (self.label > self.before) & (self.label >= self.high)
            stats["top1"] = first.to(lse.dtype)
        if "mean_logit" in self.want:
            stats["mean_logit"] = self.total / vocab_size
        weight = (q / self.mass).masked_fill(self.mass == 0, 0.0)
        return {name: value.squeeze(1) for name, value in stats.items()}, weight
