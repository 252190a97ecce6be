"""Pieces of the head by themselves, where two ways of doing one thing are open.

    recompute   coefficients of a late slab: one fused kernel, or cuBLAS and a sweep in place
    slab        a frozen slab of 256, 261 and 512 rows: coefficients in place, or apart

`bench.predict` has an opinion on most; it stands beside what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench import predict
from bench.gpu.book import Book, Options
from bench.harness import check, interleaved, summary
from bench.head import Inputs, less_label, make_inputs
from fastpo.head.types import matmul, put_matmul_

SLICE = (8192, 4096, 8192)
"""(N, D, columns) of a late slab, 128 MiB of coefficients in bf16."""
SLAB = (4096, 131072)
"""(D, V)"""
ROWS = (256, 261, 512)
"""What 256 MiB hold in fp32, before and after blocks are whole tiles."""
TOY_SLICE, TOY_SLAB, TOY_ROWS = (16, 32, 64), (32, 64), (4, 5)
GATED = 64
SLAB_OF = "frozen slab of"
FUSED, BY_PRODUCTS = "fused", "products and a sweep"

Ways = dict[str, Callable[[], Tensor]]


def to_recompute(x: Inputs, stats: Mapping[str, Tensor]) -> Ways:
    """Return name -> C [N, Vs] of a slice, at the cotangents of the inputs."""
    from fastpo.kernels.kept_coefficients import kept_coefficients
    from fastpo.kernels.linear_coefficients import linear_coefficients
    from fastpo.kernels.logits_epilogue import over

    n, v = len(x.hidden), len(x.weight)
    given: dict[str, Any] = {"v_start": 0, "vocab_size": v, "grad_logps": x.cotangents, **stats}
    c, products = x.hidden.new_empty(n, v), torch.empty(n, v, device=x.hidden.device)

    def fused() -> Tensor:
        return linear_coefficients(x.hidden, x.weight, x.labels, out=c, **given)

    def swept() -> Tensor:
        matmul(x.hidden, x.weight.T, products)
        out = over(products, x.hidden.dtype)
        return kept_coefficients(products, x.labels, out=out, **given)

    return {FUSED: fused, BY_PRODUCTS: swept}


def to_write(x: Inputs, rows: int) -> Ways:
    """Return name -> dH of a frozen slab: a product, coefficients, a product."""
    from fastpo.kernels.logits_epilogue import logits_epilogue, over

    hidden, labels = x.hidden[:rows], x.labels[:rows]
    products = torch.empty(rows, len(x.weight), device=hidden.device)
    dtype = hidden.dtype
    apart = torch.empty_like(products, dtype=dtype)
    grad = torch.empty_like(hidden, dtype=products.dtype)

    def run(out: Tensor) -> Tensor:
        matmul(hidden, x.weight.T, products)
        logits_epilogue(products, labels, want=("logps",), coefficient_of="logps", out=out)
        return put_matmul_(grad, out, x.weight, add=False)

    return {"in place": lambda: run(over(products, dtype)), "apart": lambda: run(apart)}


def measure(
    ways: Ways,
    rows: Tensor,
    dense: Callable[[torch.dtype], Tensor],
    predicted: Mapping[str, float],
    device: torch.device,
) -> dict[str, Any]:
    """Time every way that is right at some rows, beside the seconds that were predicted."""
    truth, plain = {"value": dense(torch.float64)}, {"value": dense(torch.float32)}
    found: dict[str, dict[str, Any]] = {}
    for name, run in ways.items():
        _, wrong = check({"value": run()[rows]}, truth, plain)
        found[name] = {"status": "rejected", "reason": wrong} if wrong else {"status": "ok"}
    able = {name: run for name, run in ways.items() if found[name]["status"] == "ok"}
    cold = device.type == "cuda"
    for name, seconds in interleaved(able, 20 if cold else 2, device, cold).items():
        guess = predicted.get(name) if predict.holds_for(device) else None
        found[name] |= {"seconds": summary(seconds), "predicted_seconds": guess}
    return found


def line(what: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the milliseconds of every way."""
    said = []
    for name, way in found.items():
        if "seconds" not in way:
            said.append(f"{name} {way['status']}: {way['reason']}")
            continue
        guess = way["predicted_seconds"]
        beside = "" if guess is None else f" (predicted {1e3 * guess:.3g})"
        said.append(f"{name} {1e3 * way['seconds']['median']:.3g}{beside}")
    return f"{what}, ms: {', '.join(said)}"


def recompute(dtype: torch.dtype, device: torch.device, toy: bool) -> dict[str, Any]:
    """Ask which way to the coefficients of a late slab is faster."""
    from fastpo.kernels.linear_stats import linear_stats_reference

    n, d, v = shape = TOY_SLICE if toy else SLICE
    x = make_inputs(shape, dtype, device)
    given = x.hidden, x.weight, x.labels
    stats = linear_stats_reference(*given, want=("logps", "lse", "lse_rest"))
    rows = torch.arange(min(n, GATED), device=device)

    def dense(wide: torch.dtype) -> Tensor:
        log_p = (x.hidden[rows].to(wide) @ x.weight.to(wide).T).log_softmax(1)
        c = less_label(log_p, x.labels[rows]).neg_()
        c *= x.cotangents[rows, None]
        return c if wide == torch.float64 else c.to(dtype)

    product = predict.product(n, v, d)
    rate = predict.FLOP_PER_SECOND * predict.FUSED
    predicted = {FUSED: 2 * n * d * v / rate, BY_PRODUCTS: product + predict.sweep(n * v, 4 + 2)}
    return measure(to_recompute(x, stats), rows, dense, predicted, device)


def slab(
    x: Inputs, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Ask what it costs to write coefficients elsewhere, or rows that fill no tile."""
    v, d = x.weight.shape
    some = torch.arange(min(rows, GATED), device=device)

    def dense(wide: torch.dtype) -> Tensor:
        weight = x.weight.to(wide)
        log_p = (x.hidden[some].to(wide) @ weight.T).log_softmax(1)
        c = less_label(log_p, x.labels[some]).neg_()
        # In the inputs' dtype coefficients are rounded before the product.
        return c @ weight if wide == torch.float64 else c.to(dtype).float() @ weight

    predicted = predict.product(rows, v, d) + predict.product(rows, d, v)
    predicted += predict.sweep(rows * v, 4) + predict.sweep(rows * v, 4 + 2)
    return measure(to_write(x, rows), some, dense, {"in place": predicted}, device)


def missing_pieces(part: str, book: Book, toy: bool) -> list[str]:
    """Return the names of those that the book lacks, or has as wrong."""
    size = "x".join(map(str, TOY_SLICE if toy else SLICE))
    names = [f"recompute {size}: fused or products"]
    names += [f"{SLAB_OF} {rows} rows" for rows in (TOY_ROWS if toy else ROWS)]
    results = book.part(part).get("results", {})
    right = [k for k, ways in results.items() if all(w["status"] == "ok" for w in ways.values())]
    return [name for name in names if name not in right]


def measure_piece(what: str, part: str, book: Book, options: Options) -> None:
    """Measure one.

    Raises:
        RuntimeError: one of fastpo's own ways was not right.
    """
    device, toy = options.device, options.toy
    dtype = torch.float32 if toy else torch.bfloat16
    if what.startswith(SLAB_OF):
        rows, (d, v) = int(what.split()[-2]), TOY_SLAB if toy else SLAB
        x = make_inputs((rows, d, v), dtype, device)
        found = slab(x, rows, dtype, device)
    else:
        found = recompute(dtype, device, toy)
    book.add(part, what, **found)
    if wrong := [way["reason"] for way in found.values() if "reason" in way]:
        raise RuntimeError(f"{what}: {'; '.join(wrong)}")


def piece_lines(part: str, book: Book) -> list[str]:
    """Return a line for each that is there."""
    return [line(what, found) for what, found in book.part(part).get("results", {}).items()]
