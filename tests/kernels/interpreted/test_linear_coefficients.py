"""`linear_coefficients`, the recomputed C of a vocabulary slice, against float64 autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastpo.kernels.linear_coefficients import linear_coefficients, linear_coefficients_reference
from fastpo.kernels.linear_stats import linear_stats
from fastpo.kernels.logits_epilogue import DIFFERENTIABLE
from fastpo.kernels.tile import Config, acc_dtype
from fastpo.testing.three_way import assert_three_way
from tests.kernels.cases import (
    DTYPES,
    FACTS,
    P_LABEL,
    Inputs,
    closed_form,
    confident,
    entropy_terms,
    exact,
    make,
    plain_results,
    spread,
)

SMALL = Config(BN=32, BV=128, BD=64, group=2)
NEEDED = ("lse", "lse_rest", "logps", "entropy")
GRADS = {**{name: (name,) for name in DIFFERENTIABLE}, "all": DIFFERENTIABLE}


def cotangents(x: Inputs, names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    acc = acc_dtype(x.hidden.dtype)
    return {name: torch.randn(len(x.labels), generator=g).to(acc) for name in names}


def coefficients(
    x: Inputs,
    grads: dict[str, Tensor],
    first: int = 0,
    last: int | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
    **facts,
) -> Tensor:
    """C of the columns first:last, from statistics that the other kernel wrote."""
    stats = linear_stats(*x, **facts, want=NEEDED, config=config)
    return linear_coefficients(
        x.hidden,
        x.weight[first:last],
        x.labels,
        None if x.bias is None else x.bias[first:last],
        v_start=first,
        vocab_size=len(x.weight),
        **stats,
        **{f"grad_{name}": value for name, value in grads.items()},
        **facts,
        out=out,
        out_dtype=out_dtype,
        config=config,
    )


def assert_coefficients(ours: Tensor, x: Inputs, grads: dict[str, Tensor], **facts) -> None:
    def reference(y: Inputs) -> dict[str, Tensor]:
        same = {name: g.to(acc_dtype(y.hidden.dtype)) for name, g in grads.items()}
        return {"c": linear_coefficients_reference(*y, **facts, **same)}

    wide = x.double()
    plain = [results["c"] for results in plain_results(reference, x)]
    terms = entropy_terms(wide, **facts) * grads["entropy"].abs().max() if "entropy" in grads else 0
    assert_three_way(ours, plain, reference(wide)["c"], "C", terms=float(terms))


# Each cotangent alone compiles other code than all at once, and each fact another slope.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("names", GRADS)
def test_three_way(dtype, facts, names):
    """Before any rounding to half precision; the next test is about that rounding."""
    x = make(63, 31, 507, dtype, bias=facts != "plain")
    grads = cotangents(x, GRADS[names])
    ours = coefficients(x, grads, out_dtype=acc_dtype(dtype), **FACTS[facts])
    assert_coefficients(ours, x, grads, **FACTS[facts])


def test_rounds_once():
    """In float16: the interpreter truncates to bfloat16, devices are tested for it elsewhere."""
    x = make(63, 31, 507, torch.float16, bias=True)
    grads = cotangents(x)
    wide = coefficients(x, grads, out_dtype=torch.float32)
    assert torch.equal(coefficients(x, grads), wide.half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "v"), [(1, 31, 1000), (63, 123, 507), (127, 31, 507)])
def test_awkward_shapes(dtype, n, d, v):
    x = make(n, d, v, dtype, bias=True)
    grads = cotangents(x)
    ours = coefficients(x, grads, softcap=5.0, config=SMALL)
    assert ours.dtype == dtype
    assert_coefficients(ours, x, grads, softcap=5.0)


def test_large_vocabulary():
    x = make(3, 16, 50257, torch.float32)
    grads = cotangents(x, ("logps", "entropy"))
    ours = coefficients(x, grads, config=Config(BN=4, BV=8192, BD=16))
    assert_coefficients(ours, x, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_are_the_whole(dtype):
    """Cut anywhere, also through a block and to one column."""
    x = make(21, 31, 507, dtype, bias=True)
    x.labels[:5] = torch.tensor([0, 1, 199, 200, 506])  # beside the cuts
    grads = cotangents(x)
    whole = coefficients(x, grads, softcap=5.0, config=SMALL)
    cuts = (0, 1, 128, 200, 507)
    slices = [
        coefficients(x, grads, lo, hi, softcap=5.0, config=SMALL)
        for lo, hi in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(slices, 1), whole)


@pytest.mark.parametrize(("n", "hi"), [(0, 40), (5, 0)])
def test_nothing_to_do(n, hi):
    x = make(n, 31, 40, torch.float32)
    assert coefficients(x, cotangents(x), 0, hi).shape == (n, hi)


def test_strided_inputs_and_expanded_cotangents():
    x = make(33, 123, 200, torch.float32, bias=True)
    hidden = torch.full((66, 150), math.nan)[::2, :123]
    weight = torch.full((123, 200), math.nan).T
    labels, bias = torch.full((66,), -1)[::2], torch.full((400,), math.nan)[::2]
    strided = Inputs(hidden, weight, labels, bias)
    for given, value in zip(strided, x, strict=True):
        given.copy_(value)
    one = torch.tensor(0.5)
    grads = {name: one.expand(33) for name in DIFFERENTIABLE}
    same = {name: torch.full((33,), 0.5) for name in DIFFERENTIABLE}
    expected = coefficients(x, same, config=SMALL)
    assert torch.equal(coefficients(strided, grads, config=SMALL), expected)


def test_writes_into_a_buffer_and_nowhere_else():
    x = make(33, 31, 100, torch.float32)
    grads = cotangents(x)
    buffer = torch.full((35, 130), 7.0)
    out = buffer[1:34, 10:110]
    assert coefficients(x, grads, out=out, config=SMALL) is out
    assert torch.equal(out, coefficients(x, grads, config=SMALL))
    out.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype):
    x = make(33, 31, 200, dtype)
    first, second = (coefficients(x, cotangents(x), config=SMALL) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("which", ["hidden", "weight", "out"])
def test_rows_past_two_billion_elements(which, tmp_path):
    x = make(36, 16, 36, torch.float16)
    grads = cotangents(x, ("logps",))
    tiny = Config(BN=16, BV=16, BD=16)
    expected = coefficients(x, grads, config=tiny)
    if which == "out":
        out = spread(torch.zeros(36, 36, dtype=torch.float16), tmp_path)
        assert torch.equal(coefficients(x, grads, out=out, config=tiny), expected)
    else:
        far = x._replace(**{which: spread(getattr(x, which), tmp_path)})
        stats = linear_stats(*x, want=("lse", "lse_rest", "logps"))
        ours = linear_coefficients(
            *far, v_start=0, vocab_size=36, **stats, grad_logps=grads["logps"], config=tiny
        )
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_labels_keep_their_gradient(dtype):
    """Row by row: next to 1 - p_y = 1e-9, one rounding of p_y would be 60 times the gradient."""
    x, logits = confident(dtype)
    acc = acc_dtype(dtype)
    grads = {"logps": torch.ones(len(P_LABEL), dtype=acc)}
    ours = coefficients(x, grads, out_dtype=acc, config=SMALL)
    rounded = coefficients(x, grads, config=SMALL)
    plain = closed_form(logits.to(acc), x.labels)["coefficients"]
    truth = closed_form(logits.double(), x.labels)["coefficients"]
    for row, p_label in enumerate(P_LABEL):
        size = logits[row].double().abs().max()
        terms = (truth[row].abs().max() * size).item()
        assert_three_way(ours[row], plain[row], truth[row], f"C at {p_label}", terms=terms)
        half = plain[row].to(dtype)
        assert_three_way(rounded[row], half, truth[row], f"C at {p_label}", terms=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_of_lse_reaches_no_probability(dtype):
    """Whole-number logits around 1000 are exact, but lse keeps few of the digits behind the point.

    Nothing changes when all logits shift, so the truth is that of the logits around 0.
    """
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 4, (9, 200), generator=g).to(dtype)
    x = exact(logits, torch.randint(200, (9,), generator=g))
    grads = cotangents(x)
    ours = coefficients(exact(logits + 1000, x.labels), grads, config=SMALL)
    assert_coefficients(ours, x, grads)


def test_columns_at_minus_infinity_get_zero():
    """They are as good as absent: the truth is that of the other columns."""
    real = make(33, 31, 157, torch.float32, bias=True)
    pad = make(1, 31, 43, torch.float32).weight
    bias = torch.cat([real.bias, torch.full((43,), -math.inf)])
    x = Inputs(real.hidden, torch.cat([real.weight, pad]), real.labels, bias)
    grads = cotangents(x, ("logps", "lse", "entropy"))
    ours = coefficients(x, grads, config=SMALL)
    assert (ours[:, 157:] == 0).all()
    assert_coefficients(ours[:, :157], real, grads)


def test_label_at_minus_infinity():
    """It has p = 0: C is 1 there and -p elsewhere."""
    bias = torch.zeros(100)
    bias[7] = -math.inf
    x = make(4, 31, 100, torch.float32)._replace(bias=bias, labels=torch.tensor([7, 3, 7, 99]))
    grads = cotangents(x, ("logps", "lse"))
    assert_coefficients(coefficients(x, grads, config=SMALL), x, grads)
    with_entropy = coefficients(x, cotangents(x), config=SMALL)
    assert with_entropy.isfinite().all()


@pytest.mark.parametrize("names", ["logps", "lse", "entropy", "all"])
def test_nan_stays_in_its_row(names):
    x = make(20, 31, 100, torch.float32)
    grads = cotangents(x, GRADS[names])
    expected = coefficients(x, grads, config=SMALL)
    x.hidden[7, 3] = math.nan
    ours = coefficients(x, grads, config=SMALL)
    others = torch.arange(20) != 7
    assert torch.equal(ours[others], expected[others])
    assert ours[7].isnan().all()
