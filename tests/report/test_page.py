from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastpo.report.chart import Series, chart, short
from fastpo.report.diagnosis import find_warnings, trend, warnings_text
from fastpo.report.page import write_model_card, write_report
from fastpo.run.record import Run, ends
from fastpo.train.metrics import read_metrics

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


def titles(folder: Path) -> str:
    return "\n".join(w.title for w in find_warnings(Run.read(folder)))


def test_page_is_balanced_self_contained_and_has_every_curve(tmp_path: Path) -> None:
    log = healthy(100) + [
        {"step": s, "eval_loss": 0.6 - s / 1000, "eval_rewards/accuracies": 0.7} for s in (50, 100)
    ]
    folder = write_run(tmp_path / "night-run", log, run={"status": "finished", "seconds": 61})
    text = write_report(folder).read_text()
    page = Page(text)
    for title in ("Loss", "Accuracy", "Rewards", "Margin", "Log-probability", "Gradient norm",
                  "Learning rate", "Tokens per second", "Peak memory (GiB)"):  # fmt: skip
        assert f"<b>{title}</b>" in text
    assert page.tags.count("svg") == 9
    # One line each, one more where there are chosen and rejected or train and eval.
    assert len(re.findall(r'<polyline class="line', text)) == 11
    assert "Nothing in the numbers speaks against this run." in text
    assert "night-run" in page.text[0]
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [v for k, v in page.attributes if k in ("src", "href") or k.startswith("on")]
    assert "http" not in text
    assert "prefers-color-scheme:dark" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "r",
        healthy(8),
        samples=[
            {"when": when, "step": 0, "row": 1, "source": "s", "prompt": HOSTILE,
             "response": HOSTILE + when}
            for when in ("before", "after")
        ] + [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "chosen": HOSTILE}],
        skipped=[{"source": HOSTILE, "row": 1, "field": HOSTILE, "reason": HOSTILE}],
        run={"model": {"name": HOSTILE}, "objective": {"name": HOSTILE, "formula": HOSTILE},
             "reference": HOSTILE, "arguments": {HOSTILE: HOSTILE}, "status": HOSTILE,
             "environment": {"versions": {HOSTILE: HOSTILE}}},
        recipe=f"model: {json.dumps(HOSTILE)}\n",
    )  # fmt: skip
    page = Page(write_report(folder).read_text())
    assert not {"script", "img"} & set(page.tags)
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert "".join(page.text).count(HOSTILE) >= 12


def test_samples_are_paired_and_the_latest_answer_counts(tmp_path: Path) -> None:
    def answer(when: str, row: int, text: str) -> dict[str, Any]:
        return {"when": when, "row": row, "source": "s", "prompt": f"p{row}", "response": text}

    rows = [answer("before", 1, "a"), answer("before", 2, "b"), answer("after", 1, "c"),
            answer("after", 2, "d"), answer("after", 1, "e")]  # fmt: skip
    run = Run.read(write_run(tmp_path / "r", [], samples=rows))
    assert [(r["prompt"], r["before"], r["after"]) for r in run.samples] == [
        ("p1", "a", "e"),
        ("p2", "b", "d"),
    ]


@pytest.mark.parametrize("kept", [(), ("metrics.jsonl",), ("run.json",), ("samples.jsonl",)])
def test_partial_data_gives_a_report_and_a_card(tmp_path: Path, kept: tuple[str, ...]) -> None:
    folder = write_run(
        tmp_path / "r",
        healthy(8),
        run={"status": "interrupted", "data": {"groups": 3}},
        samples=[{"prompt": "p", "before": "b"}],
        recipe="model: m\n",
    )
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    Page(write_report(folder).read_text())
    assert write_model_card(folder).read_text().startswith("---\n")


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


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        write_report(tmp_path / "none")


# --- warnings -------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_warnings(tmp_path: Path) -> None:
    assert titles(write_run(tmp_path / "r", healthy())) == ""


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


@pytest.mark.parametrize("shift", [0.0, -5.0])  # some objectives' losses are negative
def test_overfitting_names_the_best_step(tmp_path: Path, shift: float) -> None:
    def told(*losses: float) -> str:
        held = [{"step": 10 * i, "eval_loss": v + shift} for i, v in enumerate(losses, 1)]
        return titles(write_run(tmp_path / "r", healthy() + held))

    assert told(0.6, 0.5, 0.55, 0.65) == "Evaluation was best at step 20"
    assert told(0.5, 0.51, 0.62, 0.65) == "eval_loss rises at every evaluation"
    assert told(0.5, 0.65) == told(0.6, 0.5, 0.501, 0.502) == told(0.5, 0.5001, 0.5002) == ""


def test_chance_needs_certainty(tmp_path: Path) -> None:
    """Ten batches of one pair each: .5 on average, and nothing is known."""
    log = [step_line(i, 10, **{"rewards/accuracies": float(i % 2)}) for i in range(1, 11)]
    assert titles(write_run(tmp_path / "r", log)) == ""


# --- broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "trainer_state.json", "recipe.yaml", "metrics.jsonl"])
@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{", '{"data": 3, "objective": "x", "sharing": [], "seconds": "long"}',
     '{"log_history": 3}', '{"log_history": [3, {"step": "x"}]}', "\x00\xff", "[" * 3000,
     '{"objective": {"name": {"dpo": "x"}}}', '{"objective": {"dpo": "x"}}', "a: 2026-99-99",
     '{"step": 1e400, "loss": 1}', '{"step": 1, "loss": 1' + "0" * 400 + "}", "? [a]\n: 1"],
)  # fmt: skip
def test_broken_files_give_a_report(tmp_path: Path, name: str, text: str) -> None:
    folder = write_run(tmp_path / "r", healthy(2), run={"status": "finished"}, recipe="model: m\n")
    (folder / name).write_bytes(text.encode("latin-1"))
    Page(write_report(folder).read_text())
    write_model_card(folder)
    assert isinstance(read_metrics(folder), list)


def test_skipped_rows_are_a_warning_only_when_they_are_many(tmp_path: Path) -> None:
    skipped = [{"source": "s", "row": 1, "field": "chosen", "reason": "is empty"}]
    for rows, level in ((1000, "note"), (10, "warn")):
        folder = write_run(
            tmp_path / str(rows), healthy(), skipped=skipped, run={"data": {"rows": rows}}
        )
        (warning,) = find_warnings(Run.read(folder))
        assert warning.level == level
        assert "is empty" in warning.text


def test_trend_and_ends() -> None:
    rng = random.Random(0)
    noise = [(i, rng.gauss(0, 1)) for i in range(300)]
    assert abs(trend(noise)) < 3
    assert trend([(s, v + s / 50) for s, v in noise]) > 3
    assert trend([(0, 1.0), (1, 2.0)]) == 0
    assert ends([(0, 1.0), (1, math.nan), (2, 3.0)]) == (1.0, 3.0)
    assert all(math.isnan(v) for v in ends([]))


# --- charts ---------------------------------------------------------------------------------------


def test_chart_draws_finite_points_inside_the_frame() -> None:
    curve = [(1, 0.0), (2, math.nan), (3, math.inf), (4, 5.0), (5, -3.0)]
    svg = chart([Series("a", curve, "a")])
    (points,) = re.findall(r'points="([^"]*)"', svg)
    pairs = [tuple(map(float, p.split(","))) for p in points.split()]
    assert len(pairs) == 3
    assert all(0 <= x <= 320 and 0 <= y <= 176 for x, y in pairs)
    assert pairs[1][1] < pairs[0][1] < pairs[2][1]  # up is up
    assert "step 4: 5" in svg


@pytest.mark.parametrize(
    "curve", [[], [(1, 2.0)], [(1, math.nan), (2, math.nan)]], ids=["empty", "one", "nan"]
)
def test_nothing_to_draw(curve: list[tuple[float, float]]) -> None:
    assert chart([Series("a", curve, "a")]) == ""


@pytest.mark.parametrize("value", [0.0, 1e-7, -3.5e5, 1e12])
def test_constant_curves(value: float) -> None:
    assert "nan" not in chart([Series("a", [(0, value), (1, value)], "a")])


def test_long_curves_stay_small() -> None:
    svg = chart([Series("a", [(i, math.sin(i)) for i in range(100_000)], "a")])
    assert len(svg) < 120_000


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.693147, "0.6931"), (12345, "12.3k"), (1.2358e9, "1.24B"), (5e-6, "5e-6"),
     (math.nan, "-")],
)  # fmt: skip
def test_short(value: float, text: str) -> None:
    assert short(value) == text


# --- the model card -------------------------------------------------------------------------------


def test_model_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = write_run(
        tmp_path / "r",
        [step_line(i, 40, **{"logps/chosen": -60 - i}) for i in range(1, 41)],
        recipe="model: owner/base\ndataset: data/prefs.jsonl\nlora: {r: 4}\n",
        run={
            "objective": {
                "name": {"dpo": 1.0, "sft": 0.1},
                "formula": "-logsig(z)",
                "hyper": {"beta": 0.1},
                "paper": "2305.18290",
            },
            "data": {"groups": 7, "tokens": 1234},
            "environment": {"versions": {"torch": "2.13.0"}},
        },
    )
    card = ModelCard.load(write_model_card(folder, title="My model"))
    assert card.data.base_model == "owner/base"
    assert card.data.datasets is None  # a file is no repository
    assert card.data.library_name == "peft"
    assert {"dpo", "sft", "fastpo"} <= set(card.data.tags)
    for part in ("# My model", "-logsig(z)", "beta: 0.1", "2305.18290", "7 groups", "1,234 tokens",
                 "| rewards/margins |", "less likely", "torch 2.13.0", "lora:"):  # fmt: skip
        assert part in card.text
