"""From what a caller gives to what a run works on: layers as configured, data as judged groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.hidden import refuse_prompt_learning
from fastpo.model.layer_kernels import use_layer_kernels
from fastpo.model.load import disable_dropout
from fastpo.model.tiled_mlp import tile_mlps
from fastpo.run.folder import RunFolder
from fastpo.train.batches import as_groups
from fastpo.train.config import PreferenceConfig
from fastpo.train.metrics import refuse_missing_trackers
from fastpo.train.optimizers import require_optimizer
from fastpo.train.preflight import DataCheck


def refuse_early(model: nn.Module, args: PreferenceConfig, *, trains: bool) -> None:
    """Refuse what needs no work to be seen, before a model is copied or a row is read.

    Args:
        model: the policy.
        args: the configuration.
        trains: whether there is training data, so that files will be written.

    Raises:
        PackageError: a tracker or an optimiser that is not installed.
        ValueError: an adapter of tokens, or files of others in `output_dir`.
    """
    refuse_missing_trackers(args.report_to or ())
    require_optimizer(args)
    refuse_prompt_learning(model)
    if trains and args.process_index == 0:  # before anything lies there
        RunFolder.at(str(args.output_dir)).refuse_others(alone=args.push_to_hub)


def prepare_layers(models: Sequence[PreTrainedModel | Any], args: PreferenceConfig) -> None:
    """Switch dropout off and put the configured kernels and tiles into every model's layers."""
    for model in models:
        if args.disable_dropout:
            disable_dropout(model)
        use_layer_kernels(model, args.layer_kernels, args.device)
        if args.mlp_tile is not None:
            tile_mlps(model, args.mlp_tile)


def has_stream(*data: Any) -> bool:
    """Return whether one of these, in any form that the trainer takes, has no known length."""
    each = [d for item in data for d in (item.values() if isinstance(item, Mapping) else [item])]
    return any(not isinstance(d, Sized | Path | None) for d in each)


@dataclass(frozen=True)
class GroupMaker:
    """Make groups of data in any form, and judge them.

    Args:
        tokenizer: the policy's.
        args: the configuration.
        loss: the objectives.
        check: what groups are held against.
    """

    tokenizer: PreTrainedTokenizerBase
    args: PreferenceConfig
    loss: PreferenceLoss
    check: DataCheck

    def __call__(self, data: Any, source: str) -> Any:
        """Return the groups of data that messages call `source`; None stays None.

        Raises:
            ValueError: a group that cannot be trained on; names source and row.
        """
        if data is None:
            return None
        wanted = {"extras": self.loss.extras, "needs": self.loss.needs}
        groups = as_groups(data, self.tokenizer, self.args, **wanted, source=source)
        self.check(groups)
        return groups

    def by_name(self, data: Any, source: str) -> Any:
        """Return the groups of data, or of each of several by name."""
        if isinstance(data, dict):
            return {name: self(each, f"{source} {name}") for name, each in data.items()}
        return self(data, source)
