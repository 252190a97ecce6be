"""What the compiler makes of every kernel for chips that are not here."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from fastpo.kernels.aot import (
    DTYPES,
    SHARED_LIMIT,
    TARGETS,
    Report,
    compile_all,
    compile_losses,
)
from fastpo.kernels.tile import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")

KERNELS = {
    "split_kernel",
    "merge_kernel",
    "coefficients_kernel",
    "epilogue_kernel",
    "divergence_kernel",
    "divergence_coefficients_kernel",
}
LOSS_KERNELS = {"pair_kernel", "list_kernel", "reduce_kernel", "spread_kernel"}
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.",
    "sm_90": "wgmma.mma_async.sync.aligned.m64n",
    "sm_100": "tcgen05.mma.cta_group::1.kind::f16",
    "gfx942": "v_mfma_f32_32x32x",
}
"""Of 16-bit products: the chip's own, with an fp32 accumulator where the name tells."""


@pytest.fixture(scope="session")
def compilations(request: pytest.FixtureRequest) -> Iterator[dict[tuple, Future]]:
    """(target, dtype) -> the reports to come, of every case that is selected, on all cores.

    The whole table takes 45 s on one core with an empty cache (`TRITON_CACHE_DIR`), 3 s without.
    """
    cases = dict.fromkeys(
        item.callspec.params["reports"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "reports" in item.fixturenames
    )
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {
            (target, dtype): pool.submit(compile_all, target, [dtype]) for target, dtype in cases
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def reports(request: pytest.FixtureRequest, compilations: dict[tuple, Future]) -> list[Report]:
    return compilations[request.param].result()


def each(*dtypes: str) -> pytest.MarkDecorator:
    cases = [(target, dtype) for target in TARGETS for dtype in dtypes]
    ids = ["-".join(case) for case in cases]
    return pytest.mark.parametrize("reports", cases, ids=ids, indirect=True)


@each(*DTYPES)
def test_every_kernel_fits_its_chip(reports):
    """No register spills, and a block's shared memory exists. Once plain, once all switched on."""
    for rich in (False, True):
        assert {r.kernel for r in reports if r.rich == rich} == KERNELS
    assert_fit(reports)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_kernels_fit_their_chip(target):
    reports = compile_losses(target)
    assert {r.kernel for r in reports} == LOSS_KERNELS
    assert_fit(reports)


def assert_fit(reports: list[Report]) -> None:
    for r in reports:
        assert r.spill_bytes == 0, r
        assert 0 < r.registers <= (512 if r.target == "gfx942" else 255), r
        assert r.shared_bytes <= SHARED_LIMIT[r.target], r


@each("bf16", "fp16")
def test_half_precision_products_use_the_chips_matrix_instruction(reports):
    dots = [r for r in reports if r.has_dot]
    assert len(dots) == 4
    for r in dots:
        assert r.matrix_instruction is not None, r
        assert r.matrix_instruction.startswith(MATRIX_INSTRUCTION[r.target]), r
        if r.target == "sm_90":
            operand = {"bf16": "bf16", "fp16": "f16"}[r.dtype]
            assert r.matrix_instruction.endswith(f".f32.{operand}.{operand}"), r


@each("fp32")
def test_float32_products_stay_float32(reports):
    """TF32 and XF32 would round the logits to 11 bits; only gfx942 has an fp32 instruction."""
    for r in reports:
        if r.has_dot and r.target == "gfx942":
            assert r.matrix_instruction == "v_mfma_f32_32x32x2_f32", r
        else:
            assert r.matrix_instruction is None, r


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match="unknown target 'sm_75'; choose from sm_80, sm_90"):
        compile_all("sm_75")
