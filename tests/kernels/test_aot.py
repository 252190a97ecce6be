"""What the compiler makes of every kernel for chips that are not here."""

from __future__ import annotations

import ast
import multiprocessing
import re
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from fastpo.kernels import launch_table, tile
from fastpo.kernels.aot import (
    DTYPES,
    SHARED_LIMIT,
    TARGETS,
    Report,
    compile_all,
    compile_losses,
    instructions,
)
from fastpo.kernels.tile import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")

KERNELS = {
    "split_kernel",
    "merge_kernel",
    "coefficients_kernel",
    "kept_kernel",
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

    On one core a minute with an empty cache (`TRITON_CACHE_DIR`), 3 s with a full one.
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
    bits = str(8 * DTYPES[reports[0].dtype].itemsize)
    compiled = {(r.kernel, r.config) for r in reports}
    for kernel, table in launch_table.TABLE.items():
        for (chip, regime), config in table.items():
            if chip == reports[0].target and regime.split()[0] == bits:
                assert (kernel, config) in compiled, (kernel, chip, regime)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_kernels_fit_their_chip(target):
    reports = compile_losses(target)
    assert {r.kernel for r in reports} == LOSS_KERNELS
    assert_fit(reports)
    for r in reports:
        assert narrow_products(r.ttir) == [], r


def assert_fit(reports: list[Report]) -> None:
    for r in reports:
        assert r.spill_bytes == 0, r
        assert 0 < r.registers <= (512 if r.target == "gfx942" else 255), r
        assert r.shared_bytes <= SHARED_LIMIT[r.target], r


@each("bf16", "fp16")
def test_half_precision_products_use_the_chips_matrix_instruction(reports):
    dots = [r for r in reports if r.has_dot]
    assert {(r.kernel, r.rich) for r in dots} == {
        (kernel, rich) for kernel in ("split_kernel", "coefficients_kernel") for rich in (0, 1)
    }
    for r in dots:
        assert r.matrix_instruction is not None, r
        assert r.matrix_instruction.startswith(MATRIX_INSTRUCTION[r.target]), r
        if r.target == "sm_90":
            operand = {"bf16": "bf16", "fp16": "f16"}[r.dtype]
            assert r.matrix_instruction.endswith(f".f32.{operand}.{operand}"), r


@each("bf16")
def test_matrices_come_by_tma_where_the_table_says_so(reports):
    """And by pointers besides, for matrices that TMA cannot read."""
    dots = [r for r in reports if r.has_dot]
    for r in dots:
        assert r.tensor_copies == r.config.tma, r
    told = {(r.kernel, r.rich, r.config.tma) for r in dots}
    has_tma = reports[0].target in ("sm_90", "sm_100")
    assert len(told) == (8 if has_tma else 4)
    if has_tma:
        described = next(r for r in dots if r.config.tma)
        outside, inside = instructions(described)
        assert inside["UTMALDG"] >= 2
        assert outside["HGMMA"] + outside["UTCHMMA"] == 0
        assert inside["HGMMA"] + inside["UTCHMMA"] >= 4


@each("bf16")
def test_offsets_of_rows_are_64_bit(reports):
    """N * V passes 2^31 at 16K tokens of a 128K vocabulary."""
    for r in reports:
        assert narrow_products(r.ttir) == [], r


# Names may have dots: triton 3.9 calls a member of a tuple %strides.h.
_NAME = r"%[\w.#]+"
_DEFINITION = re.compile(rf"^ *({_NAME}) = ([\w.]+) (.*?) : (?:.* -> )?(.*?) loc\(", re.MULTILINE)
_INSIDE = ("tt.expand_dims", "arith.extsi", "arith.trunci", "arith.minsi")


def narrow_products(ttir: str) -> list[str]:
    """Names of the 32-bit products of two runtime values, but for offsets inside a block."""
    made = {m[1]: (m[2], re.findall(_NAME, m[3])) for m in _DEFINITION.finditer(ttir)}

    def derives(value: str, source: str, through: tuple[str, ...]) -> bool:
        op, operands = made.get(value, ("", []))
        return op == source or (
            op in through and any(derives(o, source, through) for o in operands)
        )

    return [
        m[1]
        for m in _DEFINITION.finditer(ttir)
        if m[2] == "arith.muli"
        and m[4].endswith("i32>" if "tensor" in m[4] else "i32")
        and not any(
            derives(operand, "arith.constant", ("tt.splat",))
            or derives(operand, "tt.make_range", _INSIDE)
            for operand in re.findall(_NAME, m[3])
        )
    ]


def test_a_row_offset_of_32_bits_is_found():
    line = "    {} = {} : {} loc(#loc)"
    product = line.format("%p", "arith.muli %i, %stride_hn", "i32")
    wide = line.format("%p", "arith.muli %i, %stride_hn", "i64")
    rows = [
        line.format("%r", "tt.make_range {end = 8 : i32, start = 0 : i32}", "tensor<8xi32>"),
        line.format("%o", "arith.addi %r, %first", "tensor<8xi32>"),
        line.format("%p", "arith.muli %o, %stride", "tensor<8xi32>"),
    ]
    member = line.format("%row_ptrs.1", "arith.muli %i, %strides.h", "i32")
    assert narrow_products(product) == ["%p"]
    assert narrow_products(member) == ["%row_ptrs.1"]
    assert narrow_products(wide) == []
    assert narrow_products("\n".join(rows)) == ["%p"]
    rows[-1] = rows[-1].replace("%o", "%r")
    assert narrow_products("\n".join(rows)) == []


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file of kernels, with the file's name."""
    for file in Path(tile.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield file.name, node


def test_no_kernel_is_left_out() -> None:
    assert {
        node.name
        for _, node in nodes()
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    } == KERNELS | LOSS_KERNELS


def test_masked_loads_say_what_is_outside() -> None:
    masked = [
        (file, ast.unparse(node), {keyword.arg for keyword in node.keywords})
        for file, node in nodes()
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"
    ]
    masked = [load for load in masked if "mask" in load[2]]
    assert len(masked) > 20
    assert [load for load in masked if "other" not in load[2]] == []


def test_numbers_without_a_dtype_are_exact_in_float32():
    """In a float64 kernel a load with other=0.1 gives float32's 0.1 where it is masked."""
    numbers = 0
    for file, call in nodes():
        named = isinstance(call, ast.Call) and ast.unparse(call.func)
        if named not in ("tl.load", "tl.where", "tl.maximum", "tl.minimum"):
            continue
        for value in ast.walk(call):
            if isinstance(value, ast.Constant) and isinstance(value.value, float):
                numbers += 1
                (single,) = struct.unpack("f", struct.pack("f", value.value))
                assert single == value.value, f"{file}: {ast.unparse(call)}"
    assert numbers > 20


LAUNCHES = {
    # (rich, width, described) -> the row of split_kernel
    (False, 4096, True): ("sm_90", "16"),
    (True, 4096, True): ("sm_90", "16 rich"),
    (True, 4096, False): ("sm_90", "16 rich pointers"),
    (True, 64, False): ("sm_90", "16 rich pointers"),
}


@pytest.mark.parametrize(("asked", "row"), LAUNCHES.items(), ids=str)
def test_launch_finds_the_nearest_row(asked, row):
    rich, width, described = asked
    found = launch_table.launch(
        "split_kernel", "sm_90", torch.bfloat16, rich=rich, width=width, described=described
    )
    table = launch_table.TABLE["split_kernel"]
    assert found == table[row]
    unknown = launch_table.launch("split_kernel", "sm_75", torch.bfloat16, rich=rich, width=width)
    assert unknown == table["any", "16"]


def test_pointers_have_no_descriptors():
    same = dict(rich=False, width=4096)
    table = launch_table.TABLE["split_kernel"]
    with_tma = launch_table.launch("split_kernel", "sm_90", torch.bfloat16, **same, described=True)
    without = launch_table.launch("split_kernel", "sm_90", torch.bfloat16, **same)
    assert with_tma == table["sm_90", "16"]
    assert with_tma.tma
    assert without.BV == with_tma.BV
    assert not without.tma


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
