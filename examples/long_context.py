"""`make long`: LOGO and LongPO on a real model, and what it finds in documents before and after.

    python examples/long_context.py

Documents are pages of Python's language reference, which comes with every Python, six to a
document. Two of a document's pages hold a code each ("The code of Lima is 4821."), and so does a
third one that nobody asks about. The question asks for two codes; a wrong answer has one of them
right (as after half of the pages) or none. LongPO's reference reads the two right pages alone.

Measured on documents about cities that training does not see: the share of codes in the model's
greedy answers, and of documents with both. The table goes to docs/real-runs.md. What is finished is
on disk, and training saves checkpoints: killed at any moment, the same command goes on.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import demo
import json_person
import smollm2
import torch
import transformers
from transformers.utils import logging as transformers_logging

from fastpo.cli import main as fastpo
from fastpo.data.logo_columns import joined_chunks
from fastpo.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "examples/long_context.yaml"
OUT = Path("runs/long_context")
PAGE = Path("docs/real-runs.md")
PAGES = 6  # of a document
PAGE_CHARACTERS = 600  # 150 tokens of SmolLM2's
DOCUMENTS = {"train": 16, "eval": 8}
MAX_NEW_TOKENS = 32  # an answer takes 22
LONGPO = {
    "objective": json.dumps({"sft": 1.0, "dpo": 0.01}),
    "sft.reduction": "sequence_mean",
    "dpo.beta": "0.01",
    "reference_prompt": "short_prompt",
    "reference": "store",
    "position_synthesis": "null",
}
"""The paper's, which examples/long_context_longpo.yaml has too."""
TABLE_HEAD = """\
| recipe | real tokens | positions | held-out loss | held-out margin | held-out accuracy \
| codes found | documents with both | minutes |
|---|---|---|---|---|---|---|---|---|"""
RUNS: dict[str, dict[str, str]] = {"logo": {}, "longpo": LONGPO}


def pages() -> dict[str, list[str]]:
    """Pages of the reference for training and for evaluation; some paragraphs stand in several."""
    found = []
    for _, text in sorted(topics.items()):
        page = ""
        for paragraph in re.split(r"\n\s*\n", text):
            page = f"{page}\n\n{paragraph.strip()}".strip()
            if len(page) >= PAGE_CHARACTERS:
                found.append(page[:PAGE_CHARACTERS].rsplit(maxsplit=1)[0])
                page = ""
    random.Random(0).shuffle(found)
    held_out = PAGES * DOCUMENTS["eval"]
    return {"eval": found[:held_out], "train": found[held_out:]}


def answer(cities: Sequence[str], codes: Sequence[int]) -> str:
    """What the model is to say."""
    return f"The code of {cities[0]} is {codes[0]} and the code of {cities[1]} is {codes[1]}."


def documents(side: str, count: int) -> list[dict[str, Any]]:
    """Rows for LOGO and LongPO alike, the same every time."""
    rng = random.Random(f"{side} 0")
    texts, names = pages()[side], json_person.CITIES[side].split()
    rows = []
    for number in range(count):
        chunks = [texts[(PAGES * number + i) % len(texts)] for i in range(PAGES)]
        cities, codes = rng.sample(names, 3), rng.sample(range(1000, 10000), 5)
        places = rng.sample(range(PAGES), 3)
        for city, code, place in zip(cities, codes, places, strict=False):
            chunks[place] += f"\n\nThe code of {city} is {code}."
        right, other, invented = codes[:2], codes[2], codes[3:]
        half = [right[0], other] if number % 2 else [other, right[1]]
        question = (
            f"What are the codes of {cities[0]} and {cities[1]}? Answer in the form: "
            f"The code of {cities[0]} is ... and the code of {cities[1]} is ..."
        )
        text, spans = joined_chunks(chunks, question)
        short, _ = joined_chunks([chunks[place] for place in sorted(places[:2])], question)

        def said(role: str, content: str) -> list[dict[str, str]]:
            return [{"role": role, "content": content}]

        answers = [answer(cities, each) for each in (right, half, invented)]
        rows.append(
            {
                "prompt": said("user", text),
                "short_prompt": said("user", short),
                "chunk_spans": spans,
                "responses": [said("assistant", each) for each in answers],
                "ranks": [0, 1, 1],
                "right_codes": right,
            }
        )
    return rows


def pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The right answer against the half right one, for LongPO."""
    return [
        {
            **{name: row[name] for name in ("prompt", "short_prompt")},
            "chosen": row["responses"][0],
            "rejected": row["responses"][1],
        }
        for row in rows
    ]


def write_data(folder: Path, counts: dict[str, int] = DOCUMENTS) -> None:
    """The four files that the runs read."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, count in counts.items():
        rows = documents(side, count)
        for name, made in ((side, rows), (f"{side}-pairs", pairs(rows))):
            text = "".join(json.dumps(row) + "\n" for row in made)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Found:
    """What greedy answers hold."""

    codes: float  # share of the codes asked for
    both: float  # share of documents with both
    answers: list[str]


def found_in(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> Found:
    """The codes that answers hold of those that rows ask for."""
    hits = [
        [str(code) in answer for code in row["right_codes"]]
        for answer, row in zip(answers, rows, strict=True)
    ]
    return Found(
        codes=sum(map(sum, hits)) / sum(map(len, hits)),
        both=sum(map(all, hits)) / len(hits),
        answers=list(answers),
    )


def measure(adapter: Path | None, count: int = DOCUMENTS["eval"]) -> dict[str, Any]:
    """Greedy answers of the model to the held-out documents, with an adapter or as it came."""
    model, tokenizer = smollm2.load(adapter=adapter)
    rows = documents("eval", count)
    answers = [
        smollm2.sample(
            model, tokenizer, [row["prompt"]], max_new_tokens=MAX_NEW_TOKENS, temperature=0.0
        )[0].text
        for row in rows
    ]
    return vars(found_in(answers, rows))


def train(name: str, folder: Path = OUT, flags: Sequence[str] = ()) -> dict[str, Any]:
    """One run: losses of the first and last fifth of steps, and the held-out groups' metrics.

    Raises:
        SystemExit: training failed or was interrupted.
    """
    rows = "" if name == "logo" else "-pairs"
    given = {
        **RUNS[name],
        "dataset": f"{folder}/train{rows}.jsonl",
        "eval_dataset": f"{folder}/eval{rows}.jsonl",
        "output_dir": f"{folder}/{name}",
    }
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    status = fastpo(["train", RECIPE, *words, *flags])
    if status:
        raise SystemExit(status)
    records = read_metrics(folder / name)
    steps = [r for r in records if "loss" in r]
    before, *_, after = (r for r in records if "eval_loss" in r)
    keys = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    facts = json.loads((folder / name / "run.json").read_text(encoding="utf-8"))
    return {
        "steps": len(steps),
        "first": steps[0]["loss"],
        "last": steps[-1]["loss"],
        "before": {key: before[key] for key in keys},
        "after": {key: after[key] for key in keys},
        "data": facts["data"],
    }


def section(record: demo.Record) -> str:
    """The part of docs/real-runs.md."""
    phases = {name: phase["result"] for name, phase in record.phases.items()}
    seconds = {name: phase["seconds"] for name, phase in record.phases.items()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f"{torch.get_num_threads()} of {cores} CPU cores"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    rows = []
    for name, title in (("logo", "LOGO"), ("longpo", "LongPO")):
        run, found = phases[name], phases[f"after {name}"]

        def change(key: str, run: dict[str, Any] = run) -> str:
            return f"{run['before'][key]:.3f} -> {run['after'][key]:.3f}"

        span = run["data"].get("synthetic_context", run["data"]["context"])
        rows.append(
            f"| {title} | {run['data']['context']:,} | {span:,} | {change('eval_loss')} | "
            f"{change('eval_rewards/margins')} | {change('eval_rewards/accuracies')} | "
            f"{phases['before']['codes']:.2f} -> {found['codes']:.2f} | "
            f"{phases['before']['both']:.2f} -> {found['both']:.2f} | {seconds[name] / 60:.0f} |"
        )
    made_with = f"torch {torch.__version__} and transformers {transformers.__version__}"
    return f"""\
<!-- long -->
## Long context

LOGO and LongPO on SmolLM2-135M-Instruct: LoRA, {phases["logo"]["steps"]} steps of one document of
six pages of Python's language reference, in which two of three codes are to be found. `make long`
repeats both and writes this section, which was made on {where} with
{made_with}; minutes are those of training there.

{TABLE_HEAD}
{chr(10).join(rows)}

Tokens and positions are those of the longest prompt with its longest answer: LOGO's positions are
synthetic, nothing of that length was computed. Loss, margin and accuracy are of the
{DOCUMENTS["eval"]} held-out documents as the recipe reads them, codes found those in greedy answers
to the same documents at their real positions; one code is 1/{2 * DOCUMENTS["eval"]}. No city of
theirs occurs in training; the pages around are filler, and the reference itself repeats some.
LongPO's margin is 0.01 times the difference of log-ratios to a reference that reads the two right
pages alone: below 0, the model still tells the answers apart less well in the document than it did
there, and its accuracy is the share of documents with a margin above 0.
<!-- /long -->
"""


def write_section(path: Path, text: str) -> None:
    """Replace the section of the page, or append it."""
    page = path.read_text(encoding="utf-8")
    page = re.sub(r"\n*<!-- long -->.*<!-- /long -->\n", "", page, flags=re.S)
    path.write_text(f"{page.rstrip()}\n\n{text}", encoding="utf-8")


def main() -> None:
    """Model, data, before, both runs, after, section."""
    os.chdir(ROOT)  # the recipe's paths start there
    transformers_logging.disable_progress_bar()
    smollm2.convert()
    write_data(OUT)
    record = demo.Record(OUT / "record.json")
    record.run("before", "The untrained model", lambda: measure(None))
    for name in RUNS:
        record.run(name, f"fastpo train {RECIPE}: {name}", lambda name=name: train(name))
        record.run(f"after {name}", f"After {name}", lambda name=name: measure(OUT / name))
    write_section(PAGE, section(record))
    print(f"\n{PAGE}")


if __name__ == "__main__":
    main()
