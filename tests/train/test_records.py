"""What a run leaves behind: metrics, samples, the bar, its configuration, the self-check."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastpo.train.trainer
from fastpo.data.packing import counts_of
from fastpo.model.self_check import SelfCheck
from fastpo.train.config import PreferenceConfig
from fastpo.train.metrics import METRICS_FILE, MetricWindow, ProgressCallback, read_metrics
from tests.train import tiny

TRL_NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}


def test_metrics_file(trainer: Any) -> None:
    made = trainer(eval_dataset=tiny.pairs(3), eval_strategy="steps", eval_steps=2)
    made.train()
    records = read_metrics(made.args.output_dir)
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == [1, 2, 3]
    for record in training:
        assert record.keys() >= TRL_NAMES | {"tokens_per_second", "peak_memory_gib", "sharing"}
        assert record["tokens_per_second"] > 0
        assert record["peak_memory_gib"] > 0.05
    # Distinct tokens: every prompt once.
    order = list(made._get_train_sampler())
    seen = [made.train_dataset[i] for i in order[:12]]
    assert training[-1]["num_tokens"] == counts_of(seen)["tokens"] == sum(map(len, seen))
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 3]
    assert "train_runtime" in records[-1]
    saved = yaml.safe_load((Path(made.args.output_dir) / "preference_config.yaml").read_text())
    assert PreferenceConfig.from_dict(saved).to_dict() == made.args.to_dict()


def test_window_is_weighted_by_observations(trainer: Any) -> None:
    """Two steps of 4 and 1 groups in one record: the mean over five groups, not of two means."""
    options: dict[str, Any] = {
        "train_dataset": tiny.pairs(5),
        "ref_model": tiny.model(seed=1),
        "num_train_epochs": 1,
        "max_steps": -1,
        "learning_rate": 0.0,
    }
    every = trainer(**options)
    every.train()
    each = [r for r in read_metrics(every.args.output_dir) if "loss" in r]
    whole = trainer(logging_steps=2, **options)
    whole.train()
    record = read_metrics(whole.args.output_dir)[0]
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        expected = (4 * each[0][name] + each[1][name]) / 5
        assert record[name] == pytest.approx(expected, rel=1e-6)  # float32 sums in another order


def test_window_keeps_nan_but_not_absence() -> None:
    window = MetricWindow()
    window.add({"a": torch.tensor(float("nan")), "b": 1.0}, {"a": 0, "b": 1})
    window.add({"a": torch.tensor(3.0), "b": float("nan")}, {"a": torch.tensor(2), "b": 1})
    means = window.means()
    assert means["a"] == 3.0
    assert means["b"] != means["b"]
    assert window.means() == {}


def test_resumed_file_has_no_step_twice(trainer: Any) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    made = trainer(**options)
    made.train()
    path = Path(made.args.output_dir) / METRICS_FILE
    before = read_metrics(path.parent)
    with path.open("a") as file:
        file.write('{"step": 9, "lo')  # torn by a kill
    trainer(**options).train(resume_from_checkpoint=str(path.parent / "checkpoint-2"))
    after = read_metrics(path.parent)
    assert [r["step"] for r in after] == [r["step"] for r in before] == [1, 2, 3, 4, 4]
    assert [r.get("loss") for r in after] == [r.get("loss") for r in before]
    for line in path.read_text().splitlines():
        json.loads(line)
    trainer(max_steps=1).train()  # a new run in the same folder
    assert [r["step"] for r in read_metrics(path.parent)] == [1, 1]


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


def test_progress_bar(trainer: Any, capfd: pytest.CaptureFixture) -> None:
    made = trainer(disable_tqdm=False)
    assert [c for c in made.callback_handler.callbacks if isinstance(c, ProgressCallback)]
    made.train()
    text = capfd.readouterr().err
    assert "3/3" in text
    assert "loss=0.6" in text
    assert "margin=" in text
    assert "acc=" in text


def failing(reason: str) -> Any:
    return lambda *_, **__: SelfCheck(False, reason, 1.0, 0.1, 0.0, 0.1)


def test_self_check_falls_back_to_padded_rows(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastpo.train.trainer"):
        made = trainer(self_check=True, max_steps=1)
        made.train()
    assert made.data_collator.share_prompt
    assert "self-check: shared and padded log-probs differ by" in caplog.text
    monkeypatch.setattr(fastpo.train.trainer, "self_check", failing("they differ by 1"))
    made = trainer(self_check=True, max_steps=1)
    made.train()
    assert not made.data_collator.share_prompt
    with pytest.raises(ValueError, match=r"share_prompt=true.*they differ by 1"):
        trainer(self_check=True, share_prompt=True).train()


def test_sharing_says_how_batches_were_packed(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logged(**options: Any) -> tuple[set[float], str]:
        made = trainer(**options)
        made.train()
        found = {r["sharing"] for r in made.state.log_history if "sharing" in r}
        return found, made.sharing_reason

    assert min(logged()[0]) > 1.1
    assert logged(share_prompt=False) == ({1.0}, "share_prompt is false")
    monkeypatch.setattr(fastpo.train.trainer, "self_check", failing("they differ by 1"))
    assert logged(self_check=True) == ({1.0}, "they differ by 1")


def test_check_is_once_and_can_be_asked_for_early(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(self_check=True, max_steps=1)
    made.check()
    monkeypatch.setattr(fastpo.train.trainer, "self_check", None)
    made.train()


def test_model_card_is_ours(trainer: Any) -> None:
    made = trainer(objective="simpo")
    made.train()
    made.create_model_card(model_name="My model", tags=["ignored"])
    card = (Path(made.args.output_dir) / "README.md").read_text()
    assert "# My model" in card
    assert "## Metrics after 3 steps" in card
    assert "rewards/margins" in card
    assert "generated from Trainer" not in card


def test_self_check_stops_at_another_head(trainer: Any) -> None:
    """A head that rescales its input behind our back."""
    made = trainer(self_check=True, reference="copy")
    made.model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    with pytest.raises(RuntimeError, match="fused head differs from the model's own logits"):
        made.train()


def test_model_that_cannot_share(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(
        fastpo.train.trainer, "can_share_prompt", lambda model: (False, "has recurrent state")
    )
    made = trainer(max_steps=1)
    assert not made.data_collator.share_prompt
    assert "has recurrent state" in caplog.text
    made.train()
    with pytest.raises(ValueError, match=r"share_prompt=true.*recurrent state.*share_prompt=auto"):
        trainer(share_prompt="true")
