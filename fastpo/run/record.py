"""What the files of a run's folder say: its log and its facts.

Every file may be missing or end in the middle of a line; what is there is read.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

import yaml

from fastpo.reading import read_jsonl
from fastpo.redact import redact

Curve = list[tuple[float, float]]
"""(step, value), by step; a value may be NaN."""


class Environment(TypedDict):
    """Hold what a process runs on."""

    versions: dict[str, str]
    python: str
    system: str
    devices: list[str]


class Sample(NamedTuple):
    """Hold the model's responses before and after training, and the one that the data prefers."""

    prompt: str
    before: str
    after: str
    chosen: str


class Skipped(NamedTuple):
    """Hold a row that was left out: where it stands and why."""

    source: str
    row: str
    field: str
    reason: str


def environment() -> Environment:
    """Return versions, Python, operating system and devices of this process."""
    import torch

    names = ("fastpo", "torch", "triton", "transformers", "accelerate", "peft", "datasets")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "versions": versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "devices": devices or [f"CPU, {torch.get_num_threads()} threads"],
    }


def _read_mapping(path: Path) -> dict[str, object]:
    """Read a JSON or YAML mapping; {} where there is none or a crash cut it short."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _samples(lines: Sequence[Mapping[str, object]]) -> list[Sample]:
    """Read samples in either of two forms.

    The trainer writes one line a response, {when, row, source, prompt, response, chosen}, of which
    the last counts; a script may write {prompt, before, after, chosen}.
    """
    rows: dict[object, dict[str, object]] = {}
    for i, line in enumerate(lines):
        if "when" in line:
            key = (str(line.get("source")), str(line.get("row")), str(line.get("prompt")))
            row = rows.setdefault(key, {k: line.get(k) for k in ("prompt", "chosen")})
            row[str(line["when"])] = line.get("response")
        else:
            rows[i] = dict(line)
    return [Sample(*(_text(row.get(name)) for name in Sample._fields)) for row in rows.values()]


def number(value: object) -> float:
    """Return a logged value as a float; NaN for null and text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def batch_of(facts: Mapping[str, object]) -> dict[str, int] | None:
    """Return what a step consisted of, by the keys of `PreferenceConfig.batch_facts`, or None."""
    batch = facts.get("batch")
    if not isinstance(batch, dict) or batch.keys() != {"groups", "accumulated", "ranks"}:
        return None
    return batch if all(type(size) is int for size in batch.values()) else None


@dataclass
class Run:
    """Hold everything that a run's folder says about the run.

    Attributes:
        folder: where it lies.
        log: every step's metrics, of the lines of that step the last.
        recipe: its keys and values.
        facts: run.json; a damaged one may hold anything, see `section`.
        state: trainer_state.json.
        samples: what the model wrote.
        skipped: rows that were left out.
        torn: lines that were cut off.
    """

    folder: Path
    log: dict[int, dict[str, object]] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    state: Mapping[str, object] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    torn: int = 0

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a folder.

        Raises:
            ValueError: the folder does not exist.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder, so there is no run to report on")
        run = cls(folder)
        lines, torn = read_jsonl(folder / "metrics.jsonl")
        run.state = _read_mapping(folder / "trainer_state.json")
        history = run.state.get("log_history")
        for line in lines or (history if isinstance(history, list) else []):
            # A resumed run repeats the steps after its checkpoint: the later line counts.
            step = line.get("step") if isinstance(line, dict) else None
            if isinstance(step, int):
                run.log.setdefault(step, {}).update(line)
        # An earlier version may have written secrets down.
        run.facts = redact(_read_mapping(folder / "run.json"))
        run.recipe = redact(run.section("recipe") or _read_mapping(folder / "recipe.yaml"))
        lines, torn_samples = read_jsonl(folder / "samples.jsonl")
        run.samples = _samples(lines)
        lines, torn_skipped = read_jsonl(folder / "skipped.jsonl")
        run.skipped = [Skipped(*(_text(row.get(k)) for k in Skipped._fields)) for row in lines]
        run.torn = torn + torn_samples + torn_skipped
        return run

    def section(self, name: str) -> Mapping[str, object]:
        """Return a mapping of run.json; {} where it has none, or something else."""
        value = self.facts.get(name)
        return value if isinstance(value, dict) else {}

    def curve(self, key: str) -> Curve:
        """Return a metric by step; null becomes NaN."""
        return [(s, number(line[key])) for s, line in sorted(self.log.items()) if key in line]

    def names(self) -> list[str]:
        """Return every metric that was logged, in order of first appearance."""
        return list(dict.fromkeys(key for line in self.log.values() for key in line))

    @property
    def steps(self) -> int:
        """Return the last step that was logged."""
        return max(self.log, default=0)

    @property
    def objective(self) -> str:
        """Return the objective as one would say it: `dpo`, `0.8 dpo + 1 sft`."""
        named = self.section("objective").get("name") or self.recipe.get("objective", "dpo")
        if isinstance(named, Mapping):
            return " + ".join(f"{number(weight):g} {name}" for name, weight in named.items())
        return str(named)


def finite(curve: Curve) -> Curve:
    """Return the points whose value is finite."""
    return [(s, v) for s, v in curve if math.isfinite(v)]


def ends(curve: Curve) -> tuple[float, float]:
    """Return means over the first and the last fifth of a curve, one point at least.

    An empty curve has NaN.
    """
    values = [v for _, v in finite(curve)]
    if not values:
        return math.nan, math.nan
    part = max(1, len(values) // 5)
    return statistics.fmean(values[:part]), statistics.fmean(values[-part:])
