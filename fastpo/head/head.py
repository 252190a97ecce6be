"""A language model's head: its tensors, and what turns their products into logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastpo.head.functional import linear_logps
from fastpo.head.lora import Lora


@dataclass(frozen=True)
class Head:
    """A language model's head: its facts are read once, its tensors at every call.

    `fastpo.read_head(model)` makes it from a model. A bare `lm_head` does not tell what its model
    does to the logits (Gemma 2, Cohere, Granite): built by hand, the facts below are yours to give.

    Args:
        module: the output embedding, anything with a `weight` [V, D] and perhaps a `bias` [V].
        softcap: final logit soft-cap (Gemma 2), or None.
        logit_scale: factor on the products (Cohere's `logit_scale`, Granite's 1/`logits_scaling`).
        temperature: divisor of the logits, after the soft-cap.
        vocab_size: rows of the weight that stand for tokens; the padding after them gets no
            probability. None for all of them.
    """

    module: nn.Module
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    vocab_size: int | None = None

    @property
    def weight(self) -> Tensor:
        """[V, D], as the module holds it now: an adapter may have switched it."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """[V] or None."""
        return getattr(self.module, "bias", None)

    @property
    def lora(self) -> Lora | None:
        """The low-rank delta that is active now."""
        return None

    def facts(self) -> dict[str, Any]:
        """The keyword arguments that `linear_stats` and its relatives take."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
        }

    def logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[N] log-probs of the labels [N] from states [N, D], cast to the weight's dtype."""
        weight = self.weight
        return linear_logps(
            hidden.to(weight.dtype), weight, labels, bias=self.bias, lora=self.lora, **self.facts()
        )
