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
from typing import Any

import yaml

from fastpo.redact import redact

Curve = list[tuple[float, float]]
"""(step, value), by step; a value may be NaN."""


def environment() -> dict[str, Any]:
    """Versions, Python, operating system and devices of this process."""
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


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file and how many lines were no object (a torn last line)."""
    rows, torn = [], 0
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                torn += 1
    return rows, torn


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping, {} where there is none or a crash cut it short."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _of_form(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts whose sections are mappings; what a damaged file has in their place is left out."""
    forms: dict[str, Any] = dict.fromkeys(
        ("model", "data", "objective", "sharing", "environment", "arguments", "recipe", "batch"),
        dict,
    )
    forms["seconds"] = int | float
    return {k: v for k, v in facts.items() if isinstance(v, forms.get(k, object))}


def _paired(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sample lines as {prompt, before, after, chosen}, whichever of two forms they have.

    The trainer writes one line per answer, {when, row, source, prompt, response}; a script may
    write finished rows.
    """
    rows: dict[Any, dict[str, Any]] = {}
    for i, line in enumerate(lines):
        if "when" in line:
            key = (str(line.get("source")), str(line.get("row")), str(line.get("prompt")))
            row = rows.setdefault(key, {"prompt": line.get("prompt", "")})
            row[str(line["when"])] = line.get("response", "")
            row.setdefault("chosen", line.get("chosen"))
        else:
            rows[i] = line
    return list(rows.values())


def number(value: Any) -> float:
    """A logged value as a float; NaN for null and text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


@dataclass
class Run:
    """Everything that a run's folder says about the run."""

    folder: Path
    log: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> merged log lines
    recipe: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # run.json
    state: dict[str, Any] = field(default_factory=dict)  # trainer_state.json
    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
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
        lines, run.torn = read_jsonl(folder / "metrics.jsonl")
        run.state = _read_mapping(folder / "trainer_state.json")
        history = run.state.get("log_history")
        for line in lines or (history if isinstance(history, list) else []):
            # A resumed run repeats the steps after its checkpoint: the later line counts.
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                run.log.setdefault(line["step"], {}).update(line)
        # An earlier version may have written secrets down.
        run.facts = _of_form(redact(_read_mapping(folder / "run.json")))
        run.recipe = redact(run.facts.get("recipe") or _read_mapping(folder / "recipe.yaml"))
        lines, torn = read_jsonl(folder / "samples.jsonl")
        run.samples = _paired(lines)
        run.skipped, torn_skipped = read_jsonl(folder / "skipped.jsonl")
        run.torn += torn + torn_skipped
        return run

    def curve(self, key: str) -> Curve:
        """A metric by step; null becomes NaN."""
        return [(s, number(line[key])) for s, line in sorted(self.log.items()) if key in line]

    def names(self) -> list[str]:
        """Every metric that was logged, in order of first appearance."""
        return list(dict.fromkeys(key for line in self.log.values() for key in line))

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max(self.log, default=0)

    @property
    def objective(self) -> str:
        """The objective as one would say it: `dpo`, `0.8 dpo + 1 sft`."""
        value = self.facts.get("objective", {}).get("name") or self.recipe.get("objective", "dpo")
        if isinstance(value, Mapping):
            return " + ".join(f"{number(weight):g} {name}" for name, weight in value.items())
        return str(value)


def finite(curve: Curve) -> Curve:
    """The points whose value is finite."""
    return [(s, v) for s, v in curve if math.isfinite(v)]


def ends(curve: Curve) -> tuple[float, float]:
    """Means over the first and the last fifth of a curve (at least one point); NaN if empty."""
    values = [v for _, v in finite(curve)]
    if not values:
        return math.nan, math.nan
    part = max(1, len(values) // 5)
    return statistics.fmean(values[:part]), statistics.fmean(values[-part:])
