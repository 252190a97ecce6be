"""A command in a process of its own that is killed; see `tests.train.child.start`."""

from __future__ import annotations

from typing import Any

import torch

from fastpo.cli import main
from fastpo.train.stop import StopCleanly
from tests.train.child import die


def killed_at(step: int, words: list[str], threads: int) -> None:
    """Run a command that dies after this step; with other threads sums would differ."""
    torch.set_num_threads(threads)

    def kill(self: object, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == step:
            die()

    StopCleanly.on_step_end = kill  # pyright: ignore
    main(words)
