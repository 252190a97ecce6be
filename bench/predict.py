"""How long should a call of the head take on an H200, before one has run it?

Arithmetic on the schedules that `fastpo.head.plan_head` chooses: matmuls at the rate of
whole tiles in whole waves, everything else at the rate of a copy. What follows from these two rates
is a prediction, to be checked by `python -m bench.gpu`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastpo.head.schedule import Schedule, Workload, even_chunks
from fastpo.head.select import most_kept_tokens, plan_head
from fastpo.head.spec import HeadOptions
from fastpo.head.types import chunks

# Seen on one H200 under PyTorch 2.11, of which no record is kept here: a bf16 matmul of 8192^3 on
# random data, and a copy, bytes read and written. `python -m bench.gpu --only env` makes a record.
FLOP_PER_SECOND, BYTES_PER_SECOND = 790e12, 4.3e12
MULTIPROCESSORS = 132
TILES = ((128, 256), (256, 128), (128, 128), (64, 256))
"""Tiles of a matmul's output."""
# 8192 x 8192 are 2048 tiles of 128 x 256, 15.5 waves: the measured rate is of 16.
MEASURED_WAVES = 2048 / (16 * MULTIPROCESSORS)
# What cuBLAS keeps of its rate where it splits K to fill the chip; a guess.
SPLIT_K = 0.9
# What a fused kernel without warp specialisation keeps of cuBLAS's rate; others' reach .70 to .80.
FUSED = 0.78

SHAPES = (
    (2048, 4096, 128256),
    (8192, 4096, 128256),
    (8192, 4096, 131072),
    (32768, 4096, 128256),
    (8192, 8192, 128256),
    (8192, 2048, 151936),
    (8192, 2304, 256000),
)
"""(N, D, V): Llama 3 8B at three batches, 131072 for the goals, Llama 3 70B, Qwen 3, Gemma 2."""
GOAL_SHAPE = (8192, 4096, 131072)
GOALS = {"forward": 12.5, "frozen": 25.0, "late": 48.0, "groups": 38.0}
"""Case -> ms at `GOAL_SHAPE`; `groups` with a workspace of 1 GiB."""
COUNTS = {"forward": 1, "frozen": 2, "late": 3, "groups": 3}
"""Matmuls that no method can do without."""


class Case(NamedTuple):
    """Hold a call and its prediction."""

    name: str
    workspace_mib: int
    seconds: float
    fraction: float  # of the time of its bare matmuls at the measured rate
    block: str  # rows of a chunk, rows x columns of a late one, tokens of a part


def holds_for(device: torch.device) -> bool:
    """Tell whether the two rates were measured on such a device."""
    return device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)


def filled(m: int, n: int) -> float:
    """Return the share of a matmul's time on the chip that goes into [m, n], not into padding."""
    found = 0.0
    for rows, columns in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        used = m * n / (tiles * rows * columns)
        if tiles < MULTIPROCESSORS:
            split = MULTIPROCESSORS // tiles
            waves = tiles * split / MULTIPROCESSORS * (SPLIT_K if split > 1 else 1.0)
        else:
            waves = tiles / MULTIPROCESSORS
            waves /= math.ceil(waves)
        found = max(found, used * waves)
    return found


def product(m: int, n: int, k: int, *, add: bool = False) -> float:
    """Return seconds of [m, k] x [k, n] in bf16 with an fp32 result, or added to one."""
    rate = FLOP_PER_SECOND * min(1.0, filled(m, n) / MEASURED_WAVES)
    moved = 2 * k * (m + n) + (8 if add else 4) * m * n
    return max(2 * m * n * k / rate, moved / BYTES_PER_SECOND)


def sweep(elements: float, size: int) -> float:
    """Return seconds of reading and writing so many bytes an element."""
    return elements * size / BYTES_PER_SECOND


def _schedule(n: int, d: int, v: int, mib: int, **needs: Any) -> Schedule:
    work = Workload(n, v, d, torch.bfloat16, **needs)
    return plan_head(work, HeadOptions("triton", mib), device="cuda")[1]


def _forward(n: int, d: int, v: int, chunk_tokens: int) -> float:
    """Return the seconds of the matmuls, and of one sweep over their results."""
    rows = (hi - lo for lo, hi in chunks(n, chunk_tokens))
    return sum(product(r, v, d) + sweep(r * v, 4) for r in rows)


def forward(n: int, d: int, v: int, mib: int) -> Case:
    """Return the prediction of log-probs without gradient."""
    rows = _schedule(n, d, v, mib, needs_hidden=False).chunk_tokens
    return _case("forward", (n, d, v), mib, _forward(n, d, v, rows), f"{rows}")


def frozen(n: int, d: int, v: int, mib: int) -> Case:
    """Return the prediction with a gradient to the hidden states; no byte comes from the L2."""
    rows = _schedule(n, d, v, mib).chunk_tokens
    seconds = _forward(n, d, v, rows)
    for lo, hi in chunks(n, rows):
        seconds += sweep((hi - lo) * v, 4 + 2) + product(hi - lo, d, v)
    seconds += sweep(n * d, 4 + 4 + 4 + 2)  # times the cotangents, and rounded
    return _case("frozen", (n, d, v), mib, seconds, f"{rows}")


def late(n: int, d: int, v: int, mib: int, fused: float | None = FUSED) -> Case:
    """Return the prediction of a trained head whose coefficients are known late.

    `fused` is the rate of `coefficients_kernel` over cuBLAS's; None: cuBLAS and a sweep in place.
    """
    plan = _schedule(n, d, v, mib, needs_head=True, needs_weight=True)
    seconds = _forward(n, d, v, plan.chunk_tokens)
    for first, last in chunks(v, plan.chunk_columns):
        columns = last - first
        for lo, hi in chunks(n, plan.late_tokens):
            rows = hi - lo
            if fused is None:
                seconds += product(rows, columns, d) + sweep(rows * columns, 4 + 2)
            else:
                seconds += 2 * rows * columns * d / (FLOP_PER_SECOND * fused)
            seconds += product(rows, d, columns, add=first > 0)
            seconds += product(columns, d, rows, add=lo > 0)
        seconds += sweep(columns * d, 4 + 2)  # dW, rounded
    seconds += sweep(n * d, 4 + 2)
    return _case("late", (n, d, v), mib, seconds, f"{plan.late_tokens} x {plan.chunk_columns}")


def groups(n: int, d: int, v: int, mib: int) -> Case:
    """Return the prediction of a trained head under a loss, a part of the groups at a time."""
    most = most_kept_tokens(
        v, d, device="cuda", backend="triton", workspace_mib=mib, dtype=torch.bfloat16
    )
    part = even_chunks(n, most, 128)
    plan = _schedule(part, d, v, mib, needs_head=True, needs_weight=True)
    several = part < n
    seconds = sweep(v * d, 4) if several else 0.0  # zeros that dW is added to
    for lo, hi in chunks(n, part):
        rows = hi - lo
        seconds += _forward(rows, d, v, plan.chunk_tokens) + sweep(rows * v, 4 + 2)
        seconds += product(rows, d, v) + sweep(rows * d, 4 + 2)
        columns = (last - first for first, last in chunks(v, plan.chunk_columns))
        seconds += sum(product(c, d, rows, add=several) for c in columns)
    seconds += sweep(v * d, 4 + 2)  # dW, rounded
    return _case("groups", (n, d, v), mib, seconds, f"{part}")


def _case(name: str, shape: tuple[int, int, int], mib: int, seconds: float, block: str) -> Case:
    bare = COUNTS[name] * 2 * math.prod(shape) / FLOP_PER_SECOND
    return Case(name, mib, seconds, bare / seconds, block)


def cases(n: int, d: int, v: int) -> Iterator[Case]:
    """Yield the columns of the table."""
    yield forward(n, d, v, 256)
    yield frozen(n, d, v, 256)
    yield late(n, d, v, 256)
    yield groups(n, d, v, 256)
    yield groups(n, d, v, 1024)


def section() -> str:
    """Return the section of docs/head.md."""
    title = "| N, D, V | one product | " + " | ".join(
        f"{c.name}, {c.workspace_mib} MiB" for c in cases(*GOAL_SHAPE)
    )
    lines = [f"{title} | sum of dW |", "|" + "---|" * 8]
    for n, d, v in SHAPES:
        one = 2 * n * d * v / FLOP_PER_SECOND
        cells = [f"{n}, {d}, {v}", f"{1e3 * one:.1f}"]
        cells += [f"{1e3 * c.seconds:.1f} = {c.fraction:.2f} ({c.block})" for c in cases(n, d, v)]
        lines.append(f"| {' | '.join(cells)} | {4 * v * d / (1 << 30):.1f} GiB |")
    by_cublas = late(*GOAL_SHAPE, 256, fused=None)
    found = {c.name: c for c in cases(*GOAL_SHAPE)}  # of `groups` the last, with 1 GiB
    goals = "; ".join(
        f"{name} {1e3 * found[name].seconds:.1f} of {goal:g}" for name, goal in GOALS.items()
    )
    return f"""## What an H200 should take, by arithmetic

`python -m bench.account --page docs/head.md` rewrites this section. Nothing of it is a measurement.
It rests on two rates that an H200 was seen to reach: {FLOP_PER_SECOND / 1e12:g} TFLOP/s of a bf16
product of 8192^3, and a copy of {BYTES_PER_SECOND / 1e12:g} TB/s. `python -m bench.gpu --only env`
looks at both.

Cells are predicted ms of one bf16 call, the fraction of it that bare products at that rate would
take, and in brackets the rows of a slab (late: rows x columns of coefficients; groups: tokens of a
part). A product takes whole tiles in whole waves of {MULTIPROCESSORS} multiprocessors. Products of
few rows hang on how cuBLAS splits K: +-25 % there. `groups` holds the fp32 sum of dW beside its
workspace where there are several parts.

{chr(10).join(lines)}

Against this project's goals at {", ".join(map(str, GOAL_SHAPE))}, in ms: {goals}.

By this arithmetic `late` misses its goal. It counts {FUSED} of cuBLAS's rate for the kernel that
recomputes coefficients. A product by cuBLAS and a sweep in place would take
{1e3 * by_cublas.seconds:.1f} ms at the same slab, at 4 bytes an element where the kernel takes 2.
The kernel is ahead from {_even_rate(by_cublas.seconds):.2f} of cuBLAS's rate on.
"""


def _even_rate(seconds: float) -> float:
    """Return the rate of the fused kernel, over cuBLAS's, at which `late` takes so long."""
    n, d, v = GOAL_SHAPE
    rest = late(n, d, v, 256).seconds - 2 * n * d * v / (FLOP_PER_SECOND * FUSED)
    return 2 * n * d * v / FLOP_PER_SECOND / (seconds - rest)
