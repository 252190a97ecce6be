"""Streams: endless passes, drawn from a buffer, resumed where they were left."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fastpo.data.options import DataOptions
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream
from fastpo.train.batches import Passes
from tests.train import tiny

BAD = {"prompt": "w4", "chosen": "", "rejected": "w5"}


def stream(count: int = 7, **options: Any) -> GroupStream:
    return GroupStream(tiny.rows(count), tiny.tokenizer(), DataOptions(**options))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("saved", [1, 3])
def test_resumed_stream_ends_with_the_same_bits(trainer: Any, saved: int, workers: int) -> None:
    """Seven rows, four a step: step 1 is saved in the first pass, step 3 in the second."""

    def make() -> Any:
        return trainer(
            train_dataset=load_rows(tiny.rows(7), streaming=True),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            max_steps=6,
            save_strategy="steps",
            save_steps=1,
        )

    whole, again = make(), make()
    whole.train()
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{saved}")
    assert again.state.global_step == 6
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    # Every step has its four groups; at a pass's end a step takes them from both passes.
    every = [r["loss"] for r in whole.state.log_history if "loss" in r]
    assert every[saved:] == [r["loss"] for r in again.state.log_history if "loss" in r][saved:]


def test_order_is_a_function_of_seed_and_pass(trainer: Any) -> None:
    def visited(**options: Any) -> list[int]:
        made = trainer(train_dataset=stream(8), max_steps=4, **options)
        seen: list[int] = []
        collate = made.data_collator
        made.data_collator = lambda groups: (seen.extend(g.row for g in groups), collate(groups))[1]
        made.train()
        return seen[:16]  # the loader is one batch ahead

    first = visited()
    assert first == visited() != visited(seed=4)
    assert sorted(first[:8]) == sorted(first[8:]) == list(range(8))
    assert first[:8] != first[8:]
    assert visited(train_sampling_strategy="sequential") == 2 * list(range(8))


@pytest.mark.parametrize("buffer", [0, 1, 3, 20])
def test_a_pass_has_every_group_once(buffer: int) -> None:
    groups = iter(Passes(stream(), seed=0, buffer=buffer))
    for _ in range(3):
        rows = [next(groups).row for _ in range(7)]
        assert sorted(rows) == list(range(7))
        # A group is drawn at the earliest when the buffer has reached it.
        assert all(row <= place + buffer for place, row in enumerate(rows))


def test_skipped_rows_are_kept_over_passes_and_samples(trainer: Any) -> None:
    rows = [*tiny.rows(3), BAD, *tiny.rows(4, seed=1), BAD, *tiny.rows(1, seed=2)]
    data = GroupStream(rows, tiny.tokenizer(), DataOptions(on_bad_row="skip"), source="s.jsonl")
    made = trainer(
        train_dataset=data,
        train_sampling_strategy="sequential",
        num_samples=2,
        sample_tokens=2,
        max_steps=2,  # a whole pass; the loader has begun the next one
    )
    made.train()
    assert [bad.row for bad in data.skipped] == [3, 8]
    assert data.num_rows == 10
    assert "2 of 10 rows were skipped" in data.skipped_report()


def test_head_is_read_once_and_is_the_first_pass() -> None:
    data = GroupStream(
        load_rows(tiny.rows(8), streaming=True).shuffle(seed=0, buffer_size=8), tiny.tokenizer()
    )
    first = data.head(3)
    data.set_epoch(1)
    assert data.head(2) == first[:2]
    again = [g.prompt_ids.tolist() for g in GroupStream(data.rows, tiny.tokenizer()).head(3)]
    assert again == [g.prompt_ids.tolist() for g in first]


def test_workers_that_would_lose_the_skipped_rows_are_refused(trainer: Any) -> None:
    options = {"train_dataset": stream(), "dataloader_num_workers": 1}
    trainer(**options)
    with pytest.raises(ValueError, match=r"dataloader_num_workers=1, on_bad_row='skip'.*=0 or"):
        trainer(**options, on_bad_row="skip")


def test_a_worker_without_rows_ends() -> None:
    loader = torch.utils.data.DataLoader(Passes(stream(1), 0), batch_size=None, num_workers=2)
    groups = iter(loader)
    assert [next(groups).row for _ in range(3)] == [0, 0, 0]


def test_rows_beyond_the_positions_are_warned_of_once(
    trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny.rows(20)
    for i in (12, 15):  # beyond those that are looked at before the first step
        rows[i]["prompt"] = " ".join(["w5"] * (300 + i))
    model = tiny.model()
    with caplog.at_level(logging.WARNING):
        made = trainer(model=model, train_dataset=load_rows(rows, streaming=True), max_steps=6)
        assert "was made for" not in caplog.text
        made.train()
        assert caplog.text.count("llama was made for 256") == 1
        caplog.clear()
        trainer(model=model, train_dataset=rows, max_steps=1).train()
    assert caplog.text.count("was made for") == 1
    assert "row 15: " in caplog.text
