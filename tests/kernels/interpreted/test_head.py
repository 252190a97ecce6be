"""The whole head by its kernels, `fastpo.linear_stats(..., backend="triton")`, every schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpo import linear_stats
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions
from fastpo.kernels.linear_stats import linear_stats_reference
from fastpo.kernels.logits_epilogue import DIFFERENTIABLE
from fastpo.kernels.tile import acc_dtype
from fastpo.testing.three_way import assert_three_way
from tests.kernels.cases import DTYPES, FACTS, Inputs, Results, exact, linear_logits, make, orders
from tests.loss import test_group_chunks as losses

N, D, V = 63, 31, 507
THIN, WHOLE = 0.1, 0.3
"""MiB: blocks of 25 rows, whose statistics the fused kernel makes, and one block of all rows."""

LEAVES = ("hidden", "weight", "bias")


def gradients(
    fn: Callable[[Inputs], Results], x: Inputs, leaves: tuple[str, ...], names: tuple[str, ...]
) -> tuple[Results, Results]:
    """(statistics, gradients of a random combination of `names`)."""
    fresh = {k: getattr(x, k).detach().clone().requires_grad_() for k in leaves}
    stats = fn(x._replace(**fresh))
    g = torch.Generator().manual_seed(1)
    cotangents = {name: torch.randn(len(x.labels), generator=g) for name in names}
    loss = sum((stats[name].double() * cotangents[name].double()).sum() for name in names)
    grads = torch.autograd.grad(loss, list(fresh.values()))
    return {k: v.detach() for k, v in stats.items()}, dict(zip(leaves, grads, strict=True))


def assert_head(x: Inputs, leaves: tuple[str, ...], names: tuple[str, ...], mib: float, **facts):
    def ours(y: Inputs) -> Results:
        return linear_stats(
            *y[:3], bias=y.bias, stats=names, backend="triton", workspace_mib=mib, **facts
        )

    def reference(y: Inputs) -> Results:
        return linear_stats_reference(*y, **facts, want=names)

    def put_back(name: str, grad: Tensor, v: Tensor, d: Tensor) -> Tensor:
        grad = grad if name == "hidden" else grad[v.argsort()]
        return grad if name == "bias" else grad[:, d.argsort()]

    stats, grads = gradients(ours, x, leaves, names)
    true_stats, true_grads = gradients(reference, x.double(), leaves, names)
    plain_stats, plain_grads = [], []
    for v, d in orders(x):
        same, found = gradients(reference, x.in_order(v, d), leaves, names)
        plain_stats.append(same)
        plain_grads.append({name: put_back(name, g, v, d) for name, g in found.items()})
    terms = {"mean_logit": linear_logits(x.double(), **facts).abs().mean(1).max().item()}
    for name in names:
        assert stats[name].dtype == acc_dtype(x.hidden.dtype)
        plain = [s[name] for s in plain_stats]
        assert_three_way(stats[name], plain, true_stats[name], name, terms=terms.get(name, 0.0))
    for name in leaves:
        assert grads[name].dtype == x.hidden.dtype
        plain = [g[name] for g in plain_grads]
        assert_three_way(grads[name], plain, true_grads[name], f"d{name}")


def schedule(dtype: torch.dtype, mib: float, names: tuple[str, ...], **needs: bool) -> str:
    """What runs, so that a test named for a schedule is one of it."""
    work = Workload(N, V, D, dtype, want=names, num_grad_stats=len(names), **needs)
    _, chosen, _ = plan_head(work, HeadOptions("triton", mib), device="cpu")
    return chosen.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "facts"),
    [("logps", "plain"), ("logps", "scaled"), *((name, "softcap") for name in DIFFERENTIABLE)],
)
def test_frozen(dtype, name, facts):
    assert schedule(dtype, THIN, (name,)) == "frozen"
    x = make(N, D, V, dtype, bias=facts != "plain")
    assert_head(x, ("hidden",), (name,), THIN, **FACTS[facts])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("names", "facts"),
    [(("logps",), "plain"), (DIFFERENTIABLE, "scaled"), (DIFFERENTIABLE, "softcap")],
    ids=["logps-plain", "all-scaled", "all-softcap"],
)
@pytest.mark.parametrize("mib", [THIN, WHOLE], ids=["thin", "whole"])
def test_trained(dtype, names, facts, mib):
    expected = "recompute" if mib == THIN else "kept"
    assert schedule(dtype, mib, names, needs_head=True) == expected
    x = make(N, D, V, dtype, bias=True)
    assert_head(x, LEAVES, names, mib, **FACTS[facts])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mib", [0.1, 1], ids=["recompute", "kept"])
def test_a_graph_may_be_walked_again(dtype, mib):
    """Coefficients take the place of kept products: the second walk recomputes them."""
    x = make(N, D, V, dtype, bias=True)
    leaves = [getattr(x, name).clone().requires_grad_() for name in LEAVES]
    hidden, weight, bias = leaves
    stats = linear_stats(hidden, weight, x.labels, bias=bias, backend="triton", workspace_mib=mib)
    out = stats["logps"]
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    truth = [t.double().detach().requires_grad_() for t in leaves]
    logits = truth[0] @ truth[1].T + truth[2]
    logps = logits.log_softmax(1).gather(1, x.labels[:, None])
    true_grads = torch.autograd.grad(logps.sum(), truth)
    for once, twice, true in zip(first, second, true_grads, strict=True):
        assert_three_way(twice, once, true)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("leaves", [LEAVES, ("weight",)], ids="+".join)
def test_late_slabs_are_cut_by_rows_too(dtype, leaves):
    """Three blocks of 128 rows; a slice of dW is summed over them and rounded once."""
    n, mib = 300, 0.09 if dtype == torch.float32 else 0.05
    work = Workload(n, V, D, dtype, needs_head=True, needs_hidden="hidden" in leaves)
    chosen = plan_head(work, HeadOptions("triton", mib), device="cpu")[1]
    assert (chosen.name, chosen.late_tokens) == ("recompute", 128)
    assert chosen.chunk_columns < V
    assert_head(make(n, D, V, dtype, bias=True), leaves, ("logps",), mib)


@pytest.mark.parametrize("leaves", [("weight",), ("bias",), ("hidden", "bias")])
def test_any_part_may_be_the_trained_one(leaves):
    x = make(N, D, V, torch.float32, bias=True)
    assert_head(x, leaves, DIFFERENTIABLE, THIN)


@pytest.mark.parametrize("name", ["kl_ref_policy", "kl_policy_ref", "jsd"])
@pytest.mark.parametrize("mib", [THIN, 2 * WHOLE], ids=["recompute", "kept"])
def test_a_trained_head_beside_a_reference(name, mib):
    """With a divergence alone: what its coefficients take besides was not asked for."""
    x = make(N, D, V, torch.float32, bias=True)

    def run(y: Inputs, backend: str) -> tuple[Tensor, ...]:
        leaves = [getattr(y, leaf).clone().requires_grad_() for leaf in LEAVES]
        stats = linear_stats(
            *leaves[:2], y.labels, bias=leaves[2], stats=(name,), ref_hidden=y.hidden.flip(0),
            backend=backend, workspace_mib=mib,
        )  # fmt: skip
        return torch.autograd.grad(stats[name].sum(), leaves)

    ours, plain, truth = run(x, "triton"), run(x, "torch"), run(x.double(), "torch")
    for triple in zip(ours, plain, truth, strict=True):
        assert_three_way(*triple, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mib", [THIN, WHOLE], ids=["thin", "whole"])
def test_forward(dtype, mib):
    x = make(N, D, V, dtype, bias=True)
    names = (*DIFFERENTIABLE, "log_p2", "top1")
    arguments = {"bias": x.bias, "stats": names, "softcap": 5.0, "workspace_mib": mib}
    ours = linear_stats(*x[:3], **arguments, backend="triton")
    again = linear_stats(*x[:3], **arguments, backend="triton")
    for name in names:
        plain = [
            linear_stats_reference(*x.in_order(v, d), softcap=5.0, want=(name,))[name]
            for v, d in orders(x)
        ]
        truth = linear_stats_reference(*x.double(), softcap=5.0, want=(name,))[name]
        terms = linear_logits(x.double(), softcap=5.0).abs().mean(1).max().item()
        scale = terms if name == "mean_logit" else 0.0
        assert_three_way(ours[name], plain, truth, name, terms=scale)
        assert torch.equal(ours[name], again[name])


@pytest.mark.parametrize("mib", [THIN, WHOLE], ids=["thin", "whole"])
def test_policy_and_reference_agree_to_the_bit(mib):
    """With a gradient to the hidden states, to the head, or none: the same log-probs.

    But for a frozen head in thin slabs: its products are the BLAS's, and without a gradient they
    are the kernel's, which sums in another order.
    """
    x = make(N, D, V, torch.float32)
    found = []
    gradients = [(False, False), (True, False), (True, True)]
    for hidden_grad, weight_grad in gradients if mib == WHOLE else gradients[::2]:
        hidden = x.hidden.clone().requires_grad_(hidden_grad)
        weight = x.weight.clone().requires_grad_(weight_grad)
        out = linear_stats(hidden, weight, x.labels, backend="triton", workspace_mib=mib)
        found.append(out["logps"].detach())
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_rounding_of_lse_reaches_no_gradient():
    """As in `test_linear_coefficients`: whole-number logits around 1000, the truth's around 0."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 4, (9, 200), generator=g).float()
    labels = torch.randint(200, (9,), generator=g)
    near, far = (exact(z, labels)._replace(bias=torch.zeros(200)) for z in (logits, logits + 1000))

    def ours(y: Inputs) -> Results:
        # 0.01 MiB: recompute, in slices of 145 columns.
        return linear_stats(*y[:3], bias=y.bias, backend="triton", workspace_mib=0.01)

    def reference(y: Inputs) -> Results:
        return linear_stats_reference(*y, want=("logps",))

    found, plain, truth = (
        gradients(fn, x, ("bias",), ("logps",))[1]["bias"]
        for fn, x in ((ours, far), (reference, near), (reference, near.double()))
    )
    assert_three_way(found, plain, truth, "dbias")


def test_ignored_rows_are_zero():
    x = make(N, D, V, torch.float32)
    x.labels[::3] = -100
    x.hidden[::3] = float("nan")
    hidden = x.hidden.requires_grad_()
    out = linear_stats(hidden, x.weight, x.labels, backend="triton", workspace_mib=THIN)
    out["logps"].sum().backward()
    assert (out["logps"][::3] == 0).all()
    assert (hidden.grad[::3] == 0).all()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_loss_by_groups(dtype):
    """A trained head in parts whose logits are kept: the gradients of one pass, dW rounded once."""
    ours = losses.run("mixture", dtype, 0.06, backend="triton")
    truth = losses.plain_mixture(torch.float64)
    if dtype == torch.float32:
        plain = losses.plain_mixture(dtype)
    else:  # on full half-precision logits a second rounding of dW would not show
        out, grads = losses.run("mixture", dtype, losses.LARGE)
        plain = out.loss.detach(), grads
    assert_three_way(ours[0].loss, plain[0], truth[0], "loss")
    for triple in zip(ours[1], plain[1], truth[1], strict=True):
        assert_three_way(*triple)
