"""Count what would make the host wait for a device, on a machine that has none.

Wrapped are the calls that read a tensor's values: on a GPU each of them waits until the device has
come so far. What the plain backend does on a CPU alone does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastpo

HOME = str(Path(fastpo.__file__).parent)
ON_CPU_ALONE = ("head/torch_backend.py", "testing/scores.py")
READS = (
    *("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"),
    *("masked_select", "unique", "equal", "new_tensor"),
)


def whose() -> str:
    """Return file and line of the innermost frame that is not torch's, "" if it is not ours."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(HOME) and not name.endswith(ON_CPU_ALONE):
            return f"{name[len(HOME) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        if name != __file__ and "/torch/" not in name:
            return ""
        frame = frame.f_back
    return ""


def _by_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect, while the block runs, where fastpo's own code would wait."""
    seen: list[str] = []
    inside = [False]  # a wrapped call may be made of others

    def noting(name: str, original: Callable, waits: Callable[..., bool]) -> Callable:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            where = "" if inside[0] or not waits(self, *args, **kwargs) else whose()
            if where:
                seen.append(f"{name} in {where}")
            before, inside[0] = inside[0], True
            try:
                return original(self, *args, **kwargs)
            finally:
                inside[0] = before

        return call

    def always(*args: Any, **kwargs: Any) -> bool:
        return True

    def indexed(self: Any, index: Any, *args: Any) -> bool:
        return _by_mask(index)

    def unsized(self: Any, *args: Any, **kwargs: Any) -> bool:
        return "output_size" not in kwargs

    with mock.patch.multiple(
        Tensor,
        **{name: noting(name, getattr(Tensor, name), always) for name in READS},
        **{n: noting(n, getattr(Tensor, n), indexed) for n in ("__getitem__", "__setitem__")},
        repeat_interleave=noting("repeat_interleave", Tensor.repeat_interleave, unsized),
    ):
        yield seen
