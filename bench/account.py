"""What do the head's kernels cost, before any GPU has run them?

    python -m bench.account                        # the table for an H100, a minute the first time
    python -m bench.account --page docs/head.md    # also rewrite its section

Single kernels come first, then whole calls (`bench.predict`). The binaries are real, compiled
ahead of time by `fastpo.kernels.aot`; registers, shared memory and instructions are read from them.
Times are predictions, never measurements: of a perfect memory system, and of matrix units and
schedulers that never wait.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bench import predict as schedules
from bench.harness import write_section
from fastpo.kernels.aot import TARGETS, Report, compile_all, instructions

SHAPE = (8192, 4096, 128256)
CHIP = "sm_90"


class Peaks(NamedTuple):
    """Hold one GPU's ceilings."""

    multiprocessors: int
    flop_per_second: float
    bytes_per_second: float
    clock: float
    registers: int
    shared_bytes: int
    warps: int
    schedulers: int


# NVIDIA, "H100 Tensor Core GPU Architecture": SXM5, dense bf16 with fp32 accumulation, which is
# 4096 FLOP a clock on a multiprocessor at 1.83 GHz; HBM3 bandwidth from the H100 SXM data sheet.
H100 = Peaks(132, 989.4e12, 3.35e12, 1.83e9, 65536, 228 << 10, 64, 4)
MATRIX = ("HGMMA", "UTCHMMA", "HMMA")
SHOWN = (*MATRIX, "UTMALDG", "LDGSTS", "LDG", "STG", "MUFU", "FADD", "FMUL", "FFMA", "FSEL")
# Vocabulary blocks of a program of `split_kernel`, as `aot` compiles it.
BLOCKS = 32


class Work(NamedTuple):
    """Say what one call over `SHAPE` asks of a kernel."""

    flop: float  # of matmuls
    bytes: float  # through device memory, everything read or written once
    programs: int
    sweeps: int  # runs of the outermost loop's body, over all programs


def work(report: Report, shape: tuple[int, int, int]) -> Work | None:
    """Return the work of a call with 16-bit inputs and coefficients.

    None for `merge_kernel`, whose work is next to nothing.
    """
    n, d, v = shape
    c, kernel = report.config, report.kernel
    if kernel == "merge_kernel":
        return None
    rows, columns, slab = math.ceil(n / c.BN), math.ceil(v / c.BV), n * v
    tiles = rows * columns
    if kernel == "split_kernel":
        return Work(2 * d * slab, 2 * (n + v) * d, rows * math.ceil(columns / BLOCKS), tiles)
    if kernel == "coefficients_kernel":
        return Work(2 * d * slab, 2 * (n + v) * d + 2 * slab, tiles, tiles)
    if kernel == "kept_kernel":
        return Work(0, (4 + 2) * slab, rows, tiles)
    if kernel == "divergence_coefficients_kernel":
        return Work(0, (4 + 4 + 2) * slab, tiles, tiles)
    # A second sweep over both heads' raw logits where the mixture is asked for.
    sizes = {"epilogue_kernel": 4 + 4 + 2, "divergence_kernel": 16 if report.rich else 8}
    return Work(0, sizes[kernel] * slab, rows, tiles)


def resident_blocks(report: Report, peaks: Peaks) -> int:
    """Count blocks that a multiprocessor holds: registers come in eights, a block costs 1 KiB."""
    registers = 8 * math.ceil(report.registers / 8) * 32 * report.config.warps
    return min(
        peaks.registers // registers,
        peaks.shared_bytes // (report.shared_bytes + 1024),
        peaks.warps // report.config.warps,
    )


def predict(
    asked: Work, issued: tuple[int, int], warps: int, blocks: int, peaks: Peaks
) -> dict[str, float]:
    """Return seconds of matmuls, of memory traffic, of all other instructions, and of the call.

    One resident block alternates between its matmuls and the rest; with two or more, one block's
    rest hides behind another's matmuls. Work is spread over the multiprocessors without a tail.

    Args:
        issued: a warp's instructions outside loops and in one sweep, matmuls left out.
        warps: of a program; `blocks`: programs that a multiprocessor holds.
    """
    products = asked.flop / peaks.flop_per_second
    memory = asked.bytes / peaks.bytes_per_second
    count = (asked.programs * issued[0] + asked.sweeps * issued[1]) * warps
    rest = count / (peaks.multiprocessors * peaks.schedulers * peaks.clock)
    busy = max(products, rest) if blocks > 1 else products + rest
    return {"products": products, "memory": memory, "rest": rest, "call": max(busy, memory)}


def _names(report: Report) -> str:
    """Return the cells that tell a kernel, its block and how its operands come."""
    c = report.config
    block = " x ".join(str(b) for b in (c.BN, c.BV, c.BD) if b)
    loads = "TMA" if c.tma else "pointers" if report.has_dot else "-"
    return f"{report.kernel.replace('_kernel', '')}{', rich' * report.rich} | {block} | {loads}"


def row(report: Report, shape: tuple[int, int, int], peaks: Peaks) -> str:
    """Return a line of the table, '' for what `work` leaves out."""
    asked = work(report, shape)
    if asked is None:
        return ""
    mixes, blocks = instructions(report), resident_blocks(report, peaks)
    once, sweep = (m.total() - sum(m[name] for name in (*MATRIX, "NOP")) for m in mixes)
    seconds = predict(asked, (once, sweep), report.config.warps, blocks, peaks)
    mix = mixes[0] + mixes[1]
    cells = [
        _names(report),
        report.config.warps,
        report.registers,
        report.spill_bytes,
        f"{report.shared_bytes / 1024:.0f}",
        blocks,
        f"{asked.flop / 1e12:.2f}",
        f"{asked.bytes / 1e9:.2f}",
        *(f"{1000 * each:.2f}" for each in seconds.values()),
        ", ".join(f"{name} {mix[name]}" for name in SHOWN if mix[name]),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def page(shape: tuple[int, int, int], targets: dict[str, list[Report]]) -> str:
    """Return the section of docs/head.md."""
    n, d, v = shape
    head = (
        "| kernel | block | operands | warps | registers | spill | KiB | resident | TFLOP | GB "
        "| products | memory | rest | call | instructions |"
    )
    chips = "| chip | kernel | block | operands | registers | spill | KiB | matrix instruction |"

    def rule(header: str) -> str:
        return "|" + "---|" * (header.count("|") - 1)

    every = "\n".join(
        f"| {target} | {_names(r)} | {r.registers} | {r.spill_bytes} | {r.shared_bytes / 1024:.0f} "
        f"| {f'`{r.matrix_instruction}`' if r.matrix_instruction else '-'} |"
        for target, reports in targets.items()
        for r in reports
    )
    return f"""## What the kernels cost, by the compiler's account

`python -m bench.account --page docs/head.md` rewrites this section. No time in it is a measurement.
One call over N {n}, D {d}, V {v} in bf16 on an H100 SXM: {H100.flop_per_second / 1e12:g} TFLOPS
dense bf16, {H100.bytes_per_second / 1e12:g} TB/s, {H100.multiprocessors} multiprocessors of
{H100.schedulers} schedulers at {H100.clock / 1e9:g} GHz (NVIDIA: H100 Tensor Core GPU Architecture,
H100 SXM data sheet). `rich` is everything at once: soft-cap, row temperatures, every statistic, a
low-rank delta. Blocks are rows x vocabulary (x width); registers, spilled bytes of a thread and
shared KiB are the binary's, `resident` the blocks that a multiprocessor then holds.

Predicted ms: `products` at peak; `memory`, everything read and written once; `rest`, all other
instructions, one a clock on each scheduler; `call`, the longer of `memory` and of the other two,
which add up where one block is resident and overlap where more are.

{head}
{rule(head)}
{chr(10).join(filter(None, (row(r, shape, H100) for r in targets[CHIP])))}

Every chip, bf16:

{chips}
{rule(chips)}
{every}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.account", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", default=",".join(map(str, SHAPE)), metavar="N,D,V")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="also write the section there")
    options = parser.parse_args(arguments)
    n, d, v = map(int, options.shape.split(","))
    targets = {t: compile_all(t, ["bf16"]) for t in tqdm(TARGETS, disable=None)}
    sections = {"account": page((n, d, v), targets), "predict": schedules.section()}
    for name, text in sections.items():
        print(text)
        if options.page is not None:
            write_section(options.page, name, text)


if __name__ == "__main__":
    main()
