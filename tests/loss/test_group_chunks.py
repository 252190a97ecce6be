"""A trained head a few groups at a time: the same loss and gradients, three products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpo import Head, PreferenceLoss
from fastpo.head.lora import Lora
from fastpo.loss.group_chunks import cut_groups
from fastpo.segments import Segments
from fastpo.testing.three_way import assert_three_way
from tests.head.test_schedule import CountingMode

D, V, G, K = 16, 509, 7, 3
# MiB. The logits of about 40 tokens, and of all.
SMALL, LARGE = 0.25, 256
CASES = ("simpo", "dpo", "mixture", "lipo", "tdpo2", "weighted", "gold")


def make(name: str, dtype: torch.dtype) -> tuple[PreferenceLoss, dict[str, Any], list[Tensor]]:
    """(loss, arguments, leaves)."""
    g = torch.Generator().manual_seed(0)
    pairs = name in ("dpo", "simpo", "mixture", "tdpo2", "weighted")
    k = 2 if pairs else K
    sizes = torch.randint(0, 12, (G * k + G,), generator=g)
    sizes[3] = 0
    grid = torch.arange(G * k).view(G, k)
    if not pairs:
        grid[2, 2] = -1
        sizes[8] = 0
    extras = {"gold": torch.arange(G * k, G * k + G)} if name == "gold" else {}
    if not extras:
        sizes[G * k :] = 0
    n = int(sizes.sum())
    segments = Segments(
        response=torch.arange(len(sizes)).repeat_interleave(sizes),
        grid=grid,
        label=torch.tensor([True] + [False] * (k - 1)).expand(G, k),
        num_responses=len(sizes),
        score=torch.randn(G, k, generator=g).to(dtype),
        rank=torch.tensor([0, 1, 1][:k]).expand(G, k),
        weight=torch.rand(G, generator=g).to(dtype),
        extras=extras,
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    hidden, head = normal(n, D).requires_grad_(), nn.Linear(D, V, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(normal(V, D))
        head.bias.copy_(normal(V))
    labels = torch.randint(0, V, (n,), generator=g)
    labels[5] = -100
    arguments: dict[str, Any] = {"hidden": hidden, "labels": labels, "segments": segments}
    arguments |= {"ref_logps": normal(n) - 6} if name in ("dpo", "lipo", "weighted", "gold") else {}
    leaves = [hidden, head.weight, head.bias]
    if name == "tdpo2":
        arguments |= {"ref_hidden": normal(n, D), "ref_weight": normal(V, D)}
    if name == "weighted":
        arguments["token_weights"] = torch.rand(n, generator=g).to(dtype).requires_grad_()
        leaves.append(arguments["token_weights"])
    objective: Any = {
        "mixture": {"simpo": 0.7, "sft": 0.3},
        "weighted": "dpo",
        "gold": {"gold_sft": 1.0, "pair_logistic": 0.2},
    }.get(name, name)
    return PreferenceLoss(objective, Head(head)), arguments, leaves


def run(
    name: str, dtype: torch.dtype, workspace_mib: float, **options: Any
) -> tuple[Any, list[Tensor]]:
    loss, arguments, leaves = make(name, dtype)
    out = loss(**arguments, workspace_mib=workspace_mib, **options)
    return out, list(torch.autograd.grad(3 * out.loss, leaves))


def plain_mixture(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients of 3 * loss) of "mixture" on full logits, with every sum in `dtype`."""
    _, arguments, leaves = make("mixture", dtype)
    (hidden, weight, bias), segments = leaves, arguments["segments"]
    valid = arguments["labels"] >= 0
    labels = arguments["labels"].clamp(min=0)[:, None]
    logps = (hidden @ weight.T + bias).log_softmax(1).gather(1, labels).squeeze(1)
    responses = [(segments.response == r) & valid for r in range(segments.num_responses)]
    sums = torch.stack([logps[r].sum() for r in responses])[segments.grid]
    tokens = torch.stack([r.sum() for r in responses])[segments.grid]
    chosen, rejected = (sums / tokens.clamp(min=1)).unbind(1)
    simpo = -nn.functional.logsigmoid(2.0 * (chosen - rejected) - 0.5)
    loss = 0.7 * (segments.weight * simpo).mean()
    loss = loss - 0.3 * (segments.weight * sums[:, 0]).sum() / tokens[:, 0].sum()
    return loss.detach(), list(torch.autograd.grad(3 * loss, leaves))


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(name):
    ours, grads = run(name, torch.float32, SMALL)
    whole, whole_grads = run(name, torch.float32, LARGE)
    truth, true_grads = run(name, torch.float64, LARGE)
    for what in ("loss", "losses", "rewards"):
        assert_three_way(*(getattr(o, what).detach() for o in (ours, whole, truth)), what)
    assert ours.metrics.keys() == whole.metrics.keys()
    for metric in whole.metrics:
        assert torch.equal(ours.counts[metric], whole.counts[metric])
        triple = (o.metrics[metric].detach() for o in (ours, whole, truth))
        assert_three_way(*triple, metric)
    for i, triple in enumerate(zip(grads, whole_grads, true_grads, strict=True)):
        assert_three_way(*triple, f"leaf {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_rounded_once(dtype):
    """In half precision too: dW and the bias are summed in float32 over the groups."""
    _, grads = run("simpo", dtype, SMALL)
    _, whole = run("simpo", dtype, LARGE)
    _, arguments, leaves = make("simpo", dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = PreferenceLoss("simpo")(
        **{**arguments, "hidden": wide[0]}, weight=wide[1], bias=wide[2], workspace_mib=LARGE
    )
    truth = torch.autograd.grad(3 * out.loss, wide)
    for triple in zip(grads, whole, truth, strict=True):
        assert triple[0].dtype == dtype
        assert_three_way(*triple)


def test_low_rank_delta_of_the_head():
    def run(dtype: torch.dtype, workspace_mib: float) -> tuple[Tensor, ...]:
        loss, arguments, (hidden, weight, bias) = make("simpo", dtype)
        weight.requires_grad_(False)
        bias.requires_grad_(False)
        g = torch.Generator().manual_seed(3)
        lora = Lora(*(torch.randn(s, generator=g).to(dtype) for s in ((2, D), (V, 2))), 0.5)
        for t in lora[:2]:
            t.requires_grad_()
        head = WithLora(loss.head.module, lora)
        out = PreferenceLoss("simpo", head)(**arguments, workspace_mib=workspace_mib)
        return torch.autograd.grad(out.loss, (hidden, lora.a, lora.b))

    results = run(torch.float32, SMALL), run(torch.float32, LARGE), run(torch.float64, LARGE)
    for triple in zip(*results, strict=True):
        assert_three_way(*triple)


class WithLora(Head):
    def __init__(self, module: nn.Module, lora: Lora) -> None:
        super().__init__(module)
        object.__setattr__(self, "_lora", lora)

    @property
    def lora(self) -> Lora:
        return self._lora


@pytest.mark.parametrize(("workspace", "products"), [(SMALL, 3), (0.01, 4)])
def test_three_products_unless_a_group_is_larger_than_the_workspace(workspace, products):
    loss, arguments, leaves = make("simpo", torch.float32)
    tokens = int((arguments["labels"] != -100).sum())
    with CountingMode(tokens * D * V) as count:
        torch.autograd.grad(loss(**arguments, workspace_mib=workspace).loss, leaves)
    assert count.products == pytest.approx(products)


def test_objectives_of_the_whole_batch_are_not_cut():
    """BCO's shift needs every reward before the first coefficient."""
    loss, arguments, leaves = make("dpo", torch.float32)
    bco = PreferenceLoss("bco", loss.head)
    tokens = int((arguments["labels"] != -100).sum())
    with CountingMode(tokens * D * V) as count:
        torch.autograd.grad(bco(**arguments, workspace_mib=SMALL).loss, leaves)
    assert count.products > 3


def test_cuts():
    segments = Segments(
        response=torch.tensor([0] * 5 + [1] * 5 + [2] * 9 + [4] * 3),
        grid=torch.tensor([[0, 2], [1, -1], [3, 4]]),
        label=torch.zeros(3, 2, dtype=torch.bool),
        num_responses=5,
    )
    assert cut_groups(segments, 14) == [(0, 1), (1, 3)]
    assert cut_groups(segments, 3) == [(0, 1), (1, 2), (2, 3)]
    assert cut_groups(segments, 22) == [(0, 3)]
    part, tokens = segments.select(1, 3)
    assert tokens.tolist() == [5, 6, 7, 8, 9, 19, 20, 21]
    assert part.grid.tolist() == [[0, -1], [1, 2]]
    assert part.response.tolist() == [0] * 5 + [2] * 3
    assert part.num_responses == 3
    assert part.index.tolist() == [1, 2]


def test_a_second_walk_is_refused():
    loss, arguments, leaves = make("simpo", torch.float32)
    out = loss(**arguments, workspace_mib=SMALL)
    torch.autograd.grad(out.loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward on it once"):
        torch.autograd.grad(out.loss, leaves)


def test_autocast_casts_the_weight_once():
    """And not once for every part of the batch; its gradient is summed in float32 all the same."""
    casts = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].shape == (V, D):
                casts.append((args[0].dtype, out.dtype))
            return out

    with torch.autocast("cpu", torch.bfloat16), Casts():
        out, grads = run("simpo", torch.float32, SMALL)
    assert casts.count((torch.float32, torch.bfloat16)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        whole, whole_grads = run("simpo", torch.float32, LARGE)
    truth, true_grads = run("simpo", torch.float64, LARGE)
    assert_three_way(out.loss.detach(), whole.loss.detach(), truth.loss.detach())
    for triple in zip(grads, whole_grads, true_grads, strict=True):
        assert_three_way(*triple)
