r"""Run MLPs in tiles of the sequence, so that inner activations exist for one tile at a time.

$$ y_{a:b} = \mathrm{mlp}(x_{a:b}) $$

holds exactly, since an MLP sees one token at a time. A Llama MLP keeps four [T, I] tensors for its
backward and forms three more there, 24 GiB for an 8B model at 128K tokens in bfloat16; in tiles of
`hidden_size` tokens it is 0.8 GiB. The forward keeps the MLP's input alone, and the backward runs
each tile again. Inside a checkpointed layer that costs nothing where the MLP comes last: the
layer's recomputation stops at the last tensor that its backward needs, the MLP's input. A layer
with a norm behind its MLP (Gemma 2) runs the MLP once more.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpo.model.hidden import causal_lm, decoder_of

log = logging.getLogger(__name__)


class _Keep(torch.autograd.Function):
    """Save x before the MLP has run, where `_Tiles` could only do so after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Tiles(torch.autograd.Function):
    """Compute mlp(x) by tiles; parameters are inputs: hooks of DDP and FSDP see one gradient."""

    @staticmethod
    def forward(ctx: Any, mlp: Any, tile: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.mlp, ctx.tile, ctx.parameters = mlp, tile, parameters
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return torch.cat([mlp(part) for part in x.split(tile, dim=-2)], dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.next_functions[0][0].saved_tensors  # of `_Keep`
        kind, dtype, enabled = ctx.autocast
        grad_x = torch.empty_like(x)
        # One rounding, as a matmul over the whole row has: partial sums stay in fp32.
        sums = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in ctx.parameters
        ]
        for part, part_grad, out in zip(
            *(t.split(ctx.tile, dim=-2) for t in (x, grad, grad_x)), strict=True
        ):
            part = part.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled):
                y = ctx.mlp(part)
            first, *others = torch.autograd.grad(y, (part, *ctx.parameters), part_grad)
            out.copy_(first)
            for total, other in zip(sums, others, strict=True):
                total += other
        weights = (s.to(p.dtype) for s, p in zip(sums, ctx.parameters, strict=True))
        return (None, None, grad_x, *weights)


def _tiled(module: nn.Module, x: Tensor) -> Tensor:
    """Run an MLP in tiles; its own forward is `module._untiled`."""
    state: Any = module
    if x.shape[-2] <= state._tile or not torch.is_grad_enabled():
        parts = x.split(state._tile, dim=-2)
        return torch.cat([state._untiled(part) for part in parts], dim=-2)
    trained = [p for p in module.parameters() if p.requires_grad]
    if not x.requires_grad:  # a frozen embedding before it: the graph starts here
        x = x.detach().requires_grad_()
    return _Tiles.apply(state._untiled, state._tile, _Keep.apply(x), *trained)  # pyright: ignore


def tile_mlps(model: nn.Module, tile: int | str) -> int:
    """Run the MLPs of `model` in tiles of so many tokens; returns how many layers have one.

    Adapters, quantised weights and activation checkpointing may come before or after. Rows no
    longer than a tile run as before. Mixtures of experts are left alone: their tokens are already
    spread over experts, and the router's statistics are of the whole row.

    Args:
        model: a transformers model, or a wrapper around one.
        tile: tokens; "auto" is the hidden size, with which a tile's inner activations are as large
            as the MLP's weights.

    Raises:
        ValueError: a tile below 1, dropout inside an MLP, or no layer with an MLP.
    """
    decoder = decoder_of(causal_lm(model))
    if tile == "auto":
        tile = int(decoder.config.hidden_size)
    if not isinstance(tile, int) or tile < 1:
        raise ValueError(f"mlp_tile={tile!r} must be at least 1 token, or 'auto'")
    count, skipped = 0, set()
    for layer in decoder.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for child in layer.children():
            if any(name.endswith(("experts", "router")) for name, _ in child.named_modules()):
                skipped.add(type(child).__name__)
            elif type(child).__name__.endswith("MLP"):
                _tile(child, tile)
                count += 1
    if skipped:
        log.info("not in tiles: %s, a mixture of experts", ", ".join(sorted(skipped)))
    if not count:
        raise ValueError(
            f"mlp_tile: no layer of {type(decoder).__name__} has an MLP that sees one token at a "
            "time: leave mlp_tile out"
        )
    return count


def _tile(mlp: nn.Module, tile: int) -> None:
    for part in mlp.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p:
            raise ValueError(
                f"mlp_tile: {type(mlp).__name__} has dropout {part.p}, and a tile that runs again "
                "would draw other noise: set disable_dropout or leave mlp_tile out"
            )
    state: Any = mlp
    state._tile = tile
    if "_untiled" not in mlp.__dict__:
        state._untiled = mlp.forward
        state.forward = MethodType(_tiled, mlp)
