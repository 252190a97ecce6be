"""The head by the kernels of `fastpo.kernels`; the formulas stand in `fastpo.head.types`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastpo.head.backend import forward_by_tokens
from fastpo.head.schedule import Traits, Workload
from fastpo.head.types import (
    DIFFERENTIABLE,
    NOTHING_KEPT,
    Coefficients,
    Kept,
    KeptChunk,
    PassOptions,
    PassTensors,
)

# With fewer tokens a matmul no longer fills a GPU; the fused kernel then wins.
_THIN_CHUNK = 128
# 261 tokens are 2 tiles of 128 and 5 tokens of a third, which takes as long as a whole one; a
# chunk of 1 token reads all of W, 1 GB at V 131072, D 4096.
_TILE = 128
_OF_BOTH = ("ref_lse", "ref_lse_rest", "ref_logps", "kl_policy_ref", "kl_policy_mix")


class TritonBackend:
    """Run the kernels between matmuls; matmuls stay with the vendor's BLAS."""

    def traits(self, work: Workload, device_type: str) -> Traits:
        # The products in fp32, the reference's too, and the coefficients in the inputs' dtype. The
        # last statistic's, and so an only one's, take the place of the products.
        if work.with_reference:
            return Traits(3, multiple=_TILE)
        return Traits(1 if len({*work.want} & {*DIFFERENTIABLE}) < 2 else 2, multiple=_TILE)

    def keeps_exponentials(self, tensors: PassTensors, options: PassOptions) -> bool:
        return False

    def forward(
        self, tensors: PassTensors, options: PassOptions, keep: Kept = NOTHING_KEPT
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        want, alone = options.statistics, tensors.ref_hidden is None
        thin = options.chunk_tokens < min(_THIN_CHUNK, tensors.targets.numel())
        if thin and alone and not options.early_grads and keep.logits is None:
            from fastpo.kernels.linear_stats import linear_stats

            stats = linear_stats(
                tensors.hidden,
                tensors.weight,
                tensors.targets,
                tensors.bias,
                lora=tensors.lora_b,
                **_facts(tensors, options),
                want=want,
            )
            return {name: stats[name] for name in want}, []

        kept, of_chunk = keep.whole(), _of_one if alone else _of_two

        def step(part: PassTensors, index: slice) -> tuple[dict[str, Tensor], list[Tensor]]:
            return of_chunk(part, options, None if kept is None else kept.pick(index))

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
        if tensors.ref_hidden is not None:
            return _coefficients_of_two(tensors, options, stats, cotangents, first, kept)
        from fastpo.kernels.kept_coefficients import kept_coefficients
        from fastpo.kernels.linear_coefficients import linear_coefficients
        from fastpo.kernels.logits_epilogue import over

        arguments: dict[str, Any] = {
            "v_start": first,
            "vocab_size": options.shard.vocab_size,
            "lse": stats["lse"],
            "lse_rest": stats["lse_rest"],
            "logps": stats["logps"],
            "entropy": stats.get("entropy"),
            **{f"grad_{name}": value for name, value in cotangents.items()},
            **_facts(tensors, options),
        }
        dtype = tensors.hidden.dtype
        if kept is not None:
            products = kept.logits
            out = over(products, dtype) if spend else torch.empty_like(products, dtype=dtype)
            return Coefficients(
                kept_coefficients(products, tensors.targets, tensors.bias, out=out, **arguments)
            )
        values = linear_coefficients(
            tensors.hidden,
            tensors.weight,
            tensors.targets,
            tensors.bias,
            lora_slice=tensors.lora_b,
            out_dtype=dtype,
            **arguments,
        )
        return Coefficients(values)


class _Facts(TypedDict):
    """Hold what turns products into logits, as the kernels take it."""

    softcap: float | None
    logit_scale: float
    temperature: float | Tensor


def _facts(tensors: PassTensors, options: PassOptions) -> _Facts:
    """Return the facts of a pass."""
    own = tensors.temperatures
    return {
        "softcap": options.softcap,
        "logit_scale": options.logit_scale,
        "temperature": options.temperature if own is None else own,
    }


def _of_one(
    tensors: PassTensors, options: PassOptions, keep: KeptChunk | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return statistics and unit-cotangent coefficients of a chunk of tokens of one head."""
    from fastpo.kernels.logits_epilogue import logits_epilogue, over

    products, dtype = tensors.products(None if keep is None else keep.logits), tensors.hidden.dtype
    grads = options.early_grads
    stats: dict[str, Tensor] = {}
    coefficients: list[Tensor] = []
    for name in grads or (None,):
        out = None
        if name is not None:
            last = name == grads[-1]  # nobody reads the products after it
            out = over(products, dtype) if last else torch.empty_like(products, dtype=dtype)
        results, coefficient = logits_epilogue(
            products,
            tensors.targets,
            tensors.bias,
            **_facts(tensors, options),
            want=options.statistics,
            coefficient_of=name,
            out=out,
        )
        stats = stats or results
        if coefficient is not None:
            coefficients.append(coefficient)
    return stats, coefficients


def _of_two(
    tensors: PassTensors, options: PassOptions, keep: KeptChunk | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return statistics and unit-cotangent coefficients of a chunk of tokens of two heads."""
    from fastpo.kernels.divergence import divergence, divergence_coefficients

    want, grads, reference = options.statistics, options.early_grads, tensors.reference()
    assert reference is not None
    logits, ref_logits = (None, None) if keep is None else keep[:2]
    both = tensors.products(logits), reference.products(ref_logits)
    both += tensors.targets, tensors.bias, tensors.ref_bias
    facts, beta = _facts(tensors, options), options.jsd_beta
    needed = dict.fromkeys((*want, "lse", "lse_rest", "logps", *_OF_BOTH))
    stats = divergence(*both, **facts, jsd_beta=beta, want=(*needed, *grads))
    one, dtype = torch.ones_like(stats["lse"]), tensors.hidden.dtype
    return {name: stats[name] for name in want}, [
        divergence_coefficients(
            *both, **facts, jsd_beta=beta, stats=stats, cotangents={name: one}, out_dtype=dtype
        )
        for name in grads
    ]


def _coefficients_of_two(
    tensors: PassTensors,
    options: PassOptions,
    stats: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    first: int,
    kept: KeptChunk | None,
) -> Coefficients:
    """Return `TritonBackend.coefficients` of a pass with a reference."""
    from fastpo.kernels.divergence import divergence_coefficients

    reference = tensors.reference()
    assert reference is not None
    ref_logits = None if kept is None else kept.ref_logits
    values = divergence_coefficients(
        tensors.products() if kept is None else kept.logits,
        reference.products() if ref_logits is None else ref_logits,
        tensors.targets,
        tensors.bias,
        tensors.ref_bias,
        v_start=first,
        vocab_size=options.shard.vocab_size,
        stats=stats,
        cotangents=cotangents,
        **_facts(tensors, options),
        jsd_beta=options.jsd_beta,
        out_dtype=tensors.hidden.dtype,
    )
    return Coefficients(values)
