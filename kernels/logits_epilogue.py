r"""Statistics, and the coefficients of one of them, from raw products that are already in memory.

    a = h W^T [B, V] in fp32, from cuBLAS   ->   the statistics of `linear_stats`, [B] each
                                            ->   C = d statistic / d a [B, V], rounded once

The schedule of a frozen head: while a chunk of logits is alive, r = C W [B, D] is formed by a
second product. The backward of ANY objective over that statistic is then dH_n = g_n r_n,
elementwise, with no recompute: two matrix products in all, where recomputing takes three.

One launch, one program a row, two sweeps: online statistics, then C. Traffic 4 BV bytes for the
statistics and (4 + size of C) BV for the coefficients; no exponential is ever stored.

C may take the place of the products that it is made of (`over`), so that a chunk costs 4 bytes an
element and not 4 + size of C. The second sweep goes backwards, since what the first one read last
may still be in the L2 cache: 60 MB on an H200, where the rows in flight have 200 at V = 131072.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient import DIFFERENTIABLE, Grads, coefficient
from .launch_table import launch
from .online import (
    absorb,
    accumulated,
    check_names,
    empty_state,
    finish,
    pointers,
    statistics_reference,
    store_statistics,
)
from .tile import (
    Config,
    acc_dtype,
    chip_of,
    inverse_temperature,
    logit_arguments,
    on_device_of,
    precision,
    transform,
    transform_reference,
)


@triton.jit
def load_logits(row_ptrs, bias_ptr, o_v, m_n, cooling, V, LOGIT: tl.constexpr, ACC: tl.constexpr):
    """Return z and dz/da of the columns o_v [BV] of the rows at row_ptrs [BN]."""
    m_v = o_v < V
    b_a = tl.load(row_ptrs[:, None] + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0.0)
    b_a = b_a.to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_v, mask=m_v, other=0.0)
        b_a += bias.to(ACC)[None, :]
    return transform(b_a, cooling, LOGIT)


@triton.jit
def put_coefficients(
    row_ptrs,
    bias_ptr,
    out_ptrs,
    m_n,
    labels,
    cooling,
    saved,
    grads,
    columns,
    V,
    BLOCKS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LOGIT: tl.constexpr,
    GRADS: tl.constexpr,
    ACC: tl.constexpr,
    BV: tl.constexpr,
):
    """Write C of the rows at row_ptrs [BN], the last block of columns first.

    In place, block b of a 16-bit C covers bytes 2V + 2b BV and on of its row. Its products begin
    at 4b BV, no later, since b BV < V. So only products of block b and of later ones, which are
    read already, are overwritten, once all threads hold block b: one barrier.
    """
    for i in range(BLOCKS):
        # Backwards: of 203 MB of rows in flight on an H200 the L2 cache has the last 60 MB read.
        o_v = (BLOCKS - 1 - i) * BV + tl.arange(0, BV)
        b_z, b_slope = load_logits(row_ptrs, bias_ptr, o_v, m_n, cooling, columns, LOGIT, ACC)
        m_label = o_v[None, :] == labels[:, None]
        b_c = coefficient(b_z, b_slope, m_label, saved, grads, V, GRADS)
        if IN_PLACE:
            tl.debug_barrier()
        b_c = b_c.to(out_ptrs.dtype.element_ty)
        m_out = m_n[:, None] & (o_v[None, :] < columns)
        tl.store(out_ptrs[:, None] + o_v[None, :], b_c, mask=m_out)


@triton.jit
def epilogue_kernel(
    products_ptr,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    statistics_ptr,
    out_ptr,
    stride_pn,
    stride_on,
    N,
    V,
    BLOCKS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LOGIT: tl.constexpr,
    WANT: tl.constexpr,
    GRADS: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """Write the statistics of BN rows, then the coefficients of the one that GRADS names."""
    # int64: N V passes 2^31 at 16K tokens of a 128K vocabulary.
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    # int32: a label is compared with every column, in one register instead of two.
    labels = tl.load(labels_ptr + o_n, mask=m_n, other=0).to(tl.int32)
    row_ptrs = products_ptr + o_n * stride_pn
    cooling = inverse_temperature(temperature_ptr, o_n, m_n, LOGIT, BN, ACC)
    state = empty_state(BN, ACC)
    for block in range(BLOCKS):
        o_v = block * BV + tl.arange(0, BV)
        b_z, _ = load_logits(row_ptrs, bias_ptr, o_v, m_n, cooling, V, LOGIT, ACC)
        state = absorb(state, b_z, o_v, labels, V, WANT)
    statistics = finish(state, V)
    store_statistics(statistics, statistics_ptr, o_n, m_n)
    if out_ptr is not None:
        saved = statistics.lse, statistics.lse_rest, statistics.logps, statistics.entropy
        one = tl.full([BN], 1.0, dtype=ACC)
        put_coefficients(
            row_ptrs,
            bias_ptr,
            out_ptr + o_n * stride_on,
            m_n,
            labels,
            cooling,
            saved,
            (one, one, one, one),
            V,
            V,
            BLOCKS,
            IN_PLACE,
            LOGIT,
            GRADS,
            ACC,
            BV,
        )


def over(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where C [B, V] of `dtype` takes the place of `products` [B, V].

    It is the end of each row's memory: all of it, or the second half where C is half as wide.
    """
    return products.view(dtype)[:, -products.shape[1] :]


def in_place(out: Tensor | None, products: Tensor) -> bool:
    """Tell whether C is written over its products; elsewhere in their memory is refused."""
    # Addresses say nothing on `meta`, where the tuner's processes compile: all of them are 0.
    if out is None or out.untyped_storage()._cdata != products.untyped_storage()._cdata:
        return False
    place = over(products, out.dtype)
    assert out.storage_offset() == place.storage_offset(), "not `over` its products"
    assert out.stride() == place.stride(), "not `over` its products"
    return True


def logits_epilogue(
    products: Tensor,  # [B, V]
    labels: Tensor,  # [B]
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    want: Iterable[str] = ("logps", "lse"),
    coefficient_of: str | None = None,
    out: Tensor | None = None,  # [B, V]
    config: Config | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    r"""Return statistics of softmax(z) from raw products a, and d statistic / d a of one of them.

    Args:
        products: [B, V] a = h W^T without bias, fp32 (or fp64); any row stride.
        labels: [B] int64, every one in [0, V).
        bias, softcap, logit_scale, temperature: $z = \mathrm{softcap}((a + b)\,s) / T$.
        want: names out of `online.STATISTICS`.
        coefficient_of: one of `logps`, `lse`, `mean_logit`, `entropy`, or None for no coefficients.
        out: [B, V] buffer for the coefficients, in the dtype they are rounded to; `over(products)`
            to overwrite them, otherwise disjoint from them. None allocates one like `products`.
        config: launch configuration; None asks the table.

    Returns:
        (name -> [B] fp32 (fp64), the coefficients or None).

    Raises:
        ValueError: `want` or `coefficient_of` names no (differentiable) statistic.
    """
    want = check_names(want)
    if coefficient_of is not None and coefficient_of not in DIFFERENTIABLE:
        raise ValueError(
            f"coefficient_of={coefficient_of!r}: choose from {', '.join(DIFFERENTIABLE)}"
        )
    B, V = products.shape
    assert products.stride(-1) == 1
    assert labels.shape == (B,)
    acc = acc_dtype(products.dtype)
    stats = {name: products.new_empty(B, dtype=acc) for name in want}
    if coefficient_of is None:
        assert out is None, "out without coefficient_of"
    elif out is None:
        out = torch.empty_like(products)
    if out is not None:
        assert out.shape == (B, V)
        assert out.stride(-1) == 1
    if B == 0:
        return stats, out
    config = config or launch("epilogue_kernel", chip_of(products.device), products.dtype)
    with on_device_of(products):
        epilogue_kernel[(triton.cdiv(B, config.BN),)](
            products,
            None if bias is None else bias.contiguous(),
            labels.contiguous(),
            statistics_ptr=pointers(stats),
            out_ptr=out,
            stride_pn=products.stride(0),
            stride_on=None if out is None else out.stride(0),
            N=B,
            V=V,
            BLOCKS=triton.cdiv(V, config.BV),
            IN_PLACE=in_place(out, products),
            **logit_arguments(softcap, logit_scale, temperature),
            # The entropy's own coefficients need the sum that it is made of.
            WANT=accumulated((*want, *({coefficient_of} & {"entropy"}))),
            GRADS=Grads(*(name == coefficient_of for name in DIFFERENTIABLE)),
            ACC=precision(products.dtype)["ACC"],
            BN=config.BN,
            BV=config.BV,
            num_warps=config.warps,
        )
    return stats, out


def logits_epilogue_reference(
    products: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    want: Iterable[str] = ("logps", "lse"),
    coefficient_of: str | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return `logits_epilogue` in plain torch: dense logits, coefficients by autograd."""
    raw = products.detach().to(acc_dtype(products.dtype)).requires_grad_()
    with torch.enable_grad():
        z = transform_reference(raw, bias, softcap, logit_scale, temperature)
        stats = statistics_reference(z, labels, want)
        if coefficient_of is None:
            return {name: x.detach() for name, x in stats.items()}, None
        (picked,) = statistics_reference(z, labels, (coefficient_of,)).values()
        out = torch.autograd.grad(picked.sum(), raw)[0]
    return {name: x.detach() for name, x in stats.items()}, out.to(products.dtype)
