"""What every test may count on, in one process or in several (`-n auto`)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker: more would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# The first exponential in float64 that torch 2.13 spreads over threads is wrong by about 1e-9 in
# one fresh process of forty, in one thread's share. Truths must not be that first one.
torch.ones(1 << 18, dtype=torch.float64).exp()


# Half a million objects are made while tests are collected, and none of them is garbage.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _no_garbage() -> Iterator[None]:
    """Set aside what lives at a file's end: every run of a trainer looks through all that is not.

    Compiled graphs and imported modules are 240,000 objects late in a suite, a quarter of a second
    for each of a trainer's collections.
    """
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else triton's bindings list it as leaked


INTERPRETED = "tests/kernels/interpreted"
# Files without anything that their tests share, and long: their tests go wherever there is room.
# On a GPU, `-m gpu -n 6`: 350 kernels to compile, about a second of one core each, and of the two
# tests that hold most memory, 18 and 27 GB, six processes run two at once, no more.
SCATTERED = (
    "tests/train/test_trajectory.py",
    "tests/kernels/test_gpu.py",
    "tests/model/attention/test_gpu.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, and so do all that share the interpreter's."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file in SCATTERED:
                return nodeid
            return INTERPRETED if file.startswith(INTERPRETED) else file

    return ByFile(config, log)
