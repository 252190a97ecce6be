"""Whom the head is compared with: each imported from its library and called as that library does.

A token op maps (hidden [N, D], weight [V, D], labels [N]) to log-probs [N]. A step maps
(hidden, weight, labels, ref_hidden, num_pairs) to the scalar DPO loss of 2B equally long responses,
the B chosen ones first, with the reference's log-probs taken from `ref_hidden` and the same head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpo

BETA = 0.1
TRL_CHUNK = 32768  # TRL's own `_CHUNKED_LOGPROB_CHUNK_SIZE`
TokenOp = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class Unavailable(Exception):
    """Say that a contender cannot run here; the message has the reason, and the record keeps it."""


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute what everyone writes first: three [N, V] matrices."""
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, dim=-1).gather(1, labels[:, None]).squeeze(1)


def compiled(device: torch.device) -> TokenOp:
    """Build `eager` under torch.compile, specialised on the shape."""
    torch._dynamo.reset()  # Every shape is its own specialisation, and there is a limit of eight.
    return torch.compile(eager, dynamic=False)


def torch_chunked(device: torch.device) -> TokenOp:
    """Build `F.linear_cross_entropy` on its chunked path."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none", options=options)


def trl(device: torch.device) -> TokenOp:
    """Build TRL's fused head; `outputs=()` spares it the statistics that nobody asked for."""
    _require("trl", "trl")
    from trl.kernels import ChunkedLogProbFunction

    def run(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(h, w, None, y, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    return run


def cce(device: torch.device) -> TokenOp:
    """Build cut cross-entropy: its kernel on CUDA, its torch.compile form elsewhere."""
    _require("cut_cross_entropy", "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if device.type == "cuda" else "torch_compile"
    return lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", impl=impl)


def _on_token_op(build: Callable[[torch.device], TokenOp]) -> Callable[[torch.device], Step]:
    """Make a step from a token op, for libraries that leave the loss to plain PyTorch."""

    def builder(device: torch.device) -> Step:
        op = build(device)

        def step(h: Tensor, w: Tensor, y: Tensor, ref_hidden: Tensor, num_pairs: int) -> Tensor:
            with torch.no_grad():
                ref = op(ref_hidden, w, y)
            chosen, rejected = (op(h, w, y) - ref).view(2, num_pairs, -1).sum(-1)
            return -F.logsigmoid(BETA * (chosen - rejected)).mean()

        return step

    return builder


def fastpo_step(device: torch.device, **options: Any) -> Step:
    """Build `fastpo.PreferenceLoss`, padded layout; options of its call."""
    loss = fastpo.PreferenceLoss("dpo", beta=BETA)

    def step(h: Tensor, w: Tensor, y: Tensor, ref_hidden: Tensor, num_pairs: int) -> Tensor:
        rows = 2 * num_pairs
        return loss(
            h.view(rows, -1, h.shape[-1]),
            y.view(rows, -1),
            weight=w,
            ref_hidden=ref_hidden.view(rows, -1, h.shape[-1]),
            ref_weight=w.detach(),
            **options,
        ).loss

    return step


def liger_step(device: torch.device) -> Step:
    """Build Liger's chunked DPO, a pair at a time; its torch.compile needs a GPU to pay off."""
    _require("liger_kernel", "liger-kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=device.type == "cuda")

    def step(h: Tensor, w: Tensor, y: Tensor, ref_hidden: Tensor, num_pairs: int) -> Tensor:
        rows = 2 * num_pairs
        return loss(
            w,
            h.view(rows, -1, h.shape[-1]),
            y.view(rows, -1),
            ref_input=ref_hidden.view(rows, -1, h.shape[-1]),
            ref_weight=w.detach(),
        )[0]

    return step


OURS = "fastpo"
TOKEN_OPS: dict[str, Callable[[torch.device], TokenOp]] = {
    OURS: lambda device: fastpo.linear_logps,
    "TRL": trl,
    "torch chunked": torch_chunked,
    "CCE": cce,
    "torch.compile": compiled,
    "eager": lambda device: eager,
}
STEPS: dict[str, Callable[[torch.device], Step]] = {
    OURS: fastpo_step,
    "Liger": liger_step,
    # The other two token ops would only repeat what `logps` says about them.
    **{name: _on_token_op(TOKEN_OPS[name]) for name in ("TRL", "CCE", "eager")},
}
