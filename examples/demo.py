"""`make demo`: train a real model on real preferences and measure what it learned.

    python examples/demo.py

Finds SmolLM2-135M-Instruct, asks it for JSON about people it has not seen, trains it with
`fastpo train examples/json_person.yaml` on its own judged replies, asks again, and prints a table.
Every finished phase is on disk and training saves checkpoints: killed at any moment, the same
command goes on. Uses a GPU if there is one.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import json_person as task
import numpy as np
import smollm2
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from fastpo import read_head
from fastpo.cli import main as fastpo
from fastpo.data.groups import Group, Response
from fastpo.data.packing import collate
from fastpo.head.functional import linear_stats
from fastpo.model.hidden import attach, target_hidden
from fastpo.run.record import Run

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "examples/json_person.yaml"
OUT = Path("runs/json_person")
RECORD = OUT / "demo.json"
ADAPTER = OUT / "adapter_model.safetensors"


@dataclass
class Measured:
    """What one evaluation found on the unseen people."""

    greedy: float  # share of valid replies
    sampled: float
    faults: dict[str, int]  # of the greedy replies, by kind
    replies: list[str]  # greedy
    kl: float  # to the reference, nats a sampled reply


def measure(adapter: Path | None) -> Measured:
    """Exact-valid rates and KL of the model, with an adapter or as it came."""
    model, tokenizer = smollm2.load(adapter=adapter)
    people = task.people("eval", task.EVAL_PEOPLE)
    prompts = [task.prompt(person, number) for number, person in enumerate(people)]
    torch.manual_seed(0)
    greedy, sampled = (
        smollm2.sample(
            model, tokenizer, prompts, max_new_tokens=task.MAX_NEW_TOKENS, temperature=temperature
        )
        for temperature in (0.0, task.TEMPERATURE)
    )
    faults, sampled_faults = (
        [
            task.fault(reply.text, person, finished=reply.finished)
            for reply, person in zip(replies, people, strict=True)
        ]
        for replies in (greedy, sampled)
    )
    kl = 0.0
    if adapter is not None:
        ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        kl = kl_to(smollm2.load()[0], model, ids, [reply.tokens for reply in sampled])
    return Measured(
        greedy=faults.count(None) / len(people),
        sampled=sampled_faults.count(None) / len(people),
        faults=dict(Counter(fault for fault in faults if fault)),
        replies=[reply.text for reply in greedy],
        kl=kl,
    )


@torch.inference_mode()
def kl_to(
    reference: PreTrainedModel,
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
) -> float:
    """KL(policy || reference) along replies of the policy, in nats a reply.

    The divergence of the two next-token distributions, exact over the vocabulary, summed over the
    tokens of a reply and averaged over the replies.
    """
    groups = [
        Group(
            np.asarray(prompt, np.int32),
            [Response(np.asarray(reply, np.int32), np.ones(len(reply), bool))],
            row=row,
        )
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]
    batch = collate(groups, share_prompt=False, pad_token_id=0).to(policy.device)
    stats = linear_stats(
        target_hidden(attach(policy), batch),
        read_head(policy).weight,
        batch.tokens.targets,
        stats=("kl_policy_ref",),
        ref_hidden=target_hidden(attach(reference), batch),
        ref_weight=read_head(reference).weight,
    )
    return stats["kl_policy_ref"].sum().item() / len(replies)


class Record:
    """Finished phases, their results and their seconds, kept on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phases: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.phases = json.loads(path.read_text(encoding="utf-8"))

    def run(self, name: str, what: str, work: Callable[[], Any]) -> Any:
        """The result of a phase, from disk if it was finished before."""
        if name not in self.phases:
            print(f"\n== {what}", flush=True)
            begin = time.monotonic()
            result = work()
            self.phases[name] = {"seconds": time.monotonic() - begin, "result": result}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.phases, indent=1), encoding="utf-8")
            partial.rename(self.path)
        return self.phases[name]["result"]


def train() -> dict[str, float]:
    """The recipe, from its newest checkpoint; the last evaluation's metrics.

    Raises:
        SystemExit: training failed or was interrupted.
    """
    status = fastpo(["train", RECIPE])
    if status:
        raise SystemExit(status)
    run = Run.read(OUT)
    return {name: run.curve(name)[-1][1] for name in run.names() if name.startswith("eval_")}


def summary(record: Record) -> str:
    """The table, the time and what to make of it."""
    before, after = (Measured(**record.phases[name]["result"]) for name in ("before", "after"))
    metrics = record.phases["train"]["result"]
    count, pairs = task.EVAL_PEOPLE, len(task.read_rows(task.EVAL_PAIRS))
    rows = [
        ("", "before", "after", ""),
        ("valid replies, greedy", f"{before.greedy:.2f}", f"{after.greedy:.2f}", f"{count} people"),
        (
            f"valid replies, temperature {task.TEMPERATURE}",
            f"{before.sampled:.2f}",
            f"{after.sampled:.2f}",
            "none of them in the training data",
        ),
        ("reward accuracy", "-", f"{metrics['eval_rewards/accuracies']:.2f}", f"{pairs} pairs"),
        ("KL to the reference", f"{before.kl:.2f}", f"{after.kl:.2f}", "nats a sampled reply"),
    ]
    lines = [f"{a:<32}{b:>8}{c:>8}  {d}".rstrip() for a, b, c, d in rows]
    worst = ", ".join(
        f"{n} {kind}" for kind, n in sorted(before.faults.items(), key=lambda x: -x[1])
    )
    lines += ["", f"wrong before: {worst or 'nothing'}"]
    changed = [
        (old, new)
        for old, new in zip(before.replies, after.replies, strict=True)
        if old not in after.replies
    ]
    for old, new in changed[:1]:
        lines += ["", f"before: {' '.join(old.split())}", f"after:  {' '.join(new.split())}"]
    spent = {name: phase["seconds"] for name, phase in record.phases.items()}
    lines += [
        "",
        "seconds: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in spent.items())
        + f"; {sum(spent.values()):.0f} in all",
        f"report:  {(OUT / 'report.html').resolve()}",
        "",
        "This taught a format, not knowledge. The model could already write such JSON now and",
        f"then; {len(task.read_rows(task.PAIRS))} judged pairs made it do so reliably, for prompts "
        "of this form. It knows nothing",
        "new, and nothing here says how it answers any other question.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Model, before, train, after, table."""
    os.chdir(ROOT)  # the recipe's paths start there
    transformers_logging.disable_progress_bar()
    # peft reads an attribute that transformers is about to rename.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    record = Record(RECORD)
    if not ADAPTER.exists() or (RECORD.exists() and newer(ADAPTER, RECORD)):
        # Another run trained in this folder since, or its results were removed.
        for name in ("train", "after"):
            record.phases.pop(name, None)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if not smollm2.CACHE.exists():
        record.phases.pop("model", None)
    record.run("model", "SmolLM2-135M-Instruct to safetensors", lambda: smollm2.convert().name)
    record.run("before", f"The untrained model on {where}", lambda: asdict(measure(adapter=None)))
    record.run("train", f"fastpo train {RECIPE}", train)
    record.run("after", "The trained model", lambda: asdict(measure(adapter=OUT)))
    print(f"\n{summary(record)}")


def newer(a: Path, b: Path) -> bool:
    """Whether file `a` was written after file `b`."""
    return a.stat().st_mtime > b.stat().st_mtime


if __name__ == "__main__":
    main()
