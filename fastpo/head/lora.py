"""A low-rank delta of the head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Lora(NamedTuple):
    """A low-rank delta of the head: its logits are h W^T + scaling (h A^T) B^T, W as it is."""

    a: Tensor  # [r, D]
    b: Tensor  # [V, r]
    scaling: float = 1.0


def check_lora(lora: Lora, weight: Tensor) -> None:
    (vocab_size, width), rank = weight.shape, lora.a.shape[0]
    if lora.a.shape != (rank, width) or lora.b.shape != (vocab_size, rank):
        raise ValueError(
            f"lora must be A [r, {width}] and B [{vocab_size}, r]: got {tuple(lora.a.shape)} and "
            f"{tuple(lora.b.shape)}"
        )
