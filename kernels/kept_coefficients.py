r"""Coefficients from products that were kept: C = d loss / d (h W^T + b), from all cotangents.

The logits of a trained head whose products fit the workspace wait for the backward pass. There the
statistics of `linear_stats` and the cotangents are known, and one sweep over a row makes its C:
4 + size of C bytes an element. A program owns a row, so that C may take the products' place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .coefficient import load_grads, load_saved, row_arguments
from .launch_table import launch
from .logits_epilogue import in_place, put_coefficients
from .tile import (
    Config,
    chip_of,
    inverse_temperature,
    logit_arguments,
    on_device_of,
    precision,
)


@triton.jit
def kept_kernel(
    products_ptr,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    rows_ptr,
    out_ptr,
    stride_pn,
    stride_on,
    v_start,
    N,
    V_slice,
    V,
    BLOCKS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LOGIT: tl.constexpr,
    GRADS: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """Write C of BN rows."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    # Counted from the slice and in int32: a label is compared with every column.
    labels = (tl.load(labels_ptr + o_n, mask=m_n, other=-1) - v_start).to(tl.int32)
    put_coefficients(
        products_ptr + o_n * stride_pn,
        bias_ptr,
        out_ptr + o_n * stride_on,
        m_n,
        labels,
        inverse_temperature(temperature_ptr, o_n, m_n, LOGIT, BN, ACC),
        load_saved(rows_ptr, o_n, m_n, GRADS, BN, ACC),
        load_grads(rows_ptr, o_n, m_n, BN, ACC),
        V_slice,
        V,
        BLOCKS,
        IN_PLACE,
        LOGIT,
        GRADS,
        ACC,
        BV,
    )


def kept_coefficients(
    products: Tensor,  # [N, Vs]
    labels: Tensor,  # [N]
    bias_slice: Tensor | None = None,  # [Vs]
    *,
    v_start: int,
    vocab_size: int,
    lse: Tensor,  # [N]
    logps: Tensor,  # [N]
    lse_rest: Tensor | None = None,  # [N]
    entropy: Tensor | None = None,  # [N]
    grad_logps: Tensor | None = None,  # [N]
    grad_lse: Tensor | None = None,  # [N]
    grad_mean_logit: Tensor | None = None,  # [N]
    grad_entropy: Tensor | None = None,  # [N]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    out: Tensor,  # [N, Vs]
    config: Config | None = None,
) -> Tensor:
    """Write d loss / d (h W_s^T + b_s) [N, Vs], of kept products, from the cotangents.

    Args:
        products: [N, Vs] fp32 (fp64 inputs: fp64) h W_s^T with the low-rank delta in it; unit
            stride along its rows.
        labels: [N] int64 in [0, vocab_size), numbered in the whole vocabulary.
        v_start, vocab_size: the first column of the slice, and V of the whole vocabulary.
        lse, logps, lse_rest, entropy: [N] as `linear_stats` returned them; `entropy` is needed with
            its cotangent only.
        grad_logps, grad_lse, grad_mean_logit, grad_entropy: [N] cotangents, None for zero.
        bias_slice, softcap, logit_scale, temperature: as in `linear_stats`.
        out: buffer for C in the dtype it is rounded to, once: `logits_epilogue.over(products)` to
            overwrite them, otherwise disjoint from them.
        config: launch configuration; None asks the table.

    Returns:
        `out`.
    """
    N, V_slice = products.shape
    assert products.stride(-1) == out.stride(-1) == 1
    assert out.shape == products.shape
    assert grad_entropy is None or entropy is not None, "grad_entropy needs the entropy"
    if N == 0 or V_slice == 0:
        return out
    config = config or launch("epilogue_kernel", chip_of(products.device), products.dtype)
    rows = row_arguments(
        lse=lse,
        lse_rest=lse_rest,
        logps=logps,
        entropy=entropy,
        grad_logps=grad_logps,
        grad_lse=grad_lse,
        grad_mean_logit=grad_mean_logit,
        grad_entropy=grad_entropy,
    )
    with on_device_of(products):
        kept_kernel[(triton.cdiv(N, config.BN),)](
            products,
            None if bias_slice is None else bias_slice.contiguous(),
            labels.contiguous(),
            **rows,
            out_ptr=out,
            stride_pn=products.stride(0),
            stride_on=out.stride(0),
            v_start=v_start,
            N=N,
            V_slice=V_slice,
            V=vocab_size,
            BLOCKS=triton.cdiv(V_slice, config.BV),
            IN_PLACE=in_place(out, products),
            **logit_arguments(softcap, logit_scale, temperature),
            ACC=precision(products.dtype)["ACC"],
            BN=config.BN,
            BV=config.BV,
            num_warps=config.warps,
        )
    return out
