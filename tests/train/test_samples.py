"""What the model writes to the first prompts, before training and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.train import tiny


def test_samples(trainer: Any) -> None:
    made = trainer(num_samples=2, sample_tokens=5, eval_dataset=tiny.pairs(3, seed=1))
    made.train()
    lines = (Path(made.args.output_dir) / "samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["when"], r["step"], r["row"]) for r in records] == [
        ("before", 0, 0),
        ("before", 0, 1),
        ("after", 3, 0),
        ("after", 3, 1),
    ]
    group = tiny.pairs(3, seed=1)[0]
    start = torch.from_numpy(group.prompt_ids).long()[None]
    expected = tiny.model().generate(start, max_new_tokens=5, do_sample=False)
    text = tiny.tokenizer().decode(expected[0, start.shape[1] :], skip_special_tokens=True)
    assert records[0]["response"] == text
    assert made.model.config.use_cache is False


def test_samples_do_not_change_the_run(trainer: Any) -> None:
    runs = [trainer(num_samples=n, sample_tokens=5) for n in (0, 2)]
    for made in runs:
        made.train()
    for a, b in zip(*(made.model.parameters() for made in runs), strict=True):
        assert torch.equal(a, b)
