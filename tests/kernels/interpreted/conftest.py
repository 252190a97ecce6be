"""Tests in this folder run under triton's interpreter, on any machine, and appear under their names.

Without TRITON_INTERPRET=1 their bodies run in one `child` process that has it. With it, they run
right here, which is what a debugger wants:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted --pdb
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpo.kernels.tile import INTERPRETED
from tests.kernels.interpreted.child import Child

CHILD = pytest.StashKey[Child]()


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED:
        return None
    session = pyfuncitem.session
    if CHILD not in session.stash:
        here = Path(__file__).parent
        child = Child([i.nodeid for i in session.items if i.path.is_relative_to(here)])
        session.config.add_cleanup(child.close)
        session.stash[CHILD] = child
    session.stash[CHILD].replay(pyfuncitem.nodeid)
    return True


@pytest.fixture(autouse=True, scope="session")
def _warm_exp() -> None:
    """MKL's first float64 exp of a process, shared out to threads, may be good to 1e-9 only."""
    torch.zeros(8, dtype=torch.float64).exp()


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floats are NaN, so that an element no kernel wrote shows."""

    def poisoned(make):
        @functools.wraps(make)
        def fill(*args, **kwargs) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
