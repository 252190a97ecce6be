"""Make examples/data/json_person_*.jsonl: the model's own replies, judged by the verifier.

    python examples/make_json_pairs.py          # about 12 minutes on 2 CPU cores

The pairs are committed, so `make demo` does not need this; run it to see where they come from.
Every prompt is sampled six times; a valid reply and an invalid one make a pair, at most two a
prompt, no reply used twice. Replies cut off at the token limit enter no pair: their text is not
what the model would have said.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import json_person as task
import smollm2
import torch
from tqdm import tqdm

SAMPLES = 6
PAIRS_A_PROMPT = 2


def pairs_of(
    person: task.Person, messages: list[dict[str, str]], replies: list[smollm2.Reply]
) -> list[dict[str, Any]]:
    """The preference rows one prompt's replies give: the i-th valid one over the i-th invalid."""
    texts = dict.fromkeys(reply.text for reply in replies if reply.finished)  # distinct, in order
    faults = {text: task.fault(text, person) for text in texts}
    chosen = [text for text in texts if faults[text] is None]
    rejected = [text for text in texts if faults[text] is not None and text.strip()]
    return [
        {
            "prompt": messages,
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
            **asdict(person),
            "fault": faults[bad],
        }
        for good, bad in zip(chosen[:PAIRS_A_PROMPT], rejected, strict=False)
    ]


def main() -> None:
    """Sample, judge, write."""
    parser = argparse.ArgumentParser(description="Sample, judge and pair replies.")
    parser.add_argument("--prompts", type=int, default=288, help="people in the training pairs")
    parser.add_argument("--eval-prompts", type=int, default=task.EVAL_PEOPLE)
    parser.add_argument("--batch", type=int, default=96, help="replies sampled at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=task.DATA)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model, tokenizer = smollm2.load(smollm2.convert())
    args.out.mkdir(parents=True, exist_ok=True)
    step = max(1, args.batch // SAMPLES)
    for split, count, path in (
        ("train", args.prompts, task.PAIRS),
        ("eval", args.eval_prompts, task.EVAL_PAIRS),
    ):
        people = task.people(split, count, seed=args.seed)
        prompts = [task.prompt(person, number) for number, person in enumerate(people)]
        rows: list[dict[str, Any]] = []
        valid = 0
        for start in tqdm(range(0, count, step), desc=f"{split} replies", unit="batch"):
            some = prompts[start : start + step]
            replies = smollm2.sample(
                model,
                tokenizer,
                [messages for messages in some for _ in range(SAMPLES)],
                max_new_tokens=task.MAX_NEW_TOKENS,
                temperature=task.TEMPERATURE,
            )
            for offset, messages in enumerate(some):
                person = people[start + offset]
                own = replies[offset * SAMPLES : (offset + 1) * SAMPLES]
                valid += sum(task.fault(r.text, person, finished=r.finished) is None for r in own)
                rows += pairs_of(person, messages, own)
        with (args.out / path.name).open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
        print(
            f"{split}: {valid} of {count * SAMPLES} replies valid ({valid / count / SAMPLES:.2f}), "
            f"{len(rows)} pairs -> {args.out / path.name}"
        )


if __name__ == "__main__":
    main()
