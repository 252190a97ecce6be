r"""Slabs of logits: statistics out of them, coefficients in their place, by either backend.

The logits of N label tokens are an [N, V] matrix that never exists whole. It is produced a slab at
a time, reduced to statistics, and where a gradient is due turned in place into coefficients

    C[t, v] = d(loss) / d(h_t . W_v + b_v),   so that   dH = C W   and   dW = C^T H.

With $z_v = softcap(s (W_v \cdot h + b_v)) / T$, $c_v = (s/T)(1 - tanh^2)$ and cotangents g:

    C_v = c_v ( g_logps (1[v=y] - p_v) + g_lse p_v + g_mean/V - g_entropy p_v (log p_v + H)
              + g_klf (p_v - pref_v) + g_klr p_v (log p_v - log pref_v - KLr)
              + g_jsd (1 - beta) p_v (log p_v - log m_v - KLm) ),

m = beta pref + (1 - beta) p the mixture of `jsd` and KLm = KL(p || m), `kl_policy_mix`.

C is formed in fp32, the label's column included, and rounded to the inputs' dtype once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.head.vocab_parallel import Shard

DIVERGENCES = ("kl_ref_policy", "kl_policy_ref", "jsd")
DIFFERENTIABLE = ("logps", "lse", "entropy", "mean_logit", *DIVERGENCES)
OF_REFERENCE = (*DIVERGENCES, "ref_logps")  # these need a second head
STATISTICS = (*DIFFERENTIABLE, "log_p2", "top1", "skipped", "ref_logps")

# Rows of a half-precision matrix that a CPU turns into float32 at a time: 16 MiB at D = 4096.
UPCAST_ROWS = 1024
# Columns of a low-rank delta that are formed at a time on a GPU: 256 MiB at 8192 rows.
LORA_COLUMNS = 8192


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Half-open intervals of `size` that cover range(total)."""
    return ((lo, min(lo + size, total)) for lo in range(0, total, size))


def concatenate(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Row blocks' statistics as one [N] tensor a name."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Link(NamedTuple):
    """z = softcap((h.W + b) * logit_scale) / temperature; jsd_beta weighs the mixture of `jsd`."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float | Tensor = 1.0  # [B, 1] where `of` says so
    jsd_beta: float = 0.5

    def of(self, heads: Heads) -> Link:
        """The link of these rows, with their own temperatures if they have any."""
        rows = heads.temperature
        return self if rows is None else self._replace(temperature=rows[:, None])

    def apply_(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Turn raw products h.W into logits z, in place."""
        if bias is not None:
            products += bias
        if self.softcap is None:
            scale = self.logit_scale / self.temperature
            one = not isinstance(scale, Tensor) and scale == 1.0
            return products if one else products.mul_(scale)
        return (
            products.mul_(self.logit_scale / self.softcap)
            .tanh_()
            .mul_(self.softcap / self.temperature)
        )

    def derivative(self, z: Tensor) -> Tensor | float:
        """dz / d(h.W): a slab with a soft-cap, otherwise one number, or one a row."""
        slope = self.logit_scale / self.temperature
        if self.softcap is None:
            return slope
        tanh = z * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1).mul_(slope)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with the result in the accumulator dtype; nothing is rounded to half on the way."""
    acc = accumulator(a.dtype)
    if a.dtype == b.dtype == acc:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=acc, out=out)
    # Half-precision products on CPUs without AMX are 5-25 times slower than float32 ones.
    return torch.mm(a.to(acc), b.to(acc), out=out)


def put_matmul_(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> Tensor:
    """out = a @ b, or += where `add`, in out's accumulator dtype.

    Coefficients `a` are rounded to b's dtype, once. On a GPU the product itself adds (beta = 1):
    a separate sum would read and write [N, D] or [V, D] of fp32 twice more.
    """
    if b.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if b.is_cuda:
        a = a.to(b.dtype)
        if not add:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    for lo, hi in blocks(b.shape[0], UPCAST_ROWS):
        put_matmul_(out, a[:, lo:hi].to(out.dtype), b[lo:hi].to(out.dtype), add=add or lo > 0)
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
    temperature: Tensor | None = None  # [N] in the accumulator dtype
    lora_b: Tensor | None = None  # [V, r]; `hidden` is then [N, D + r], see `linear_stats`

    def rows(self, lo: int, hi: int) -> Heads:
        """The pass restricted to label tokens lo:hi."""
        return self._of_tokens(lambda rows: rows[lo:hi])

    def _of_tokens(self, take: Callable[[Tensor], Tensor]) -> Heads:
        names = ("hidden", "labels", "ref_hidden", "temperature")
        found = {name: getattr(self, name) for name in names}
        return self._replace(**{n: None if p is None else take(p) for n, p in found.items()})

    def pick(self, index: slice | Tensor) -> Heads:
        """The pass restricted to label tokens `index`."""
        return self._of_tokens(lambda rows: rows[index])

    def gathered(self, shard: Shard) -> Heads:
        """The pass over the tokens of all ranks."""
        return self._of_tokens(shard.gather)

    def columns(self, lo: int, hi: int) -> Heads:
        """The pass restricted to vocabulary columns lo:hi (labels keep their global numbers)."""
        names = ("weight", "bias", "ref_weight", "ref_bias", "lora_b")
        found = {name: getattr(self, name) for name in names}
        return self._replace(**{n: None if p is None else p[lo:hi] for n, p in found.items()})

    def of_labels(self, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a slice that starts at column `first`: [N] whether the labels lie inside, their rows
        [N, D (+ r)], their biases [N, 1]; those of labels outside are any.
        """
        index = self.labels - first
        inside = (index >= 0) & (index < len(self.weight))
        index = index.clamp(0, len(self.weight) - 1)
        return inside, self.of(index), None if self.bias is None else self.bias[index][:, None]

    def of(self, index: Tensor) -> Tensor:
        """[n, D (+ r)], the head's rows `index`."""
        rows = self.weight[index]
        return rows if self.lora_b is None else torch.cat([rows, self.lora_b[index]], dim=1)

    def reference(self) -> Heads | None:
        """The reference as a pass of its own."""
        if self.ref_hidden is None or self.ref_weight is None:
            return None
        return Heads(
            self.ref_hidden,
            self.ref_weight,
            self.ref_bias,
            self.labels,
            temperature=self.temperature,
        )

    @property
    def states(self) -> Tensor:
        """[N, D], what meets the weight: without the low-rank part that meets `lora_b`."""
        return self.hidden[:, : self.weight.shape[1]]

    @property
    def low(self) -> Tensor:
        """[N, r], what meets `lora_b`."""
        return self.hidden[:, self.weight.shape[1] :]

    def products(self, out: Tensor | None = None) -> Tensor:
        """[N, V] raw products in the accumulator dtype, the low-rank delta included."""
        products = matmul(self.states, self.weight.T, out)
        if self.lora_b is not None:
            # In slices: on a GPU the delta's products need memory of their own.
            for lo, hi in blocks(len(self.lora_b), LORA_COLUMNS):
                put_matmul_(products[:, lo:hi], self.low, self.lora_b[lo:hi].T, add=True)
        return products

    def gradient(self, coefficients: Tensor) -> Tensor:
        """[N, D (+ r)] d loss / d hidden of these columns."""
        if self.lora_b is None and self.weight.dtype == coefficients.dtype:
            return coefficients @ self.weight  # without filling zeros, .8 % of a trained step
        out = coefficients.new_empty(self.hidden.shape)
        self.put_gradient_(out, coefficients, add=False)
        return out

    def put_gradient_(
        self, out: Tensor, coefficients: Tensor, rows: Tensor | None = None, *, add: bool = True
    ) -> None:
        """out [N, D (+ r)] = d loss / d hidden of these columns, or += where `add`.

        `rows` are those that the coefficients have; None for all.
        """
        if rows is not None:
            assert add, "the other rows would stay unwritten"
            some = out[rows]
            self.put_gradient_(some, coefficients)
            out[rows] = some
            return
        width = self.weight.shape[1]
        put_matmul_(out[:, :width], coefficients, self.weight, add=add)
        if self.lora_b is not None:
            put_matmul_(out[:, width:], coefficients, self.lora_b, add=add)


class KeptSlice(NamedTuple):
    """What of a slice of the vocabulary, or of all of it, waits for the backward pass."""

    logits: Tensor  # [N, Vs] z, or h.W by kernels; with a shift exp(z - shift), 0 at the label
    ref_logits: Tensor | None = None  # [N, Vs] of the reference
    shift: Tensor | None = None  # [N]

    def rows(self, index: slice | Tensor) -> KeptSlice:
        """The same of some tokens."""
        return KeptSlice(*(None if t is None else t[index] for t in self))  # pyright: ignore[reportArgumentType]


class Kept(NamedTuple):
    """What waits for the backward pass, so that it need not be recomputed.

    Where p alone makes the coefficients, exponentials do, and spare the backward pass its own. Each
    slice of them is a tensor: an allocator reuses blocks of that size, while 192 MiB at once would
    be mapped and unmapped by every step, for .08 s on a CPU.
    """

    logits: Tensor | None = None  # [N, K] of the first K columns
    ref_logits: Tensor | None = None
    shifts: Tensor | None = None  # [slices, N]
    shares: Tensor | None = None  # [all slices, N], sum of p; infinite where the label is
    exponentials: tuple[Tensor, ...] = ()  # [N, S] of each slice

    def whole(self) -> KeptSlice | None:
        """The logits of the first K columns, if these are kept."""
        return None if self.logits is None else KeptSlice(self.logits, self.ref_logits)

    def slice(self, index: int, lo: int, hi: int) -> KeptSlice | None:
        """What there is of slice number `index`, columns lo:hi."""
        if self.shifts is not None and index < len(self.exponentials):
            return KeptSlice(self.exponentials[index], shift=self.shifts[index])
        if self.logits is None or hi > self.logits.shape[1]:
            return None
        ref = self.ref_logits
        return KeptSlice(self.logits[:, lo:hi], None if ref is None else ref[:, lo:hi])


NOTHING_KEPT = Kept()


class Coefficients(NamedTuple):
    """C [N, Vs] = scale * slab, and single elements that are 0 in it.

    Kept exponentials are such a slab. It meets the two products and nothing else: a pass over it
    to scale it would be 2 % of a step, and what takes the scale instead is [N, D].
    """

    slab: Tensor
    scale: Tensor | None = None  # [N, 1]
    elements: tuple[Tensor, Tensor, Tensor] | None = None  # tokens [n], columns [n], values [n, 1]

    def columns(self, lo: int, hi: int) -> Coefficients:
        """C of the columns lo:hi, where the slab is all of it."""
        if (lo, hi) == (0, self.slab.shape[1]):
            return self
        assert self.scale is None
        return Coefficients(self.slab[:, lo:hi])

    def put_hidden_(
        self, out: Tensor, part: Heads, rows: Tensor | None = None, *, add: bool
    ) -> None:
        """out [N, D (+ r)] = C W for the columns of `part`, or += where `add`.

        C has all of its rows, or `rows`.
        """
        if self.scale is None or self.elements is None:
            part.put_gradient_(out, self.slab, rows, add=add)
            return
        some, (tokens, columns, values) = part.gradient(self.slab), self.elements
        of_labels = part.of(columns).to(out.dtype) * values
        if rows is None:
            total = out.addcmul_(some, self.scale) if add else torch.mul(some, self.scale, out=out)
            total.index_add_(0, tokens, of_labels)
        else:
            assert add, "the other rows would stay unwritten"
            some.mul_(self.scale).index_add_(0, tokens, of_labels)
            out.index_add_(0, rows, some)

    def put_columns_(self, out: Tensor, states: Tensor, *, add: bool) -> None:
        """out [Vs, D] = C^T states, or += where `add`, in the accumulator's dtype."""
        acc = accumulator(states.dtype)
        c = self.slab.T.to(states.dtype) if self.slab.is_cuda else self.slab.T
        scaled = states if self.scale is None else states.to(acc) * self.scale
        if add:
            put_matmul_(out, c, scaled, add=True)
        else:
            matmul(c, scaled, out)
        if self.elements is not None:
            tokens, columns, values = self.elements
            out.index_add_(0, columns, states[tokens].to(acc) * values)

    def put_sums_(self, out: Tensor, *, add: bool) -> None:
        """out [Vs] = C summed over its tokens, or += where `add`, in the accumulator's dtype."""
        if self.scale is None or self.elements is None:
            sums = self.slab.sum(dim=0, dtype=accumulator(self.slab.dtype))
        else:
            _, columns, values = self.elements
            sums = torch.mv(self.slab.T, self.scale.squeeze(1))
            sums.index_add_(0, columns, values.squeeze(1))
        out.copy_(sums.add_(out) if add else sums)
