"""A language model's head: its tensors, and what turns their products into logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastpo.head.lora import Lora
from fastpo.head.spec import HeadSpec
from fastpo.head.statistics import token_statistics
from fastpo.head.tensors import HeadTensors


@dataclass(frozen=True)
class Head:
    """Hold a language model's head: its facts are read once, its tensors at every call.

    `fastpo.read_head(model)` makes it from a model. A bare `lm_head` does not tell what its model
    does to the logits (Gemma 2, Cohere, Granite): built by hand, the facts below are yours to give.

    Args:
        module: the output embedding, anything with a `weight` [V, D] and perhaps a `bias` [V].
        softcap: final logit soft-cap (Gemma 2), or None.
        logit_scale: factor on the products (Cohere's `logit_scale`, Granite's 1/`logits_scaling`).
        temperature: divisor of the logits, after the soft-cap.
        vocab_size: vocabulary rows that stand for tokens; the padding after them gets no
            probability. None for all of them.

    Attributes:
        spec: the facts above as one object.

    Raises:
        ValueError: facts that `HeadSpec` refuses.
    """

    module: nn.Module
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    vocab_size: int | None = None
    spec: HeadSpec = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", HeadSpec(**self.facts()))

    @property
    def tensors(self) -> HeadTensors:
        """Return the tensors as the module holds them now: an adapter may have switched them."""
        return HeadTensors(self.weight, self.bias, self.lora)

    @property
    def weight(self) -> Tensor:
        """Return the weight [V, D], as the module holds it now."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Return the bias [V], or None."""
        return getattr(self.module, "bias", None)

    @property
    def lora(self) -> Lora | None:
        """Return the low-rank delta that is active now."""
        return None

    def facts(self) -> dict[str, Any]:
        """Return the facts as the keyword arguments of `linear_stats` and its relatives."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
        }

    def logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return [N] log-probs of labels [N] from states [N, D], cast to the weight's dtype."""
        head = self.tensors
        hidden = hidden.to(head.weight.dtype)
        return token_statistics(hidden, head, labels, want=("logps",), spec=self.spec)["logps"]
