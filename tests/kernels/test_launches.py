"""The launchers' own calls, compiled for a chip that is not here.

`aot` writes its signatures by hand. Here the public functions launch as they do on a device, up to
the point where the binary would run: a stub of triton's driver names the chip. Sizes of one, odd
sizes and absent tensors are specialised as they really are.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastpo.kernels import linear_coefficients as coefficients_module
from fastpo.kernels import linear_stats as stats_module
from fastpo.kernels import logits_epilogue as epilogue_module
from fastpo.kernels.aot import TARGETS
from fastpo.kernels.logits_epilogue import DIFFERENTIABLE
from fastpo.kernels.online import STATISTICS
from fastpo.kernels.tile import INTERPRETED, acc_dtype
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
    for module in (stats_module, coefficients_module, epilogue_module):
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


def launch_epilogue(x, **arguments) -> None:
    products = torch.zeros(len(x.labels), len(x.weight), dtype=acc_dtype(x.hidden.dtype))
    epilogue_module.logits_epilogue(products, x.labels, x.bias, **arguments)


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
    assert len(compiled) == (2 if launch is launch_stats else 1)
    for kernel in compiled:
        assert kernel.asm["cubin"], kernel.name
