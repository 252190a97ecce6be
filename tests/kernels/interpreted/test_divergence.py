"""`divergence` and its coefficients, of products in memory, against float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastpo.kernels.divergence import (
    DIVERGENCES,
    OF_BOTH,
    OF_REFERENCE,
    divergence,
    divergence_coefficients,
    divergence_reference,
)
from fastpo.kernels.online import STATISTICS
from fastpo.kernels.tile import Config, transform_reference
from fastpo.testing.three_way import assert_three_way
from tests.kernels.cases import FACTS

SMALL = Config(BN=4, BV=128)
NAMES = (*STATISTICS, *OF_BOTH, *OF_REFERENCE)
COMPARED = tuple(name for name in NAMES if not name.endswith("lse_rest"))
GRADS = ("logps", "lse", "entropy", "mean_logit", *DIVERGENCES)
BETA = 0.3


class Inputs(NamedTuple):
    """The tensors of `divergence`, in its order."""

    products: Tensor  # [B, V]
    ref_products: Tensor  # [B, V]
    labels: Tensor  # [B]
    bias: Tensor  # [V]
    ref_bias: Tensor  # [V]

    def double(self) -> Inputs:
        return Inputs(*(t.double() if t.is_floating_point() else t for t in self))

    def columns(self, order: Tensor) -> Inputs:
        """The same numbers with the vocabulary in another order."""
        labels = order.argsort()[self.labels]
        return Inputs(
            self.products[:, order],
            self.ref_products[:, order],
            labels,
            self.bias[order],
            self.ref_bias[order],
        )


def make(b: int, v: int, dtype: torch.dtype, apart: float = 1.0) -> Inputs:
    """A reference whose logits differ from the policy's by about `apart`."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g).to(dtype)

    products, bias = 3 * normal(b, v), normal(v)
    labels = torch.randint(v, (b,), generator=g)
    return Inputs(products, products + apart * normal(b, v), labels, bias, bias + apart * normal(v))


def facts_of(name: str, b: int, dtype: torch.dtype) -> dict:
    facts = {"jsd_beta": BETA} | FACTS[name]
    if name == "scaled":  # here with a temperature a row
        facts["temperature"] = torch.linspace(0.5, 2.0, b).to(dtype)
    return facts


def widened(facts: dict) -> dict:
    return {k: t.double() if isinstance(t, Tensor) else t for k, t in facts.items()}


def by_autograd(x: Inputs, cotangents: dict[str, Tensor], **facts) -> Tensor:
    products = x.products.clone().requires_grad_()
    stats = divergence_reference(products, *x[1:], **facts, want=tuple(cotangents))
    g = [cotangents[name].to(products.dtype) for name in stats]
    return torch.autograd.grad(list(stats.values()), products, g)[0]


def log_softmaxes(x: Inputs, facts: dict) -> list[Tensor]:
    """log p and log q."""
    names = ("softcap", "logit_scale", "temperature")
    found = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0} | facts
    return [
        transform_reference(a, b, *(found[n] for n in names)).log_softmax(1)
        for a, b in ((x.products, x.bias), (x.ref_products, x.ref_bias))
    ]


def coefficient_terms(x: Inputs, cotangents: dict[str, Tensor], **facts) -> float:
    """Largest of the terms that the coefficients are the difference of: p and q, or p log p, ..."""
    found = {"logit_scale": 1.0, "temperature": 1.0} | facts
    log_p, log_q = log_softmaxes(x, facts)
    terms = log_p.exp() * (log_p.abs() + log_q.abs()) + log_q.exp()
    largest = max(g.abs().max().item() for g in cotangents.values())
    slope = found["logit_scale"] / torch.as_tensor(found["temperature"]).min().item()
    return terms.max().item() * slope * largest


def plain_orders(v: int, dtype: torch.dtype) -> list[Tensor]:
    """A float64 truth is rounded like everybody; other orders of its sums show how far."""
    seeds = range(4) if dtype == torch.float64 else ()
    found = [torch.randperm(v, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return found or [torch.arange(v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize(("b", "v"), [(9, 507), (1, 50), (3, 1), (5, 128)])
def test_statistics(dtype, facts, b, v):
    x = make(b, v, dtype)
    facts = facts_of(facts, b, dtype)
    ours = divergence(*x, **facts, want=NAMES, config=SMALL)
    truth = divergence_reference(*x.double(), **widened(facts), want=COMPARED)
    plains = [
        divergence_reference(*x.columns(order), **facts, want=COMPARED)
        for order in plain_orders(v, dtype)
    ]
    size = x.products.double().abs()
    # Logits are rounded in proportion to themselves, and that much of a small entropy is lost.
    terms = {"mean_logit": size.mean(1).max(), "entropy": truth["entropy"].max() * size.max()}
    # A divergence sums terms of both signs, and all are made of log(q / p).
    log_p, log_q = log_softmaxes(x.double(), widened(facts))
    of_p, of_q = ((p.exp() * (log_p - log_q).abs()).sum(1).max() for p in (log_p, log_q))
    terms |= {"kl_policy_ref": of_p, "kl_policy_mix": of_p, "kl_ref_policy": of_q}
    terms["jsd"] = torch.maximum(of_p, of_q)
    terms = {name: value.item() for name, value in terms.items()}
    for name in COMPARED:
        same = [stats[name] for stats in plains]
        assert_three_way(ours[name], same, truth[name], name, terms=terms.get(name, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("names", [*((name,) for name in DIVERGENCES), GRADS], ids="-".join)
def test_coefficients(dtype, facts, names):
    """Two slices, the second of which starts inside the vocabulary, are the whole."""
    b, v, cut = 9, 300, 131
    x, facts = make(b, v, dtype), facts_of(facts, b, dtype)
    g = torch.Generator().manual_seed(1)
    cotangents = {name: torch.randn(b, generator=g).to(dtype) for name in names}
    stats = divergence(*x, **facts, want=NAMES, config=SMALL)

    def part(lo: int, hi: int) -> Tensor:
        return divergence_coefficients(
            x.products[:, lo:hi], x.ref_products[:, lo:hi], x.labels, x.bias[lo:hi],
            x.ref_bias[lo:hi], stats=stats, cotangents=cotangents, v_start=lo, vocab_size=v,
            **facts, config=SMALL,
        )  # fmt: skip

    ours = torch.cat([part(0, cut), part(cut, v)], dim=1)
    truth = by_autograd(x.double(), cotangents, **widened(facts))
    plains = [
        by_autograd(x.columns(order), cotangents, **facts)[:, order.argsort()]
        for order in plain_orders(v, dtype)
    ]
    terms = coefficient_terms(x.double(), cotangents, **widened(facts))
    assert_three_way(ours, plains, truth, "C", terms=terms)


@pytest.mark.parametrize("name", ["kl_ref_policy", "kl_policy_ref"])
def test_a_small_divergence_keeps_its_digits(name):
    """Logits near 1000 that differ by 1e-2: the sums of the two heads' logits cancel to 1e-4."""
    g = torch.Generator().manual_seed(0)
    near = torch.randn(4, 200, generator=g).mul(256).round() / 256
    other = near + torch.randn(4, 200, generator=g).mul(2).round() / 256
    labels = torch.randint(200, (4,), generator=g)
    far, here = (
        divergence(near + shift, other + shift, labels, want=(name,), config=SMALL)[name]
        for shift in (1024.0, 0.0)
    )
    assert torch.equal(far, here), "a shift of all logits changes nothing"
    truth = divergence_reference(near.double(), other.double(), labels, want=(name,))[name]
    plain = divergence_reference(near, other, labels, want=(name,))[name]
    assert_three_way(here, plain, truth, name)


def test_columns_at_minus_infinity_are_as_good_as_absent():
    x = make(5, 157, torch.float32)
    pad = torch.full((5, 143), -math.inf)
    padded = x._replace(
        products=torch.cat([x.products, pad], 1), ref_products=torch.cat([x.ref_products, pad], 1)
    )
    more = torch.zeros(143)
    padded = padded._replace(bias=torch.cat([x.bias, more]), ref_bias=torch.cat([x.ref_bias, more]))
    want = tuple(n for n in COMPARED if n != "mean_logit")
    facts = {"jsd_beta": BETA}
    ours = divergence(*padded, **facts, want=NAMES, config=SMALL)
    truth, plain = (divergence_reference(*y, **facts, want=want) for y in (x.double(), x))
    for name in want:
        assert_three_way(ours[name], plain[name], truth[name], name)
    cotangents = {name: torch.ones(5) for name in DIVERGENCES}
    c = divergence_coefficients(*padded, stats=ours, cotangents=cotangents, **facts, config=SMALL)
    assert (c[:, 157:] == 0).all()
    truth, plain = (by_autograd(y, cotangents, **facts) for y in (x.double(), x))
    assert_three_way(c[:, :157], plain, truth, "C")


def test_equal_heads_have_no_divergence():
    x = make(5, 200, torch.float32, apart=0.0)
    ours = divergence(*x, want=OF_BOTH, config=SMALL)
    assert (ours["kl_ref_policy"] == 0).all()
    assert (ours["kl_policy_ref"] == 0).all()


def test_strided_slabs_round_once_and_give_the_same_bits():
    x = make(5, 200, torch.float32)
    stats = divergence(*x, want=NAMES, config=SMALL)
    wide, ref = torch.full((5, 230), math.nan), torch.full((5, 250), math.nan)
    slabs = wide[:, 7:207].copy_(x.products), ref[:, 3:203].copy_(x.ref_products)
    again = divergence(*slabs, *x[2:], want=NAMES, config=SMALL)
    assert all(torch.equal(stats[name], again[name]) for name in NAMES)
    more = {"stats": stats, "cotangents": {"jsd": torch.ones(5)}, "config": SMALL}
    half = divergence_coefficients(*slabs, *x[2:], **more, out_dtype=torch.float16)
    assert torch.equal(half, divergence_coefficients(*x, **more).half())


def test_no_rows():
    ours = divergence(*make(0, 20, torch.float32), want=NAMES)
    assert {t.shape for t in ours.values()} == {(0,)}
