"""A run's model, ready for `from_pretrained`: its files appear at once, over nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer

from fastpo.model.adapters import copied
from fastpo.model.merge import write_merged
from fastpo.run.folder import STAGING, RunFolder
from fastpo.train.preflight import is_sharded


def save_model(trainer: Trainer, write: Callable[[str | None, bool], None], folder: Path) -> None:
    """Save model and tokenizer, each rank of a sharded run its part.

    Args:
        trainer: the run.
        write: the Trainer's `save_model`, which writes file by file.
        folder: where the files appear.

    Raises:
        ValueError: a file there that this tool did not write; names it.
    """
    sharded = is_sharded(trainer)
    if trainer.is_world_process_zero():
        with RunFolder.at(folder).placing() as staging:
            write(str(staging), True)
            if sharded:
                trainer.accelerator.wait_for_everyone()
    else:
        apart = sharded and not trainer.args.should_save
        write(str(folder / STAGING if apart else folder), True)
        if sharded:
            trainer.accelerator.wait_for_everyone()


def save_merged(trainer: Trainer, path: str | Path) -> None:
    """Write the model without adapters, safetensors and tokenizer.

    Args:
        trainer: the run; of its processes only the one that saves writes.
        path: a folder.

    Raises:
        ValueError: a file there that this tool did not write; names it. Or the merged model is
            another than was trained.
    """
    if not trainer.args.should_save:
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with RunFolder.at(path).placing() as staging:
        if isinstance(model, PeftModel):
            write_merged(lambda: copied(model), staging)
        else:
            model.save_pretrained(str(staging))
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(str(staging))  # pyright: ignore
