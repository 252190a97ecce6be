"""The tests of this folder run under triton's interpreter, and appear under their own names.

Without TRITON_INTERPRET=1 their bodies run in one `child` process that has it. With it, they run
right here, which is what a debugger wants:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted --pdb
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

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


@pytest.fixture(autouse=True, scope="session")
def _patched_once() -> Iterator[None]:
    """Patch `triton.language` once a launch, not once a function that a kernel calls.

    Every such call looks through all names of the module again, for 40 % of these tests' time.
    """
    patch, plain = interpreter._patch_lang, tl.range
    patched: set[str] = set()

    def patch_once(fn: Callable[..., Any]) -> Any:
        names = {m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core}
        if tl.range is plain:  # a launch; all else happens inside of one
            patched.clear()
        elif names <= patched:
            return None
        patched.update(names)
        return patch(fn)

    if INTERPRETED:
        interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


@pytest.fixture(autouse=True)
def _poison(poison: None) -> None:
    """Here every test wants it."""
