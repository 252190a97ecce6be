"""One optimiser step: how it is counted, divided, and cut into micro-batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import TrainerCallback

from fastpo.data.packing import counts_of
from fastpo.loss import preference_loss
from fastpo.loss.metrics import batch_counts
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.loss.scores import score_responses
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import Collator, PreferenceTrainer
from tests.train import tiny
from tests.train.plain import dense_stats

LISTS = tiny.groups(8, 3)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.flat: Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if self.flat is None:
            self.flat = torch.cat([p.grad.detach().flatten().clone() for p in model.parameters()])


def first_step(
    folder: Path, batch: int, accumulation: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients, logged gradient norm) of a step over the same eight groups."""
    objective = options.get("objective", "dpo")
    # Not the policy itself, so that ratios are not all zero.
    reference = options.pop("ref_model", None) or tiny.model(seed=1)
    extras = PreferenceLoss(objective).extras
    data = options.pop("train_dataset", None)
    gradients = Gradients()
    trainer = PreferenceTrainer(
        tiny.model().to(dtype),
        tiny.config(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,  # clipping would hide a wrong scale
            **options,
        ),
        train_dataset=data or tiny.pairs(8, extras=extras),
        ref_model=reference.to(dtype),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    record = trainer.state.log_history[0]
    assert gradients.flat is not None
    loss, norm = (torch.tensor(record[name], dtype=dtype) for name in ("loss", "grad_norm"))
    return loss, gradients.flat, norm


@pytest.mark.parametrize("objective", ["dpo", {"dpo": 1.0, "sft": 0.5}, "tpo", "treg"], ids=str)
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (8, 1), (3, 3)])
def test_cut_into_micro_batches(
    objective: Any, batch: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1x8 = 2x4 = 8x1 = 3x3 with a short last batch: loss, gradients and logged norm."""
    ours = first_step(tmp_path / "ours", batch, accumulation, objective=objective)
    monkeypatch.setattr(preference_loss, "token_statistics", dense_stats)
    plain = first_step(tmp_path / "plain", 8, 1, objective=objective)
    truth = first_step(tmp_path / "truth", 8, 1, torch.float64, objective=objective)
    for what, a, b, c in zip(("loss", "gradients", "norm"), ours, plain, truth, strict=True):
        assert_three_way(a, b, c, what)


def test_ties_fall_as_the_row_says_however_a_step_is_cut(tmp_path: Path) -> None:
    """Policy and reference are one, so LiPO orders every list by its tie keys alone."""

    def step(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        folder = tmp_path / f"{batch} {dtype}"
        options = {"objective": "lipo", "ref_model": tiny.model(), "train_dataset": LISTS}
        return first_step(folder, batch, 8 // batch, dtype, **options)

    whole, truth = step(8), step(8, torch.float64)
    for what, a, b, c in zip(("loss", "gradients", "norm"), step(2), whole, truth, strict=True):
        assert_three_way(a, b, c, what)


def test_kto_shift_is_per_micro_batch(tmp_path: Path) -> None:
    """z0 is a mean over a micro-batch and all ranks: the cut matters where it is not clamped to 0.

    Against a sharper, hence worse, reference z0 is positive; against a similar one it is 0.
    """
    cuts = [(8, 1), (4, 2)]
    whole, halves = (first_step(tmp_path / f"{b}", b, a, objective="kto") for b, a in cuts)
    truth = first_step(tmp_path / "truth", 8, 1, torch.float64, objective="kto")
    assert_three_way(halves[0], whole[0], truth[0], "loss")
    assert_three_way(halves[1], whole[1], truth[1], "gradients")
    worse = tiny.model(seed=1, initializer_range=0.4)
    whole, halves = (
        first_step(tmp_path / f"w{b}", b, a, objective="kto", ref_model=worse)[0] for b, a in cuts
    )
    assert whole != halves


@pytest.mark.parametrize("objective", ["kto", "bco"])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (3, 3)])
def test_exact_statistics_do_not_see_the_cut(
    objective: str, batch: int, accumulation: int, tmp_path: Path
) -> None:
    """The reference of `test_kto_shift_is_per_micro_batch`, whose z0 is positive."""

    def step(b: int, a: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        return first_step(
            tmp_path / f"{b} {dtype}",
            b,
            a,
            dtype,
            objective=objective,
            ref_model=tiny.model(seed=1, initializer_range=0.4),
            batch_statistics="exact",
        )

    whole, truth, cut = step(8, 1), step(8, 1, torch.float64), step(batch, accumulation)
    for what, a, b, c in zip(("loss", "gradients", "norm"), cut, whole, truth, strict=True):
        assert_three_way(a, b, c, what)


def test_data_that_does_not_fit_is_named_before_the_first_step(trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"tiny.jsonl, row 0: dpo compares pairs"):
        trainer(train_dataset=tiny.groups(4, 3))
    with pytest.raises(ValueError, match=r"tiny.jsonl, row 0: dpo compares pairs"):
        trainer(eval_dataset={"a": tiny.pairs(3), "b": tiny.groups(4, 3)})
    from fastpo.data.rows import load_rows

    rows = load_rows(tiny.rows(8), streaming=True)
    with pytest.raises(ValueError, match="row 0: lipo needs a grade of every response"):
        trainer(train_dataset=rows, objective="lipo", max_steps=2)


def test_batch_has_no_labels_key_and_counts_what_the_loss_counts() -> None:
    groups = [*tiny.groups(3, 3), *tiny.groups(2, 1, seed=1)]
    groups[0].responses[1].label = True  # two desirable candidates
    groups[4].responses[0].label = False  # none
    batch = Collator(pad_token_id=0)(groups)
    assert not hasattr(batch, "labels")
    logps = torch.zeros(len(batch.tokens.targets))
    scores = score_responses({"logps": logps}, batch.tokens.segments)
    expected = {k: int(v) for k, v in batch_counts(scores).items()}
    assert {k: getattr(batch.counts, k) for k in expected} == expected
    assert counts_of(groups) == batch.counts


def test_first_loss_is_ln_2(trainer: Any) -> None:
    """Policy and reference are one model: bit for bit the same log-probs."""
    made = trainer(max_steps=1)
    made.train()
    record = made.state.log_history[0]
    assert record["loss"] == torch.tensor(2.0).log().item()
    assert record["rewards/margins"] == 0.0
    assert record["rewards/chosen"] == 0.0


def test_order_is_a_function_of_seed_and_epoch(trainer: Any) -> None:
    def visited(**options: Any) -> list[list[int]]:
        made = trainer(max_steps=-1, num_train_epochs=2, **options)
        seen: list[list[int]] = []
        collate = made.data_collator
        made.data_collator = lambda groups: (seen.append([g.row for g in groups]), collate(groups))[
            1
        ]
        made.train()
        return seen

    first, again, other = visited(), visited(), visited(seed=4)
    torch.manual_seed(123)
    assert first == again == visited()
    assert first != other
    assert sorted(row for batch in first[:4] for row in batch) == list(range(16))
    assert first[:4] != first[4:]


def test_grouping_by_length(trainer: Any) -> None:
    made = trainer(train_sampling_strategy="group_by_length", train_dataset=tiny.pairs(64))
    groups = made.train_dataset
    order = list(made._get_train_sampler())
    assert sorted(order) == list(range(64))

    def padding(rows: list[int]) -> int:
        batches = [[len(groups[i]) for i in rows[k : k + 4]] for k in range(0, 64, 4)]
        return sum(4 * max(b) - sum(b) for b in batches)

    assert padding(order) < padding(list(range(64))) / 4


def test_gradients_undo_the_mean_over_ranks(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP averages gradients over ranks, while counts are of the whole step already."""
    made = trainer(ref_model=tiny.model(seed=1))
    groups = iter([made.data_collator(tiny.pairs(4))])
    (batch,), totals = made.get_batch_samples(groups, 1, made.args.device)
    made.create_optimizer()

    def gradients(ranks: int) -> Tensor:
        monkeypatch.setattr(type(made.accelerator), "num_processes", ranks)
        made.model.zero_grad()
        made.training_step(made.model, batch, totals)
        return torch.cat([p.grad.flatten() for p in made.model.parameters()])

    alone = gradients(1)
    assert alone.abs().max() > 0
    assert torch.equal(gradients(4), 4 * alone)  # a power of two: exact


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off(trainer: Any, checkpointing: bool) -> None:
    noisy = tiny.model(attention_dropout=0.5)
    made = trainer(model=noisy, max_steps=1, activation_checkpointing=checkpointing)
    assert made.args.disable_dropout
    made.train()
    assert made.state.log_history[0]["loss"] == torch.tensor(2.0).log().item()


def test_not_finite_loss_names_rows(trainer: Any) -> None:
    model = tiny.model()
    groups = tiny.pairs(16)
    poison = 127
    for group in groups:  # the token occurs in row 5 only
        for response in group.responses:
            response.input_ids[response.input_ids == poison] = 4
        group.prompt_ids[group.prompt_ids == poison] = 4
    groups[5].responses[1].input_ids[0] = poison
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = math.nan
    made = trainer(model=model, train_dataset=groups, max_steps=8)
    with pytest.raises(FloatingPointError, match=r"loss is nan in step \d, from tiny.jsonl row 5;"):
        made.train()


def test_many_gpus_in_one_process_are_refused(config: Any) -> None:
    args = config()
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        PreferenceTrainer(
            tiny.model(), args, train_dataset=tiny.pairs(4), processing_class=tiny.tokenizer()
        )


def test_stream_needs_max_steps_and_trains(trainer: Any) -> None:
    from fastpo.data.rows import load_rows

    with pytest.raises(ValueError, match="max_steps=-1, but the training data is a stream"):
        trainer(train_dataset=load_rows(tiny.rows(8), streaming=True), max_steps=-1)
    made = trainer(train_dataset=load_rows(tiny.rows(8), streaming=True), max_steps=3)
    made.train()
    assert made.state.global_step == 3  # one epoch and a half of two steps each


def test_rows_become_groups(trainer: Any, tmp_path: Path) -> None:
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in tiny.rows(8)), encoding="utf-8")
    made = trainer(train_dataset=str(path), max_prompt_length=4, eval_dataset=tiny.rows(3))
    assert len(made.train_dataset) == 8
    assert max(len(g.prompt_ids) for g in made.train_dataset) <= 4
    made.train()


@pytest.mark.parametrize("empty", [[], Subset([], [])], ids=["list", "groups"])
def test_no_data_is_refused(trainer: Any, empty: Any) -> None:
    with pytest.raises(ValueError, match="train data is empty"):
        trainer(train_dataset=empty)
    with pytest.raises(ValueError, match="eval data dev is empty"):
        trainer(eval_dataset={"dev": empty})
    with pytest.raises(ValueError, match="nothing to train on"):
        trainer(train_dataset=None, eval_dataset=tiny.pairs(2)).train()


def test_a_hyper_parameter_moves_with_the_steps(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    evaluate = PreferenceLoss._evaluate

    def spy(component: Any, *args: Any) -> Any:
        seen.append(component.hyper["lam"])
        return evaluate(component, *args)

    monkeypatch.setattr(PreferenceLoss, "_evaluate", staticmethod(spy))
    trainer(objective="dpo_shift", objective_args={"lam": [0.5, 1.0]}, max_steps=4).train()
    assert seen == [0.5, 0.625, 0.75, 0.875]
