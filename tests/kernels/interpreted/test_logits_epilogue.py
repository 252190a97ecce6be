"""`logits_epilogue`: statistics and coefficients of products in memory, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpo.kernels.logits_epilogue import (
    DIFFERENTIABLE,
    logits_epilogue,
    logits_epilogue_reference,
    over,
)
from fastpo.kernels.online import STATISTICS
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
    linear_logits,
    make,
    plain_results,
    spread,
)

SMALL = Config(BN=4, BV=128)
COMPARED = tuple(name for name in STATISTICS if name != "lse_rest")


def products_of(n: int, v: int, dtype: torch.dtype, *, bias: bool = False, seed: int = 0) -> Inputs:
    """Inputs whose raw logits are exactly the products [N, V]: `weight` is their transpose."""
    x = make(n, 31, v, torch.float32, bias=bias, seed=seed)
    made = exact((x.hidden @ x.weight.T).to(dtype), x.labels)
    return made._replace(bias=None if x.bias is None else x.bias.to(dtype))


def products(x: Inputs) -> Tensor:
    return x.weight.T.contiguous()


def epilogue(x: Inputs, **arguments) -> tuple[dict[str, Tensor], Tensor | None]:
    return logits_epilogue(products(x), x.labels, x.bias, want=STATISTICS, **arguments)


def assert_epilogue(
    stats: dict[str, Tensor], out: Tensor | None, x: Inputs, of: str | None, **facts
) -> None:
    def reference(y: Inputs) -> dict[str, Tensor]:
        found, c = logits_epilogue_reference(
            products(y), y.labels, y.bias, **facts, want=tuple(stats), coefficient_of=of
        )
        return found if c is None else {**found, "C": c}

    wide = x.double()
    ours = stats if out is None else {**stats, "C": out}
    truth, plain = reference(wide), plain_results(reference, x)
    terms = {"mean_logit": linear_logits(wide, **facts).abs().mean(1).max().item()}
    if of == "entropy":
        terms["C"] = entropy_terms(wide, **facts)
    for name in set(ours) & {*COMPARED, "C"}:
        same = [results[name] for results in plain]
        assert_three_way(ours[name], same, truth[name], name, terms=terms.get(name, 0.0))


# Statistics alone, and the coefficients of each, which are other code; each fact is another slope.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("of", [None, *DIFFERENTIABLE])
def test_three_way(dtype, facts, of):
    x = products_of(63, 507, dtype, bias=facts != "plain")
    stats, out = epilogue(x, **FACTS[facts], coefficient_of=of)
    assert {t.dtype for t in stats.values()} == {acc_dtype(dtype)}
    assert (out is None) == (of is None)
    assert_epilogue(stats, out, x, of, **FACTS[facts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "v"), [(1, 1), (1, 507), (7, 64), (5, 1000)])
def test_awkward_shapes(dtype, n, v):
    x = products_of(n, v, dtype, bias=True)
    stats, out = epilogue(x, softcap=5.0, coefficient_of="entropy", config=SMALL)
    assert_epilogue(stats, out, x, "entropy", softcap=5.0)


def test_large_vocabulary():
    x = products_of(3, 50257, torch.float32)
    stats, out = epilogue(x, coefficient_of="logps", config=Config(BN=4, BV=16384))
    assert_epilogue(stats, out, x, "logps")


def test_no_rows():
    stats, out = epilogue(products_of(0, 50, torch.float32), coefficient_of="logps")
    assert {t.shape for t in stats.values()} == {(0,)}
    assert out.shape == (0, 50)


@pytest.mark.parametrize("name", STATISTICS)
def test_each_statistic_alone(name):
    x = products_of(5, 200, torch.float32, bias=True)
    for of in (None, "entropy"):
        alone, _ = logits_epilogue(
            products(x), x.labels, x.bias, want=(name,), coefficient_of=of, config=SMALL
        )
        assert list(alone) == [name]
        assert torch.equal(alone[name], epilogue(x, config=SMALL)[0][name])


@pytest.mark.parametrize("of", DIFFERENTIABLE)
def test_coefficients_alone(of):
    """What they need is accumulated whether or not it is returned."""
    x = products_of(5, 200, torch.float32, bias=True)
    stats, out = logits_epilogue(
        products(x), x.labels, x.bias, want=(), coefficient_of=of, config=SMALL
    )
    assert stats == {}
    assert torch.equal(out, epilogue(x, coefficient_of=of, config=SMALL)[1])


@pytest.mark.parametrize("of", DIFFERENTIABLE)
def test_rounds_once(of):
    """In float16: the interpreter truncates to bfloat16, devices are tested for it elsewhere."""
    x = products_of(9, 200, torch.float32, bias=True)
    out = torch.empty(9, 200, dtype=torch.float16)
    rounded = epilogue(x, softcap=5.0, coefficient_of=of, out=out, config=SMALL)[1]
    assert rounded is out
    wide = epilogue(x, softcap=5.0, coefficient_of=of, config=SMALL)[1]
    assert torch.equal(rounded, wide.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("v", [1, 128, 129, 300])
@pytest.mark.parametrize("of", DIFFERENTIABLE)
def test_may_overwrite_its_products(dtype, v, of):
    """The same bits as elsewhere, at any number of blocks and with odd rows."""
    x = products_of(9, v, acc_dtype(dtype), bias=True)
    arguments = {"want": STATISTICS, "coefficient_of": of, "config": SMALL}
    apart = torch.empty(9, v, dtype=dtype)
    stats, _ = logits_epilogue(products(x), x.labels, x.bias, out=apart, **arguments)
    slab = products(x)
    place = over(slab, dtype)
    again, same = logits_epilogue(slab, x.labels, x.bias, out=place, **arguments)
    assert same is place
    assert place.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr()
    assert torch.equal(place, apart)
    assert all(torch.equal(stats[name], again[name]) for name in STATISTICS)


def test_strided_slabs_and_nothing_else_written():
    x = products_of(9, 200, torch.float32)
    stats, out = epilogue(x, coefficient_of="logps", config=SMALL)
    wide, buffer = torch.full((11, 250), math.nan), torch.full((11, 230), 7.0)
    slab, target = wide[1:10, 20:220], buffer[1:10, 15:215]
    slab.copy_(products(x))
    labels = torch.full((18,), -1)[::2].copy_(x.labels)
    again, _ = logits_epilogue(
        slab, labels, want=STATISTICS, coefficient_of="logps", out=target, config=SMALL
    )
    assert all(torch.equal(stats[name], again[name]) for name in STATISTICS)
    assert torch.equal(target, out)
    target.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("which", ["products", "out"])
def test_rows_past_two_billion_elements(which, tmp_path):
    x = products_of(36, 100, torch.float32)
    stats, out = epilogue(x, coefficient_of="logps", config=SMALL)
    far = spread(products(x) if which == "products" else torch.zeros(36, 100), tmp_path)
    arguments = {"coefficient_of": "logps", "want": STATISTICS, "config": SMALL}
    if which == "products":
        again, same = logits_epilogue(far, x.labels, **arguments)
    else:
        again, same = logits_epilogue(products(x), x.labels, out=far, **arguments)
    assert all(torch.equal(stats[name], again[name]) for name in STATISTICS)
    assert torch.equal(same, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype):
    x = products_of(9, 200, dtype)
    (first, c), (second, d) = (epilogue(x, coefficient_of="logps", config=SMALL) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in STATISTICS)
    assert torch.equal(c, d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_labels_keep_every_digit(dtype):
    """Row by row, so that the rule's scale is the row's own, as in the test of `linear_stats`."""
    x, logits = confident(dtype)
    acc = acc_dtype(dtype)
    out = torch.empty(logits.shape, dtype=acc)
    stats, _ = epilogue(x, coefficient_of="logps", out=out, config=SMALL)
    plain = closed_form(logits.to(acc), x.labels)
    truth = closed_form(logits.double(), x.labels)
    for name, ours in (*((n, stats[n]) for n in ("logps", "entropy")), ("coefficients", out)):
        for row, p_label in enumerate(P_LABEL):
            at, size = slice(row, row + 1), logits[row].double().abs().max()
            terms = (truth[name][at].abs().max() * size).item()
            what = f"{name} at {p_label}"
            assert_three_way(ours[at], plain[name][at], truth[name][at], what, terms=terms)


def test_columns_at_minus_infinity_are_as_good_as_absent():
    real = products_of(9, 157, torch.float32, bias=True)
    pad = torch.full((43, 9), -math.inf)
    bias = torch.cat([real.bias, torch.zeros(43)])
    x = Inputs(real.hidden, torch.cat([real.weight, pad]), real.labels, bias)
    for of in ("logps", "lse", "entropy"):
        stats, out = epilogue(x, coefficient_of=of, config=SMALL)
        assert (stats.pop("mean_logit") == -math.inf).all()
        assert (out[:, 157:] == 0).all()
        assert_epilogue(stats, out[:, :157], real, of)


def test_nan_stays_in_its_row():
    x = products_of(9, 200, torch.float32)
    expected, c = epilogue(x, coefficient_of="logps", config=SMALL)
    x.weight[150, 4] = math.nan
    ours, d = epilogue(x, coefficient_of="logps", config=SMALL)
    others = torch.arange(9) != 4
    for name in COMPARED:
        assert torch.equal(ours[name][others], expected[name][others])
        if name != "top1":
            assert ours[name][4].isnan(), name
    assert torch.equal(d[others], c[others])
    assert d[4].isnan().all()


def test_bad_names_are_told():
    x = products_of(2, 5, torch.float32)
    with pytest.raises(ValueError, match="unknown statistic 'logp'"):
        logits_epilogue(products(x), x.labels, want=("logp",))
    with pytest.raises(ValueError, match="coefficient_of='top1': choose from logps, lse"):
        logits_epilogue(products(x), x.labels, coefficient_of="top1")
