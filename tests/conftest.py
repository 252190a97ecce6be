"""What every test may count on, in one process or in several (`-n auto --dist loadgroup`)."""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker: more would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# The first exponential in float64 that torch 2.13 spreads over threads is wrong by about 1e-9 in
# one fresh process of forty, in one thread's share. Truths must not be that first one.
torch.ones(1 << 18, dtype=torch.float64).exp()


INTERPRETED = Path(__file__).parent / "kernels" / "interpreted"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay in one process, and so do all that share the interpreter's."""
    for item in items:
        path = INTERPRETED if item.path.is_relative_to(INTERPRETED) else item.path
        item.add_marker(pytest.mark.xdist_group(str(path)))
