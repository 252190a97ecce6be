"""The logit tile: what every kernel of the head does to a block of rows and a block of vocabulary.

    a = h W^T + b                     raw logit, accumulated in fp32 (fp64 inputs: fp64)
    z = OUTER * squash(INNER * a)     squash = tanh under a soft-cap, else the identity
    dz/da = OUTER * INNER * (1 - squash^2)

A head's low-rank delta B [V, R] adds l B^T to a, with l [N, R] the last R columns of `hidden`. Rows
with temperatures of their own divide z and dz/da by them.

`softcap(x) = cap tanh(x / cap)` applied to `scale * a`, divided by the temperature, is exactly this
with INNER = scale / cap and OUTER = cap / temperature; without a soft-cap INNER = 1 and
OUTER = scale / temperature. Both are constexpr: they belong to a model and a run, a compiled kernel
is kept per value, a factor of one folds away, and float64 runs see them unrounded (a float argument
of a kernel is fp32).

Legend for all files: N rows, V vocabulary, D width; B* block sizes; `x_ptr` pointer (a matrix with
TMA: descriptor), `o_v` offsets, `m_v` mask, `b_x` block value [BN, BV], `i_n` block index. Row
vectors [BN] carry no prefix.

D is constexpr too: the trip count is then known to the compiler, and the interpreter of triton 3.6
cannot range over a runtime argument with numpy >= 2.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tanh(x):
    """tanh to full precision, from exp: tl has no tanh, and libdevice cannot be interpreted.

    (1 - e) / (1 + e) with e = exp(-2|x|) never overflows, but 1 - e cancels near zero, where most
    capped logits live: at |x| = 2^-7 it keeps 17 bits of fp32. Below 1/2 the [7/8] Pade approximant
    (relative error 3e-19) takes over, so one formula serves fp32 and fp64. One division for both.
    """
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    q = x * x
    over = a * (2027025.0 + q * (270270.0 + q * (6930.0 + q * 36.0)))
    under = 2027025.0 + q * (945945.0 + q * (51975.0 + q * (630.0 + q)))
    small = a < 0.5
    r = tl.where(small, over, 1.0 - e) / tl.where(small, under, 1.0 + e)
    return tl.where(x < 0, -r, r)


@triton.jit
def block_order(pid, num_n, num_v, GROUP: tl.constexpr):
    """Program id -> (row block, vocabulary block): GROUP row blocks walk the vocabulary together.

    Programs in flight then share GROUP blocks of hidden rows and about (programs / GROUP) of weight
    rows, both of which stay in L2; plain row-major order would stream one of the two from memory
    once per program.
    """
    wave = GROUP * num_v
    first = (pid // wave) * GROUP
    rows = tl.minimum(num_n - first, GROUP)
    within = pid % wave
    return first + within % rows, within // rows


@triton.jit
def load_rows(x_ptr, o_n, m_n, HAS: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """[BN] row values, zero where the input is absent."""
    if HAS:
        return tl.load(x_ptr + o_n, mask=m_n, other=0.0).to(ACC)
    else:
        return tl.zeros([BN], dtype=ACC)


@triton.jit
def add_dot(
    b_a,
    h,
    w,
    n_first,
    v_first,
    d_first,
    D: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """b_a + the product over D columns: of h from column d_first on, of w from its first.

    With TMA h and w are descriptors of whole matrices, read in blocks [BN, BD] and [BV, BD] at rows
    n_first and v_first; zeros lie outside. Else pointers [BN, BD] and [BD, BV] to the first blocks.
    """
    o_d = tl.arange(0, BD)
    for d in range(0, D, BD):
        if TMA:
            b_h = h.load([n_first, d_first + d])
            b_w = w.load([v_first, d]).T
        elif D % BD == 0:
            b_h = tl.load(h)
            b_w = tl.load(w)
        else:
            b_h = tl.load(h, mask=o_d[None, :] < D - d, other=0.0)
            b_w = tl.load(w, mask=o_d[:, None] < D - d, other=0.0)
        b_a = tl.dot(b_h.to(DOT), b_w.to(DOT), b_a, input_precision="ieee", out_dtype=ACC)
        if not TMA:
            h += BD
            w += BD
    return b_a


@triton.jit
def raw_tile(
    hidden_ptr,
    weight_ptr,
    lora_ptr,
    stride_hn,
    stride_wv,
    stride_lv,
    i_n,
    v_first,
    N,
    V,
    D: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BN, BV] tile of h W^T (+ l B^T) for row block i_n and the vocabulary rows from v_first on.

    Rows past either edge repeat the last valid one instead of being masked: the loop stays free of
    predicates and the caller masks the result. Block bases are int64, offsets inside fit int32.
    With TMA the matrices come as descriptors, and rows past an edge are zeros.
    fp32 operands multiply in fp32: TF32 would round the logits to 11 bits.
    """
    b_a = tl.zeros([BN, BV], dtype=ACC)
    if TMA:
        n_first = i_n * BN
        h, w, low = hidden_ptr, weight_ptr, lora_ptr
    else:
        n_first = i_n.to(tl.int64) * BN
        v_first = v_first.to(tl.int64)
        o_n = tl.minimum(tl.arange(0, BN), N - 1 - n_first).to(tl.int32)
        o_v = tl.minimum(tl.arange(0, BV), V - 1 - v_first).to(tl.int32)
        o_d = tl.arange(0, BD)
        h = hidden_ptr + n_first * stride_hn + (o_n[:, None] * stride_hn + o_d[None, :])
        w = weight_ptr + v_first * stride_wv + (o_v[None, :] * stride_wv + o_d[:, None])
        if R > 0:
            low = lora_ptr + v_first * stride_lv + (o_v[None, :] * stride_lv + o_d[:, None])
    b_a = add_dot(b_a, h, w, n_first, v_first, 0, D, BD, TMA, DOT, ACC)
    if R > 0:
        h_low = h
        if not TMA:
            h_low += D
        b_a = add_dot(b_a, h_low, low, n_first, v_first, D, R, BD, TMA, DOT, ACC)
    return b_a


@triton.jit
def inverse_temperature(
    temperature_ptr, o_n, m_n, HAS_TEMPERATURE: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr
):
    """[BN] 1 / T of every row."""
    if HAS_TEMPERATURE:
        return 1.0 / tl.load(temperature_ptr + o_n, mask=m_n, other=1.0).to(ACC)
    else:
        return tl.full([BN], 1.0, dtype=ACC)


@triton.jit
def transform(
    b_a,
    cooling,
    SOFTCAP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """Raw logits -> (z, dz/da), cooling [BN] being 1 / T. An unused slope compiles away."""
    if SOFTCAP:
        b_t = tanh(b_a * INNER)
        b_z = b_t * OUTER
        b_slope = (1.0 - b_t * b_t) * (INNER * OUTER)
    else:
        b_z = b_a * OUTER
        b_slope = tl.full(b_a.shape, OUTER, b_a.dtype)
    if HAS_TEMPERATURE:
        b_z *= cooling[:, None]
        b_slope *= cooling[:, None]
    return b_z, b_slope


@triton.jit
def coefficient(
    b_z,
    b_slope,
    m_label,
    lse,
    lse_rest,
    logp,
    entropy,
    g_logps,
    g_lse,
    g_mean,
    g_entropy,
    V,
    HAS_LOGPS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """d loss / da from the cotangents of the row statistics, in the accumulator's precision.

        dz/da * ( g_logps (1[v = y] - p) + g_lse p + g_mean / V - g_entropy p (log p + H) )

    The label's column is a row vector of its own, formed from the saved log p, and its 1 - p is
    -expm1(log p): for a confident token both vanish, and recomputing them as z - lse and
    1 - exp(z - lse) would return rounding noise.
    """
    own = tl.zeros_like(logp)
    factor = tl.zeros_like(logp)  # of p in the other columns
    p = tl.exp(logp)
    if HAS_LOGPS:
        t = tanh(0.5 * logp)
        own += g_logps * (-2.0 * t / (1.0 - t))  # -expm1(logp) without cancellation
        factor -= g_logps
    if HAS_LSE:
        own += g_lse * p
        factor += g_lse
    if HAS_ENTROPY:
        own -= g_entropy * tl.where(p == 0.0, 0.0, p * (logp + entropy))
    b_c = tl.zeros(b_z.shape, dtype=b_z.dtype)
    if HAS_LOGPS or HAS_LSE or HAS_ENTROPY:
        b_logp = (b_z - lse[:, None]) - lse_rest[:, None]
        b_p = tl.exp(b_logp)
        b_c = b_p * factor[:, None]
        if HAS_ENTROPY:
            # A logit of -inf has p = 0 and adds nothing; 0 * -inf would be NaN.
            b_e = b_p * (b_logp + entropy[:, None]) * g_entropy[:, None]
            b_c -= tl.where(b_p == 0.0, 0.0, b_e)
        b_c = tl.where(m_label, own[:, None], b_c)
    if HAS_MEAN:
        b_c += (g_mean / V)[:, None]
    return b_c * b_slope


# tanh stands for every kernel: all are interpreted if TRITON_INTERPRET was set on import.
INTERPRETED = not isinstance(tanh, triton.JITFunction)


@dataclass(frozen=True)
class Config:
    """Block sizes and launch options of one kernel on one chip.

    BN, BV, BD: rows, vocabulary and width of a block (BD is 0 where there is no matrix product).
    group: row blocks that walk the vocabulary together, see `block_order`.
    tma: matrices are read through descriptors, by the hardware's tensor memory accelerator.
    """

    BN: int
    BV: int
    BD: int = 0
    group: int = 1
    warps: int = 4
    stages: int = 1
    tma: bool = False


Table = Mapping[tuple[str, str], Config]
"""(chip, regime) -> Config. A regime is the width of the input dtype in bits, then words: `rich`
where a soft-cap or more than log-probabilities needs registers that others spend on a larger tile,
`pointers` where descriptors cannot be used, `narrow` for small D. The chip `any` is the fallback of
every table."""

_SAME_CHIP = {"sm_103": "sm_100"}


def chip_of(device: torch.device) -> str:
    """The chip name a table is keyed by: sm_90, gfx942, ..., or `cpu` for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def pick(table: Table, chip: str, dtype: torch.dtype, words: Sequence[str] = ()) -> Config:
    """The table's row for this chip, dtype and of `words` what it has, the last given up first;
    else the one for any chip."""
    chip, bits = _SAME_CHIP.get(chip, chip), str(8 * dtype.itemsize)
    for kept in itertools.product(*((f" {word}", "") for word in words)):
        if (found := table.get((chip, bits + "".join(kept)))) is not None:
            return found
    return table["any", bits]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel accumulates and returns statistics: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_TL_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def precision(dtype: torch.dtype) -> dict[str, tl.dtype]:
    """Constexprs DOT (operands) and ACC (accumulator) of a matrix product on inputs of `dtype`.

    The interpreter keeps bfloat16 as uint16 and multiplies the integers, so operands widen there.
    """
    widen = INTERPRETED and dtype == torch.bfloat16
    return {
        "DOT": tl.float32 if widen else _TL_DTYPE[dtype],
        "ACC": _TL_DTYPE[acc_dtype(dtype)],
    }


def transform_arguments(
    softcap: float | None, logit_scale: float, temperature: float | Tensor
) -> dict[str, Any]:
    """A kernel's arguments for `transform`."""
    rows, number = (
        (temperature.contiguous(), 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    )
    inner, outer = (1.0, logit_scale) if softcap is None else (logit_scale / softcap, softcap)
    return {
        "temperature_ptr": rows,
        "HAS_TEMPERATURE": rows is not None,
        "SOFTCAP": softcap is not None,
        "INNER": inner,
        "OUTER": outer / number,
    }


def operands(hidden: Tensor, weight: Tensor, lora: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments for `raw_tile`: h [N, D (+ R)], W [V, D], and B [V, R] or None."""
    hidden, weight = unit_rows(hidden), unit_rows(weight)
    lora = None if lora is None else unit_rows(lora)
    return {
        "hidden_ptr": hidden,
        "weight_ptr": weight,
        "lora_ptr": lora,
        "stride_hn": hidden.stride(0),
        "stride_wv": weight.stride(0),
        "stride_lv": 0 if lora is None else lora.stride(0),
        "D": weight.shape[1],
        "R": 0 if lora is None else lora.shape[1],
    }


def described(arguments: Mapping[str, Any]) -> bool:
    """Whether TMA can read these `operands`: rows 16 bytes apart or a multiple, and start there."""
    matrices = [arguments[f"{name}_ptr"] for name in ("hidden", "weight", "lora")]
    return all(
        m.data_ptr() % 16 == 0 and m.stride(0) >= m.shape[1] and m.stride(0) * m.itemsize % 16 == 0
        for m in matrices
        if m is not None
    )


def blocks_of(config: Config, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks and launch options of a matrix kernel; with TMA also descriptors for `arguments`."""
    rows = {"hidden_ptr": config.BN, "weight_ptr": config.BV, "lora_ptr": config.BV}
    descriptors = {
        name: TensorDescriptor.from_tensor(arguments[name], [size, config.BD])
        for name, size in rows.items()
        if config.tma and arguments[name] is not None
    }
    return descriptors | {
        "BN": config.BN,
        "BV": config.BV,
        "BD": config.BD,
        "GROUP": config.group,
        "TMA": config.tma,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def transform_reference(
    raw: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float | Tensor,
) -> Tensor:
    """z from raw products, in plain torch and in the dtype of `raw`."""
    z = raw if bias is None else raw + bias.to(raw.dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def raw_reference(hidden: Tensor, weight: Tensor, lora: Tensor | None) -> Tensor:
    """Raw products [N, V] in plain torch; 16-bit inputs widen to fp32 first."""
    acc, width = acc_dtype(hidden.dtype), weight.shape[1]
    raw = hidden[:, :width].to(acc) @ weight.to(acc).T
    return raw if lora is None else raw + hidden[:, width:].to(acc) @ lora.to(acc).T


def unit_rows(matrix: Tensor) -> Tensor:
    """`matrix` with unit stride along its rows: any row stride is read in place, others copied."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Launch on the tensor's device: triton launches on the current one, whatever its inputs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
