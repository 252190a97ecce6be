"""What scoring is compared with: transformers on one sequence at a time, and whole logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = 3
DTYPES = (torch.float32, torch.float64)


class Sequences(NamedTuple):
    """States that predict the response's tokens, and their log-probs."""

    hidden: Tensor  # [R, D]
    logps: Tensor  # [R]


def plainly(folder: Path, prompt: str, ids: list[int], dtype: torch.dtype) -> Sequences:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    start = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    with torch.no_grad():
        out = model(torch.tensor([start + ids]), output_hidden_states=True)
    at = slice(len(start) - 1, -1)
    logps = out.logits[0, at].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    return Sequences(out.hidden_states[-1][0, at], logps)


def sources(tiny: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tiny / "prefs.jsonl").read_text().splitlines()][:ROWS]


def response_ids(tiny: Path, text: str, *, end: bool = True) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    return tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * end


@torch.no_grad()
def logits_of(model: Any, folder: Path, prompt: str, response: str, dtype: torch.dtype) -> Any:
    """(logits [R, V] that predict the response's tokens, the tokens [R])."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id])
    start = len(ids) - len(response) - 1  # a byte a token
    logits = model.to(dtype)(ids[None]).logits[0].to(dtype)
    return logits[start - 1 : -1], ids[start:]


def by_hand(rule: str, model: Path, other: Path, row: dict, dtype: torch.dtype) -> list:
    """[chosen, rejected] numbers, from whole logits."""
    numbers = []
    for name in ("chosen", "rejected"):
        sides = []
        for folder, column in ((model, "better_prompt"), (other, "worse_prompt")):
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            prompt = row.get(column, row["prompt"])
            sides.append(logits_of(loaded, folder, prompt, row[name], dtype))
        (plus, ids), (minus, _) = sides
        at = ids[:, None]
        if rule == "critical":
            c = (2 * plus - minus).softmax(-1).gather(1, at)[:, 0]
            numbers.append(c if name == "chosen" else 1 - c)
            continue
        logps = [z.log_softmax(-1).gather(1, at)[:, 0] for z in (plus, minus)]
        if rule == "treg":
            numbers.append(torch.sigmoid(logps[0] - logps[1]) - 0.5)
        else:
            sign = 1 if name == "chosen" else -1
            numbers.append(torch.exp(sign * (logps[0] - logps[1]).clamp(-1.5, 1.5)))
    return numbers
