r"""What a pass of the head is made of: its tensors, its options, what it keeps, its coefficients.

The logits of N target tokens are an [N, V] matrix that never exists whole. It is produced a chunk
at a time, reduced to statistics, and where a gradient is due turned in place into coefficients

    C[t, v] = d(loss) / d(h_t . W_v + b_v),   so that   dH = C W   and   dW = C^T H.

With $z_v = softcap(s (W_v \cdot h + b_v)) / T$, $c_v = (s/T)(1 - tanh^2)$ and cotangents g:

    C_v = c_v ( g_logps (1[v=y] - p_v) + g_lse p_v + g_mean/V - g_entropy p_v (log p_v + H)
              + g_klf (p_v - pref_v) + g_klr p_v (log p_v - log pref_v - KLr)
              + g_jsd (1 - beta) p_v (log p_v - log m_v - KLm) ),

m = beta pref + (1 - beta) p the mixture of `jsd` and KLm = KL(p || m), `kl_policy_mix`.

C is formed in fp32, the target's column included, and rounded to the inputs' dtype once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.head.vocab_parallel import Shard

DIVERGENCES = ("kl_ref_policy", "kl_policy_ref", "jsd")
DIFFERENTIABLE = ("logps", "lse", "entropy", "mean_logit", *DIVERGENCES)
OF_REFERENCE = (*DIVERGENCES, "ref_logps")  # these need a second head
STATISTICS = (*DIFFERENTIABLE, "log_p2", "top1", "skipped", "ref_logps")

# Vocabulary rows that a CPU turns into float32 at a time: 16 MiB at D = 4096.
UPCAST_ROWS = 1024
# Columns of a low-rank delta that are formed at a time on a GPU: 256 MiB at 8192 tokens.
LORA_COLUMNS = 8192


def needs_reference(statistics: Iterable[str]) -> bool:
    """Return whether one of them compares with a second head."""
    return any(name in OF_REFERENCE for name in statistics)


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield half-open intervals of `size` that cover range(total)."""
    return ((lo, min(lo + size, total)) for lo in range(0, total, size))


def concatenate(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the statistics of chunks of tokens to one [N] tensor a name."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class LogitTransform(NamedTuple):
    """Compute z = softcap((h.W + b) * logit_scale) / temperature."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float | Tensor = 1.0  # [B, 1] after `of`

    def of(self, tensors: PassTensors) -> LogitTransform:
        """Return the transform of these tokens, with their own temperatures if they have any."""
        own = tensors.temperatures
        return self if own is None else self._replace(temperature=own[:, None])

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
        """Return dz / d(h.W): a chunk with a soft-cap, otherwise one number, or one a token."""
        slope = self.logit_scale / self.temperature
        if self.softcap is None:
            return slope
        tanh = z * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1).mul_(slope)


class PassOptions(NamedTuple):
    """Hold everything about a pass that is not a tensor; an operator hands over lists."""

    want: Sequence[str]  # statistics to return
    grads: Sequence[str]  # those of them that carry a gradient
    softcap: float | None
    logit_scale: float
    temperature: float
    jsd_beta: float
    skip_below: float  # a chunk of smaller probability is left out of a token's gradient
    backend: str  # torch or triton
    schedule: str
    chunk_tokens: int  # from here on as in `schedule.Schedule`
    chunk_columns: int
    late_tokens: int
    kept: int
    group: str | None  # from here on the fields of Shard
    rank: int
    rows: Sequence[int]
    tokens: Sequence[int]

    @property
    def transform(self) -> LogitTransform:
        """Return what turns products into logits."""
        return LogitTransform(self.softcap, self.logit_scale, self.temperature)

    @property
    def shard(self) -> Shard:
        """Return the vocabulary rows that are here."""
        return Shard(self.group, self.rank, tuple(self.rows), tuple(self.tokens))

    @property
    def late(self) -> bool:
        """Return whether the backward pass goes through the vocabulary."""
        return self.schedule in ("kept", "recompute")

    @property
    def early_grads(self) -> tuple[str, ...]:
        """Return the statistics whose gradient to the hidden states the forward pass forms."""
        return tuple(self.grads) if self.schedule == "frozen" else ()

    @property
    def with_reference(self) -> bool:
        """Return whether a second head's logits are formed too."""
        return needs_reference(self.want)

    @property
    def spends(self) -> bool:
        """Return whether coefficients can take the place of the kept products."""
        return self.backend == "triton" and self.schedule == "kept" and not self.with_reference

    @property
    def statistics(self) -> tuple[str, ...]:
        """Return what the forward pass returns: those wanted, and what `coefficients` takes."""
        if not self.late:
            return tuple(self.want)
        needed = (*self.want, "lse", "lse_rest", "logps")
        if self.with_reference:
            needed += ("ref_lse", "ref_lse_rest", "ref_logps")
        if "jsd" in self.grads:
            needed += ("kl_policy_mix",)
        return tuple(dict.fromkeys(needed))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b in the accumulator dtype; nothing is rounded to half on the way."""
    acc = accumulator(a.dtype)
    if a.dtype == b.dtype == acc:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=acc, out=out)
    # Half-precision matmuls on CPUs without AMX are 5-25 times slower than float32 ones.
    return torch.mm(a.to(acc), b.to(acc), out=out)


def put_matmul_(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> Tensor:
    """Write out = a @ b, or += where `add`, in out's accumulator dtype.

    Coefficients `a` are rounded to b's dtype, once. On a GPU the matmul itself adds (beta = 1):
    a separate sum would read and write [N, D] or [V, D] of fp32 twice more.
    """
    if b.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if b.is_cuda:
        a = a.to(b.dtype)
        if not add:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    for lo, hi in chunks(b.shape[0], UPCAST_ROWS):
        put_matmul_(out, a[:, lo:hi].to(out.dtype), b[lo:hi].to(out.dtype), add=add or lo > 0)
    return out


class PassTensors(NamedTuple):
    """Hold the tensors of one pass: N target tokens, one head, and the reference's if any."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    targets: Tensor  # [N] int64, all within [0, V)
    ref_hidden: Tensor | None = None  # [N, D']
    ref_weight: Tensor | None = None  # [V, D']
    ref_bias: Tensor | None = None
    temperatures: Tensor | None = None  # [N] in the accumulator dtype
    lora_b: Tensor | None = None  # [V, r]; `hidden` is then [N, D + r], see `token_statistics`

    def pick(self, index: slice | Tensor) -> PassTensors:
        """Return the pass restricted to tokens `index`."""
        return self._of_tokens(lambda tensor: tensor[index])

    def gathered(self, shard: Shard) -> PassTensors:
        """Return the pass over the tokens of all ranks."""
        return self._of_tokens(shard.gather)

    def _of_tokens(self, take: Callable[[Tensor], Tensor]) -> PassTensors:
        return self._changed(("hidden", "targets", "ref_hidden", "temperatures"), take)

    def columns(self, lo: int, hi: int) -> PassTensors:
        """Return the pass restricted to columns lo:hi of the logits; targets stay as they are."""
        names = ("weight", "bias", "ref_weight", "ref_bias", "lora_b")
        return self._changed(names, lambda tensor: tensor[lo:hi])

    def _changed(self, names: tuple[str, ...], take: Callable[[Tensor], Tensor]) -> PassTensors:
        before = {name: getattr(self, name) for name in names}
        return self._replace(**{n: None if t is None else take(t) for n, t in before.items()})

    def of_targets(self, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what belongs to the targets in vocabulary rows that start at number `first`.

        Returns:
            [N] whether the targets lie inside, their rows [N, D (+ r)] and biases [N, 1]; values of
            targets outside are arbitrary.
        """
        index = self.targets - first
        inside = (index >= 0) & (index < len(self.weight))
        index = index.clamp(0, len(self.weight) - 1)
        bias = None if self.bias is None else self.bias[index][:, None]
        return inside, self.vocabulary_rows(index), bias

    def vocabulary_rows(self, index: Tensor) -> Tensor:
        """Return [n, D (+ r)], the head's rows `index`."""
        rows = self.weight[index]
        return rows if self.lora_b is None else torch.cat([rows, self.lora_b[index]], dim=1)

    def reference(self) -> PassTensors | None:
        """Return the reference as a pass of its own."""
        if self.ref_hidden is None or self.ref_weight is None:
            return None
        return PassTensors(
            self.ref_hidden,
            self.ref_weight,
            self.ref_bias,
            self.targets,
            temperatures=self.temperatures,
        )

    @property
    def states(self) -> Tensor:
        """Return [N, D], what meets the weight: without the low-rank part that meets `lora_b`."""
        return self.hidden[:, : self.weight.shape[1]]

    @property
    def low(self) -> Tensor:
        """Return [N, r], what meets `lora_b`."""
        return self.hidden[:, self.weight.shape[1] :]

    def products(self, out: Tensor | None = None) -> Tensor:
        """Return [N, V] raw products in the accumulator dtype, the low-rank delta included."""
        products = matmul(self.states, self.weight.T, out)
        if self.lora_b is not None:
            # In chunks: on a GPU the delta's products need memory of their own.
            for lo, hi in chunks(len(self.lora_b), LORA_COLUMNS):
                put_matmul_(products[:, lo:hi], self.low, self.lora_b[lo:hi].T, add=True)
        return products

    def gradient(self, coefficients: Tensor) -> Tensor:
        """Return [N, D (+ r)] d loss / d hidden of these columns."""
        if self.lora_b is None and self.weight.dtype == coefficients.dtype:
            return coefficients @ self.weight  # without filling zeros, .8 % of a trained step
        out = coefficients.new_empty(self.hidden.shape)
        self.put_gradient_(out, coefficients, add=False)
        return out

    def put_gradient_(
        self, out: Tensor, coefficients: Tensor, index: Tensor | None = None, *, add: bool = True
    ) -> None:
        """Write out [N, D (+ r)] = d loss / d hidden of these columns, or += where `add`.

        `index` names the tokens that the coefficients have; None for all.
        """
        if index is not None:
            assert add, "the other tokens would stay unwritten"
            part = out[index]
            self.put_gradient_(part, coefficients)
            out[index] = part
            return
        width = self.weight.shape[1]
        put_matmul_(out[:, :width], coefficients, self.weight, add=add)
        if self.lora_b is not None:
            put_matmul_(out[:, width:], coefficients, self.lora_b, add=add)


class KeptChunk(NamedTuple):
    """Hold what of a chunk of the vocabulary, or of all of it, waits for the backward pass."""

    logits: Tensor  # [N, Vc] z, or h.W by kernels; with a shift exp(z - shift), 0 at the target
    ref_logits: Tensor | None = None  # [N, Vc] of the reference
    shift: Tensor | None = None  # [N]

    def pick(self, index: slice | Tensor) -> KeptChunk:
        """Return the same of tokens `index`."""
        return KeptChunk(*(None if t is None else t[index] for t in self))  # pyright: ignore[reportArgumentType]


class Kept(NamedTuple):
    """Hold what waits for the backward pass, so that it need not be recomputed.

    Where p alone makes the coefficients, exponentials do, and spare the backward pass its own. Each
    chunk of them is a tensor: an allocator reuses blocks of that size, while 192 MiB at once would
    be mapped and unmapped by every step, for .08 s on a CPU.
    """

    logits: Tensor | None = None  # [N, K] of the first K columns
    ref_logits: Tensor | None = None
    shifts: Tensor | None = None  # [chunks, N]
    shares: Tensor | None = None  # [all chunks, N], sum of p; infinite where the target is
    exponentials: tuple[Tensor, ...] = ()  # [N, S] of each chunk

    @classmethod
    def room(cls, tensors: PassTensors, options: PassOptions, *, exponentials: bool) -> Kept:
        """Return empty tensors for what a pass keeps."""
        if not options.late:
            return NOTHING_KEPT
        n, vocab_size = len(tensors.targets), len(tensors.weight)
        # The options are the same for all ranks, whose vocabulary rows may be fewer.
        columns = min(options.kept, vocab_size)

        def empty(*shape: int) -> Tensor:
            return tensors.hidden.new_empty(shape, dtype=accumulator(tensors.hidden.dtype))

        count = -(-vocab_size // options.chunk_columns)
        shares = empty(count, n) if options.skip_below else None
        if not columns:
            return cls(shares=shares)
        if exponentials:
            parts = tuple(empty(n, hi - lo) for lo, hi in chunks(columns, options.chunk_columns))
            return cls(shifts=empty(len(parts), n), shares=shares, exponentials=parts)
        ref_logits = None if tensors.ref_hidden is None else empty(n, columns)
        return cls(empty(n, columns), ref_logits, shares=shares)

    def flat(self, like: Tensor) -> list[Tensor]:
        """Return an operator's list, which has no None: an empty vector stands for it."""
        return [like.new_empty(0) if t is None else t for t in self[:-1]] + list(self.exponentials)

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor]) -> Kept:
        """Return the inverse of `flat`."""
        fixed = len(cls._fields) - 1
        logits, ref_logits, shifts, shares = (t if t.dim() > 1 else None for t in tensors[:fixed])
        return cls(logits, ref_logits, shifts, shares, tuple(tensors[fixed:]))

    def whole(self) -> KeptChunk | None:
        """Return the logits of the first K columns, if these are kept."""
        return None if self.logits is None else KeptChunk(self.logits, self.ref_logits)

    def chunk(self, index: int, lo: int, hi: int) -> KeptChunk | None:
        """Return what there is of chunk number `index`, columns lo:hi."""
        if self.shifts is not None and index < len(self.exponentials):
            return KeptChunk(self.exponentials[index], shift=self.shifts[index])
        if self.logits is None or hi > self.logits.shape[1]:
            return None
        ref = self.ref_logits
        return KeptChunk(self.logits[:, lo:hi], None if ref is None else ref[:, lo:hi])


NOTHING_KEPT = Kept()


class Coefficients(NamedTuple):
    """Hold C [N, Vc] = scale * values, and single elements that are 0 in `values`.

    Kept exponentials are such values. They meet the two matmuls and nothing else: a pass over them
    to scale them would be 2 % of a step, and what takes the scale instead is [N, D].
    """

    values: Tensor
    scale: Tensor | None = None  # [N, 1]
    elements: tuple[Tensor, Tensor, Tensor] | None = None  # tokens [n], columns [n], values [n, 1]

    def columns(self, lo: int, hi: int) -> Coefficients:
        """Return C of the columns lo:hi, where `values` are all of it."""
        if (lo, hi) == (0, self.values.shape[1]):
            return self
        assert self.scale is None
        return Coefficients(self.values[:, lo:hi])

    def put_hidden_(
        self, out: Tensor, part: PassTensors, index: Tensor | None = None, *, add: bool
    ) -> None:
        """Write out [N, D (+ r)] = C W for the columns of `part`, or += where `add`.

        `index` names the tokens that C has; None for all.
        """
        if self.scale is None or self.elements is None:
            part.put_gradient_(out, self.values, index, add=add)
            return
        gradient, (tokens, columns, values) = part.gradient(self.values), self.elements
        of_targets = part.vocabulary_rows(columns).to(out.dtype) * values
        if index is None:
            if add:
                total = out.addcmul_(gradient, self.scale)
            else:
                total = torch.mul(gradient, self.scale, out=out)
            total.index_add_(0, tokens, of_targets)
        else:
            assert add, "the other tokens would stay unwritten"
            gradient.mul_(self.scale).index_add_(0, tokens, of_targets)
            out.index_add_(0, index, gradient)

    def put_columns_(self, out: Tensor, states: Tensor, *, add: bool) -> None:
        """Write out [Vc, D] = C^T states, or += where `add`, in the accumulator's dtype."""
        acc = accumulator(states.dtype)
        c = self.values.T.to(states.dtype) if self.values.is_cuda else self.values.T
        scaled = states if self.scale is None else states.to(acc) * self.scale
        if add:
            put_matmul_(out, c, scaled, add=True)
        else:
            matmul(c, scaled, out)
        if self.elements is not None:
            tokens, columns, values = self.elements
            out.index_add_(0, columns, states[tokens].to(acc) * values)

    def put_sums_(self, out: Tensor, *, add: bool) -> None:
        """Write out [Vc] = C summed over its tokens, or += where `add`, in its own dtype."""
        if self.scale is None or self.elements is None:
            sums = self.values.sum(dim=0, dtype=accumulator(self.values.dtype))
        else:
            _, columns, values = self.elements
            sums = torch.mv(self.values.T, self.scale.squeeze(1))
            sums.index_add_(0, columns, values.squeeze(1))
        out.copy_(sums.add_(out) if add else sums)
