"""Compile the kernels of `bench.gpu` for Hopper without a GPU: `python -m bench.gpu.warm`.

The calls of `right` and of the head run as they do there, but for matrix products, up to the point
where a binary would run (`bench.ahead.pretend`).
Keys of triton's cache hold the absolute folder and the triton wheel: both must be the same on the
machine that reads it. A miss there costs what compiling costs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from bench.gpu.head import SMALLEST, Case, head_cases, head_contenders
from bench.gpu.pieces import ROWS, SLAB, SLICE, to_recompute, to_write
from bench.gpu.right import (
    FULL,
    KERNELS,
    LOSSES,
    SCHEDULES,
    Sizes,
    frozen_mib,
    kept_mib,
    kernel_results,
    make_batch,
    run_frozen,
    run_loss,
    run_twice,
    schedule_mib,
    written,
)
from bench.head import Inputs

CHIP, MULTIPROCESSORS = 90, 132


def place() -> Path:
    """Return where the cache has to lie on both machines."""
    return Path(tempfile.gettempdir()) / "fastpo-triton"


def warm(archive: Path) -> Path | None:
    """Pack a cache that works under the path returned; None where it cannot be made."""
    cache = place()
    shutil.rmtree(cache, ignore_errors=True)
    archive.unlink(missing_ok=True)
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    command = [sys.executable, "-m", "bench.gpu.warm"]
    done = subprocess.run(
        command,
        env=env,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    print(f"kernels: {last}")
    if done.returncode or not cache.exists():
        print("kernels are compiled there, on first use")
        return None
    # A quarter of the size.
    with tarfile.open(archive, "w:gz") as made:
        made.add(cache, ".")
    return cache


def watched() -> list[bool]:
    """Return a list that grows by whether each kernel launched from now on was in the cache."""
    from triton import knobs

    hits: list[bool] = []

    def listener(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = listener
    return hits


@contextlib.contextmanager
def without_products() -> Iterator[None]:
    """Take tensors of a CPU pass for a GPU's; matrix products are left out.

    All else is the code that runs on a GPU, so that its launches are those.
    """
    from bench.ahead import kernel_modules
    from bench.gpu import pieces
    from fastpo.head import select, types
    from fastpo.head.types import accumulator

    choose = select.choose_backend

    def on_gpu(backend: Any, device: torch.device, plain_only: str = "") -> Any:
        return choose(backend, torch.device("cuda"), plain_only)

    def unmultiplied(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        size, dtype = (a.shape[0], b.shape[1]), accumulator(a.dtype)
        return a.new_empty(size, dtype=dtype) if out is None else out

    def unput(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> Tensor:
        return out

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(select, "choose_backend", on_gpu))
        for module in (types, pieces):
            stack.enter_context(mock.patch.object(module, "matmul", unmultiplied))
            stack.enter_context(mock.patch.object(module, "put_matmul_", unput))
        for module in kernel_modules():
            for name, value in (
                ("chip_of", f"sm_{CHIP}"),
                ("_programs_wanted", 4 * MULTIPROCESSORS),
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda _, v=value: v))
        yield


def blank(n: int, d: int, v: int, dtype: torch.dtype) -> Inputs:
    """Make inputs that take no memory until they are touched."""
    hidden, weight = torch.empty(n, d, dtype=dtype), torch.empty(v, d, dtype=dtype)
    return Inputs(hidden, weight, torch.zeros(n, dtype=torch.int64), hidden, torch.ones(n))


def launches(sizes: Sizes = FULL) -> dict[str, Callable[[], Any]]:
    """Return name -> calls of the parts `right` and `head_a`, in their dtypes and sizes."""
    found: dict[str, Callable[[], Any]] = {}
    for kind, n, v in itertools.product(sizes.dtypes, sizes.tokens[:1], sizes.slabs):
        dtype = getattr(torch, kind)
        found[f"in place {n}x{v} {kind}"] = partial(in_place, n, v, dtype)
    for case in [*head_cases("head_a", toy=False), *head_cases("head_b", toy=False)]:
        name = " ".join((case.task, case.mode, *map(str, case.shape)))
        found[name] = partial(head, case._replace(peers=(), sizes=(SMALLEST,)))
    found["recompute"] = recompute
    for rows in ROWS:
        found[f"slab of {rows} rows"] = partial(slab, rows)
    for shape in itertools.product(sizes.tokens, sizes.widths, sizes.vocabularies):
        for kind in sizes.dtypes:
            name = f"{'x'.join(map(str, shape))} {kind}"
            found[name] = partial(kernels, shape, getattr(torch, kind), sizes)
    for name, kind in itertools.product(LOSSES, dict.fromkeys((sizes.dtypes[0], sizes.dtypes[-1]))):
        found[f"{name} {kind}"] = partial(loss, name, kind, sizes)
    return found


def in_place(n: int, v: int, dtype: torch.dtype) -> None:
    """Warm what `right.in_place` launches."""
    slab, labels = torch.empty(n, v), torch.zeros(n, dtype=torch.int64)
    written(slab, labels, dtype, apart=True)
    written(slab, labels, dtype)


def head(case: Case) -> None:
    """Warm what `head.measure_head` launches."""
    cpu = torch.device("cpu")
    for make in head_contenders(case, blank(*case.shape, torch.bfloat16), cpu).values():
        make()()


def recompute() -> None:
    """Warm what `pieces.recompute` launches."""
    x = blank(*SLICE, torch.bfloat16)
    stats = {name: torch.empty(len(x.labels)) for name in ("logps", "lse", "lse_rest")}
    for way in to_recompute(x, stats).values():
        way()


def slab(rows: int) -> None:
    """Warm what `pieces.slab` launches."""
    for way in to_write(blank(max(ROWS), *SLAB, torch.bfloat16), rows).values():
        way()


def kernels(shape: tuple[int, int, int], dtype: torch.dtype, sizes: Sizes) -> None:
    """Warm what `right.heads` and `right.kernels` launch."""
    x, (n, _, v) = blank(*shape, dtype), shape
    run_frozen("triton", x, frozen_mib(n, v))
    if n == sizes.tokens[0]:
        run_twice("triton", x, sizes.thin, walks=1)
        run_twice("triton", x, kept_mib(n, v))
    for kernel in KERNELS:
        kernel_results(kernel, x, None)


def loss(name: str, kind: str, sizes: Sizes) -> None:
    """Warm what `right.losses` launches."""
    shape = sizes.widths[0], sizes.vocabularies[-1]
    batch = make_batch(name, kind, sizes, torch.device("cpu"), shape)
    for schedule in SCHEDULES:
        mib = schedule_mib(schedule, name, batch, sizes)
        run_loss(name, batch, "triton", schedule != "frozen", mib, getattr(torch, kind))


def main() -> int:
    """Compile every launch; a form that is refused is a miss on the card and no failure here."""
    from triton.backends.compiler import GPUTarget

    from bench.ahead import first_line, pretend

    pretend(GPUTarget("cuda", CHIP, 32))
    hits = watched()
    refused = 0
    with without_products():
        for name, launch in tqdm(launches().items(), unit="launch", disable=None):
            try:
                launch()
            except Exception as why:  # compilers raise anything
                refused += 1
                print(f"{name}: {first_line(why)}", flush=True)
    print(f"{len(hits) - sum(hits)} compiled, {sum(hits)} were there, {refused} refused")
    return 0 if hits else 1


if __name__ == "__main__":
    raise SystemExit(main())
