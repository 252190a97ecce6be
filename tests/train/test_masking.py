"""Token masks in a run: trained beside the policy, however a step is cut, and saved with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.data.groups import Group
from fastpo.data.packing import collate
from fastpo.loss import preference_loss
from fastpo.model.load import add_lora
from fastpo.model.masks import TokenMasks
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.train import child, tiny
from tests.train.plain import dense_stats

DPO: dict[str, Any] = {"objective": "dpo", "objective_args": {}}
PRICES = {"l1_weight": 0.01, "kl_l1_weight": 0.02}


def made(folder: Path | str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A trainer of SparsePO, its reference another model."""
    model = options.pop("model", None) or tiny.model().to(dtype)
    reference = options.pop("ref_model", tiny.model(seed=1).to(dtype))
    data = options.pop("data", None) or tiny.pairs(8)
    defaults: dict[str, Any] = {
        "objective": "sparse_po",
        "objective_args": PRICES,
        "token_masks": "independent",
        "optim": "sgd",
        "learning_rate": 0.05,
    }
    return PreferenceTrainer(
        model,
        tiny.config(folder, **{**defaults, **options}),
        train_dataset=data,
        ref_model=reference,
        processing_class=tiny.tokenizer(),
    )


def outcome(trainer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, the policy's weights, the masks') after training."""
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    dtype = trainer.model.dtype
    masking = trainer._masking
    parts = (
        [*trainer.model.parameters()],
        [] if masking is None else [*masking.masks.parameters()],
    )
    empty = torch.zeros(0, dtype=dtype)
    weights = (torch.cat([empty, *(p.detach().flatten() for p in part)]) for part in parts)
    return torch.tensor(losses, dtype=dtype), *weights


def assert_same(ours: Any, plain: Any, truth: Any) -> None:
    for what, a, b, c in zip(("losses", "weights", "masks"), ours, plain, truth, strict=False):
        assert_three_way(a, b, c, what)


@pytest.mark.parametrize("kind", ["common", "independent"])
def test_trajectory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps through the fused head, through whole logits, and in float64; masks move."""
    options = {"token_masks": kind, "max_steps": 10}
    ours = made(tmp_path / "ours", **options)
    before = torch.cat([p.detach().flatten().clone() for p in ours._masking.masks.parameters()])
    ours = outcome(ours)
    monkeypatch.setattr(preference_loss, "token_statistics", dense_stats)
    plain = outcome(made(tmp_path / "plain", **options))
    truth = outcome(made(tmp_path / "truth", torch.float64, **options))
    assert_same(ours, plain, truth)
    assert not torch.equal(ours[2], before)


def by_hand(dtype: torch.dtype, masks: TokenMasks) -> dict[str, Tensor]:
    """The gradients of the masks in the first step over all eight pairs, padded, whole logits."""
    batch = collate(tiny.pairs(8), share_prompt=False, pad_token_id=0)
    inputs = {k: getattr(batch, k) for k in ("input_ids", "attention_mask", "position_ids")}
    index, response = batch.head_positions, batch.tokens.segments.response
    layers: list[Tensor] = []
    policy, reference = (tiny.model(seed=s).to(dtype).eval() for s in (0, 1))
    for layer in reference.model.layers:
        layer.register_forward_hook(lambda m, a, out: layers.append(out))
    with torch.no_grad():
        logits = [m(**inputs).logits.flatten(0, 1)[index] for m in (policy, reference)]
    logp, ref = (z.log_softmax(-1) for z in logits)
    states = [h.flatten(0, 1)[index] for h in layers]
    a, d = (masks.learned[name](states) for name in ("token_weights", "kl_weights"))
    at = batch.tokens.targets[:, None]
    score = a * (logp - ref).gather(1, at)[:, 0] + d * (ref.exp() * (ref - logp)).sum(-1)
    sums = torch.zeros(16, dtype=dtype).index_add(0, response, score).view(8, 2)
    price = PRICES["l1_weight"] * a.sum() + PRICES["kl_l1_weight"] * d.sum()
    loss = (F.softplus(-0.1 * (sums[:, 0] - sums[:, 1])).sum() + price) / 8
    masks.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in masks.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_first_step_against_whole_logits(clip: float, tmp_path: Path) -> None:
    """SGD moves every parameter by the gradient of hand-written SparsePO, clipped by its norm."""
    steps = {"max_steps": 1, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    trainer = made(tmp_path, max_grad_norm=clip, **steps)
    masks = trainer._masking.masks
    before = {name: p.detach().clone() for name, p in masks.named_parameters()}
    trainer.train()
    after = {name: p.detach().clone() for name, p in masks.named_parameters()}
    assert all(p.grad is None for p in masks.parameters())  # the next step begins anew
    found = []
    for dtype in (torch.float32, torch.float64):
        masks.load_state_dict(before)
        gradients = by_hand(dtype, masks.to(dtype).eval())
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        scale = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
        found.append(
            {n: p.detach() - 0.05 * scale * gradients[n] for n, p in masks.named_parameters()}
        )
        assert (norm > clip) or not clip
    for name in after:
        assert_three_way(after[name], found[0][name], found[1][name], name)


def test_cut_into_micro_batches(tmp_path: Path) -> None:
    """1 x 8 = 4 x 2 = 8 x 1."""

    def cut(batch: int, accumulation: int, dtype: torch.dtype = torch.float32) -> Any:
        sizes = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
        }
        return outcome(made(tmp_path / f"{batch}-{dtype}", dtype, max_steps=2, **sizes))

    plain, truth = cut(8, 1), cut(8, 1, torch.float64)
    for batch, accumulation in ((1, 8), (4, 2)):
        assert_same(cut(batch, accumulation), plain, truth)


def one_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    run = made(folder, max_steps=2, per_device_train_batch_size=2, ddp_backend="gloo")
    torch.save(outcome(run)[1:], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    port = child.free_port()
    ranks = [child.start(one_rank, rank, port, str(tmp_path / "two")) for rank in (0, 1)]
    options = {"max_steps": 2, "per_device_train_batch_size": 4}
    plain = outcome(made(tmp_path / "one", **options))[1:]
    truth = outcome(made(tmp_path / "truth", torch.float64, **options))[1:]
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1))
    for what, a, other, b, c in zip(("weights", "masks"), first, second, plain, truth, strict=True):
        assert torch.equal(a, other)
        assert_three_way(a, b, c, what)


def test_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = {
        "optim": "adamw_torch",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_dropout": False,
    }
    whole = outcome(made(tmp_path, **options))
    resumed = made(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = torch.cat([p.detach().flatten() for p in resumed._masking.masks.parameters()])
    assert torch.equal(again, whole[2])
    assert torch.equal(
        torch.cat([p.detach().flatten() for p in resumed.model.parameters()]), whole[1]
    )
    other = (tmp_path / "checkpoint-2").rename(tmp_path / "another programs")
    (other / "manifest.json").unlink()
    (other / "token_masks.safetensors").unlink()
    with pytest.raises(ValueError, match="was saved without token_masks"):
        made(tmp_path, **options).train(resume_from_checkpoint=str(other))


def fixed_weights(dtype: torch.dtype) -> list[Group]:
    """The pairs of `made` with MaPO's masks as token weights of the data, made by hand."""
    reference, groups = tiny.model(seed=1).to(dtype), tiny.pairs(8)
    for group in groups:
        for response in group.responses:
            ids = np.concatenate([group.prompt_ids, response.input_ids])
            layers: list[Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda m, a, out, layers=layers: layers.append(out))
                for layer in reference.model.layers
            ]
            with torch.no_grad():
                reference(torch.from_numpy(ids).long()[None])
            for hook in hooks:
                hook.remove()
            means = torch.stack([h[0, len(group.prompt_ids) - 1 : -1].mean(-1) for h in layers])
            low, high = (f(means, dim=1, keepdim=True).values for f in (torch.min, torch.max))
            response.token_weights = ((means - low) / (high - low)).mean(0).float().numpy()
    return groups


@pytest.mark.parametrize("objective", ["dpo", "sparse_po"])
def test_activation_masks_are_fixed_weights(objective: str, tmp_path: Path) -> None:
    """MaPO learns nothing: the same run as with these weights in the data."""
    common = {"objective": objective, "objective_args": {}, "max_steps": 5}
    trainer = made(tmp_path / "ours", **common, token_masks="activation")
    assert not list(trainer._masking.masks.parameters())
    ours = outcome(trainer)
    by_hand = {**common, "token_masks": "none"}
    plain = outcome(made(tmp_path / "plain", data=fixed_weights(torch.float32), **by_hand))
    truth = outcome(made(tmp_path / "truth", torch.float64, **common, token_masks="activation"))
    assert_same(ours[:2], plain[:2], truth[:2])


def test_masks_of_an_adapter_read_its_base(tmp_path: Path) -> None:
    """The adapter switched off and a copy from before the first step are one reference."""

    def run(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        model = add_lora(tiny.model().to(dtype), {"r": 2})
        options = {"reference": kind, "token_masks": "common", "max_steps": 5}
        return outcome(made(tmp_path / f"{kind}-{dtype}", model=model, ref_model=None, **options))

    assert_same(run("adapter"), run("copy"), run("copy", torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "simpo", "objective_args": {}}, "and an objective that compares with one"),
        (DPO, "'independent' has a mask for divergences"),
        ({"reference": "store", "token_masks": "common", **DPO}, "a reference that runs"),
        ({"token_masks": "comon"}, "did you mean 'common'"),
    ],
)
def test_what_masks_cannot_do(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **options)
