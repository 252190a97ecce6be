"""The script that runs one objective of every family, on a model of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import families
import json_person as task
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastpo.data.formats import read_row
from fastpo.model.random_init import byte_tokenizer
from fastpo.objectives import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_every_family_has_a_run_but_diffusion() -> None:
    covered = [example.family for example in families.EXAMPLES]
    assert covered == [name for name in SECTIONS if name != "Diffusion models"]
    for example in families.EXAMPLES:
        if isinstance(example.objective, str):
            assert example.objective in SECTIONS[example.family]


def test_rows_are_what_the_objectives_ask_for() -> None:
    rows = task.read_rows(task.PAIRS)
    pairs, lists = families.pairs_of(rows), families.lists_of(rows)
    assert len(pairs) == len(rows)
    for row in pairs:
        assert row["context_prompt"] != row["prompt"]
    assert sum(len(row["responses"]) for row in lists) <= 2 * len(rows)
    assert max(len(row["responses"]) for row in lists) > 2
    for row in lists:
        assert max(row["scores"]) == 1 > min(row["scores"]) == 0
        assert len(read_row(row).responses) == len(row["responses"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    tokenizer = byte_tokenizer(config)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[families.Result]:
    """Four groups, trained on whole and measured: nothing but a wrong gradient goes wrong there."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("families")
    families.write_data(folder)
    for name in ("pairs", "lists"):
        some = "".join((folder / f"{name}.jsonl").read_text().splitlines(keepends=True)[:4])
        for path in (folder / f"{name}.jsonl", folder / f"eval-{name}.jsonl"):
            path.write_text(some)
    flags = ["--model", str(model), "--learning_rate", "1e-3", "--use_cpu", "true"]
    flags += ["--disable_tqdm", "true", "--max_steps", "3", "--eval_steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipe's path starts there
        return [families.run(example, folder, flags) for example in families.EXAMPLES]


def test_every_run_moves_the_right_way(results: list[families.Result]) -> None:
    assert {r.example.name: r.verdict for r in results} == {
        example.name: "yes" for example in families.EXAMPLES
    }
    assert all(len(r.steps) == 3 for r in results)


def test_verdicts_name_what_is_wrong(results: list[families.Result]) -> None:
    result = results[0]
    assert replace(result, steps=[{"loss": None}]).verdict == "not finite"
    swapped = replace(result, before=result.after, after=result.before)
    assert swapped.verdict == "loss rose"
    worse = {**result.after, "eval_rewards/margins": -1.0}
    assert replace(result, after=worse).verdict == "margin fell"


def test_page_and_figure_show_every_run(results: list[families.Result]) -> None:
    text = families.page(results)
    for result in results:
        assert f"`{result.example.name}` | {result.before['eval_loss']:.3f} -> " in text
    drawn = [axes for axes in families.draw(results).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in drawn] == [r.example.name for r in results]
