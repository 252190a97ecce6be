"""The account of the kernels: its arithmetic, by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from bench import account
from bench.account import H100, Work, predict, resident_blocks, work
from fastpo.kernels.aot import Report
from fastpo.kernels.tile import Config


def report(kernel: str = "split_kernel", **options) -> Report:
    default = dict(
        kernel=kernel, target="sm_90", dtype="bf16", rich=False,
        config=Config(128, 256, 64, warps=8), has_dot=True, registers=168, spill_bytes=0,
        shared_bytes=100 << 10, matrix_instruction=None, tensor_copies=True, width=4096,
        machine=b"", ttir="",
    )  # fmt: skip
    return Report(**(default | options))


def test_resident_blocks_by_each_limit():
    small = report(registers=32, shared_bytes=0)
    assert resident_blocks(small, H100) == 8  # 64 warps
    assert resident_blocks(report(registers=32), H100) == 2  # 228 KiB in 101
    assert resident_blocks(report(shared_bytes=0), H100) == 1  # 65536 registers in 43008
    assert resident_blocks(report(registers=121, shared_bytes=0), H100) == 2  # rounded up to 128


def test_work_of_a_matrix_kernel():
    found = work(report("coefficients_kernel"), (256, 4096, 512))
    assert found == Work(2 * 256 * 4096 * 512, 2 * (256 + 512) * 4096 + 2 * 256 * 512, 4, 4)
    split = work(report(), (256, 4096, 256 * 33))
    assert split is not None
    assert (split.programs, split.sweeps) == (4, 66)
    assert work(report("merge_kernel"), (256, 4096, 512)) is None


def test_prediction_adds_up_or_overlaps():
    asked = Work(H100.flop_per_second, H100.bytes_per_second / 2, 0, 1)
    # As many instructions as all schedulers issue in half a second.
    issued = int(H100.multiprocessors * H100.schedulers * H100.clock / 2)
    alone = predict(asked, (0, issued), 1, 1, H100)
    assert alone == {"products": 1, "memory": 0.5, "rest": 0.5, "call": 1.5}
    assert predict(asked, (0, issued), 1, 2, H100)["call"] == 1
    bound = asked._replace(bytes=3 * H100.bytes_per_second)
    assert predict(bound, (0, issued), 1, 1, H100)["call"] == 3


def test_page_calls_predictions_predictions(monkeypatch):
    mix = Counter(HGMMA=4, FADD=10), Counter(FADD=20, NOP=3)
    monkeypatch.setattr(account, "instructions", lambda report: mix)
    text = account.page(account.SHAPE, {"sm_90": [report(), report("merge_kernel")]})
    assert "No time in it is a measurement" in text
    assert "| split | 128 x 256 x 64 | pointers | 8 | 168 | 0 | 100 | 1 | 8.61 | 1.12 |" in text
    assert "HGMMA 4, FADD 30 |" in text
    assert "| sm_90 | merge | 128 x 256 x 64 |" in text


@pytest.mark.parametrize("kernel", ["epilogue_kernel", "divergence_kernel"])
def test_rich_sweeps_cost_more(kernel):
    config = Config(1, 1024, warps=8)
    plain, rich = (work(report(kernel, rich=r, config=config), (2, 1, 2048)) for r in (False, True))
    assert plain is not None
    assert rich is not None
    assert rich.bytes == plain.bytes * (2 if kernel == "divergence_kernel" else 1)
    assert plain.sweeps == 4
