"""Facts of a head beyond its weight: low-rank deltas, padding, tokens' temperatures, promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpo import linear_cross_entropy, linear_logps, linear_stats
from fastpo.head.lora import Lora
from fastpo.head.spec import HeadOptions, HeadSpec
from fastpo.head.statistics import token_statistics
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.head.types import DIFFERENTIABLE, OF_REFERENCE
from fastpo.testing.three_way import assert_three_way

N, D, V, R, PADDED = 41, 24, 300, 5, 320
SMALL, LARGE = 0.1, 256
OWN = tuple(name for name in DIFFERENTIABLE if name not in OF_REFERENCE)
LEAVES = ("hidden", "weight", "bias", "a", "b")


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g).to(dtype)

    return {
        "hidden": normal(N, D),
        "weight": normal(PADDED, D) / 2,
        "bias": normal(PADDED),
        "a": normal(R, D) / 4,
        "b": normal(PADDED, R) / 4,
        "ref_hidden": normal(N, D),
        "temperature": torch.rand(N, generator=g).to(dtype) + 0.5,
        "labels": torch.randint(V, (N,), generator=g),
    }


def plain(x: dict[str, Tensor], beta: float, softcap: float | None) -> dict[str, Tensor]:
    """The definitions on full logits of the real vocabulary, in the dtype of the inputs."""

    def log_softmax(h: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor]:
        z = h @ x["weight"][:V].T + x["bias"][:V]
        z = z if low is None else z + low @ x["b"][:V].T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        z = z / x["temperature"][:, None].to(z.dtype)
        return z, z.log_softmax(-1)

    z, log_p = log_softmax(x["hidden"], (x["hidden"] @ x["a"].T) * 2.0)
    log_q = log_softmax(x["ref_hidden"], None)[1].detach()
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return {
        "logps": log_p.gather(1, x["labels"][:, None])[:, 0],
        "lse": z.logsumexp(-1),
        "entropy": -(p * log_p).sum(-1),
        "mean_logit": z.mean(-1),
        "kl_ref_policy": (q * (log_q - log_p)).sum(-1),
        "kl_policy_ref": (p * (log_p - log_q)).sum(-1),
        "jsd": beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1),
        "ref_logps": log_q.gather(1, x["labels"][:, None])[:, 0],
    }


def ours(x: dict[str, Tensor], names: tuple[str, ...], **options: Any) -> dict[str, Tensor]:
    more: dict[str, Any] = {}
    if not set(names).isdisjoint(OF_REFERENCE):
        weight, bias = x["weight"].detach(), x["bias"].detach()
        more = {"ref_hidden": x["ref_hidden"], "ref_weight": weight, "ref_bias": bias}
    return linear_stats(
        x["hidden"], x["weight"], x["labels"], stats=names, bias=x["bias"], vocab_size=V,
        temperature=x["temperature"], lora=Lora(x["a"], x["b"], 2.0), **more, **options,
    )  # fmt: skip


def gradients(fn, x: dict[str, Tensor], leaves: tuple[str, ...], names: tuple[str, ...]):
    tensors = x | {k: x[k].clone().requires_grad_() for k in leaves}
    stats = fn(tensors)
    g = torch.Generator().manual_seed(1)
    cotangents = {n: torch.randn(N, generator=g, dtype=torch.float64) for n in names}
    loss = sum((stats[n].double() * cotangents[n]).sum() for n in names)
    grads = torch.autograd.grad(loss, [tensors[k] for k in leaves])
    return stats, dict(zip(leaves, grads, strict=True))


def assert_facts(
    dtype: torch.dtype,
    leaves: tuple[str, ...],
    names: tuple[str, ...],
    *,
    softcap: float | None = None,
    **options: Any,
) -> None:
    """Statistics and gradients of a padded head with a delta, a temperature a token."""
    x = inputs(dtype)
    beta = 0.3

    def mine(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return ours(t, names, jsd_beta=beta, softcap=softcap, **options)

    def full(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return plain(t, beta, softcap)

    wide = {k: t if k == "labels" else t.double() for k, t in x.items()}
    differentiable = tuple(n for n in names if n in DIFFERENTIABLE)
    stats, grads = gradients(mine, x, leaves, differentiable)
    same, same_grads = gradients(full, x, leaves, differentiable)
    truth, true_grads = gradients(full, wide, leaves, differentiable)
    for name in names:
        assert_three_way(stats[name], same[name].to(stats[name].dtype), truth[name], name)
    for leaf in leaves:
        assert_three_way(grads[leaf], same_grads[leaf], true_grads[leaf], f"d{leaf}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [("logps",), OWN, (*DIFFERENTIABLE, "ref_logps")], ids=len)
@pytest.mark.parametrize("leaves", [("hidden",), ("hidden", "a"), ("a", "b"), LEAVES], ids=str)
@pytest.mark.parametrize("workspace", [SMALL, LARGE])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_three_way(dtype, names, leaves, workspace, softcap):
    assert_facts(dtype, leaves, names, softcap=softcap, workspace_mib=workspace)


def test_gradcheck():
    x = {k: t if k == "labels" else t.double() for k, t in inputs(torch.float64).items()}
    rows = {k: x[k][:3] for k in ("hidden", "ref_hidden", "temperature", "labels")}
    x |= rows | {"labels": rows["labels"] % 6}
    x |= {k: x[k][:8] for k in ("weight", "bias", "b")}

    def fn(*leaves: Tensor) -> tuple[Tensor, ...]:
        t = x | dict(zip(LEAVES, leaves, strict=True))
        out = linear_stats(
            t["hidden"], t["weight"], t["labels"], stats=DIFFERENTIABLE, bias=t["bias"],
            vocab_size=6, temperature=t["temperature"], lora=Lora(t["a"], t["b"], 2.0),
            ref_hidden=x["ref_hidden"], ref_weight=x["weight"], jsd_beta=0.8,
        )  # fmt: skip
        return tuple(out.values())

    assert torch.autograd.gradcheck(fn, [x[k].clone().requires_grad_() for k in LEAVES])


def test_padding_gets_no_gradient_and_no_label():
    x = inputs(torch.float32)
    weight = x["weight"].clone().requires_grad_()
    linear_logps(x["hidden"], weight, x["labels"], vocab_size=V).sum().backward()
    assert weight.grad is not None
    assert (weight.grad[V:] == 0).all()
    with pytest.raises(ValueError, match=rf"label {V} at position 0 is outside"):
        linear_logps(x["hidden"], weight, torch.full((N,), V), vocab_size=V)


def test_ignored_rows_keep_their_nan_to_themselves():
    x = inputs(torch.float32)
    x["labels"][::3], x["hidden"][::3] = -100, math.nan
    stats, grads = gradients(lambda t: ours(t, ("logps",)), x, ("hidden", "a", "b"), ("logps",))
    assert (stats["logps"][::3] == 0).all()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_no_label_left_gives_every_leaf_a_zero():
    x = inputs(torch.float32)
    x["labels"][:] = -100
    leaves = ("hidden", "weight", "bias", "a", "b")
    _, grads = gradients(lambda t: ours(t, ("logps",)), x, leaves, ("logps",))
    assert all((grad == 0).all() for grad in grads.values())


def test_cross_entropy_takes_the_same_facts():
    x = inputs(torch.float64)
    z = plain(x, 0.5, None)
    facts = {"vocab_size": V, "temperature": x["temperature"], "bias": x["bias"]}
    loss = linear_cross_entropy(
        x["hidden"], x["weight"], x["labels"], lora=Lora(x["a"], x["b"], 2.0), **facts
    )
    assert_three_way(loss, -z["logps"].mean(), -z["logps"].mean())


class Copies(TorchDispatchMode):
    """Names the operators that look for tokens, or copy them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("nonzero", "index", "index_copy", "clone", "_to_copy", "cat"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [False, True])
def test_the_promise_that_all_are_scored_spares_waits_and_copies(trained):
    """Tensors without values: what reads one on the host fails."""
    with FakeTensorMode(), Copies() as copies:
        hidden = torch.empty(N, D, requires_grad=True)
        head = HeadTensors(torch.empty(V, D, requires_grad=trained))
        targets = torch.empty(N, dtype=torch.long)
        options = HeadOptions(workspace_mib=64)

        def run(**promise: bool) -> Tensor:
            return token_statistics(
                hidden, head, targets, want=("logps",), options=options, **promise
            )["logps"]

        with pytest.raises(DataDependentOutputException):
            run()
        logps = run(all_scored=True)
        assert copies.names == []
        logps.sum().backward()
    assert hidden.grad is not None
    assert (head.weight.grad is not None) == trained


def test_a_promise_beside_a_reference_a_delta_and_temperatures():
    x = inputs(torch.float32)
    names = (*DIFFERENTIABLE, "ref_logps")
    same = ours(x, names, jsd_beta=0.3)
    stats = token_statistics(
        x["hidden"], HeadTensors(x["weight"], x["bias"], Lora(x["a"], x["b"], 2.0)), x["labels"],
        want=names, reference=ReferenceStates(x["ref_hidden"]), spec=HeadSpec(vocab_size=V),
        options=HeadOptions(jsd_beta=0.3), temperatures=x["temperature"], all_scored=True,
    )  # fmt: skip
    for name in names:
        assert torch.equal(stats[name], same[name])


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_trls(beta):
    """Of GKD's trainer, value and gradient: the reference is its teacher."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    x = inputs(torch.float32)

    def run(dtype: torch.dtype, by_trl: bool) -> tuple[Tensor, Tensor]:
        weight, ref_hidden = x["weight"].to(dtype), x["ref_hidden"].to(dtype)
        hidden = x["hidden"].to(dtype).requires_grad_()
        if by_trl:
            logits = hidden @ weight.T, ref_hidden @ weight.T
            jsd = trainer.generalized_jsd_loss(
                *logits, beta=beta, temperature=0.8, reduction="none"
            ).sum(-1)
        else:
            jsd = linear_stats(
                hidden, weight, x["labels"], stats=("jsd",), ref_hidden=ref_hidden,
                temperature=0.8, jsd_beta=beta,
            )["jsd"]  # fmt: skip
        return jsd.detach(), torch.autograd.grad(jsd.square().sum(), hidden)[0]

    ours, same = (run(torch.float32, by_trl) for by_trl in (False, True))
    for mine, theirs, truth in zip(ours, same, run(torch.float64, True), strict=True):
        assert_three_way(mine, theirs, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": torch.ones(N + 1)}, r"temperature must be a number or \[41\]"),
        ({"vocab_size": PADDED + 1}, "vocab_size 321 for a weight of 320 rows"),
        ({"vocab_size": 0}, "vocab_size 0 for a weight"),
        ({"jsd_beta": 1.0}, "jsd_beta must lie between 0 and 1: got 1.0"),
        ({"lora": Lora(torch.zeros(R, D + 1), torch.zeros(PADDED, R))}, r"A \[r, 24\]"),
        ({"lora": Lora(torch.zeros(R, D), torch.zeros(V, R))}, r"B \[320, r\]"),
    ],
)
def test_bad_facts_are_named(change, message):
    x = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_stats(x["hidden"], x["weight"], x["labels"], **change)
