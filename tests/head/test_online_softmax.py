"""One pass over chunks of the vocabulary: its running sums, and chunks that gradients leave out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastpo import linear_logps, linear_stats
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions
from fastpo.head.torch_backend import TorchBackend
from fastpo.testing.three_way import assert_three_way
from tests.head.test_functional import gradients, inputs, plain, plain_in_order
from tests.head.test_schedule import CountingMode

N, D, V = 60, 64, 4090
FACTS = [{}, {"softcap": 20.0, "logit_scale": 0.9, "temperature": 0.7}]
# A trained head: logits kept, none kept.
SCHEDULES = pytest.mark.parametrize(
    ("trained", "workspace"), [(False, 256), (False, 0.1), (True, 4), (True, 0.1)]
)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """1024 columns each: a token stays in the chunk that has its target."""
    monkeypatch.setattr(TorchBackend, "largest_chunk", 1 << 16)


def peaked(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """p_y from .5 to 1 - 1e-8: many tokens of a language model are nearly certain."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) / D**0.5
    labels = torch.randint(0, V, (N,), generator=g)
    rows = weight[labels] / weight[labels].square().sum(1, keepdim=True)
    hidden = rows * torch.linspace(9, 30, N)[:, None]
    return hidden.to(dtype), weight.to(dtype), labels


def run(skip_below: float, trained: bool, facts: dict, workspace: float, dtype=torch.float32):
    hidden, weight, labels = peaked(dtype)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    out = linear_stats(
        hidden, weight, labels, stats=("logps", "skipped") if skip_below else ("logps",),
        skip_below=skip_below, workspace_mib=workspace, **facts,
    )  # fmt: skip
    out["logps"].sum().backward()
    return out["logps"].detach(), hidden.grad, weight.grad, out.get("skipped")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("facts", FACTS, ids=["plain", "softcap"])
@pytest.mark.parametrize("trained", [False, True])
def test_sums_move_with_a_rising_maximum(monkeypatch, dtype, facts, trained):
    """Every chunk of 50 columns raises the maximum, so that all sums before it are rescaled."""
    monkeypatch.setattr("fastpo.head.schedule._LEAST_COLUMNS", 50)
    monkeypatch.setattr(TorchBackend, "largest_chunk", 50 * 63)
    x = inputs(dtype)
    del x["ref_hidden"]
    x["bias"] = torch.linspace(-9, 9, 507).to(dtype)
    names, every = ("logps", "entropy"), ("logps", "entropy", "log_p2", "top1", "mean_logit")
    best = (x["hidden"].double() @ x["weight"].double().T + x["bias"].double()).argmax(1)
    x["labels"][::3] = best[::3]  # top1 is 1 somewhere
    leaves = ("hidden", "weight") if trained else ()
    work = Workload(63, 507, 31, dtype, want=every, needs_hidden=trained, needs_head=trained)
    assert plan_head(work, HeadOptions(workspace_mib=0.1), device="cpu")[1].chunk_columns == 50

    def of(fn, x, **options):
        if trained:
            return gradients(fn, x, leaves, names, **facts, **options)
        return fn(x["hidden"], x["weight"], x["labels"], bias=x["bias"], **facts, **options), {}

    wide = {k: t if k == "labels" else t.double() for k, t in x.items()}
    ours, our_grads = of(linear_stats, x, stats=every, grad=names, workspace_mib=0.1)
    truth, true_grads = of(plain, wide)
    orders = [partial(plain_in_order, seed) for seed in range(8)]
    same = [of(fn, x) for fn in (orders if dtype == torch.float64 else [plain])]
    for name in every[:-1]:
        if name != "top1":
            others = [stats[name].to(ours[name].dtype) for stats, _ in same]
            assert_three_way(ours[name], others, truth[name], name)
        elif dtype != torch.bfloat16:  # whose logits tie where the true ones do not
            assert torch.equal(ours[name].double(), truth[name])
    for leaf in leaves:
        assert_three_way(our_grads[leaf], [g[leaf] for _, g in same], true_grads[leaf], leaf)


@pytest.mark.parametrize("facts", FACTS, ids=["plain", "softcap"])
@SCHEDULES
def test_error_is_within_what_was_skipped(trained, workspace, facts):
    logps, dh, dw, skipped = run(2**-12, trained, facts, workspace)
    same, full_h, full_w, _ = run(0.0, trained, facts, workspace)
    assert torch.equal(logps, same)
    # Of 60 tokens those that are nearly certain leave something out, the first ones nothing.
    assert skipped[0] == 0
    assert 5 < (skipped > 0).sum() < N
    chunks = 4 if workspace > 1 else 32
    assert skipped.max() <= chunks * 2**-12, "a chunk was likelier than allowed"
    slope = facts.get("logit_scale", 1.0) / facts.get("temperature", 1.0)
    hidden, weight, _ = peaked()
    rounding = 1e-6 * full_h.abs().max()
    bound = skipped * slope * weight.norm(dim=1).max() + rounding
    error = (dh - full_h).norm(dim=1)
    assert (error <= bound).all()
    assert error.max() > rounding, "something was left out"
    if trained:
        bound = (skipped * slope * hidden.norm(dim=1)).sum()
        assert 0 < (dw - full_w).norm(dim=1).max() <= bound


@SCHEDULES
def test_matmuls_are_saved(trained, workspace):
    def products(skip_below: float) -> float:
        with CountingMode(N * D * V) as count:
            run(skip_below, trained, {}, workspace)
        return count.products

    full, fewer = products(1e-12), products(2**-12)
    # The forward's matmul stays; of the others at least a quarter goes.
    assert fewer - 1 < 0.75 * (full - 1)


@SCHEDULES
def test_same_bits_twice(trained, workspace):
    first, second = (run(2**-12, trained, {}, workspace, torch.bfloat16) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_nan_stays_nan():
    hidden, weight, labels = peaked()
    hidden[40] = float("nan")
    hidden.requires_grad_()
    linear_logps(hidden, weight, labels, skip_below=2**-12).sum().backward()
    assert hidden.grad[40].isnan().all()
    assert not hidden.grad[:40].isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stats": ("entropy",)}, "for the gradient of logps alone"),
        ({"backend": "triton"}, "has no skip_below"),
        ({"skip_below": 0.0, "stats": ("logps", "skipped")}, "nothing is skipped without"),
        ({"skip_below": -0.1}, r"skip_below must lie in \[0, 1\)"),
    ],
)
def test_what_cannot_be_skipped(options, message):
    hidden, weight, labels = peaked()
    with pytest.raises(ValueError, match=message):
        linear_stats(hidden, weight, labels, **{"skip_below": 2**-12, **options})
