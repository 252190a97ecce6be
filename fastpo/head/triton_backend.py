"""The head's walks by the kernels of `fastpo.kernels`; the formulas stand in `types`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpo.head.backend import forward_by_rows
from fastpo.head.types import (
    DIFFERENTIABLE,
    NOTHING_KEPT,
    Coefficients,
    Heads,
    Kept,
    KeptSlice,
    Link,
)

# Below this many rows a matrix product no longer fills a GPU; the fused kernel then wins.
_THIN_SLAB = 128
_OF_BOTH = ("ref_lse", "ref_lse_rest", "ref_logps", "kl_policy_ref", "kl_policy_mix")


def _facts(heads: Heads, link: Link) -> dict[str, Any]:
    """What turns products into logits, as the kernels take it."""
    rows = heads.temperature
    return {
        "softcap": link.softcap,
        "logit_scale": link.logit_scale,
        "temperature": link.temperature if rows is None else rows,
    }


class TritonTiles:
    """The same steps by the kernels of `fastpo.kernels`; products stay with the vendor's BLAS."""

    largest_slab: int | None = None
    # A block of 261 rows is 2 tiles of 128 and 5 rows of a third, which takes as long as a whole
    # one; one of 1 row reads all of W, 1 GB at V 131072, D 4096.
    tile = 128

    def num_slabs(self, link: Link, want: tuple[str, ...], with_reference: bool) -> int:
        # The products in fp32, the reference's too, and the coefficients in the inputs' dtype. The
        # last statistic's, and so an only one's, take the place of the products.
        if with_reference:
            return 3
        return 1 if len({*want} & {*DIFFERENTIABLE}) < 2 else 2

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
        thin = row_block < min(_THIN_SLAB, heads.labels.numel())
        if thin and not grads and heads.ref_hidden is None and keep.logits is None:
            from fastpo.kernels.linear_stats import linear_stats

            stats = linear_stats(
                heads.hidden,
                heads.weight,
                heads.labels,
                heads.bias,
                lora=heads.lora_b,
                **_facts(heads, link),
                want=want,
            )
            return {name: stats[name] for name in want}, []

        kept = keep.whole()

        def step(part: Heads, lo: int, hi: int) -> tuple[dict[str, Tensor], list[Tensor]]:
            mine = None if kept is None else kept.rows(slice(lo, hi))
            return self._row_block(part, link, want, grads, mine)

        return forward_by_rows(step, heads, grads, row_block)

    @staticmethod
    def _row_block(
        heads: Heads,
        link: Link,
        want: tuple[str, ...],
        grads: tuple[str, ...],
        keep: KeptSlice | None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        from fastpo.kernels.divergence import divergence, divergence_coefficients
        from fastpo.kernels.logits_epilogue import logits_epilogue, over

        logits, ref_logits = (None, None) if keep is None else keep[:2]
        products, reference = heads.products(logits), heads.reference()
        if reference is not None:
            ref_products = reference.products(ref_logits)
            slabs = products, ref_products, heads.labels, heads.bias, heads.ref_bias
            facts: dict[str, Any] = _facts(heads, link) | {"jsd_beta": link.jsd_beta}
            needed = dict.fromkeys((*want, "lse", "lse_rest", "logps", *_OF_BOTH))
            stats = divergence(*slabs, **facts, want=(*needed, *grads))
            one = torch.ones_like(stats["lse"])
            return {name: stats[name] for name in want}, [
                divergence_coefficients(
                    *slabs,
                    **facts,
                    stats=stats,
                    cotangents={name: one},
                    out_dtype=heads.hidden.dtype,
                )
                for name in grads
            ]
        stats: dict[str, Tensor] = {}
        coefficients: list[Tensor] = []
        for name in grads or (None,):
            out = None
            if name is not None:
                dtype = heads.hidden.dtype
                last = name == grads[-1]  # nobody reads the products after it
                out = over(products, dtype) if last else torch.empty_like(products, dtype=dtype)
            found, coefficient = logits_epilogue(
                products,
                heads.labels,
                heads.bias,
                **_facts(heads, link),
                want=want,
                coefficient_of=name,
                out=out,
            )
            stats = stats or found
            if coefficient is not None:
                coefficients.append(coefficient)
        return stats, coefficients

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
        from fastpo.kernels.divergence import divergence_coefficients
        from fastpo.kernels.kept_coefficients import kept_coefficients
        from fastpo.kernels.linear_coefficients import linear_coefficients
        from fastpo.kernels.logits_epilogue import over

        reference = heads.reference()
        if reference is not None:
            ref_products = None if kept is None else kept.ref_logits
            slab = divergence_coefficients(
                heads.products() if kept is None else kept.logits,
                reference.products() if ref_products is None else ref_products,
                heads.labels,
                heads.bias,
                heads.ref_bias,
                v_start=first,
                vocab_size=vocab_size,
                stats=stats,
                cotangents=cotangents,
                **_facts(heads, link),
                jsd_beta=link.jsd_beta,
                out_dtype=heads.hidden.dtype,
            )
            return Coefficients(slab)
        given: dict[str, Any] = {
            "v_start": first,
            "vocab_size": vocab_size,
            "lse": stats["lse"],
            "lse_rest": stats["lse_rest"],
            "logps": stats["logps"],
            "entropy": stats.get("entropy"),
            **{f"grad_{name}": value for name, value in cotangents.items()},
            **_facts(heads, link),
        }
        dtype = heads.hidden.dtype
        if kept is not None:
            products = kept.logits
            out = over(products, dtype) if spend else torch.empty_like(products, dtype=dtype)
            return Coefficients(
                kept_coefficients(products, heads.labels, heads.bias, out=out, **given)
            )
        slab = linear_coefficients(
            heads.hidden,
            heads.weight,
            heads.labels,
            heads.bias,
            lora_slice=heads.lora_b,
            out_dtype=dtype,
            **given,
        )
        return Coefficients(slab)
