"""Compile launches for a chip before they are made, on every core.

Triton compiles a kernel at its first launch, for about a second of one core. Here other processes
make the same launches, up to the point where the binary would run, and leave it in triton's cache,
where the launch on the device finds it. A process that the compiler hangs or kills costs that
candidate alone.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import pkgutil
import time
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, TypeVar

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastpo.kernels

Job = TypeVar("Job", bound=Hashable)
SECONDS = 15.0
"""What one candidate may take; those of the table take .5 to 1.2 on one core."""


def kernel_modules() -> list[ModuleType]:
    """Return the modules of `fastpo.kernels`, in alphabetical order."""
    names = sorted(found.name for found in pkgutil.iter_modules(fastpo.kernels.__path__))
    return [importlib.import_module(f"fastpo.kernels.{name}") for name in names]


def hash_in_order() -> None:
    """Give every kernel its key in triton's cache, before the first launch.

    Triton 3.6 hashes a kernel together with what others that were hashed before left behind: in
    another order of first launches a process misses what was compiled ahead.
    """
    for module in kernel_modules():
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                _ = value.cache_key


class _Chip:
    """Name the chip as a driver does, and run nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(target: GPUTarget) -> None:
    """Make every launch of this process compile for `target` and not run."""
    chip: Any = _Chip(target)
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(chip)
    JITFunction.run = compile_only
    hash_in_order()


def first_line(error: Exception) -> str:
    """Return an exception's kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _attempt(call: Callable[[Any], object], job: Any) -> str | None:
    try:
        call(job)
    except Exception as error:  # whatever the compiler raises is what this is here to find
        return first_line(error)
    return None


class Ahead:
    """Run processes that compile for a chip, alive while the context is.

    Args:
        target: the chip, as triton's driver names it.
        processes: one a core where it is None.
    """

    def __init__(self, target: GPUTarget, processes: int | None = None) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        # Not forked: a fork of a process that holds a GPU is broken, and one with threads may hang.
        context = multiprocessing.get_context("spawn")
        self.pool = context.Pool(self.processes, initializer=pretend, initargs=(target,))

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()
        self.pool.join()

    def compile(
        self, call: Callable[[Job], object], jobs: Sequence[Job], seconds: float = math.inf
    ) -> dict[Job, str | None]:
        """Return job -> None where `call(job)` compiled, else why not.

        A job has no entry where time ran out.

        Args:
            call: a function of a module, and picklable as such; it launches kernels.
            seconds: for all jobs together.
        """
        start = time.monotonic()
        limit = SECONDS * math.ceil(len(jobs) / self.processes)
        results = {job: self.pool.apply_async(_attempt, (call, job)) for job in jobs}
        found: dict[Job, str | None] = {}
        for job, result in results.items():
            left = start + min(limit, seconds) - time.monotonic()
            try:
                found[job] = result.get(timeout=max(0.0, left))
            except multiprocessing.TimeoutError:
                if limit <= seconds:
                    found[job] = f"the compiler died or took over {limit:.0f} s"
        return found
