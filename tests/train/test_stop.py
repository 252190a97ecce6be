"""A signal ends training after the step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from fastpo.train.stop import StopCleanly


def test_one_signal_ends_the_step_and_another_does_not_wait(config: Any, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop, args = StopCleanly(), config()

    def step() -> TrainerControl:
        control = TrainerControl()
        stop.on_step_end(args, TrainerState(), control)
        return control

    with stop:
        assert not step().should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert step().should_training_stop
        assert step().should_save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
