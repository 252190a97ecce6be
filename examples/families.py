"""`make families`: one objective of every family, trained for a dozen steps on a real model.

    python examples/families.py

Each run is `fastpo train examples/families.yaml` with another objective, on SmolLM2-135M and the
pairs of `make demo`, and is measured on held-out groups before the first and after the last step.
A run passes if every logged number is finite, the held-out loss fell, and the held-out margin of
rewards rose. The table and the figure go to docs/real-runs.md. Runs that are finished are not
repeated: killed at any moment, the same command goes on.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import json_person as task
import matplotlib
import smollm2
import torch
import transformers

from fastpo.cli import main as fastpo
from fastpo.train.metrics import read_metrics

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "examples/families.yaml"
OUT = Path("runs/families")
PAGE = Path("docs/real-runs.md")
FIGURE = Path("docs/figures/real-runs.png")
HELD_OUT = 8  # groups: more would take longer than the training
TABLE_HEAD = """\
| family | objective | held-out loss | held-out margin | held-out accuracy | steps | right way |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Example:
    """An objective that stands for its family."""

    family: str  # a heading of the catalogue
    objective: str | dict[str, float]
    data: Literal["pairs", "lists"] = "pairs"
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A word for folders and rows."""
        return self.objective if isinstance(self.objective, str) else "+".join(self.objective)


EXAMPLES = (
    Example("Pairs with a reference", "dpo"),
    Example("Pairs without a reference", "simpo"),
    # 1 / 10 is the beta of the others: with the default 1 a difference of grades of 1 asks for a
    # margin of 1 nat, which a single step overshoots.
    Example("Regressions of margins and rewards", "rebel", flags=("--eta", "10")),
    Example("Pairs that see the whole batch", "beta_dpo"),
    Example("Other prompts, other references", "mdpo"),
    Example("Single responses", "kto"),
    # Not LiPO: its weights follow the ranking, so that its value may rise while the lists improve.
    Example("Lists", "listnet", "lists"),
    Example("Token statistics", "tdpo2"),
    Example("Policy gradients on sampled responses", "step_dapo"),
    Example("Likelihood and other regularisers", {"dpo": 1.0, "sft": 1.0}),
)


@dataclass(frozen=True)
class Result:
    """A run's records: of its training steps, and of the held-out groups before and after."""

    example: Example
    steps: list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What is wrong, or "yes"."""
        records = [*self.steps, self.before, self.after]
        # metrics.jsonl has null for a number that is not finite.
        if any(value is None for record in records for value in record.values()):
            return "not finite"
        if not self.after["eval_loss"] < self.before["eval_loss"]:
            return "loss rose"
        if not self.after["eval_rewards/margins"] > self.before["eval_rewards/margins"]:
            return "margin fell"
        return "yes"


def pairs_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs with everything that an objective may ask for.

    Grades of +-1/2, whose difference is a reward of 1 and which are an advantage where the two are
    all there is; and the next person's prompt for a context that does not fit.
    """
    prompts = {row["name"]: row["prompt"] for row in rows}
    names = list(prompts)
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    return [
        {
            **{name: row[name] for name in ("prompt", "chosen", "rejected")},
            "score_chosen": 0.5,
            "score_rejected": -0.5,
            "context_prompt": prompts[following[row["name"]]],
        }
        for row in rows
    ]


def lists_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All distinct replies to a prompt, graded 1 (valid) or 0."""
    grades: dict[str, dict[str, float]] = {}
    for row in rows:
        of_prompt = grades.setdefault(json.dumps(row["prompt"]), {})
        of_prompt[json.dumps(row["chosen"])] = 1.0
        of_prompt[json.dumps(row["rejected"])] = 0.0
    return [
        {
            "prompt": json.loads(prompt),
            "responses": [json.loads(reply) for reply in replies],
            "scores": list(replies.values()),
        }
        for prompt, replies in grades.items()
    ]


def write_data(folder: Path) -> None:
    """The four files that the runs read."""
    folder.mkdir(parents=True, exist_ok=True)
    for start, path in (("", task.PAIRS), ("eval-", task.EVAL_PAIRS)):
        rows = task.read_rows(path)
        for name, made in (("pairs", pairs_of(rows)), ("lists", lists_of(rows))):
            kept = made[:HELD_OUT] if start else made
            text = "".join(json.dumps(row) + "\n" for row in kept)
            (folder / f"{start}{name}.jsonl").write_text(text, encoding="utf-8")


def run(example: Example, folder: Path, flags: Sequence[str] = ()) -> Result:
    """Train one objective unless that is done, and read its metrics.

    Raises:
        SystemExit: training failed or was interrupted.
    """
    out = folder / example.name
    objective = example.objective
    words = ["--objective", objective if isinstance(objective, str) else json.dumps(objective)]
    words += ["--dataset", f"{folder / example.data}.jsonl", "--output_dir", str(out)]
    words += ["--eval_dataset", str(folder / f"eval-{example.data}.jsonl")]
    status = fastpo(["train", RECIPE, *words, *example.flags, *flags])
    if status:
        raise SystemExit(status)
    records = read_metrics(out)
    before, *_, after = (r for r in records if "eval_loss" in r)
    steps = [r for r in records if "loss" in r]
    return Result(example, steps, before, after)


def draw(results: Sequence[Result]) -> plt.Figure:
    """Rewards of chosen and rejected replies over the steps, a panel a run."""
    columns = 5
    rows = math.ceil(len(results) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.3 * rows), squeeze=False)
    for panel, result in itertools.zip_longest(axes.flat, results):
        if result is None:
            panel.set_visible(False)
            continue
        steps = [record["step"] for record in result.steps]
        for side, colour in (("chosen", "#0072B2"), ("rejected", "#D55E00")):
            rewards = [record[f"rewards/{side}"] for record in result.steps]
            panel.plot(steps, rewards, color=colour, label=side)
        panel.set_title(result.example.name, size=9, loc="left")
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def page(results: Sequence[Result]) -> str:
    """docs/real-runs.md."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} CPU cores"

    def change(result: Result, name: str) -> str:
        return f"{result.before[name]:.3f} -> {result.after[name]:.3f}"

    rows = [
        f"| {r.example.family} | `{r.example.name}` | {change(r, 'eval_loss')} | "
        f"{change(r, 'eval_rewards/margins')} | {change(r, 'eval_rewards/accuracies')} | "
        f"{r.steps[0]['loss']:.3f} -> {r.steps[-1]['loss']:.3f} | {r.verdict} |"
        for r in results
    ]
    steps = results[0].steps[-1]["step"]
    made_with = f"torch {torch.__version__} and transformers {transformers.__version__}"
    return f"""\
# Real runs

One objective of every family on SmolLM2-135M-Instruct and the pairs of `make demo`: LoRA, {steps}
steps of 4 groups, no tuning per objective. `make families` repeats them and writes this page, which
was made on {where} with {made_with}.

![Rewards of chosen and rejected replies](figures/{FIGURE.name})

Held-out numbers are means over the same {HELD_OUT} groups before the first step and after the last;
the losses of single steps are those of different batches. A run moves the right way if every logged
number is finite, the held-out loss falls and the held-out margin of rewards rises. The reference is
the model itself: with one all rewards start at 0, and so does the accuracy, where a tie is wrong.

{TABLE_HEAD}
{chr(10).join(rows)}

Margins are in each objective's own unit of reward and do not compare between rows. `rebel` and
`step_dapo` get grades of +-1/2, `rebel` with `eta: 10`, which asks for a margin of 10 nats: at the
default of 1 a single step overshoots its target of 1 nat, and the held-out loss rose from 1.000 to
1.791 while the margin rose too. `listnet` gets all replies to a prompt with grade 1 or 0, `mdpo`
the next person's prompt as the context that does not fit; `beta_dpo` and `kto` take their
statistics of each batch. `listnet` stands for the lists because LiPO's loss is no measure of
progress: its weights follow the current ranking. Of the policy gradients `step_dapo` is one that a
data set feeds: GRPO and its relatives compare with the log-probs of the policy that drew the
samples, from your own loop. Diffusion objectives are functions of denoising errors and have no run
of a language model.
"""


def main() -> None:
    """Model, data, runs, page; status 1 if a run did not move the right way."""
    os.chdir(ROOT)  # the recipe's paths start there
    smollm2.convert()
    write_data(OUT)
    results = []
    for number, example in enumerate(EXAMPLES, 1):
        print(f"\n== {number} of {len(EXAMPLES)}: {example.name} ({example.family})", flush=True)
        results.append(run(example, OUT))
    draw(results).savefig(FIGURE, dpi=150)
    _, mark, others = PAGE.read_text(encoding="utf-8").partition("\n<!-- long -->")
    PAGE.write_text(page(results) + mark + others, encoding="utf-8")  # examples/long_context.py's
    for result in results:
        print(f"{result.example.name:<12}{result.verdict}")
    print(f"\n{PAGE}")
    if any(result.verdict != "yes" for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
