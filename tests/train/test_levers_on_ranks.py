"""Tiles, offload and mixed precision on two ranks: DDP by the trainer, FSDP2 around the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastpo.data.packing import collate
from fastpo.model.hidden import attach, target_hidden
from fastpo.model.offload import LayerInputOffload
from fastpo.model.tiled_mlp import tile_mlps
from fastpo.testing.three_way import assert_three_way
from fastpo.train.trainer import PreferenceTrainer
from tests.model.tiny import family
from tests.train import child, tiny

GROUPS = tiny.groups(8, 3)
MIXED = ("llama", "gemma2", "gpt_oss")


def trained(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """The weights after two steps of four groups under SGD."""
    args = tiny.config(
        folder,
        objective="plackett_luce",
        optim="sgd",
        learning_rate=0.1,
        max_steps=2,
        activation_checkpointing=True,
        **options,
    )
    model = tiny.model().to(dtype)
    PreferenceTrainer(model, args, train_dataset=GROUPS, processing_class=tiny.tokenizer()).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(dtype: torch.dtype = torch.float32, sharded: bool = False) -> dict[str, Tensor]:
    """Of a sum over hidden states; sharded ones have both levers, and rank r has group r."""
    model: Any = attach(tiny.model()).to(dtype)
    model.activation_checkpointing_enable()
    mine = GROUPS[:2]
    if sharded:
        tile_mlps(model, 8)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        mine = [GROUPS[torch.distributed.get_rank()]]
    arena = LayerInputOffload()
    for group in mine:
        with arena if sharded else torch.enable_grad():
            hidden = target_hidden(model, collate([group], share_prompt=True, pad_token_id=0))
        (hidden.cumsum(-1).tanh().sum() / 2 * (2 if sharded else 1)).backward()
    assert bool(arena.host_bytes) == sharded
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if sharded else g for n, g in found.items()}  # pyright: ignore


def states(name: str, dtype: torch.dtype, sharded: bool = False) -> Tensor:
    """Hidden states of one shared row, of rank r group r.

    A sharded model has float32 weights and computes in `dtype`: FSDP2 casts, and so rebuilds,
    whatever travels with a forward.
    """
    model: Any = attach(family(name))
    rank = 0
    if sharded:
        policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=True)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        rank = torch.distributed.get_rank()
    else:
        model = model.to(dtype)
    batch = collate([GROUPS[rank]], share_prompt=True, pad_token_id=0)
    hidden = target_hidden(model, batch)
    assert hidden.dtype == dtype
    hidden.float().sum().backward()
    return hidden.detach()


def one_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    levers = {"mlp_tile": 8, "offload_activations": True}
    sizes = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    weights = trained(Path(folder), **levers, **sizes)
    mixed = {name: states(name, torch.bfloat16, sharded=True) for name in MIXED}
    torch.save((weights, gradients(sharded=True), mixed), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    port = child.free_port()
    ranks = [child.start(one_rank, rank, port, str(tmp_path / "two")) for rank in (0, 1)]
    options = {"per_device_train_batch_size": 4}
    plain = trained(tmp_path / "one", **options)
    truth = trained(tmp_path / "truth", torch.float64, **options)
    plain_gradients, true_gradients = gradients(), gradients(torch.float64)
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first[0], second[0])
    assert_three_way(first[0], plain, truth, "weights under DDP")
    assert first[1].keys() == true_gradients.keys()
    for name, value in first[1].items():
        assert_three_way(value, plain_gradients[name], true_gradients[name], f"FSDP2 {name}")
    for name in MIXED:
        plain_states, true_states = (states(name, d) for d in (torch.bfloat16, torch.float64))
        assert_three_way(first[2][name], plain_states, true_states, f"FSDP2 in bfloat16, {name}")
