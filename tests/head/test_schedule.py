"""The schedule is a pure function; its matmuls and its memory are what it says they are."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastpo import linear_stats
from fastpo.head import op as ops
from fastpo.head.schedule import (
    Traits,
    Workload,
    auto_workspace_mib,
    choose_schedule,
    even_chunks,
)
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions
from fastpo.head.types import DIFFERENTIABLE, put_matmul_

BIG = {"num_tokens": 4096, "vocab_size": 131072}


@pytest.mark.parametrize(
    ("case", "name", "matmuls"),
    [
        ({"needs_hidden": False}, "forward", 1),
        ({"needs_hidden": True, "num_grad_stats": 0}, "forward", 1),
        ({"needs_hidden": True}, "frozen", 2),
        ({"needs_hidden": True, "num_grad_stats": 2}, "recompute", 3),
        ({"needs_hidden": True, "with_reference": True}, "frozen", 3),
        ({"needs_hidden": True, "with_reference": True, "num_grad_stats": 2}, "frozen", 4),
        ({"needs_hidden": True, "needs_head": True, "needs_weight": True}, "recompute", 4),
        ({"needs_hidden": True, "needs_head": True, "needs_weight": False}, "recompute", 3),
        ({"needs_hidden": False, "needs_head": True, "needs_weight": True}, "recompute", 3),
    ],
)
def test_matmuls(case, name, matmuls):
    schedule = choose_schedule(Workload(**BIG, **case))
    assert (schedule.name, schedule.matmuls) == (name, matmuls)


def test_small_logits_are_kept():
    schedule = choose_schedule(Workload(64, 1000, needs_head=True))
    assert (schedule.name, schedule.matmuls) == ("kept", 3)


@pytest.mark.parametrize("with_reference", [False, True])
def test_kernels_keep_logits_that_fill_the_workspace(with_reference):
    """Without a second chunk beside them; the chunks of dW come on top."""
    most = 1024 if with_reference else 2048
    work = Workload(most, 131072, needs_head=True, with_reference=with_reference)
    traits = Traits(3 if with_reference else 2)
    kept = choose_schedule(work, traits, workspace_bytes=1 << 30)
    assert (kept.name, kept.matmuls, kept.chunk_columns) == ("kept", 3 + with_reference, 8192)
    more = work._replace(num_tokens=most + 1)
    assert choose_schedule(more, traits, workspace_bytes=1 << 30).name == "recompute"


def test_chunks_fit_the_workspace_at_any_size():
    for n, v, mib in [(1, 257, 1), (10**6, 262144, 256), (64000, 131072, 1), (3, 10**6, 256)]:
        s = choose_schedule(Workload(n, v), Traits(3), workspace_bytes=mib << 20)
        assert 1 <= s.chunk_tokens <= n
        assert 1 <= s.chunk_columns <= v
        for tokens, columns, size in ((s.chunk_tokens, v, 12), (s.late_tokens, s.chunk_columns, 4)):
            assert tokens * columns * size <= mib << 20 or min(tokens, columns) == 1


def on_a_card(n: int, v: int, d: int, mib: float, **needs):
    """The schedule of bfloat16 on a GPU, which need not be there."""
    work = Workload(n, v, d, torch.bfloat16, **needs)
    return plan_head(work, HeadOptions(workspace_mib=mib), device="cuda")[1]


TRAINED = {"needs_head": True, "needs_weight": True}


@pytest.mark.parametrize(
    ("n", "v", "mib", "tokens"),
    [
        (8192, 131072, 256, 512),
        (8192, 128256, 256, 512),  # 523 tokens would fit
        (8192, 151936, 256, 384),
        (8192, 256000, 256, 256),
        (8192, 131072, 1024, 2048),
        (513, 131072, 256, 384),  # two chunks, and none of a single token
        (600, 131072, 256, 384),
        (300, 131072, 256, 300),
        (8192, 1 << 20, 256, 64),  # less than a tile
    ],
)
def test_chunks_on_a_card_are_equal_and_whole_tiles(n, v, mib, tokens):
    for needs in ({}, {"needs_hidden": False}, TRAINED):
        assert on_a_card(n, v, 4096, mib, **needs).chunk_tokens == tokens


def test_even_chunks_waste_less_than_a_tile_each():
    for total in (1, 127, 128, 129, 5000, 8192):
        for most in (1, 100, 128, 300, 523, 10**5):
            size = even_chunks(total, most, 128)
            assert 1 <= size <= min(most, total) + (size > total) * 127
            if most >= 128 and size < total:
                assert size % 128 == 0
                count = -(-total // size)
                assert count == -(-total // (most - most % 128))
                assert count * size - total < 128 * count
            assert even_chunks(total, most, 1) == min(most, total)


def test_two_statistics_with_gradients_have_coefficients_beside_the_products():
    both = {"want": ("logps", "entropy"), "num_grad_stats": 2, "needs_head": True}
    assert on_a_card(8192, 131072, 4096, 256, **both).chunk_tokens == 256
    kl = {"want": ("logps", "kl_ref_policy"), "num_grad_stats": 2, "with_reference": True}
    assert on_a_card(8192, 131072, 4096, 256, **kl).chunk_tokens == 128


@pytest.mark.parametrize(
    ("n", "d", "mib", "tokens", "columns"),
    [
        (8192, 4096, 256, 8192, 8192),
        (32768, 4096, 256, 8192, 8192),
        (8192, 4096, 1024, 8192, 32768),
        (131072, 4096, 256, 8192, 8192),
        (9000, 4096, 256, 4608, 10368),
    ],
)
def test_late_chunks_on_a_card(n, d, mib, tokens, columns):
    """They hold 2 bytes a coefficient and 4 D bytes a column; equal sides move least."""
    late = on_a_card(n, 131072, d, mib, **TRAINED)
    assert (late.name, late.late_tokens, late.chunk_columns) == ("recompute", tokens, columns)
    assert columns * (2 * tokens + 4 * d) <= mib << 20


def test_late_chunks_on_a_card_fit_at_any_size():
    for n, v, d, mib in [(1, 300, 16, 1), (10**6, 262144, 8192, 64), (70000, 131072, 64, 16)]:
        for weight in (True, False):
            late = on_a_card(n, v, d, mib, needs_head=True, needs_weight=weight)
            assert late.late_tokens <= n + 127
            size = late.chunk_columns * (2 * late.late_tokens + 4 * d * weight)
            assert late.name == "kept" or size <= mib << 20


def test_plain_chunks_are_a_caches_on_a_cpu_and_larger_on_a_card():
    work, options = Workload(8192, 131072, 4096, torch.bfloat16), HeadOptions("torch", 256)
    cpu, card = (plan_head(work, options, device=d)[1] for d in ("cpu", "cuda"))
    assert cpu.chunk_columns == 1024
    assert card.chunk_columns == 4096  # 8192 tokens of them, 128 MiB; a second chunk beside it
    assert card.chunk_tokens * 131072 // card.chunk_columns == 8192


def test_auto_workspace():
    gib = 1 << 30
    assert [auto_workspace_mib(size) for size in (None, 139 * gib, 24 * gib)] == [256, 1024, 491]
    work = Workload(4096, 131072, 64, needs_head=True)
    cpu = plan_head(work, device="cpu")[1]
    assert cpu == plan_head(work, HeadOptions(workspace_mib=256), device="cpu")[1]


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the operators that are called and runs those that write into `out` not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removeprefix("aten."))
        out = (kwargs or {}).get("out")
        return func(*args, **(kwargs or {})) if out is None else out


@pytest.mark.parametrize("add", [False, True])
def test_matmuls_on_a_card_add_by_themselves(add):
    """One call, and its sum in fp32: a card's values are tested where there is one."""
    with FakeTensorMode():
        a, b = (torch.empty(64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out = torch.empty(64, 64, device="cuda")
        with Calls() as calls:
            assert put_matmul_(out, a, b, add=add) is out
    matmuls = [name for name in calls.names if not name.startswith("prim.")]
    assert matmuls == ["addmm.dtype_out" if add else "mm.dtype_out"]


class CountingMode(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts multiply-adds of matrix products, in units of N * D * V."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit, self.total = unit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpo":
            with self:  # what runs inside the operator
                return getattr(ops, func.overloadpacket.__name__)(*args)
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.matmul, aten.addmm, aten.addmm_):
            a, b = args[-2:]
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> float:
        return self.total / self.unit


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("workspace_mib", [0.1, 256])
@pytest.mark.parametrize("stats", [("logps",), DIFFERENTIABLE])
def test_as_many_matmuls_run_as_the_schedule_says(trained, workspace_mib, stats):
    n, d, v = 60, 16, 509
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=trained)
    labels = torch.randint(0, v, (n,))
    with_reference = stats != ("logps",)
    work = Workload(
        n, v, d, want=stats, num_grad_stats=len(stats), needs_head=trained,
        with_reference=with_reference,
    )  # fmt: skip
    _, schedule, _ = plan_head(work, HeadOptions(workspace_mib=workspace_mib), device="cpu")
    said = FlopCounterMode(display=False)
    for counter in (CountingMode(n * d * v), said):
        with counter:
            out = linear_stats(
                hidden, weight, labels, stats=stats, workspace_mib=workspace_mib,
                ref_hidden=torch.randn(n, d) if with_reference else None,
                ref_weight=weight.detach() if with_reference else None,
            )  # fmt: skip
            sum(t.sum() for t in out.values()).backward()
        if counter is not said:
            assert counter.products == schedule.matmuls
    assert said.get_total_flops() == round(2 * n * d * v * schedule.matmuls)


MEMORY = """
import json, resource, sys, torch
from fastpo import linear_logps
torch.set_num_threads(1)
n, v, trained = (int(a) for a in sys.argv[1:])
hidden = torch.randn(n, 32, requires_grad=True)
weight = torch.randn(v, 32).requires_grad_(bool(trained))
labels = torch.randint(0, v, (n,))
warm = linear_logps(hidden[:8], weight[:64], labels[:8] % 64).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_logps(hidden, weight, labels, workspace_mib=16).sum().backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps((after - before) * 1024))
"""


@pytest.mark.slow
@pytest.mark.parametrize("trained", [0, 1])
def test_peak_memory_does_not_grow_with_n_times_v(trained):
    """A fresh process each, because the high-water mark only rises.

    N V grows 16-fold, to 1 GiB of float32 logits. What may grow is O(N D + V D), at most 8 MiB
    here, and the allocator's slack; the workspace of 16 MiB is the same in both.
    """

    def peak(n: int, v: int) -> int:
        argv = [sys.executable, "-c", MEMORY, str(n), str(v), str(trained)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    small, large = peak(2048, 8192), peak(8192, 32768)
    logits = 8192 * 32768 * 4
    assert large < logits / 8, f"peak {large >> 20} MiB for logits of {logits >> 20} MiB"
    assert large - small < 32 << 20, f"{small >> 20} MiB grew to {large >> 20} MiB"
