"""The tensors of one head, and the states that a reference brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fastpo.head.lora import Lora


class HeadTensors(NamedTuple):
    """Hold the tensors of one head of V vocabulary rows and width D."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    lora: Lora | None = None

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by name: weight, bias, lora_a, lora_b."""
        named = {"weight": self.weight, "bias": self.bias}
        if self.lora is not None:
            named |= {"lora_a": self.lora.a, "lora_b": self.lora.b}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_leaves(self, leaves: Mapping[str, Tensor]) -> HeadTensors:
        """Return the same head with other tensors, as `leaves` names them."""
        lora = self.lora
        if lora is not None:
            lora = lora._replace(a=leaves["lora_a"], b=leaves["lora_b"])
        return HeadTensors(leaves["weight"], leaves.get("bias"), lora)

    def check(self) -> None:
        """Raise ValueError for what is no head."""
        weight, bias, lora = self
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"weight must be a tensor [V, D], not a {type(weight).__name__}: for a model, "
                "head = fastpo.read_head(model), then head.weight and **head.facts()"
            )
        if weight.dim() != 2:
            raise ValueError(f"weight must be [V, D]: got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}]: got {tuple(bias.shape)}")
        if lora is not None:
            lora.check(weight)


class ReferenceStates(NamedTuple):
    """Hold what the reference model brings to a pass; it gets no gradient."""

    hidden: Tensor  # [N, D']
    # None: the policy's own head without its low-rank delta.
    head: HeadTensors | None = None
