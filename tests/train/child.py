"""Training processes of their own: killed with SIGKILL, or one of several ranks.

They are forked from a server that has imported everything, since importing takes longer than any
of these tests; see `start`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from fastpo.data.groups import Group
from fastpo.reference import live as reference
from fastpo.reference import store
from fastpo.train import checkpointing, trainer
from tests.train import tiny


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieInStep(TrainerCallback):
    """Dies between backward and optimiser step of step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.at:
            die()


RECIPES: dict[str, dict[str, Any]] = {
    # BCO carries state between steps.
    "bco": {"objective": {"bco": 1.0, "dpo": 1.0}},
    "logo": {"objective": "logo"},
    "longpo": {
        "objective": {"sft": 1.0, "dpo": 0.01},
        "reference": "store",
        "reference_prompt": "short_prompt",
    },
}


def data(recipe: str) -> list[Group]:
    """Sixteen groups."""
    if recipe == "logo":
        return tiny.logo_groups(16)
    return tiny.pairs(16, short_prompt=recipe == "longpo")


def make(
    folder: str, *callbacks: TrainerCallback, recipe: str = "bco"
) -> trainer.PreferenceTrainer:
    """Seven steps, two an epoch, saved every three."""
    torch.set_num_threads(1)
    return trainer.PreferenceTrainer(
        tiny.model(attention_dropout=0.1),
        tiny.config(
            folder,
            **RECIPES[recipe],
            max_steps=7,
            save_strategy="steps",
            save_steps=3,
            save_total_limit=2,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
        ),
        train_dataset=data(recipe),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def killed(mode: str, folder: str, recipe: str = "bco") -> None:
    """Train until the moment called `mode`, then die."""
    if mode == "step":
        make(folder, DieInStep(6), recipe=recipe).train()
    elif mode == "save":  # the second checkpoint: weights and optimiser are written, no more
        made = make(folder, recipe=recipe)
        save = made._save_rng_state

        def save_once(output_dir: str) -> None:
            (save if made.state.global_step == 3 else die)(output_dir)

        made._save_rng_state = save_once
        made.train()
    elif mode == "rename":  # everything of the second checkpoint is written but its name
        publish = checkpointing.publish

        def publish_once(staging: Any, final: Any) -> None:
            (publish if final.name == "checkpoint-3" else die)(staging, final)

        checkpointing.publish = publish_once
        make(folder, recipe=recipe).train()
    elif mode == "store":
        add = store.ReferenceStore.add

        def add_twice(self: store.ReferenceStore, groups: Any, logps: Any) -> None:
            add(self, groups, logps)
            if len(self) >= 8:
                die()

        store.ReferenceStore.add = add_twice
        small = reference.ShardWriter
        reference.ShardWriter = lambda held: small(held, groups=4)  # type: ignore
        if recipe == "longpo":
            make(folder, recipe=recipe)  # dies in it
        trainer.PreferenceTrainer(
            tiny.model(),
            tiny.config(folder, reference="store"),
            train_dataset=tiny.pairs(16),
            processing_class=tiny.tokenizer(),
        )
    os._exit(17)  # still alive


def start(target: Callable[..., None], *args: Any) -> Any:
    """A started process that runs `target(*args)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.child"])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def free_port() -> int:
    """A port that nobody has, for processes that are to meet there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
