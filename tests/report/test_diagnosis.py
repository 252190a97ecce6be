"""What the numbers of a run say against it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fastpo.report.diagnosis import find_warnings, trend, warnings_text
from fastpo.report.page import write_report
from fastpo.run.record import Run
from tests.report.runs import healthy, step_line, write_run


def titles(folder: Path) -> str:
    return "\n".join(w.title for w in find_warnings(Run.read(folder)))


def test_a_healthy_run_has_no_warnings(tmp_path: Path) -> None:
    assert titles(write_run(tmp_path / "r", healthy())) == ""


# One rule each, in a run that is healthy otherwise: no other rule speaks up.
@pytest.mark.parametrize(
    ("change", "title"),
    [
        (lambda t: {"loss": None if t > 0.5 else 0.6}, "not finite from step 21"),
        (lambda t: {"logps/chosen": -60 - 20 * t}, "chosen responses become less likely"),
        (lambda t: {"rewards/accuracies": min(1.0, 4 * t)}, "ranked right from step 10 on"),
        (lambda t: {"rewards/accuracies": 0.5}, "Accuracy ends at chance (0.50)"),
        (lambda t: {"grad_norm": 90.0 if t == 0.5 else 2.0}, "Gradient spikes"),
    ],
    ids=["nan", "displacement", "too easy", "chance", "spike"],
)
def test_warnings(tmp_path: Path, change: Any, title: str) -> None:
    log = [step_line(i, 40, **change(i / 40)) for i in range(1, 41)]
    folder = write_run(tmp_path / "r", log)
    assert title in titles(folder)
    assert len(titles(folder).splitlines()) == 1
    assert warnings_text(Run.read(folder)).count(title) == 1


def falling(chosen: float, rejected: float, nats: float = 2.0) -> Any:
    """Rewards that fall to these, and the chosen log-probability by so many nats."""
    return lambda t: {
        "rewards/chosen": chosen * t,
        "rewards/rejected": rejected * t,
        "rewards/margins": (chosen - rejected) * t + (t * 40 % 2) / 100,
        "logps/chosen": -60 - nats * t,
        "logps/rejected": -60 + 10 * rejected * t,
    }


# The three ways in which both rewards fall: harmless, displaced, and without telling them apart.
@pytest.mark.parametrize(
    ("change", "level", "title", "parts"),
    [
        (
            falling(-0.2, -1.5),
            "note",
            "Both rewards fall a little while their margin grows",
            ["rewards/chosen went from", "{dpo: 1, sft: 0.1}", "2410.08847", "0.50 to 0.75"],
        ),
        (
            falling(-2, -5, nats=20),
            "warn",
            "Margins grow while the chosen responses become less likely",
            ["a larger beta", "smaller learning_rate", "--ches"],
        ),
        (
            falling(-2, -2, nats=20),
            "warn",
            "Both rewards fall and their margin does not grow",
            ["tenth of learning_rate", "mixed up"],
        ),
    ],
)
def test_both_rewards_fall(
    tmp_path: Path, change: Any, level: str, title: str, parts: list[str]
) -> None:
    log = [step_line(i, 40, **change(i / 40)) for i in range(1, 41)]
    log += [{"step": s, "eval_rewards/accuracies": v} for s, v in ((20, 0.5), (40, 0.75))]
    folder = write_run(tmp_path / "r", log, recipe="objective: dpo\n")
    (warning,) = find_warnings(Run.read(folder))
    assert (warning.level, warning.title) == (level, title)
    for part in parts:
        assert part in warning.text
    assert title in write_report(folder).read_text()
    mixed = write_run(tmp_path / "m", log, recipe="objective: {dpo: 1, sft: 0.1}\n")
    assert "sft: 0.1}" not in find_warnings(Run.read(mixed))[0].text


# One step, a few, and one below the least that is judged.
@pytest.mark.parametrize("steps", [1, 3, 9])
def test_a_short_run_is_not_judged(tmp_path: Path, steps: int) -> None:
    """Each of its numbers would speak of overfitting, chance or a spike in a longer one."""
    log = [
        step_line(i, steps, **{"rewards/accuracies": 0.5, "grad_norm": 99.0 if i == 2 else 1.0})
        for i in range(1, steps + 1)
    ]
    log += [{"step": s, "eval_loss": 0.5 + s / 10} for s in range(1, steps + 1)]
    folder = write_run(tmp_path / "r", log)
    (warning,) = find_warnings(Run.read(folder))
    assert warning.title.startswith(f"Too little to judge: {steps} logged step")
    assert "speaks against" not in write_report(folder).read_text()


def test_a_loss_of_zero(tmp_path: Path) -> None:
    log = [step_line(i, 40, loss=0.0) for i in range(1, 41)]
    (warning,) = find_warnings(Run.read(write_run(tmp_path / "r", log)))
    assert (warning.level, warning.title) == ("stop", "The loss is 0 at every step")
    log[7]["loss"] = 0.1
    assert titles(write_run(tmp_path / "r", log)) == ""


def test_a_loss_that_stays(tmp_path: Path) -> None:
    log = [step_line(i, 40, loss=0.6931) for i in range(1, 41)]
    assert titles(write_run(tmp_path / "r", log)) == "The loss is 0.6931 at every step"
    log[7]["loss"] = 0.6932
    assert titles(write_run(tmp_path / "r", log)) == ""


# Some objectives' losses are negative.
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_overfitting_names_the_best_step(tmp_path: Path, shift: float) -> None:
    def judged(*losses: float) -> str:
        evaluated = [{"step": 10 * i, "eval_loss": v + shift} for i, v in enumerate(losses, 1)]
        return titles(write_run(tmp_path / "r", healthy() + evaluated))

    assert judged(0.6, 0.5, 0.55, 0.65) == "Evaluation was best at step 20"
    assert judged(0.5, 0.51, 0.62, 0.65) == "eval_loss rises at every evaluation"
    assert judged(0.5, 0.65) == judged(0.6, 0.5, 0.501, 0.502) == judged(0.5, 0.5001, 0.5002) == ""


def test_chance_needs_certainty(tmp_path: Path) -> None:
    """Ten batches of one pair each: .5 on average, and nothing is known."""
    log = [step_line(i, 10, **{"rewards/accuracies": float(i % 2)}) for i in range(1, 11)]
    assert titles(write_run(tmp_path / "r", log)) == ""


def test_skipped_rows_are_a_warning_only_when_they_are_many(tmp_path: Path) -> None:
    skipped = [{"source": "s", "row": 1, "field": "chosen", "reason": "is empty"}]
    for rows, level in ((1000, "note"), (10, "warn")):
        folder = write_run(
            tmp_path / str(rows), healthy(), skipped=skipped, run={"data": {"rows": rows}}
        )
        (warning,) = find_warnings(Run.read(folder))
        assert warning.level == level
        assert "is empty" in warning.text


def test_trend() -> None:
    rng = random.Random(0)
    noise = [(i, rng.gauss(0, 1)) for i in range(300)]
    assert abs(trend(noise)) < 3
    assert trend([(s, v + s / 50) for s, v in noise]) > 3
    assert trend([(0, 1.0), (1, 2.0)]) == 0
