"""Evaluation: the numbers of the whole set, however it is cut into batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.testing.three_way import assert_three_way
from fastpo.train.batches import Filler
from fastpo.train.evaluation import Evaluation, filled_up
from fastpo.train.metrics import read_metrics
from tests.train import child, tiny

MIXTURE = {"dpo": 1.0, "sft": 0.5}  # a mean over groups and one over tokens
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "rewards/rejected")


def evaluated(trainer: Any, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = trainer(
        model=tiny.model().to(dtype),
        ref_model=tiny.model(seed=1).to(dtype),
        objective=MIXTURE,
        per_device_eval_batch_size=batch,
        eval_dataset=tiny.pairs(7, seed=1),
    )
    metrics = made.evaluate()
    return torch.tensor([metrics[f"eval_{name}"] for name in METRICS], dtype=dtype)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_uneven_last_batch(trainer: Any, batch: int) -> None:
    """7 = 3 + 3 + 1 = 4 + 3: as one batch of seven."""
    whole, truth = evaluated(trainer, 7), evaluated(trainer, 7, torch.float64)
    cut = evaluated(trainer, batch)
    for name, *values in zip(METRICS, cut, whole, truth, strict=True):
        assert_three_way(*values, name)


def test_several_sets(trainer: Any) -> None:
    made = trainer(eval_dataset={"a": tiny.pairs(3), "b": tiny.pairs(5, seed=1)})
    metrics = made.evaluate()
    assert {"eval_a_loss", "eval_b_rewards/accuracies"} <= metrics.keys()


def test_stream_is_weighted_by_groups(trainer: Any) -> None:
    from fastpo.data.rows import load_rows

    rows = tiny.rows(7)
    options = {"ref_model": tiny.model(seed=1), "per_device_eval_batch_size": 3}
    stream = trainer(eval_dataset=load_rows(rows, streaming=True), **options).evaluate()
    whole = trainer(eval_dataset=rows, **options).evaluate()
    for name in METRICS:
        assert stream[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-6)


@pytest.mark.parametrize("most", [None, 60])
def test_groups_of_a_stream_are_counted(trainer: Any, most: int | None) -> None:
    """The Trainer, which knows no batch of groups, would see none."""
    from fastpo.data.rows import load_rows

    made = trainer(
        objective="simpo", max_tokens_per_row=most, per_device_eval_batch_size=3, max_steps=1
    )
    assert made.predict(load_rows(tiny.rows(7), streaming=True)).metrics["test_samples_per_second"]
    output = made.evaluation_loop(made.get_test_dataloader(tiny.pairs(5)), "Test")
    assert output.num_samples == 5
    loader = made.get_test_dataloader(load_rows(tiny.rows(7), streaming=True))
    assert made.evaluation_loop(loader, "Test").num_samples == 7


def test_training_state_is_untouched(trainer: Any) -> None:
    """BCO's shift moves in training only."""
    made = trainer(objective="bco", eval_dataset=tiny.pairs(5), max_steps=1)
    made.train()
    shift = made.loss.get_buffer("bco_shift").clone()
    made.evaluate()
    assert torch.equal(made.loss.get_buffer("bco_shift"), shift)


def test_a_set_is_filled_up_for_several_ranks() -> None:
    groups = tiny.pairs(5)
    assert filled_up(groups, 2, 1) is groups
    padded = filled_up(groups, 2, 2)
    assert len(padded) == 8
    assert Evaluation(padded).totals == Evaluation(groups).totals
    assert [isinstance(padded[i], Filler) for i in range(8)] == [False] * 5 + [True] * 3


def two_ranks(rank: int, port: int, folder: str, options: dict[str, Any]) -> None:
    """One of two processes that train and evaluate together."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    made = distributed_run(folder, batch=2, ddp_backend="gloo", **options)
    if rank == 0:
        torch.save([p.detach() for p in made.model.parameters()], f"{folder}/weights.pt")
    torch.distributed.destroy_process_group()


def distributed_run(
    folder: str, batch: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    from fastpo.train.trainer import PreferenceTrainer

    torch.set_num_threads(1)
    made = PreferenceTrainer(
        tiny.model().to(dtype),
        tiny.config(
            folder,
            **{
                "objective": {"bco": 1.0, "dpo": 1.0, "sft": 0.5},
                "per_device_train_batch_size": batch,
                "per_device_eval_batch_size": batch,
                "gradient_accumulation_steps": 2,
                "max_steps": 3,
                "optim": "sgd",
                "eval_strategy": "steps",
                "eval_steps": 3,
                **options,
            },
        ),
        train_dataset=tiny.pairs(16),
        eval_dataset=tiny.pairs(7, seed=1),
        ref_model=tiny.model(seed=1).to(dtype),
        processing_class=tiny.tokenizer(),
    )
    made.train()
    return made


@pytest.mark.parametrize(
    ("statistics", "batch", "cut", "row"), [("local", 4, 2, None), ("exact", 8, 1, 45)]
)
def test_two_ranks_are_one(
    statistics: str, batch: int, cut: int, row: int | None, tmp_path: Path
) -> None:
    """2 ranks x 2 groups x 2 micro-batches: losses, weights, evaluation, metrics.

    With local statistics as 1 x 4 x 2, whose micro-batches hold the same groups over all ranks;
    with exact ones as 1 x 8 x 1: they do not see the cut, nor that into rows of 45 tokens, where
    one rank's two groups fit one row and the other's do not.
    """

    port = child.free_port()
    two = str(tmp_path / "two")
    budget = {"batch_statistics": statistics, "max_tokens_per_row": row}
    ranks = [child.start(two_ranks, rank, port, two, budget) for rank in (0, 1)]
    options = {"gradient_accumulation_steps": cut, "batch_statistics": statistics}
    one = distributed_run(str(tmp_path / "one"), batch, **options)
    truth = distributed_run(str(tmp_path / "truth"), batch, torch.float64, **options)
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    for mine, theirs, true in zip(
        torch.load(f"{two}/weights.pt"),
        one.model.parameters(),
        truth.model.parameters(),
        strict=True,
    ):
        assert_three_way(mine, theirs.detach(), true.detach(), "weights")
    records = [read_metrics(tmp_path / name) for name in ("two", "one", "truth")]
    names = [*METRICS, "num_tokens", "grad_norm", *(f"eval_{name}" for name in METRICS)]
    for a, b, c in zip(*records, strict=True):
        for name in names:
            if name in c:
                values = [
                    torch.tensor(r[name], dtype=t)
                    for r, t in zip(
                        (a, b, c), (torch.float32, torch.float32, torch.float64), strict=True
                    )
                ]
                # Rewards are differences of log-probs, scaled by beta.
                logps = next(c[key] for key in c if key.endswith("logps/chosen"))
                terms = 0.1 * abs(logps) if "rewards/" in name else 0.0
                assert_three_way(*values, f"step {c['step']} {name}", terms=terms)


def test_data_of_an_evaluation(trainer: Any) -> None:
    """Rows become groups as they do at the start; a stored reference knows the trainer's own."""
    rows = tiny.rows(6, seed=7)
    made = trainer(objective="simpo", eval_dataset=rows)
    expected = made.evaluate()["eval_loss"]
    assert made.evaluate(rows)["eval_loss"] == expected
    assert made.evaluate({"held": rows})["eval_held_loss"] == expected
    assert made.predict(rows).metrics["test_loss"] == expected
    with pytest.raises(ValueError, match="evaluation data is empty"):
        made.evaluate([])
    stored = trainer(eval_dataset=tiny.pairs(4, seed=5))
    with pytest.raises(ValueError, match=r"row \d is not in the reference store .*'copy'$"):
        stored.evaluate(tiny.pairs(4, seed=8))
