"""Token masks in a run: fed by the reference's layers, trained by the run's own optimiser.

The masks are no part of the model, which is saved without them. So what the Trainer does to the
model's gradients is done here to theirs: the mean over ranks, clipping by their norm, zeroing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from fastpo.batch import Batch
from fastpo.distributed import gather_rows
from fastpo.model.hidden import decoder_of
from fastpo.model.masks import MaskKind, TokenMasks, layer_states
from fastpo.reference.live import Compared, Reference
from fastpo.train.config import PreferenceConfig

FILE = "token_masks.safetensors"
DROPOUT = 0.01  # SparsePO's


class MaskTraining(TrainerCallback):
    """Train masks of a run's tokens.

    Args:
        kind: of the masks.
        source: the model whose layers they read: what the reference runs.
        seed: of their first values.
        dropout: of the masks.
        max_grad_norm: of their gradients; 0 does not clip.
    """

    def __init__(
        self, kind: MaskKind, source: nn.Module, *, seed: int, dropout: float, max_grad_norm: float
    ) -> None:
        self.source, self.max_grad_norm = source, max_grad_norm
        decoder = decoder_of(source)
        config = decoder.config
        with torch.random.fork_rng():  # the order of the data is to be the same without masks
            torch.manual_seed(seed)
            masks = TokenMasks(kind, config.num_hidden_layers, config.hidden_size, dropout)
        self.masks = masks.to(decoder.device, torch.promote_types(decoder.dtype, torch.float32))

    @classmethod
    def of(cls, args: PreferenceConfig, source: nn.Module) -> MaskTraining:
        """Return the masks that a run is configured to train."""
        assert args.token_masks != "none"
        return cls(
            args.token_masks,
            source,
            seed=args.seed,
            dropout=0.0 if args.disable_dropout else DROPOUT,
            max_grad_norm=args.max_grad_norm,
        )

    def __call__(self, reference: Reference, model: nn.Module, batch: Batch) -> Compared:
        """Return what the reference does, with the weights that the masks make of its layers."""
        self.masks.train(model.training)
        with layer_states(self.source, batch.for_reference.head_positions) as states:
            tokens, of_reference = reference(model, batch)
        weights = self.masks(states, tokens.segments, tokens.token_weights)
        return Compared(replace(tokens, **weights), of_reference)

    def add_to(self, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
        """Add the masks as one more group of parameters, unless the optimiser has them."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        new = [p for p in self.masks.parameters() if id(p) not in known]
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": weight_decay})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average and clip the masks' gradients, as the model's own are by now."""
        learned = list(self.masks.parameters())
        for parameter in learned:
            assert parameter.grad is not None
            parameter.grad = gather_rows(parameter.grad[None]).mean(0)
        if self.max_grad_norm > 0 and learned:
            nn.utils.clip_grad_norm_(learned, self.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero the masks' gradients; the Trainer zeroes what the model holds."""
        self.masks.zero_grad()

    def save(self, folder: Path) -> None:
        """Write the masks into a checkpoint."""
        save_file(self.masks.state_dict(), folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the checkpoint has no such file.
        """
        if not (folder / FILE).is_file():
            raise ValueError(
                f"{folder} holds no {FILE}: it was saved without token_masks and cannot be resumed "
                "with them"
            )
        self.masks.load_state_dict(load_file(folder / FILE))
