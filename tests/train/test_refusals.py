"""What cannot be trained on is told before the first step: no step, or tokens without a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpo.data.options import DataOptions
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream
from fastpo.train.batches import of_workers
from tests.train import tiny


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"per_device_train_batch_size": 64, "dataloader_drop_last": True},
            r"dataloader_drop_last leaves no batch of 64 in 16 groups: lower",
        ),
        ({"train_dataset": None}, "nothing to train on"),
    ],
)
def test_no_step_is_an_error_before_training(trainer: Any, options: dict, told: str) -> None:
    made = trainer(**options)
    before = sorted(Path(made.args.output_dir).rglob("*"))
    with pytest.raises(ValueError, match=told):
        made.train()
    assert sorted(Path(made.args.output_dir).rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"parallelism_config": ""}, "parallelism_config='': give accelerate's"),
        ({"torch_compile_mode": "3"}, "torch_compile_mode='3' must be one of default, "),
        ({"torch_compile_backend": "inducter"}, "did you mean 'inductor'"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0 must be above 0"),
    ],
)
def test_no_step_is_asked_for(config: Any, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config(**options)


def test_every_process_needs_a_batch(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(per_device_train_batch_size=4, dataloader_drop_last=True)
    made.refuse_no_step()
    monkeypatch.setattr(type(made.args), "world_size", 5)
    with pytest.raises(ValueError, match=r"no batch of 20 \(5 processes\) in 16 groups"):
        made.refuse_no_step()


class Empty(torch.utils.data.IterableDataset):
    def head(self, count: int) -> list:
        return []

    def __iter__(self) -> Any:
        return iter(())


def test_a_stream_that_ends_before_a_step(trainer: Any) -> None:
    made = trainer(train_dataset=tiny.pairs(4), max_steps=2)
    made.train_dataset = Empty()
    with pytest.raises(ValueError, match="gave no batch, so no step was taken"):
        made.train()


def test_a_run_whose_steps_are_done_is_no_error(trainer: Any) -> None:
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(**options)
    whole.train()
    again = trainer(**options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


# Tokens


def larger(**options: Any) -> Any:
    """The tiny tokenizer with one token more than the model has, for `<new>` and padding."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"], "pad_token": "<pad2>"})
    assert len(tokenizer) == tiny.VOCAB + 2
    return tokenizer


def made_with(tokenizer: Any, config: Any, rows: Any, **data: Any) -> Any:
    from fastpo.train.trainer import PreferenceTrainer

    return PreferenceTrainer(
        tiny.model(), config(**data), train_dataset=rows, processing_class=tokenizer
    )


def test_a_token_beyond_the_embedding(config: Any) -> None:
    rows = tiny.rows(6)
    rows[3]["chosen"] += " <new> w7"
    tokenizer = larger()
    new = tokenizer.convert_tokens_to_ids("<new>")
    with pytest.raises(ValueError, match=rf"row 3: token {new} of the rows is beyond the model's"):
        made_with(tokenizer, config, rows)


def test_a_larger_vocabulary_does_no_harm(config: Any) -> None:
    made = made_with(larger(), config, tiny.rows(6), self_check=True, num_samples=1)
    made.train()
    assert made.state.global_step == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_checked_as_it_comes(config: Any, workers: int) -> None:
    rows = tiny.rows(20)
    rows[15]["rejected"] += " <new>"
    made = made_with(
        larger(),
        config,
        load_rows(rows, streaming=True),
        max_steps=9,
        dataloader_num_workers=workers,
    )
    with pytest.raises(ValueError, match=r"^.*row 15: token \d+ of the rows is beyond.*\Z"):
        made.train()


def test_a_bad_row_of_a_loader_process_is_told_in_a_line(config: Any) -> None:
    rows = [*tiny.rows(70), {"prompt": "w4", "chosen": "", "rejected": "w5"}]
    stream = GroupStream(rows, tiny.tokenizer(), DataOptions(), source="d.jsonl")
    made = made_with(tiny.tokenizer(), config, stream, max_steps=9, dataloader_num_workers=1)
    with pytest.raises(ValueError, match=r"^d.jsonl, row 70, field 'chosen': empty response.*\Z"):
        made.train()


def test_a_fault_of_ours_in_a_loader_process_stays_one() -> None:
    fault = "Caught KeyError in DataLoader worker process 0.\nOriginal Traceback\nKeyError: 'x'"
    with pytest.raises(RuntimeError, match="Caught KeyError"), of_workers():
        raise RuntimeError(fault)
