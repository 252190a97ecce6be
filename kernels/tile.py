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

README.md of this folder has the legend of names and the order of a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Logit(NamedTuple):
    """Say how raw logits become z: the constexpr LOGIT of a kernel.

    One compiled kernel per value. TEMPERATURES: every row has a temperature of its own.
    """

    SOFTCAP: bool
    INNER: float
    OUTER: float
    TEMPERATURES: bool


class Tile(NamedTuple):
    """Hold sizes and dtypes of a matrix product: the constexpr TILE of a kernel.

    D and R are constexpr too. The trip count is then known to the compiler, and the interpreter of
    triton 3.6 cannot range over a runtime argument with numpy >= 2.4.
    """

    D: int
    R: int
    BN: int
    BV: int
    BD: int
    GROUP: int
    TMA: bool
    DOT: tl.dtype
    ACC: tl.dtype


class Strides(NamedTuple):
    """Hold the elements between rows of h [N, D (+ R)], W [V, D] and B [V, R]; None without B."""

    h: int
    w: int
    low: int | None


@triton.jit
def tanh(x):
    """Return tanh to full precision, from exp.

    `tl` has no tanh, and libdevice cannot be interpreted.

    (1 - e) / (1 + e) with e = exp(-2|x|) never overflows, but 1 - e cancels near zero, where most
    capped logits live: at |x| = 2^-7 it keeps 17 bits of fp32. Below 1/2 the [7/8] Pade approximant
    (relative error 3e-19) takes over, so one formula serves fp32 and fp64. One division for both.
    """
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    # Integers below 2^24: exact in fp32 as well, so one text serves both precisions.
    q = x * x
    over = a * (2027025.0 + q * (270270.0 + q * (6930.0 + q * 36.0)))
    under = 2027025.0 + q * (945945.0 + q * (51975.0 + q * (630.0 + q)))
    small = a < 0.5
    r = tl.where(small, over, 1.0 - e) / tl.where(small, under, 1.0 + e)
    return tl.where(x < 0, -r, r)


@triton.jit
def block_order(pid, num_n, num_v, GROUP: tl.constexpr):
    """Return (row block, vocabulary block): GROUP row blocks share their way over the vocabulary.

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
def load_rows(x_ptr, o_n, m_n, BN: tl.constexpr, ACC: tl.constexpr):
    """Return row values [BN], zeros where the pointer is None."""
    # triton 3.6 cannot return None from here; unused zeros compile away.
    if x_ptr is not None:
        return tl.load(x_ptr + o_n, mask=m_n, other=0.0).to(ACC)
    else:
        return tl.zeros([BN], dtype=ACC)


@triton.jit
def add_dot(b_a, h, w, n_first, v_first, d_first, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Return b_a plus a product over WIDTH columns of h, from d_first on, and of w.

    With TMA h and w are descriptors of whole matrices, read in blocks [BN, BD] and [BV, BD] at rows
    n_first and v_first; zeros lie outside. Else pointers [BN, BD] and [BD, BV] to the first blocks.
    """
    BD: tl.constexpr = TILE.BD
    o_d = tl.arange(0, BD)
    for d in range(0, WIDTH, BD):
        if TILE.TMA:
            b_h = h.load([n_first, d_first + d])
            b_w = w.load([v_first, d]).T
        elif WIDTH % BD == 0:
            b_h = tl.load(h)
            b_w = tl.load(w)
        else:
            b_h = tl.load(h, mask=o_d[None, :] < WIDTH - d, other=0.0)
            b_w = tl.load(w, mask=o_d[:, None] < WIDTH - d, other=0.0)
        # fp32 operands multiply in fp32: TF32 would round the logits to 11 bits.
        b_h, b_w = b_h.to(TILE.DOT), b_w.to(TILE.DOT)
        b_a = tl.dot(b_h, b_w, b_a, input_precision="ieee", out_dtype=TILE.ACC)
        if not TILE.TMA:
            h += BD
            w += BD
    return b_a


@triton.jit
def raw_tile(
    hidden_ptr,
    weight_ptr,
    lora_ptr,
    strides,
    i_n,
    v_first,
    N,
    V,
    TILE: tl.constexpr,
):
    """Return the tile [BN, BV] of h W^T (+ l B^T): row block i_n, vocabulary rows from v_first on.

    With TMA the matrices come as descriptors.
    """
    # Unpacked: triton 3.6 refuses members of a constexpr tuple in a shape, [TILE.BN, TILE.BV].
    BN: tl.constexpr = TILE.BN
    BV: tl.constexpr = TILE.BV
    D: tl.constexpr = TILE.D
    R: tl.constexpr = TILE.R
    b_a = tl.zeros([BN, BV], dtype=TILE.ACC)
    if TILE.TMA:
        # The hardware returns zeros past either edge.
        n_first = i_n * BN
        h, w, low = hidden_ptr, weight_ptr, lora_ptr
    else:
        # int64: N * D passes 2^31 at 512K tokens of D 4096. Offsets inside a block fit int32, which
        # takes half the registers.
        n_first = i_n.to(tl.int64) * BN
        v_first = v_first.to(tl.int64)
        # Rows past an edge repeat the last valid one: the loop stays free of predicates, and the
        # caller masks the result.
        o_n = tl.minimum(tl.arange(0, BN), N - 1 - n_first).to(tl.int32)
        o_v = tl.minimum(tl.arange(0, BV), V - 1 - v_first).to(tl.int32)
        o_d = tl.arange(0, TILE.BD)
        h = hidden_ptr + n_first * strides.h + (o_n[:, None] * strides.h + o_d[None, :])
        w = weight_ptr + v_first * strides.w + (o_v[None, :] * strides.w + o_d[:, None])
        if R > 0:
            low = lora_ptr + v_first * strides.low + (o_v[None, :] * strides.low + o_d[:, None])
    b_a = add_dot(b_a, h, w, n_first, v_first, 0, D, TILE)
    if R > 0:
        h_low = h
        if not TILE.TMA:
            h_low += D
        b_a = add_dot(b_a, h_low, low, n_first, v_first, D, R, TILE)
    return b_a


@triton.jit
def inverse_temperature(
    temperature_ptr, o_n, m_n, LOGIT: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr
):
    """Return 1 / T [BN] of every row."""
    if LOGIT.TEMPERATURES:
        # One division a row here, instead of one a logit in `transform`.
        return 1.0 / tl.load(temperature_ptr + o_n, mask=m_n, other=1.0).to(ACC)
    else:
        return tl.full([BN], 1.0, dtype=ACC)


@triton.jit
def transform(b_a, cooling, LOGIT: tl.constexpr):
    """Turn raw logits into (z, dz/da), cooling [BN] being 1 / T. An unused slope compiles away."""
    if LOGIT.SOFTCAP:
        b_t = tanh(b_a * LOGIT.INNER)
        b_z = b_t * LOGIT.OUTER
        b_slope = (1.0 - b_t * b_t) * (LOGIT.INNER * LOGIT.OUTER)
    else:
        b_z = b_a * LOGIT.OUTER
        b_slope = tl.full(b_a.shape, LOGIT.OUTER, b_a.dtype)
    if LOGIT.TEMPERATURES:
        b_z *= cooling[:, None]
        b_slope *= cooling[:, None]
    return b_z, b_slope


# tanh stands for every kernel: all are interpreted if TRITON_INTERPRET was set on import.
INTERPRETED = not isinstance(tanh, triton.JITFunction)


@dataclass(frozen=True)
class Config:
    """Hold block sizes and launch options of one kernel on one chip.

    BN, BV, BD: rows, vocabulary and width of a block (BD is 0 where there is no matrix product).
    group: row blocks that go over the vocabulary together, see `block_order`.
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
    """Return the chip name a table is keyed by: sm_90, gfx942, or `cpu` for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def pick(table: Table, chip: str, dtype: torch.dtype, words: Sequence[str] = ()) -> Config:
    """Return the table's row for this chip, dtype and words.

    Where there is none, words are given up, the last one first, and then the chip.
    """
    chip, bits = _SAME_CHIP.get(chip, chip), str(8 * dtype.itemsize)
    for kept in itertools.product(*((f" {word}", "") for word in words)):
        if (config := table.get((chip, bits + "".join(kept)))) is not None:
            return config
    return table["any", bits]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_TL_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def precision(dtype: torch.dtype) -> dict[str, tl.dtype]:
    """Return DOT (operands) and ACC (accumulator) of a matrix product on inputs of `dtype`.

    The interpreter keeps bfloat16 as uint16 and multiplies the integers, so operands widen there.
    """
    widen = INTERPRETED and dtype == torch.bfloat16
    return {
        "DOT": tl.float32 if widen else _TL_DTYPE[dtype],
        "ACC": _TL_DTYPE[acc_dtype(dtype)],
    }


def logit_arguments(
    softcap: float | None, logit_scale: float, temperature: float | Tensor
) -> dict[str, object]:
    """Return a kernel's arguments for `transform`: `temperature_ptr` and LOGIT."""
    rows, number = (
        (temperature.contiguous(), 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    )
    inner, outer = (1.0, logit_scale) if softcap is None else (logit_scale / softcap, softcap)
    # Floats: triton 3.6 multiplies members by the first one's method, and int * float has none.
    logit = Logit(softcap is not None, float(inner), float(outer / number), rows is not None)
    return {"temperature_ptr": rows, "LOGIT": logit}


class Operands(NamedTuple):
    """Hold the matrices of `raw_tile`: h [N, D (+ R)], W [V, D], and B [V, R] or None."""

    hidden: Tensor
    weight: Tensor
    lora: Tensor | None


def operands(hidden: Tensor, weight: Tensor, lora: Tensor | None) -> Operands:
    """Return the matrices with unit stride along their rows."""
    return Operands(unit_rows(hidden), unit_rows(weight), None if lora is None else unit_rows(lora))


def described(matrices: Operands) -> bool:
    """Tell whether TMA can read the matrices: rows start at, and are apart by, 16 bytes or more."""
    return all(
        m.data_ptr() % 16 == 0 and m.stride(0) >= m.shape[1] and m.stride(0) * m.itemsize % 16 == 0
        for m in matrices
        if m is not None
    )


def matrix_arguments(config: Config, matrices: Operands) -> dict[str, object]:
    """Return a matrix kernel's arguments for `raw_tile`, and its launch options."""
    hidden, weight, lora = matrices
    blocks = (config.BN, config.BV, config.BV)
    named = zip(Operands._fields, matrices, blocks, strict=True)
    pointers = {
        f"{name}_ptr": TensorDescriptor.from_tensor(matrix, [rows, config.BD])
        if config.tma and matrix is not None
        else matrix
        for name, matrix, rows in named
    }
    low, rank = (None, 0) if lora is None else (lora.stride(0), lora.shape[1])
    return pointers | {
        "strides": Strides(hidden.stride(0), weight.stride(0), low),
        "TILE": tile_of(config, hidden.dtype, weight.shape[1], rank),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def tile_of(config: Config, dtype: torch.dtype, width: int, rank: int) -> Tile:
    """Return the TILE of a launch configuration, for inputs of `dtype` and the given D and R."""
    blocks = {"BN": config.BN, "BV": config.BV, "BD": config.BD, "GROUP": config.group}
    return Tile(D=width, R=rank, **blocks, TMA=config.tma, **precision(dtype))


def transform_reference(
    raw: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float | Tensor,
) -> Tensor:
    """Return z of raw products, in plain torch and in the dtype of `raw`."""
    z = raw if bias is None else raw + bias.to(raw.dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def raw_reference(hidden: Tensor, weight: Tensor, lora: Tensor | None) -> Tensor:
    """Return raw products [N, V] in plain torch; 16-bit inputs widen to fp32 first."""
    acc, width = acc_dtype(hidden.dtype), weight.shape[1]
    raw = hidden[:, :width].to(acc) @ weight.to(acc).T
    return raw if lora is None else raw + hidden[:, width:].to(acc) @ lora.to(acc).T


def unit_rows(matrix: Tensor) -> Tensor:
    """Return `matrix` with unit stride along its rows: a copy unless its rows are contiguous."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Enter the tensor's device: triton launches on the current one, whatever its inputs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
