"""The kernels on a device, at sizes that fill it: `pytest -m gpu tests/kernels`."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions
from fastpo.head.types import put_matmul_
from fastpo.kernels.divergence import (
    DIVERGENCES,
    OF_BOTH,
    OF_REFERENCE,
    divergence,
    divergence_coefficients,
    divergence_reference,
)
from fastpo.kernels.kept_coefficients import kept_coefficients
from fastpo.kernels.linear_coefficients import linear_coefficients, linear_coefficients_reference
from fastpo.kernels.linear_stats import linear_stats, linear_stats_reference
from fastpo.kernels.listwise import MAX_CANDIDATES
from fastpo.kernels.logits_epilogue import DIFFERENTIABLE, logits_epilogue, over
from fastpo.kernels.online import STATISTICS, statistics_reference
from fastpo.kernels.segment_reduce import (
    REDUCTIONS,
    segment_reduce,
    segment_reduce_reference,
)
from fastpo.kernels.tile import transform_reference
from fastpo.loss import fused
from fastpo.testing.scores import Case, cast
from fastpo.testing.three_way import assert_three_way
from tests.kernels.cases import (
    FACTS,
    P_LABEL,
    Inputs,
    Results,
    closed_form,
    confident,
    entropy_terms,
    linear_logits,
    make,
)
from tests.kernels.interpreted.test_fused import (
    COVERED,
    LISTS,
    assert_is_the_pure_function,
    by_kernel,
    scores_of,
)
from tests.kernels.interpreted.test_jit_functions import (
    applied,
    binade,
    log1p_kernel,
    mpmath_of,
    tanh_kernel,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

DEVICE = "cuda"
N, D, V = 1000, 512, 32000
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NEEDED = ("lse", "lse_rest", "logps", "entropy")
COMPARED = tuple(name for name in STATISTICS if name != "lse_rest")


def raw_products(x: Inputs) -> list[Tensor]:
    """h W^T in plain PyTorch and fp32: with operands widened, and as tensor cores multiply them."""
    found = [x.hidden.float() @ x.weight.float().T]
    if x.hidden.dtype != torch.float32:
        found.append(torch.mm(x.hidden, x.weight.T, out_dtype=torch.float32))
    return found


def dense(raw: Tensor, x: Inputs, grads: Results, **facts) -> tuple[Results, Tensor]:
    """(statistics, coefficients) from raw products, by autograd in their dtype."""
    raw = raw.detach().requires_grad_()
    facts = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0} | facts
    stats = statistics_reference(transform_reference(raw, x.bias, **facts), x.labels, COMPARED)
    loss = [stats[name] for name in grads]
    (c,) = torch.autograd.grad(loss, raw, [grads[name].to(raw.dtype) for name in grads])
    return {name: value.detach() for name, value in stats.items()}, c


def cotangents(n: int, names: tuple[str, ...] = DIFFERENTIABLE) -> Results:
    g = torch.Generator(DEVICE).manual_seed(1)
    return {name: torch.randn(n, generator=g, device=DEVICE) for name in names}


def recomputed(x: Inputs, grads: Results, out_dtype: torch.dtype, **facts) -> Tensor:
    stats = linear_stats(*x, **facts, want=NEEDED)
    return linear_coefficients(
        *x,
        v_start=0,
        vocab_size=len(x.weight),
        **stats,
        **{f"grad_{name}": value for name, value in grads.items()},
        **facts,
        out_dtype=out_dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("facts", FACTS)
def test_three_way(dtype, facts):
    """All kernels: the fused statistics, the recomputed C, the epilogue's statistics and C."""
    x = make(N, D, V, dtype, bias=facts != "plain", device=DEVICE)
    arguments, grads, wide = FACTS[facts], cotangents(N), x.double()
    plains = [dense(raw, x, grads, **arguments) for raw in raw_products(x)]
    truth, true_c = dense(wide.hidden @ wide.weight.T, wide, grads, **arguments)
    terms = {"mean_logit": linear_logits(wide, **arguments).abs().mean(1).max().item()}

    def check(ours: Results, who: str) -> None:
        for name in COMPARED:
            same = [stats[name] for stats, _ in plains]
            what = f"{name} of {who}"
            assert_three_way(ours[name], same, truth[name], what, terms=terms.get(name, 0.0))

    check(linear_stats(*x, **arguments, want=STATISTICS), "linear_stats")
    c_terms = entropy_terms(wide, **arguments)
    largest = max(g.abs().max().item() for g in grads.values())
    ours = recomputed(x, grads, torch.float32, **arguments)
    assert_three_way(ours, [c for _, c in plains], true_c, "C", terms=c_terms * largest)
    assert torch.equal(recomputed(x, grads, dtype, **arguments), ours.to(dtype)), "rounds once"

    raws = raw_products(x)
    one = torch.ones(N, device=DEVICE)
    for of in DIFFERENTIABLE:
        stats, c = logits_epilogue(
            raws[-1], x.labels, x.bias, **arguments, want=STATISTICS, coefficient_of=of
        )
        check(stats, "logits_epilogue")
        same = [dense(raw, x, {of: one}, **arguments)[1] for raw in raws]
        true_c = dense(wide.hidden @ wide.weight.T, wide, {of: one}, **arguments)[1]
        assert_three_way(c, same, true_c, f"C of {of}", terms=c_terms if of == "entropy" else 0.0)
        half = torch.empty_like(c, dtype=dtype)
        logits_epilogue(raws[-1], x.labels, x.bias, **arguments, coefficient_of=of, out=half)
        assert torch.equal(half, c.to(dtype)), "rounds once"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_labels_keep_every_digit(dtype):
    """The test of the interpreter, with the device's exp and log."""
    x, logits = confident(dtype)
    x = Inputs(*(None if t is None else t.to(DEVICE) for t in x))
    logits = logits.to(DEVICE)
    stats = linear_stats(*x, want=NEEDED)
    c = recomputed(x, {"logps": torch.ones(len(P_LABEL), device=DEVICE)}, torch.float32)
    ours = {"logps": stats["logps"], "entropy": stats["entropy"], "coefficients": c}
    plain, truth = closed_form(logits.float(), x.labels), closed_form(logits.double(), x.labels)
    for name, value in ours.items():
        for row, p_label in enumerate(P_LABEL):
            at, size = slice(row, row + 1), logits[row].double().abs().max()
            terms = (truth[name][at].abs().max() * size).item()
            what = f"{name} at {p_label}"
            assert_three_way(value[at], plain[name][at], truth[name][at], what, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 4096, 4097, 32000, 32001, 131072])
def test_coefficients_over_their_products(dtype, v):
    """The same bits as elsewhere, time after time: what an interpreter cannot see is a race."""
    g = torch.Generator(DEVICE).manual_seed(0)
    products = torch.empty(N, v, device=DEVICE).normal_(std=4, generator=g)
    labels = torch.randint(v, (N,), generator=g, device=DEVICE)
    want = ("lse", "lse_rest", "logps")
    apart = torch.empty(N, v, dtype=dtype, device=DEVICE)
    stats, _ = logits_epilogue(products, labels, want=want, coefficient_of="logps", out=apart)
    given = {"v_start": 0, "vocab_size": v, "grad_logps": torch.ones(N, device=DEVICE), **stats}
    kept = kept_coefficients(products, labels, out=torch.empty_like(apart), **given)
    for _ in range(10):
        slab = products.clone()
        again, c = logits_epilogue(
            slab, labels, want=want, coefficient_of="logps", out=over(slab, dtype)
        )
        assert torch.equal(c, apart)
        assert all(torch.equal(again[name], stats[name]) for name in want)
        slab = products.clone()
        assert torch.equal(kept_coefficients(slab, labels, out=over(slab, dtype), **given), kept)
    truth = statistics_reference(products.double(), labels, ("logps",))["logps"]
    assert_three_way(
        stats["logps"], statistics_reference(products, labels, ("logps",))["logps"], truth
    )
    if v > 1:
        probabilities = products.double().softmax(1)
        true_c = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1) - probabilities
        plain = (
            products.softmax(1)
            .neg_()
            .scatter_add_(1, labels[:, None], torch.ones(N, 1, device=DEVICE))
        )
        for c in (apart, kept):
            assert_three_way(c, plain.to(dtype), true_c, "C")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(512, 4096, 1024), (100, 77, 300), (256, 32000, 512)])
def test_products_add_in_fp32(dtype, m, k, n):
    """`addmm` with an fp32 result: exact to fp32, into columns of a wider sum too."""
    g = torch.Generator(DEVICE).manual_seed(0)
    a = torch.empty(m, k, device=DEVICE).normal_(generator=g).to(dtype)
    b = torch.empty(k, n, device=DEVICE).normal_(generator=g).to(dtype)
    sums = torch.empty(m, n + 16, device=DEVICE).normal_(generator=g)
    once, twice = a.float() @ b.float(), a.double() @ b.double()
    for add in (False, True):
        plain = once + sums[:, :n] if add else once
        truth = twice + sums[:, :n].double() if add else twice
        for out in (sums[:, :n].clone(), sums.clone()[:, :n]):
            assert put_matmul_(out, a, b, add=add) is out
            assert_three_way(out, plain, truth, f"add={add}", terms=k)


def test_a_weights_gradient_is_rounded_once():
    """No half-precision partial sums, which PyTorch's default allows cuBLAS where K is split."""
    n, d, v = 16384, 256, 512
    x = make(n, d, v, torch.bfloat16, device=DEVICE)
    weight = x.weight.clone().requires_grad_()
    out = fastpo.linear_logps(x.hidden, weight, x.labels, backend="triton")
    (ours,) = torch.autograd.grad(out.sum(), weight)
    wide = x.double()
    truth = wide.weight.requires_grad_()
    logps = (wide.hidden @ truth.T).log_softmax(1).gather(1, x.labels[:, None])
    (true,) = torch.autograd.grad(logps.sum(), truth)
    plain = x.weight.float().requires_grad_()
    logps = (x.hidden.float() @ plain.T).log_softmax(1)
    c = torch.zeros_like(logps).scatter_(1, x.labels[:, None], 1) - logps.exp()
    same = (c.detach().bfloat16().float().T @ x.hidden.float()).bfloat16()
    assert_three_way(ours, same, true, "dW")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_jit_functions_are_mpmaths(dtype):
    for exponent in (-80, -40, *range(-30, 5)):
        x = binade(exponent, dtype).to(DEVICE)
        truth = mpmath_of(mpmath.tanh, x)
        assert_three_way(applied(tanh_kernel, x), torch.tanh(x), truth, f"tanh near 2^{exponent}")
        if exponent < 0:
            truth = mpmath_of(mpmath.log1p, x)
            ours = applied(log1p_kernel, x)
            assert_three_way(ours, torch.log1p(x), truth, f"log1p near 2^{exponent}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype):
    """Splits, merges and groups in flight: their order must not matter."""
    x = make(N, D, V, dtype, bias=True, device=DEVICE)
    grads = cotangents(N)

    def run() -> list[Tensor]:
        stats = linear_stats(*x, softcap=30.0, want=STATISTICS)
        c = recomputed(x, grads, dtype, softcap=30.0)
        again, slab = logits_epilogue(
            raw_products(x)[-1], x.labels, x.bias, want=STATISTICS, coefficient_of="entropy"
        )
        return [*stats.values(), c, *again.values(), slab]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_beyond_two_billion_logits():
    """20000 x 131072 = 2.6e9 elements, written by both kernels that write that many."""
    n, v = 20000, 131072
    x = make(n, 64, v, torch.bfloat16, device=DEVICE)
    grads = cotangents(n, ("logps",))
    rows = torch.tensor([0, 1, 127, 128, 16383, 16384, 19998, 19999], device=DEVICE)
    few = x._replace(hidden=x.hidden[rows], labels=x.labels[rows])
    few_grads = {"logps": grads["logps"][rows]}
    wide = few.double()
    plains = [dense(raw, few, few_grads) for raw in raw_products(few)]
    truth, true_c = dense(wide.hidden @ wide.weight.T, wide, few_grads)

    def check(stats: Results, c: Tensor, who: str) -> None:
        assert not any(value.isnan().any() for value in stats.values())
        for name in ("lse", "logps"):
            same = [s[name] for s, _ in plains]
            assert_three_way(stats[name][rows], same, truth[name], f"{name} of {who}")
        same = [d.to(c.dtype) for _, d in plains]
        assert_three_way(c[rows], same, true_c, f"C of {who}")
        # NaN in any element makes the sum NaN; a mask of all elements would be as large as C.
        assert not c.sum(dtype=torch.float32).isnan()

    stats = linear_stats(*x, want=NEEDED)
    c = recomputed(x, grads, torch.bfloat16)
    check(stats, c, "linear_coefficients")
    del c
    products = torch.mm(x.hidden, x.weight.T, out_dtype=torch.float32)
    stats, slab = logits_epilogue(
        products, x.labels, want=NEEDED, coefficient_of="logps", out=products
    )
    assert slab is products
    slab.mul_(grads["logps"][:, None])
    check(stats, slab, "logits_epilogue")


LOW_RANK = {
    # D, rank, as TMA reads them or (rows not a multiple of 16 bytes apart) as pointers do
    "descriptors": (512, 16),
    "pointers": (511, 5),
}


@pytest.mark.parametrize("how", LOW_RANK)
@pytest.mark.parametrize("rich", [False, True])
def test_low_rank_delta_and_row_temperatures(how, rich):
    """h W^T + l B^T in bf16, plain and rich rows of the launch table, a temperature a row."""
    d, rank = LOW_RANK[how]
    x = make(N, d, V, torch.bfloat16, bias=True, device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(2)
    low, lora = (torch.randn(k, rank, generator=g, device=DEVICE).bfloat16() for k in (N, V))
    x = x._replace(hidden=torch.cat([x.hidden, low], dim=1))
    temperature = torch.linspace(0.5, 2.0, N, device=DEVICE)
    names = ("logps", "entropy") if rich else ("logps",)
    grads, softcap = cotangents(N, names), 30.0 if rich else None

    def reference(dtype: torch.dtype) -> tuple[Results, Tensor]:
        wide = [None if t is None else t.to(dtype) if t.is_floating_point() else t for t in x]
        facts = dict(lora=lora.to(dtype), softcap=softcap, temperature=temperature.to(dtype))
        same = {name: value.to(dtype) for name, value in grads.items()}
        stats = linear_stats_reference(*wide, want=names, **facts)
        return stats, linear_coefficients_reference(*wide, **facts, **same)

    (plain, plain_c), (truth, true_c) = reference(torch.float32), reference(torch.float64)
    facts = dict(softcap=softcap, temperature=temperature)
    stats = linear_stats(*x, lora=lora, want=("lse", "lse_rest", *names), **facts)
    c = linear_coefficients(
        *x, lora_slice=lora, v_start=0, vocab_size=V, **stats, **facts, out_dtype=torch.float32,
        **{f"grad_{name}": value for name, value in grads.items()},
    )  # fmt: skip
    for name in names:
        assert_three_way(stats[name], plain[name], truth[name], name)
    assert_three_way(c, plain_c, true_c, "C", terms=plain_c.abs().max().item())


def two_heads(n: int, v: int) -> tuple[Tensor, ...]:
    """Products of two heads [n, v], labels, and bf16 biases of both."""
    g = torch.Generator(DEVICE).manual_seed(3)
    products = torch.empty(n, v, device=DEVICE).normal_(std=3, generator=g)
    other = torch.empty(n, v, device=DEVICE).normal_(generator=g).add_(products)
    labels = torch.randint(v, (n,), generator=g, device=DEVICE)
    bias, ref_bias = (torch.randn(v, generator=g, device=DEVICE).bfloat16() for _ in range(2))
    return products, other, labels, bias, ref_bias


def assert_divergences(slabs: tuple[Tensor, ...], rows: Tensor, **facts) -> None:
    """Statistics of both heads and C of every divergence in bf16, compared at `rows`."""
    one = torch.ones(len(slabs[0]), device=DEVICE)
    stats = divergence(*slabs, **facts, want=(*STATISTICS, *OF_BOTH, *OF_REFERENCE))
    few = [t[rows] for t in slabs[:3]]
    temperature = facts.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature[rows]

    def reference(dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
        leaf = few[0].to(dtype).requires_grad_()
        same = {"temperature": temperature}
        if isinstance(temperature, Tensor):
            same = {"temperature": temperature.to(dtype)}
        value = divergence_reference(
            leaf, few[1].to(dtype), few[2], *(b.to(dtype) for b in slabs[3:]), want=(name,),
            **(facts | same),
        )[name]  # fmt: skip
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    for name in DIVERGENCES:
        c = divergence_coefficients(
            *slabs, **facts, stats=stats, cotangents={name: one}, out_dtype=torch.bfloat16
        )
        assert not c.sum(dtype=torch.float32).isnan()
        (plain, plain_c), (truth, true_c) = (
            reference(dtype, name) for dtype in (torch.float32, torch.float64)
        )
        assert_three_way(stats[name][rows], plain, truth, name)
        assert_three_way(c[rows], plain_c.bfloat16(), true_c, f"C of {name}")


@pytest.mark.parametrize("facts", ["plain", "softcap, row temperatures"])
def test_divergences_three_way(facts):
    rows, given = torch.arange(N, device=DEVICE), {"jsd_beta": 0.3}
    if facts != "plain":
        given |= {"softcap": 30.0, "temperature": torch.linspace(0.5, 2.0, N, device=DEVICE)}
    assert_divergences(two_heads(N, V), rows, **given)


def test_divergences_past_two_billion_elements():
    """Two slabs of 17000 x 131072 in fp32 are 17 GiB; a 32-bit row offset would wrap at 16384."""
    rows = torch.tensor([0, 1, 16383, 16384, 16998, 16999], device=DEVICE)
    assert_divergences(two_heads(17000, 131072), rows)


def head(x: Inputs, leaves: tuple[str, ...], names: tuple[str, ...], backend, mib: float):
    """(statistics, gradients) of a random combination of `names`."""
    fresh = {k: getattr(x, k).detach().clone().requires_grad_() for k in leaves}
    y = x._replace(**fresh)
    stats = fastpo.linear_stats(
        *y[:3], bias=y.bias, stats=names, softcap=30.0, backend=backend, workspace_mib=mib
    )
    loss = sum((stats[n] * g.to(stats[n])).sum() for n, g in cotangents(N, names).items())
    grads = torch.autograd.grad(loss, list(fresh.values())) if leaves else ()
    return {k: v.detach() for k, v in stats.items()}, dict(zip(leaves, grads, strict=True))


HEADS = {
    "frozen": (("hidden",), ("logps",), 64),
    "recompute": (("hidden", "weight", "bias"), DIFFERENTIABLE, 64),
    "forward": ((), DIFFERENTIABLE, 64),
    "forward thin": ((), DIFFERENTIABLE, 8),
    "recompute thin": (("hidden", "weight", "bias"), ("logps",), 8),
    "recompute by rows": (("hidden", "weight", "bias"), ("logps",), 1),
    "kept": (("hidden", "weight", "bias"), DIFFERENTIABLE, 256),
}
"""name -> (leaves, statistics, MiB). At 8 MiB a block has fewer rows than a tile, which are the
fused kernel's. At 1 MiB slabs of coefficients are cut by rows too.
"""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_head_is_as_exact_as_plain_tiles(dtype, name):
    leaves, names, mib = HEADS[name]
    x = make(N, D, V, dtype, bias=True, device=DEVICE)
    work = Workload(
        N, V, D, dtype, want=names, num_grad_stats=len(names),
        needs_hidden="hidden" in leaves, needs_head="weight" in leaves,
    )  # fmt: skip
    _, chosen, _ = plan_head(work, HeadOptions("triton", mib), device=DEVICE)
    assert chosen.name == name.split()[0]
    stats, grads = head(x, leaves, names, "triton", mib)
    same, same_grads = head(x, leaves, names, "torch", mib)
    truth, true_grads = head(x.double(), leaves, names, "torch", 4096)
    terms = {"mean_logit": linear_logits(x.double(), softcap=30.0).abs().mean(1).max().item()}
    for key in names:
        assert_three_way(stats[key], same[key], truth[key], key, terms=terms.get(key, 0.0))
    for key in leaves:
        assert_three_way(grads[key], same_grads[key], true_grads[key], f"d{key}")


@pytest.mark.parametrize("mib", [256, 64, 8])
def test_policy_and_reference_agree_to_the_bit(mib):
    x = make(N, D, V, torch.bfloat16, bias=True, device=DEVICE)
    forward, _ = head(x, (), ("logps",), "triton", mib)
    for leaves in (("hidden",), ("hidden", "weight")):
        stats, _ = head(x, leaves, ("logps",), "triton", mib)
        assert torch.equal(stats["logps"], forward["logps"]), leaves


def on_device(scores: Results) -> Results:
    return {name: value.to(DEVICE) for name, value in scores.items()}


@pytest.mark.parametrize("case", COVERED, ids=repr)
def test_objectives_three_way(case):
    """Thousands of groups, with the device's exp and log; see `interpreted.test_fused`."""
    sizes = {"pair": [2], "point": [1, 4, 3], "list": [8, 2, 5]}[case.objective.family]
    for extreme in (False, True):
        scores = scores_of(case, sizes * 700, extreme=extreme)
        assert_is_the_pure_function(case, on_device(scores))


@pytest.mark.parametrize("case", LISTS, ids=repr)
@pytest.mark.parametrize("size", [64, MAX_CANDIDATES])
def test_long_lists_three_way(case, size):
    assert_is_the_pure_function(case, on_device(scores_of(case, [size, 2, size - 1])))


@pytest.mark.parametrize("name", ["dpo", "lipo"])
def test_objective_is_one_launch(name, monkeypatch):
    """Nothing else runs on the device, neither a copy nor a fill."""
    case = Case(fastpo.OBJECTIVES[name], fastpo.OBJECTIVES[name].hyper)
    scores = cast(on_device(scores_of(case)), torch.float32)
    by_kernel(case, scores)  # compiles
    monkeypatch.undo()  # `poison` fills each of the three results by a launch of its own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fused.evaluate(case.objective, case.hyper, scores)
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA  # what the host does has the device type CPU
    launched = [event.name for event in profile.events() if event.device_type == on_gpu]
    kernel = {"pair": "pair_kernel", "list": "list_kernel"}[case.objective.family]
    assert launched == [kernel]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_segment_reduce_of_long_responses(reduction):
    starts = torch.tensor([0, 100_000, 100_000, 100_001, 250_000], device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    leaves = [-torch.rand(250_000, generator=g, device=DEVICE) for _ in range(2)]
    cotangents = torch.randn(4, generator=g, device=DEVICE)

    def run(reduce, dtype: torch.dtype) -> list[Tensor]:
        x, a = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        out = reduce(x, starts, a, reduction)
        return [out.detach(), *torch.autograd.grad(out, (x, a), cotangents.to(dtype))]

    ours, again = (run(segment_reduce, torch.float32) for _ in range(2))
    plain = run(segment_reduce_reference, torch.float32)
    truth = run(segment_reduce_reference, torch.float64)
    for value, twice, same, true in zip(ours, again, plain, truth, strict=True):
        assert torch.equal(value, twice)
        assert_three_way(value, same, true)
