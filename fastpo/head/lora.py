"""A low-rank delta of the head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Lora(NamedTuple):
    """Hold a low-rank delta of the head: its logits are h W^T + scaling (h A^T) B^T, W as it is."""

    a: Tensor  # [r, D]
    b: Tensor  # [V, r]
    scaling: float = 1.0

    def check(self, weight: Tensor) -> None:
        """Raise ValueError where the factors do not fit a weight [V, D]."""
        (vocab_size, width), rank = weight.shape, self.a.shape[0]
        if self.a.shape != (rank, width) or self.b.shape != (vocab_size, rank):
            raise ValueError(
                f"lora must be A [r, {width}] and B [{vocab_size}, r]: got {tuple(self.a.shape)} "
                f"and {tuple(self.b.shape)}"
            )
