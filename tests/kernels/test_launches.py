"""The launchers' own calls, compiled for a chip that is not here.

`aot` writes its signatures by hand. Here the public functions launch as they do on a device, up to
the point where the binary would run: a stub of triton's driver names the chip. Sizes of one, odd
sizes and absent tensors are specialised as they really are.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastpo.kernels import divergence as divergence_module
from fastpo.kernels import kept_coefficients as kept_module
from fastpo.kernels import linear_coefficients as coefficients_module
from fastpo.kernels import linear_stats as stats_module
from fastpo.kernels import listwise, pairwise, segment_reduce
from fastpo.kernels import logits_epilogue as epilogue_module
from fastpo.kernels.aot import TARGETS
from fastpo.kernels.logits_epilogue import DIFFERENTIABLE
from fastpo.kernels.online import STATISTICS
from fastpo.kernels.tile import INTERPRETED, acc_dtype
from fastpo.loss import fused
from fastpo.objectives import OBJECTIVES
from fastpo.testing.scores import cast, make_scores
from tests.kernels.cases import make

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")

CHIP = "sm_90"


class Driver:
    """A device that compiles and does not run."""

    def get_current_target(self):
        return TARGETS[CHIP]

    def get_current_device(self) -> str:
        return CHIP  # the key of a kernel's cache of binaries

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[CompiledKernel]:
    """Every kernel that is launched while the fixture lives."""
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    modules = (stats_module, coefficients_module, kept_module, epilogue_module, divergence_module)
    for module in (*modules, listwise, pairwise, segment_reduce):
        monkeypatch.setattr(module, "chip_of", lambda device: CHIP)
    return kernels


def launch_stats(x, **facts) -> None:
    stats_module.linear_stats(*x, **facts)


def launch_coefficients(x, names: tuple[str, ...] = ("logps",), first: int = 0, **facts) -> None:
    row = torch.zeros(len(x.labels), dtype=acc_dtype(x.hidden.dtype))
    coefficients_module.linear_coefficients(
        x.hidden, x.weight[first:], x.labels, None if x.bias is None else x.bias[first:],
        v_start=first, vocab_size=len(x.weight), lse=row, logps=row, entropy=row,
        **{f"grad_{name}": row for name in names}, **facts,
    )  # fmt: skip


def launch_epilogue(x, *, in_place: bool = False, **arguments) -> None:
    products = torch.zeros(len(x.labels), len(x.weight), dtype=acc_dtype(x.hidden.dtype))
    if in_place:
        arguments["out"] = epilogue_module.over(products, x.hidden.dtype)
    epilogue_module.logits_epilogue(products, x.labels, x.bias, **arguments)


def launch_kept(x, names: tuple[str, ...] = ("logps",), **facts) -> None:
    """In place."""
    row = torch.zeros(len(x.labels), dtype=acc_dtype(x.hidden.dtype))
    products = torch.zeros(len(x.labels), len(x.weight), dtype=row.dtype)
    kept_module.kept_coefficients(
        products, x.labels, x.bias, v_start=0, vocab_size=len(x.weight), lse=row, logps=row,
        entropy=row, **{f"grad_{name}": row for name in names}, **facts,
        out=epilogue_module.over(products, x.hidden.dtype),
    )  # fmt: skip


def launch_divergence(x, names: tuple[str, ...] = ("kl_ref_policy",), **facts) -> None:
    products = torch.zeros(len(x.labels), len(x.weight), dtype=acc_dtype(x.hidden.dtype))
    slabs = products, products.clone(), x.labels, x.bias, x.bias
    every = (*STATISTICS, *divergence_module.OF_BOTH, *divergence_module.OF_REFERENCE)
    stats = divergence_module.divergence(*slabs, want=every, **facts)
    cotangents = {name: stats["lse"] for name in names}
    divergence_module.divergence_coefficients(
        *slabs, stats=stats, cotangents=cotangents, out_dtype=x.hidden.dtype, **facts
    )


def launch_low_rank(x, launch: Callable[..., None], name: str, **facts) -> None:
    """`x` with a delta of rank 5 and a temperature a row."""
    n, v = len(x.labels), len(x.weight)
    hidden = torch.cat([x.hidden, x.hidden.new_zeros(n, 5)], dim=1)
    rows = torch.ones(n, dtype=acc_dtype(x.hidden.dtype))
    delta = {name: x.hidden.new_zeros(v, 5)}
    launch(x._replace(hidden=hidden), **delta, temperature=rows, **facts)


LAUNCHES: dict[str, tuple[Callable[..., None], tuple[int, int, int], bool, dict]] = {
    # name: (launch, (N, D, V), bias, arguments). One row and one split are constants to triton.
    "stats of one row": (launch_stats, (1, 64, 512), False, {}),
    "stats of odd sizes": (launch_stats, (63, 123, 507), True, {"want": STATISTICS}),
    "stats of one split": (launch_stats, (640, 64, 256), False, {"want": ("logps",)}),
    "nothing but top1": (launch_stats, (16, 64, 512), False, {"want": ("top1",)}),
    "coefficients of one row": (launch_coefficients, (1, 64, 512), False, {}),
    "coefficients of odd sizes": (
        launch_coefficients, (63, 123, 507), True,
        {"names": DIFFERENTIABLE, "first": 9, "softcap": 5.0},
    ),
    "one column of coefficients": (launch_coefficients, (16, 64, 512), True, {"first": 511}),
    "epilogue of one row": (launch_epilogue, (1, 64, 512), False, {}),
    "epilogue of odd sizes": (
        launch_epilogue, (63, 64, 507), True,
        {"want": STATISTICS, "coefficient_of": "entropy", "softcap": 5.0},
    ),
    "epilogue in place": (
        launch_epilogue, (63, 64, 512), False, {"coefficient_of": "logps", "in_place": True},
    ),
    "epilogue of odd sizes in place": (
        launch_epilogue, (63, 64, 507), True, {"coefficient_of": "logps", "in_place": True},
    ),
    "kept coefficients of one row": (launch_kept, (1, 64, 512), False, {}),
    "kept coefficients of odd sizes": (
        launch_kept, (63, 64, 507), True, {"names": DIFFERENTIABLE, "softcap": 5.0},
    ),
    "divergences of one row": (launch_divergence, (1, 64, 512), False, {}),
    "divergences of odd sizes": (
        launch_divergence, (63, 64, 507), True,
        {"names": divergence_module.DIVERGENCES, "softcap": 5.0},
    ),
    "stats of a low-rank delta": (
        launch_low_rank, (63, 64, 507), True, {"launch": launch_stats, "name": "lora"},
    ),
    "coefficients of a low-rank delta": (
        launch_low_rank, (63, 64, 507), True,
        {"launch": launch_coefficients, "name": "lora_slice"},
    ),
    "epilogue for coefficients only": (
        launch_epilogue, (16, 64, 512), False, {"want": (), "coefficient_of": "lse"},
    ),
}  # fmt: skip


CASES = [
    *((name, torch.bfloat16) for name in LAUNCHES),
    *((name, torch.float64) for name in LAUNCHES if "odd" in name),  # `aot` leaves float64 out
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_launch_compiles(name, dtype, compiled):
    launch, shape, bias, arguments = LAUNCHES[name]
    launch(make(*shape, dtype, bias=bias), **arguments)
    two = launch in (launch_stats, launch_divergence) or arguments.get("launch") is launch_stats
    assert len(compiled) == (2 if two else 1)
    for kernel in compiled:
        assert kernel.asm["cubin"], kernel.name
        if dtype == torch.float64:
            # A number without a dtype of its own, as in tl.where(m, 0.1, x), would be fp32.
            assert "f32" not in kernel.asm["ttir"], kernel.name


def launch_pairs(dtype: torch.dtype, groups: int) -> None:
    x, mask = torch.zeros(groups, 2, dtype=dtype), torch.ones(groups, 2, dtype=torch.bool)
    form = pairwise.PairForm("modulated", given="margin", given_scale=0.5)
    pairwise.pair_losses(form, x, mask, reward_of=x, given=torch.zeros(groups))


def launch_lists(dtype: torch.dtype, groups: int, candidates: int, form: str, **options) -> None:
    x = torch.zeros(groups, candidates, dtype=dtype)
    key = torch.zeros(groups, candidates, dtype=torch.int64)
    grade = None if form == "first" else key if "ascending" in options else x
    form = listwise.ListForm(form, **options)
    listwise.list_losses(form, x, x == 0, grade=grade, tie_key=key)


def launch_reduction(dtype: torch.dtype, responses: int, reduction: str) -> None:
    values = torch.zeros(2 * responses, dtype=dtype, requires_grad=True)
    weights = torch.ones(2 * responses, dtype=dtype)
    starts = 2 * torch.arange(responses + 1)
    segment_reduce.segment_reduce(values, starts, weights, reduction).sum().backward()


LOSSES: dict[str, tuple[Callable[..., None], dict]] = {
    "one pair": (launch_pairs, {"groups": 1}),
    "pairs": (launch_pairs, {"groups": 77}),
    "lists by rank": (
        launch_lists, {"groups": 5, "candidates": 3, "form": "below", "ascending": True},
    ),
    "lists with keys": (
        launch_lists, {"groups": 1, "candidates": 100, "form": "logistic", "lambda_weights": True},
    ),
    "lists without grades": (launch_lists, {"groups": 5, "candidates": 8, "form": "first"}),
    "one response": (launch_reduction, {"responses": 1, "reduction": "mean"}),
    "responses": (launch_reduction, {"responses": 5, "reduction": "normalised"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_launch_compiles(name, dtype, compiled):
    launch, arguments = LOSSES[name]
    launch(dtype, **arguments)
    assert len(compiled) == (2 if launch is launch_reduction else 1)
    for kernel in compiled:
        assert kernel.asm["cubin"], kernel.name


@pytest.mark.parametrize("launch", [launch_epilogue, launch_kept])
def test_a_block_is_read_before_it_is_overwritten(launch, compiled):
    """In place there is a barrier between the loads of a block and its stores, elsewhere none."""
    x = make(8, 64, 40960, torch.bfloat16)

    def sweep(kernel: CompiledKernel) -> str:
        """The last loop's loads L, barriers | and stores S, in order."""
        loop = re.split(r"\$L__BB\w+:", kernel.asm["ptx"])[-1]
        words = re.findall(r"ld\.global|bar\.sync|st\.global", loop)
        return "".join({"l": "L", "b": "|", "s": "S"}[word[0]] for word in words)

    coefficients = {"coefficient_of": "logps"} if launch is launch_epilogue else {}
    launch(x, **coefficients, **({"in_place": True} if coefficients else {}))
    assert re.fullmatch("L+[|]S+", sweep(compiled[0]))
    launch_epilogue(x, coefficient_of="logps")
    assert re.fullmatch("L+S+", sweep(compiled[1]))


class Operators(TorchDispatchMode):
    """Names of the operators that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dpo", "lipo"])
def test_an_objective_asks_a_device_for_memory_and_one_kernel(name, compiled):
    """The launches that `test_gpu.test_objective_is_one_launch` counts on a device."""
    objective = OBJECTIVES[name]
    sizes = {"pair": [2, 2], "list": [4, 2, 3]}[objective.family]
    scores = cast(make_scores(objective, sizes), torch.float32)
    fused.evaluate(objective, {}, scores)  # its plan runs the pure function once, on no groups
    compiled.clear()
    with Operators() as ran:
        assert fused.evaluate(objective, {}, scores) is not None
    assert [kernel.name for kernel in compiled] == [f"{objective.family}_kernel"]
    assert len(ran.names) == 3, "losses, gradients and rewards"
    assert set(ran.names) <= {"new_empty", "empty_like", "detach"}
