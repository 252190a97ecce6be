r"""Compute token masks from a reference's hidden states: learned (SparsePO) or fixed (MaPO).

With $h^{(i)}_t$ the output of layer i at the position that predicts token t:

| kind | masks |
|---|---|
| `common` | $a_t = (\sum_i m_i (w_i \cdot LN(h^{(i)}_t) + b_i)_+)_+$, with $x_+ = \max(x, 0)$ |
| `independent` | one such $a_t$ for log-probs and a second one, $d_t$, for divergences |
| `activation` | mean of $h^{(i)}_t$, rescaled to [0, 1] in its response, averaged over i |

They are token weights: objectives contain them, and give the learned ones their gradient and their
price (`sparse_po`). The layer norm is shared by the layers of a mask. Paper:
https://arxiv.org/abs/2410.05102. Its code averages the fixed mask over activations inside attention
and MLP too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastpo.model.hidden import decoder_of
from fastpo.segments import Segments

MaskKind = Literal["common", "independent", "activation"]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's layers, in order.

    Raises:
        ValueError: no list of as many modules as the model has layers.
    """
    decoder = decoder_of(model)
    count = decoder.config.num_hidden_layers
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(
        f"{type(decoder).__name__} has no list of its {count} layers: token_masks cannot read "
        "their hidden states"
    )


@contextmanager
def layer_states(model: nn.Module, index: Tensor) -> Iterator[list[Tensor]]:
    """Collect the output [N, D] of every layer at `index` while `model` runs inside.

    Args:
        model: a causal language model, wrapped or not.
        index: [N] flat positions of a batch, its `head_positions`.
    """
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden.flatten(0, 1).index_select(0, index))

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class LearnedMask(nn.Module):
    """Compute one mask [N], not negative, from the states of all layers; see the module's table.

    Args:
        num_layers, hidden_size: sizes of the reference.
        dropout: rate for each layer's part and for the mask.
    """

    def __init__(self, num_layers: int, hidden_size: int, dropout: float = 0.01) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.layers = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(num_layers))
        self.mixer = nn.Linear(num_layers, 1, bias=False)
        # A negative sum is cut to 0 and gives no gradient, so a mixer of negative numbers, likely
        # where layers are few, would stay where it is for ever.
        nn.init.uniform_(self.mixer.weight, 0, num_layers**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Map [N, D] of each layer to a mask [N]."""
        dtype = self.mixer.weight.dtype
        parts = [
            self.dropout(layer(self.norm(state.to(dtype))).relu())
            for layer, state in zip(self.layers, states, strict=True)
        ]
        return self.dropout(self.mixer(torch.cat(parts, -1)).relu()).squeeze(-1)


def activation_mask(states: Sequence[Tensor], segments: Segments) -> Tensor:
    """Map [N, D] of each layer to [N] in [0, 1]; 1 in responses whose tokens are all alike.

    >>> states = [torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]])]
    >>> table = Segments(torch.tensor([0, 0, 0]), torch.tensor([[0]]), torch.tensor([[True]]), 1)
    >>> activation_mask(states, table)
    tensor([0.0000, 1.0000, 0.5000])
    """
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    means = torch.stack([state.mean(-1, dtype=dtype) for state in states])
    response = segments.response.expand_as(means)
    bounds = means.new_zeros(len(means), segments.num_responses)
    low, high = (
        bounds.scatter_reduce(1, response, means, kind, include_self=False).gather(1, response)
        for kind in ("amin", "amax")
    )
    spread = high - low
    return torch.where(spread > 0, (means - low) / spread.where(spread > 0, 1), 1).mean(0)


class TokenMasks(nn.Module):
    """Compute weights of tokens, as `PreferenceLoss` takes them, from a reference's layers.

    Args:
        kind: see the module's table; `activation` has no parameters.
        num_layers, hidden_size, dropout: arguments of learned masks.
    """

    def __init__(
        self, kind: MaskKind, num_layers: int, hidden_size: int, dropout: float = 0.01
    ) -> None:
        super().__init__()
        names = {"common": ["token_weights"], "independent": ["token_weights", "kl_weights"]}
        self.learned = nn.ModuleDict(
            {name: LearnedMask(num_layers, hidden_size, dropout) for name in names.get(kind, [])}
        )

    def forward(
        self, states: Sequence[Tensor], segments: Segments, token_weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `token_weights` [N], also `kl_weights` [N] for independent masks.

        Both are multiplied by the `token_weights` that are passed, if any.
        """
        # Log-probs are float32 under autocast too, and a weight rounds them like any factor.
        with torch.autocast(segments.response.device.type, enabled=False):
            masks = {name: mask(states) for name, mask in self.learned.items()}
        masks = masks or {"token_weights": activation_mask(states, segments)}
        if token_weights is None:
            return masks
        return {name: mask * token_weights for name, mask in masks.items()}
