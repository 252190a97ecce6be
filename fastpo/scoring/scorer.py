"""Score packed batches with models that are not trained, and check them on the data first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastpo.batch import Batch
from fastpo.data.groups import Group
from fastpo.data.packing import collate
from fastpo.head.head import Head
from fastpo.model.adapters import adapter_off
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import target_hidden
from fastpo.model.limits import Positions, Vocabulary
from fastpo.model.self_check import CHECKED, self_check


class HasHead(Protocol):
    """Hold a model and its head."""

    model: Any
    head: Head


class Scorer:
    """Run a frozen model in evaluation mode that returns log-probabilities."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()
        self.head = read_head(model)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Return the [N, D] states that predict the batch's target tokens."""
        return target_hidden(self.model, batch).to(self.head.weight.dtype)

    @torch.no_grad()
    def logps(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return [N] log-probabilities of the batch's target tokens."""
        return self.head.logps(hidden, batch.tokens.targets)

    def __call__(self, batch: Batch) -> Tensor:
        """Return [N] log-probabilities of the batch's target tokens."""
        return self.logps(self.hidden(batch), batch)


class AdapterOff(Scorer):
    """Run the model of another scorer, its adapter switched off."""

    def __init__(self, adapted: Scorer) -> None:
        self.model, self.head = adapted.model, adapted.head

    def __call__(self, batch: Batch) -> Tensor:
        """Return the base model's [N] log-probabilities of the batch's target tokens."""
        with adapter_off(self.model):
            return super().__call__(batch)


class Packer:
    """Pack groups into batches on the scorers' device, each of which is checked first.

    Attributes:
        vocabulary: the token ids that every scorer takes.
        share_prompt: one prompt copy per group, where the self-check of every scorer allows it.

    Raises:
        SelfCheckError: as `fastpo.model.self_check.self_check`.
        ValueError: a token beyond a scorer's embedding, or a row beyond its table of positions.
    """

    def __init__(
        self,
        scorers: Sequence[HasHead],
        groups: Sequence[Group],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        models = [scorer.model for scorer in scorers]
        self.vocabulary = Vocabulary.of(tokenizer, *models)
        self.vocabulary.check_groups(groups)
        Positions.of(*models).check_groups(groups)
        self.pad_token_id = self.vocabulary.padding
        self.device = scorers[0].head.weight.device
        self.share_prompt = all(
            self_check(s.model, s.head, groups[:CHECKED], self.pad_token_id).share_prompt
            for s in scorers
        )

    def __call__(self, groups: list[Group]) -> Batch:
        """Return one packed batch on the scorers' device."""
        form = {"share_prompt": self.share_prompt, "pad_token_id": self.pad_token_id}
        return collate(groups, **form).to(self.device)
