"""Numbers of a run: averaged over a logging window, written to metrics.jsonl, shown on the bar."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import ProgressCallback as HFProgressCallback
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from fastpo.optional import missing
from fastpo.reading import read_jsonl
from fastpo.run.folder import RunFolder
from fastpo.run.record import number

METRICS_FILE = "metrics.jsonl"
Record = Mapping[str, float | None]
"""A line of metrics.jsonl: numbers by name, with its `step`; None is NaN or infinite."""

# Of the Trainer's trackers those whose names are their packages' too.
TRACKERS = ("clearml", "codecarbon", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")

log = logging.getLogger(__name__)


def refuse_missing_trackers(names: Iterable[str]) -> None:
    """Check `report_to` before a model is copied: the Trainer would do so long after, at length.

    Raises:
        PackageError: a tracker that is not installed.
    """
    installed = get_available_reporting_integrations()
    for name in names:
        if name in TRACKERS and name not in installed:
            raise missing(f"report_to={name!r}", name)


class MetricWindow:
    """Hold weighted means of named numbers, on their device until they are read.

    A number with count 0 (the mean reward of rejected responses in a batch that has none) is left
    out; one that is NaN for another reason makes the mean NaN.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name -> [sum of count * value, sum of count]

    def add(
        self, values: Mapping[str, Tensor | float], counts: Mapping[str, Tensor | float]
    ) -> None:
        """Add values, each the mean of so many observations."""
        for name in values:
            value = torch.as_tensor(values[name]).detach().double()
            count = torch.as_tensor(counts[name]).to(value)
            pair = torch.stack([torch.where(count > 0, value * count, 0.0), count])
            self._sums[name] = pair + self._sums[name] if name in self._sums else pair

    def means(self) -> dict[str, float]:
        """Return means over all ranks; the window is empty afterwards."""
        local = {name: pair.tolist() for name, pair in self._sums.items()}
        self._sums = {}
        total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for rank in gather_object([local]):
            for name, (value, count) in rank.items():
                total[name][0] += value
                total[name][1] += count
        return {name: s / n for name, (s, n) in sorted(total.items()) if n}


class Stopwatch:
    """Measure wall time of training alone: evaluation, saving and sampling are left out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return seconds


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak so far: allocated on the accelerator, or resident here on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_metrics(output_dir: str | Path) -> list[Record]:
    """Return the records of a run's metrics.jsonl; a last line torn by a kill is left out."""
    lines, _ = read_jsonl(Path(output_dir) / METRICS_FILE)
    return [cast(Record, line) for line in lines if isinstance(line.get("step"), int)]


class JsonlCallback(TrainerCallback):
    """Append every logged record to `<output_dir>/metrics.jsonl`.

    A resumed run first drops the records of the steps that it will run again.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        folder = RunFolder.at(str(args.output_dir))
        earlier = read_metrics(folder.path) if state.global_step else []
        kept = [record for record in earlier if number(record["step"]) <= state.global_step]
        folder.write(METRICS_FILE, "".join(json.dumps(record) + "\n" for record in kept))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, **(logs or {}), "time": time.time()}
        for name, value in record.items():  # JSON has no NaN
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        folder = RunFolder.at(str(args.output_dir))
        folder.add(METRICS_FILE)  # also of an evaluation without training
        with (folder.path / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class KLBudget(TrainerCallback):
    """End training once the policy is over `budget` nats a response from its reference.

    Over-optimisation is a function of that distance (https://arxiv.org/abs/2406.02900), so runs
    that end at the same one compare. It is read off the responses of the data, the larger of
    `kl/chosen` and `kl/rejected` in a logging window: sums over tokens of half the squared
    log-ratio, which to second order is either divergence where the reference drew the responses.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        spent = max((logs or {}).get(f"kl/{side}", 0.0) for side in ("chosen", "rejected"))
        if spent > self.budget:
            log.warning(
                "step %d: %.3g nats a response from the reference, kl_budget is %g: training ends",
                state.global_step,
                spent,
                self.budget,
            )
            control.should_training_stop = True


class ProgressCallback(HFProgressCallback):
    """Show loss, margin and accuracy of the last window at the right end of the Trainer's bar."""

    shown = (
        ("loss", "loss"),
        ("rewards/margins", "margin"),
        ("rewards/accuracies", "acc"),
        ("eval_loss", "eval_loss"),
        ("eval_rewards/accuracies", "eval_acc"),
    )

    def __init__(self) -> None:
        super().__init__()
        self._postfix: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None:
            return
        for name, label in self.shown:
            if logs is not None and name in logs:
                self._postfix[label] = f"{logs[name]:.4g}"
        self.training_bar.set_postfix(self._postfix)
