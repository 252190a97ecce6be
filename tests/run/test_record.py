"""What the files of a run's folder say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastpo.report.page import write_report
from fastpo.run.record import Run, batch_of, ends
from tests.report.runs import healthy, write_run


def test_samples_are_paired_and_the_latest_answer_counts(tmp_path: Path) -> None:
    def answer(when: str, row: int, text: str) -> dict[str, Any]:
        return {"when": when, "row": row, "source": "s", "prompt": f"p{row}", "response": text}

    rows = [answer("before", 1, "a"), answer("before", 2, "b"), answer("after", 1, "c"),
            answer("after", 2, "d"), answer("after", 1, "e")]  # fmt: skip
    run = Run.read(write_run(tmp_path / "r", [], samples=rows))
    assert run.samples == [("p1", "a", "e", ""), ("p2", "b", "d", "")]


def test_torn_and_repeated_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", [*healthy(8), {"step": 4, "loss": 9.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (folder / "run.json").write_text('{"status": "fin')
    run = Run.read(folder)
    assert run.torn == 1
    assert dict(run.curve("loss"))[4] == 9.0
    assert run.steps == 8
    assert "Torn lines" in write_report(folder).read_text()


def test_trainer_state_stands_in_for_metrics(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", [], trainer_state={"log_history": healthy(8)})
    assert Run.read(folder).steps == 8


def test_ends() -> None:
    assert ends([(0, 1.0), (1, math.nan), (2, 3.0)]) == (1.0, 3.0)
    assert all(math.isnan(v) for v in ends([]))


def test_a_batch_is_known_or_not() -> None:
    batch = {"groups": 3, "accumulated": 2, "ranks": 1}
    assert batch_of({"batch": batch}) == batch
    for damaged in (None, 3, [], {}, {**batch, "ranks": "2"}, {**batch, "more": 1}):
        assert batch_of({"batch": damaged}) is None
