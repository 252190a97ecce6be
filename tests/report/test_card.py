"""The model card of a run."""

from __future__ import annotations

from pathlib import Path

from fastpo.report.card import write_model_card
from tests.report.runs import step_line, write_run


def test_a_card_says_what_the_run_was(tmp_path: Path) -> None:
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


def test_a_card_of_nothing_says_so(tmp_path: Path) -> None:
    card = write_model_card(write_run(tmp_path / "r", [])).read_text()
    body = card.split("---\n")[2].partition("<!--")[0]
    assert body == (
        "\n# r\n\nTrained on preference data with `dpo`.\n\n## Objective\n\n## Data\n\n"
        "Not recorded.\n"
    )
