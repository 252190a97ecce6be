"""The checkpoints of a trainer: written whole or not at all, resumed from only where whole.

A writer asks the trainer for its parts, model, optimiser, random state, and adds what else goes
from step to step. `fastpo.run.checkpoint` knows what a complete folder is.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from fastpo.run.checkpoint import (
    LOSS_STATE,
    TRAINER_STATE,
    incomplete,
    latest_complete,
    publish,
    staging_dir,
)
from fastpo.run.folder import RunFolder, is_own_checkpoint, rotate
from fastpo.run.record import batch_of
from fastpo.train.config import batch_words

log = logging.getLogger(__name__)


class Carried(Protocol):
    """Hold what goes from step to step beside model and optimiser, in files of its own."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class LossState:
    """Hold buffers of a loss, such as BCO's shift; a checkpoint without them leaves them as is."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def save(self, folder: Path) -> None:
        """Write the buffers into a checkpoint."""
        torch.save(self.loss.state_dict(), folder / LOSS_STATE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        if (folder / LOSS_STATE).is_file():
            state = torch.load(folder / LOSS_STATE, map_location="cpu", weights_only=True)
            self.loss.load_state_dict(state)


class CheckpointWriter:
    """Write complete checkpoints under their names, and keep as many as the run wants.

    Args:
        carried: what each checkpoint holds beside the Trainer's own parts.
    """

    def __init__(self, carried: Sequence[Carried]) -> None:
        self.carried = carried

    def write(self, trainer: Trainer, trial: Any) -> None:
        """Write the checkpoint of the trainer's step, on every rank.

        Args:
            trainer: the run.
            trial: a trial of a hyper-parameter search.

        Raises:
            ValueError: a folder of that name that this tool did not write; names it.
        """
        if trainer.hp_search_backend is None and trial is None:
            trainer.store_flos()
        args, accelerator = trainer.args, trainer.accelerator
        run_dir, step = Path(trainer._get_output_dir(trial)), trainer.state.global_step
        final, staging = run_dir / f"checkpoint-{step}", staging_dir(run_dir, step)
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        accelerator.wait_for_everyone()
        staging.mkdir(parents=True, exist_ok=True)
        trainer.save_model(str(staging), _internal_call=True)
        if not args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(staging))
            trainer._save_scaler(str(staging))
            trainer._save_rng_state(str(staging))
        best = trainer.state.best_global_step
        if best and (best == step or (run_dir / f"checkpoint-{best}").exists()):
            trainer.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")
        accelerator.wait_for_everyone()  # every rank has written its part
        if args.should_save:
            _save_state(trainer, staging / TRAINER_STATE)
            if final.exists() and not is_own_checkpoint(final):
                raise ValueError(
                    f"{final} was not written by fastpo: move it away; this checkpoint is {staging}"
                )
            publish(staging, final)
        accelerator.wait_for_everyone()
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(final))
        if args.should_save:
            rotate(run_dir, args.save_total_limit, trainer.state.best_model_checkpoint)

    def save_carried(self, folder: str | Path) -> None:
        """Write what is carried, on the process that saves."""
        for each in self.carried:
            each.save(Path(folder))

    def load_carried(self, folder: str | Path) -> None:
        """Read what `save_carried` wrote.

        Raises:
            ValueError: a file that the run cannot go on without is missing; names it.
        """
        for each in self.carried:
            each.load(Path(folder))


def _save_state(trainer: Trainer, path: Path) -> None:
    """Write the Trainer's state with that of its callbacks; several of a class make a list."""
    states: dict[str, list[object]] = {}
    for each in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(each, ExportableState):
            states.setdefault(type(each).__name__, []).append(each.state())
    for name, several in states.items():
        trainer.state.stateful_callbacks[name] = several if len(several) > 1 else several[0]  # pyright: ignore
    trainer.state.save_to_json(str(path))


def checkpoint_to_resume(run_dir: str | Path, wanted: str | bool | None) -> str | None:
    """Return the checkpoint that a run goes on from, or None where it starts anew.

    Args:
        run_dir: the run's folder.
        wanted: True for its newest complete checkpoint, "auto" for the same or the start where
            there is none, a checkpoint's path, or None or False for the start.

    Raises:
        ValueError: there is no complete checkpoint, or this one is not; says why.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True or wanted == "auto":
        newest = latest_complete(run_dir)
        if newest is None and wanted is True:
            raise ValueError(
                f"no complete checkpoint in {run_dir}: start without resuming, or give "
                "resume_from_checkpoint='auto'"
            )
        if newest is not None:
            log.info("resuming from %s", newest)
        return newest
    reason = incomplete(wanted)
    if reason is not None:
        raise ValueError(f"cannot resume from {wanted}: {reason}")
    return str(wanted)


def note_batch(folder: RunFolder, batch: dict[str, int], *, resumes: bool) -> None:
    """Write down what a step consists of, and warn where a run goes on with other steps.

    Args:
        folder: the run's.
        batch: what a step consists of.
        resumes: whether the run goes on from a checkpoint.
    """
    before = batch_of(folder.facts)
    if resumes and before is not None and before != batch:
        log.warning(
            "goes on with %s, where its checkpoint was trained with %s",
            batch_words(batch),
            batch_words(before),
        )
    folder.save(batch=batch)
