"""Check that shared prompts and the fused head give the model's own numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature

import numpy as np
import torch
from torch import Tensor, nn

from fastpo.batch import Batch
from fastpo.data.groups import Group, Response
from fastpo.data.packing import collate
from fastpo.head.functional import logps_from_logits
from fastpo.head.head import Head
from fastpo.model.attention.shared_row import SharingError
from fastpo.model.device import seeded_draws
from fastpo.model.hidden import attach, causal_lm, decoder_of, mode, target_hidden

log = logging.getLogger(__name__)

CHECKED = 8
"""Number of groups that are looked at before a model's first batch."""
# So many tokens of a group are enough to see a wrong mask and cost next to nothing.
_PROMPT_TOKENS, _RESPONSE_TOKENS = 24, 8
# Gradients keep what every layer saw, 10 MB a token in a 7B model: 24 tokens of one pair.
_GRADIENT_TOKENS = 8, 4
_LARGEST = 2**20  # elements at most of a parameter whose gradient is compared


class SelfCheckError(RuntimeError, ValueError):
    """Refuse a model that would train on wrong numbers; another model is the cure."""


@dataclass(frozen=True)
class SelfCheck:
    """Hold results of `self_check`.

    Args:
        share_prompt: True where the shared row gave the padded rows' log-probs.
        reason: why not, or what was measured.
        sharing_error, sharing_bound: largest difference in log-probs and what rounding explains;
            None where no shared row was run.
        head_error, head_bound: the same for the fused head against the model's own logits.
        gradient_error, gradient_bound: largest difference of a gradient before and after the
            forwards in evaluation mode, and what rounding explains; None where nothing is trained.
    """

    share_prompt: bool
    reason: str
    sharing_error: float | None
    sharing_bound: float | None
    head_error: float
    head_bound: float
    gradient_error: float | None = None
    gradient_bound: float | None = None


def can_share_prompt(model: nn.Module) -> tuple[bool, str]:
    """Return (whether the architecture allows one prompt copy per group, the reason).

    The answer rests on what the architecture declares; `self_check` measures.
    """
    inner = causal_lm(model)
    name = inner.config.model_type
    try:
        decoder = decoder_of(inner)
    except ValueError as error:
        return False, str(error)
    config = decoder.config
    parts = (inner, decoder)
    if any(getattr(part, "_is_stateful", False) for part in parts):
        return False, f"{name} has recurrent state, which runs through the row token by token"
    if not all(part._supports_attention_backend for part in parts):
        return False, f"{name} does not take its attention from transformers' AttentionInterface"
    if not any(p.kind is p.VAR_KEYWORD for p in signature(decoder.forward).parameters.values()):
        return False, f"{name} takes no further keyword arguments, so no segment table"
    if not all(part._can_set_attn_implementation() for part in parts):
        return False, f"{name} cannot change its attention implementation"
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return False, f"{name} has {', '.join(other)} layers"
    if getattr(config, "use_bidirectional_attention", False):
        return False, f"{name} attends in both directions"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return False, f"{name} biases attention by row position (ALiBi)"
    return True, f"{name} takes its attention from transformers' AttentionInterface"


def self_check(
    model: nn.Module,
    head: Head,
    groups: Sequence[Group],
    pad_token_id: int,
    *,
    share_prompt: bool = True,
) -> SelfCheck:
    r"""Score a few shortened groups shared and padded, fused and through the model's own logits.

    The bounds are what rounding explains. Shared against padded: both run the same layers in
    another order of sums, so each of the 2L residual updates of L layers may differ by one rounding
    of its dtype. A padded run with every input embedding moved by one such rounding measures what
    that does to the log-probs (e); independent ones add up as $2 \sqrt{2L} \, e$. Head: logits
    rounded to the model's dtype (once by the matmul, up to three times by soft-cap and scale), at
    the target and in the log-sum-exp: $4 \epsilon \max|z|$, plus $2 \epsilon_{32} (|h| |W_v| +
    |\log p|)$ for fp32 sums in another order.

    Where anything is trained, gradients of a few small parameters are compared too, with bounds
    found in the same way: shared against padded, and in training mode before all this against
    after it, since a library may rebuild weights for inference at the first forward in evaluation
    mode.

    Args:
        model: an attached or plain causal language model, perhaps wrapped; attached on return.
        groups: any groups of the data; the first two with the most responses are used, shortened.
        share_prompt: False checks the head only.

    Returns:
        SelfCheck; a sharing mismatch is logged in one line and reported, not raised.

    Raises:
        SelfCheckError: the model's own logits are not finite, the fused head does not reproduce
            them, or gradients changed with a forward in evaluation mode.
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("self_check needs at least one group")
    attach(model)
    device = next(causal_lm(model).get_input_embeddings().parameters()).device
    small = _few(groups)

    def packed(groups: list[Group], shared: bool) -> Batch:
        return collate(groups, share_prompt=shared, pad_token_id=pad_token_id).to(device)

    batches = {shared: packed(small, shared) for shared in (False, True)}
    able, reason = can_share_prompt(model) if share_prompt else (False, "not asked for")
    error = bound = gradient_error = gradient_bound = None
    gradients = _Gradients(model, head)
    pair = replace(small[0], responses=small[0].responses[:2])
    tiny = [_shortened(pair, *_GRADIENT_TOKENS)]
    before = gradients(packed(tiny, False), training=True)
    with mode(model, training=False), torch.no_grad():
        # First: where the model itself is broken, sharing prompts is not what fails.
        jumps = any(group.prompt_positions is not None for group in small)
        head_error, head_bound = _compare_head(model, head, batches[False], jumps)
        if not head_error <= head_bound:
            raise SelfCheckError(
                f"the fused head differs from the model's own logits by {head_error:.2e} in "
                f"log-probs, rounding explains {head_bound:.2e}: "
                f"{type(causal_lm(model)).__name__} makes its logits in a way that "
                f"Head({head.facts()}) does not describe"
            )
        padded = _logps(model, head, batches[False])
        if able:
            try:
                error = largest(_logps(model, head, batches[True]) - padded)
            except SharingError as refusal:
                able, reason = False, str(refusal)
            else:
                bound = _sharing_bound(model, head, batches[False], padded)
                able = error <= bound
                reason = (
                    f"shared and padded log-probs differ by {error:.2e}, "
                    f"rounding explains {bound:.2e}"
                )
    if before:
        after = gradients(packed(tiny, False), training=True)
        plain = gradients(packed(tiny, False))
        with one_rounding(model):
            moved = gradients(packed(tiny, False))
        gradient_error, gradient_bound = gradients.compare(after, before, plain, moved)
        if not gradient_error <= gradient_bound:
            raise SelfCheckError(
                f"a forward in evaluation mode changed gradients by {gradient_error:.2e}, rounding "
                f"explains {gradient_bound:.2e}: a library rebuilds weights of "
                f"{type(causal_lm(model)).__name__} for inference; train it with another "
                "quantisation or kernel, or without"
            )
        if able:
            try:
                shared = gradients(packed(tiny, True))
            except NotImplementedError as refusal:  # FlexAttention on a CPU
                able, reason = False, str(refusal).partition(".")[0]
            else:
                off, explained = gradients.compare(shared, plain, plain, moved)
                if not off <= explained:
                    able = False
                    reason = (
                        f"gradients of shared and padded prompts differ by {off:.2e}, rounding "
                        f"explains {explained:.2e}"
                    )
    if share_prompt and not able:
        log.warning("prompts are not shared, every response gets its own row: %s", reason)
    return SelfCheck(
        able, reason, error, bound, head_error, head_bound, gradient_error, gradient_bound
    )


class _Gradients:
    """Compute gradients of a weighted sum of log-probs to a few small trained parameters."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        self.model, self.head = model, head
        trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
        small = [p for p in trained if p.numel() <= _LARGEST] or trained[:1]
        # Neighbours, since a fresh adapter's A has no gradient, and both ends of the model.
        self.parameters = small if len(small) <= 8 else [*small[:4], *small[-4:]]

    def __call__(self, batch: Batch, *, training: bool = False) -> list[Tensor]:
        """Return a float64 tensor a parameter; none without a gradient or if not finite."""
        if not self.parameters:
            return []
        targets = batch.tokens.targets
        device = targets.device
        # Seeded, so that dropout is the same each time.
        with mode(self.model, training=training), torch.enable_grad(), seeded_draws(device):
            logps = self.head.logps(target_hidden(self.model, batch), targets)
            if not logps.requires_grad:
                return []
            weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype, device=device)
            gradients = torch.autograd.grad(
                logps @ weights, self.parameters, allow_unused=True, materialize_grads=True
            )
        finite = all(bool(g.isfinite().all()) for g in gradients)
        return [g.double() for g in gradients] if finite else []

    def compare(
        self, now: list[Tensor], then: list[Tensor], plain: list[Tensor], moved: list[Tensor]
    ) -> tuple[float, float]:
        """Return (difference, what rounding explains) for the parameter furthest beyond its bound.

        Args:
            now, then: the gradients to compare.
            plain, moved: gradients without and with every input embedding moved by one rounding.
        """
        if not (now and plain and moved):  # gradients were there, and are gone
            return float("inf"), 0.0
        eps = torch.finfo(self.head.weight.dtype).eps
        pairs = [
            (largest(a - b), rounding_bound(self.model, largest(d - c), eps * largest(c)))
            for a, b, c, d in zip(now, then, plain, moved, strict=True)
        ]
        return max(pairs, key=lambda pair: pair[0] - pair[1])


def few_tokens(groups: Sequence[Group], pad_token_id: int, device: torch.device) -> Batch:
    """Return a padded batch of the two groups with the most responses, shortened."""
    return collate(_few(groups), share_prompt=False, pad_token_id=pad_token_id).to(device)


def _few(groups: Sequence[Group]) -> list[Group]:
    return [_shortened(g) for g in sorted(groups, key=lambda group: -len(group.responses))[:2]]


def _shortened(
    group: Group, prompt_tokens: int = _PROMPT_TOKENS, response_tokens: int = _RESPONSE_TOKENS
) -> Group:
    def cut(response: Response) -> Response:
        ids, prompt = response.input_ids[:response_tokens], response.prompt_ids
        return replace(
            response,
            input_ids=ids,
            loss_mask=np.ones(len(ids), dtype=bool),
            token_weights=None,
            token_rewards=None,
            prompt_ids=None if prompt is None else prompt[-prompt_tokens:],
        )

    positions = group.prompt_positions
    return replace(
        group,
        prompt_ids=group.prompt_ids[-prompt_tokens:],
        prompt_positions=None if positions is None else positions[-prompt_tokens:],
        responses=[cut(response) for response in group.responses],
        extras={role: cut(response) for role, response in group.extras.items()},
    )


def _logps(model: nn.Module, head: Head, batch: Batch) -> Tensor:
    return head.logps(target_hidden(model, batch), batch.tokens.targets).double()


def largest(difference: Tensor) -> float:
    """Return the largest magnitude; NaN, which no bound admits, counts as infinite."""
    return difference.abs().nan_to_num(nan=float("inf")).max().item()


@contextmanager
def one_rounding(model: nn.Module) -> Iterator[None]:
    """Move every input embedding by one rounding of its dtype while inside."""

    def move(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        eps = torch.finfo(output.dtype).eps
        signs = torch.ones(output.shape[-1], device=output.device, dtype=output.dtype)
        signs[::2] = -1
        return output * (1 + eps * signs)

    hook = decoder_of(model).get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def rounding_bound(model: nn.Module, moved: float, last: float) -> float:
    """Bound what rounding explains.

    Args:
        moved: change of a value when the input embeddings move by one rounding.
        last: one rounding of the value itself.
    """
    layers = decoder_of(model).config.num_hidden_layers
    return 2 * (2 * layers) ** 0.5 * (moved + last)


def _sharing_bound(model: nn.Module, head: Head, batch: Batch, logps: Tensor) -> float:
    with one_rounding(model):
        moved = largest(_logps(model, head, batch) - logps)
    eps = torch.finfo(head.weight.dtype).eps
    return rounding_bound(model, moved, eps * largest(logps))


def _compare_head(model: nn.Module, head: Head, batch: Batch, jumps: bool) -> tuple[float, float]:
    """Return (largest difference in log-probs, bound by rounding); `jumps`: positions have some."""
    targets, index = batch.tokens.targets, batch.head_positions
    # Not every family takes position_ids: without jumps a padded row counts from 0 by itself.
    names = ("input_ids", "attention_mask", *(["position_ids"] if jumps else []))
    inputs = {name: getattr(batch, name) for name in names}
    logits = causal_lm(model)(**inputs, use_cache=False).logits.flatten(0, 1)[index]
    logits = logits[:, : head.vocab_size]
    plain = logps_from_logits(logits, targets, temperature=head.temperature).double()
    if bool(plain.isnan().any()):
        name = type(causal_lm(model)).__name__
        broken = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
        raise SelfCheckError(
            f"{name} gives NaN: {len(broken)} of its weights hold NaN or infinity, the first is "
            f"{broken[0]}; load another checkpoint"
            if broken
            else f"{name} gives NaN with finite weights: {logits.dtype} overflows; load it with "
            "dtype=float32"
        )
    hidden = target_hidden(model, batch)
    error = largest(head.logps(hidden, targets).double() - plain)

    weight = head.weight
    raw = (hidden.to(weight.dtype) @ weight.T).abs().max().item() * abs(head.logit_scale)
    norms = (
        hidden.float().norm(dim=-1).max()
        * torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).max()
    )
    rounding = 4 * torch.finfo(logits.dtype).eps * max(raw, 1.0)
    eps = torch.finfo(torch.float32).eps
    summation = eps * norms.item() * abs(head.logit_scale) / head.temperature
    # Where the weights are small, the log-probs are near -log V and their own rounding is most.
    logps = eps * plain.abs().max().item()
    return error, rounding / head.temperature + 2 * (summation + logps)
