"""Folders of runs that never were, and a reader of pages that is stricter than a browser."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HOSTILE = '<script>alert("x")</script></div></main><img src=x onerror=alert(1)> & "quotes"'
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a browser would do with the page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def step_line(step: int, of: int, **changes: Any) -> dict[str, Any]:
    """A training record of a healthy run."""
    rng, t = random.Random(step), step / of
    margin = 1.5 * t + rng.gauss(0, 0.05)
    line = {
        "step": step,
        "epoch": t,
        "loss": 0.69 - 0.4 * t + rng.gauss(0, 0.01),
        "rewards/chosen": margin / 2,
        "rewards/rejected": -margin / 2,
        "rewards/margins": margin,
        "rewards/accuracies": 0.5 + 0.3 * t + rng.gauss(0, 0.02),
        "logps/chosen": -60 + rng.gauss(0, 1),
        "logps/rejected": -60 - 10 * margin,
        "grad_norm": 2 + rng.random(),
        "learning_rate": 1e-6 * (1 - t),
        "tokens_per_second": 1000 + rng.random(),
        "peak_memory_gib": 3.5,
    }
    return {**line, **changes}


def write_run(folder: Path, log: list[dict[str, Any]], **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for name, value in files.items():
        if isinstance(value, list):
            text = "".join(json.dumps(row) + "\n" for row in value)
            (folder / f"{name}.jsonl").write_text(text)
        elif name == "recipe":
            (folder / "recipe.yaml").write_text(value)
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def healthy(steps: int = 40) -> list[dict[str, Any]]:
    return [step_line(i, steps) for i in range(1, steps + 1)]
