"""The tests of this folder run under triton's interpreter, and appear under their own names.

Without TRITON_INTERPRET=1 their bodies run in one `child` process that has it. With it, they run
right here, which is what a debugger wants:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted --pdb
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
def _one_thread() -> Iterator[None]:
    """The tensors are tiny; and MKL's first float64 exp, if threads share it, may err by 1e-9."""
    before = torch.get_num_threads()
    if INTERPRETED:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poison(poison: None) -> None:
    """Here every test wants it."""
