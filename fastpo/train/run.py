"""What the files of a run's folder say: its log, its facts, and what speaks against it.

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
from typing import Any, Literal, NamedTuple

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
            except json.JSONDecodeError:
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
    except (json.JSONDecodeError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


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
    return float(value)


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
        for line in lines or run.state.get("log_history", []):
            # A resumed run repeats the steps after its checkpoint: the later line counts.
            if isinstance(line.get("step"), int):
                run.log.setdefault(line["step"], {}).update(line)
        # An earlier version may have written secrets down.
        run.facts = redact(_read_mapping(folder / "run.json"))
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
            return " + ".join(f"{weight:g} {name}" for name, weight in value.items())
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


def trend(curve: Curve) -> float:
    """Last third minus first third of a curve in standard errors; 0 below six points.

    Batches differ, so two noisy means always differ too: past 3 the change is hardly chance.
    """
    values = [v for _, v in finite(curve)]
    third = len(values) // 3
    if third < 2:
        return 0.0
    first, last = values[:third], values[-third:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    change = statistics.fmean(last) - statistics.fmean(first)
    return change / error if error else math.copysign(math.inf, change) if change else 0.0


class Warning(NamedTuple):
    """Something that the reader should know before trusting the numbers."""

    level: Literal["stop", "warn", "note"]
    title: str
    text: str


def find_warnings(run: Run) -> list[Warning]:
    """What the numbers of a run say against it, worst first."""
    found: list[Warning] = []

    def add(level: Literal["stop", "warn", "note"], title: str, text: str) -> None:
        found.append(Warning(level, title, text))

    broken = [s for s, v in run.curve("loss") if not math.isfinite(v)]
    if broken:
        add(
            "stop",
            f"The loss is not finite from step {broken[0]:.0f}",
            f"{len(broken)} logged steps have a NaN or infinite loss. What was trained after "
            "that is not usable; lower learning_rate, or train in bfloat16 instead of float16.",
        )
    margins, chosen = run.curve("rewards/margins"), run.curve("logps/chosen")
    if trend(margins) > 3 and trend(chosen) < -3:
        before, after = ends(chosen)
        add(
            "warn",
            "Margins grow while the chosen responses become less likely",
            f"logps/chosen went from {before:.1f} to {after:.1f}: the model pushes both responses "
            "down, the rejected one faster, and the probability goes to answers nobody rated. "
            "Read the samples. An SFT term (objective: {dpo: 1, sft: 0.1}), a larger beta or a "
            "smaller learning_rate holds the chosen responses up.",
        )
    accuracy = finite(run.curve("rewards/accuracies"))
    if len(accuracy) >= 6:
        easy = next(
            (i for i in range(len(accuracy)) if min(v for _, v in accuracy[i:]) >= 0.99), None
        )
        if easy is not None and easy <= len(accuracy) // 2:
            add(
                "warn",
                f"Every pair is ranked right from step {accuracy[easy][0]:.0f} on",
                "The rest of the run only widens margins. The pairs may be too easy, or tell "
                "chosen from rejected by something plain such as length or a fixed phrase.",
            )
        last = ends(accuracy)[1]
        if 0.45 <= last <= 0.55 and abs(trend(accuracy)) < 3:
            add(
                "warn",
                f"Accuracy ends at chance ({last:.2f})",
                "The model has not learned which response is preferred: train longer, raise "
                "learning_rate, or check that chosen and rejected are the right way round.",
            )
    evaluated = finite(run.curve("eval_loss"))
    if len(evaluated) >= 3:
        best_step, best = min(evaluated, key=lambda point: point[1])
        last_step, last = evaluated[-1]
        if best_step < last_step and last > best * 1.02 and trend(run.curve("loss")) < 0:
            add(
                "warn",
                f"Evaluation was best at step {best_step:.0f}",
                f"eval_loss rose from {best:.4f} to {last:.4f} while the training loss went down: "
                "the run overfits. Prefer the checkpoint nearest to that step, or train less.",
            )
    norms = [v for _, v in finite(run.curve("grad_norm"))]
    if len(norms) >= 6 and max(norms) > 10 * statistics.median(norms) > 0:
        add(
            "note",
            "Gradient spikes",
            f"The largest gradient norm, {max(norms):.3g}, is more than ten times the median, "
            f"{statistics.median(norms):.3g}. A longer warm-up or max_grad_norm tames single rows.",
        )
    data = run.facts.get("data", {})
    if run.skipped:
        rows = number(data.get("rows"))
        share = f" ({len(run.skipped) / rows:.1%} of {rows:.0f})" if rows > 0 else ""
        add(
            "warn" if rows > 0 and len(run.skipped) > 0.01 * rows else "note",
            f"Skipped rows: {len(run.skipped)}{share}",
            f"The first: {run.skipped[0].get('reason', 'no reason given')}. All are listed below.",
        )
    sharing = run.facts.get("sharing", {})
    if sharing.get("on") is False and sharing.get("reason"):
        add("note", "Prompts were not shared", f"{sharing['reason']}.")
    status = run.facts.get("status")
    if status and status != "finished":
        error = f"{run.facts['error']}. " if "error" in run.facts else ""
        level = "stop" if status == "failed" else "note"
        add(level, f"This run is {status}", f"{error}The numbers end at step {run.steps}.")
    if run.torn:
        add("note", "Torn lines", f"Lines cut off in the run's JSONL files: {run.torn}.")
    order = ("stop", "warn", "note")
    return sorted(found, key=lambda warning: order.index(warning.level))
