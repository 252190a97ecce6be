"""Which run a recipe goes on with: only the one that it was, from a checkpoint that is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastpo.model.load import trained_adapter
from fastpo.objectives.user import is_reference, same
from fastpo.recipe.recipe import Recipe
from fastpo.redact import is_secret, redact
from fastpo.run.checkpoint import incomplete, latest_complete
from fastpo.run.folder import RECORDS
from fastpo.run.record import Run, batch_of
from fastpo.train.config import PreferenceConfig, batch_words

# A run may go on with these changed: they leave the weights of the steps already done alone.
MAY_CHANGE = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "run_name",
    "report_to",
    "disable_tqdm",
    "log_level",
    "report",
    "num_samples",
    "sample_tokens",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "eval_steps",
    "eval_strategy",
    "eval_on_start",
    "eval_delay",
    "per_device_eval_batch_size",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "save_only_model",
    "load_best_model_at_end",
    "metric_for_best_model",
    "early_stopping_patience",
    "kl_budget",
    "self_check",
    "backend",
    "workspace_mib",
    "offload_activations",
    "mlp_tile",
    "layer_kernels",
    "share_prompt",
    "dataloader_num_workers",
    "reference_store",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


class Start(NamedTuple):
    """Say how a run begins.

    Attributes:
        checkpoint: what it goes on from; None begins at step 0.
        continues: whether that is one of its own folder.
        finished: whether there is nothing left to do.
    """

    checkpoint: str | None
    continues: bool
    finished: bool


def judge_start(recipe: Recipe, config: PreferenceConfig, before: Run, *, fresh: bool) -> Start:
    """Decide how a run begins in a folder.

    Args:
        recipe: what to train.
        config: the recipe's, for the trainer.
        before: the run that lies in the folder; an empty one where none does.
        fresh: whether that one is left out of account.

    Raises:
        ValueError: a checkpoint that cannot be resumed from, another recipe than the run's, or a
            finished run without a checkpoint.
    """
    checkpoint = _checkpoint(before.folder, config.resume_from_checkpoint, fresh=fresh)
    finished = before.facts.get("status") == "finished"
    continues = checkpoint is not None and _lies_in(before.folder, checkpoint)
    if not continues and not finished:
        return Start(checkpoint, continues, finished=False)
    refuse_mixture(recipe, config, before)
    same_length = all(
        before.recipe.get(key) == recipe.settings.get(key)
        for key in ("max_steps", "num_train_epochs")
    )
    if finished and not same_length and not continues:
        raise ValueError(
            f"{before.folder} is finished and has no checkpoint to go on from: take another "
            "output_dir, or start over with --overwrite"
        )
    return Start(checkpoint, continues, finished=finished and same_length)


def _checkpoint(output_dir: Path, asked: str | None, *, fresh: bool) -> str | None:
    """Return the checkpoint to go on from: a named one, but of another folder at the start only.

    Raises:
        ValueError: the named one is not there or damaged.
    """
    newest = None if fresh else latest_complete(output_dir)
    if asked is None or asked == "auto":
        return newest
    reason = incomplete(asked)
    if reason is not None:
        raise ValueError(f"resume_from_checkpoint = {asked!r}: {reason}; name another, or none")
    return asked if newest is None or _lies_in(output_dir, asked) else newest


def _lies_in(folder: Path, checkpoint: str) -> bool:
    return Path(checkpoint).resolve().parent == folder.resolve()


def refuse_mixture(recipe: Recipe, config: PreferenceConfig, before: Run) -> None:
    """Refuse to go on with another run than it was; secrets are no part of that.

    The same groups a step may be spread over ranks and accumulated batches in another way, unless
    the objective has statistics of a batch.

    Raises:
        ValueError: a key, or the number of ranks, that changes what the steps compute.
    """
    earlier, now = (
        json.loads(json.dumps(redact(keys), default=str))
        for keys in (before.recipe, recipe.settings)
    )
    start_over = "take another output_dir, or start over with --overwrite"
    batch_before, batch = batch_of(before.facts), config.batch_facts()
    # Else what a step computes depends on how its groups are spread.
    spreads = (
        config.batch_statistics == "exact" or not config.build_loss().has_statistics
    ) and config.train_sampling_strategy != "group_by_length"
    alike = (
        batch_before is not None
        and spreads
        and math.prod(batch_before.values()) == math.prod(batch.values())
    )
    may_change = MAY_CHANGE | (
        {"per_device_train_batch_size", "gradient_accumulation_steps"} if alike else set()
    )
    for key in {**earlier, **now}:
        old, new = earlier.get(key), now.get(key)
        stays = old == new or (key == "objective" and _same_objective(old, new))
        if key not in may_change and not is_secret(key) and not stays:
            raise ValueError(
                f"{before.folder} holds a run with {key} = {old!r}, now it is {new!r}: {start_over}"
            )
    if batch_before is not None and batch_before["ranks"] != batch["ranks"] and not alike:
        other = ", or set gradient_accumulation_steps so that steps have as many groups"
        raise ValueError(
            f"{before.folder} holds a run with {batch_words(batch_before)}, now it is "
            f"{batch_words(batch)}: take as many ranks{other if spreads else ''}, or {start_over}"
        )


def _same_objective(one: object, other: object) -> bool:
    """Return whether two mixtures are one; a start's folder spells the files of one's own."""

    def weights(objective: object) -> Mapping[str, object]:
        return objective if isinstance(objective, Mapping) else {str(objective): 1.0}

    def alike(a: str, b: str) -> bool:
        return a == b or (is_reference(a) and is_reference(b) and same(a, b))

    left = list(weights(other).items())
    for name, weight in weights(one).items():
        match = next((item for item in left if item[1] == weight and alike(name, item[0])), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def read_by(recipe: Recipe) -> list[str]:
    """Return every file, folder and name that a run of this recipe reads."""
    model, data = recipe.model, recipe.data
    names = [model.model, model.tokenizer, model.chat_template, data.dataset, data.eval_dataset]
    checkpoint = recipe.settings.get("resume_from_checkpoint")
    names += [checkpoint] if isinstance(checkpoint, str) else []
    for reference in (model.ref_model, model.ref_model2):
        names += [reference] if isinstance(reference, str) else [*(reference or ())]
    adapter = trained_adapter(model.model)
    return [*filter(None, names), *([] if adapter is None else [adapter.base])]


def refuse_own_data(output_dir: Path, *sources: str | None) -> None:
    """Refuse an output_dir whose files would be read as rows.

    Raises:
        ValueError: it lies in a folder of data, or its files match a glob; names both.
    """
    place = output_dir.resolve()
    for source in filter(None, sources):
        path = Path(source).expanduser()
        inside = path.is_dir() and place.is_relative_to(path.resolve())
        pattern = str(path.absolute())
        if inside or any((place / name).match(pattern) for name in RECORDS):
            raise ValueError(
                f"output_dir {output_dir}: its files would be read as rows of {source}: take "
                "another output_dir"
            )
