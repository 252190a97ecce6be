"""Can this model share prompts, and do shared prompts and the fused head give its own numbers?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpo.data.groups import Group, Response
from fastpo.data.packing import collate
from fastpo.head import Head, logps_from_logits
from fastpo.model.hidden import attach, causal_lm, decoder_of, label_hidden
from fastpo.model.shared_row import SharingError

logger = logging.getLogger(__name__)

# Of a group's tokens, these many are enough to see a wrong rule and cost next to nothing.
_PROMPT_TOKENS, _RESPONSE_TOKENS = 24, 8


class SelfCheckError(RuntimeError, ValueError):
    """A model that would train on wrong numbers; a ValueError, since another model is the cure."""


@dataclass(frozen=True)
class SelfCheck:
    """What `self_check` found.

    Args:
        share_prompt: True where the shared row gave the padded rows' log-probs.
        reason: why not, or what was measured.
        sharing_error, sharing_bound: largest difference in log-probs and what rounding explains;
            None where no shared row was run.
        head_error, head_bound: the same of the fused head against the model's own logits.
    """

    share_prompt: bool
    reason: str
    sharing_error: float | None
    sharing_bound: float | None
    head_error: float
    head_bound: float


def can_share_prompt(model: nn.Module) -> tuple[bool, str]:
    """Whether this model's architecture allows one prompt copy per group, and why (not).

    A yes is a promise of the architecture's declarations only; `self_check` measures.
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


def check_positions(model: nn.Module, groups: Iterable[Group]) -> None:
    """One warning where synthetic positions pass those that the model was made for.

    Raises:
        ValueError: they do, and the model looks positions up in a table.
    """
    config = decoder_of(model).config
    most = getattr(config, "max_position_embeddings", None)
    reach = max((g.span for g in groups if g.prompt_positions is not None), default=0)
    if most is None or reach <= most:
        return
    told = f"synthetic positions reach over {reach}, {config.model_type} was made for {most}"
    if getattr(config, "rope_parameters", None) is None:
        raise ValueError(f"{told}: lower position_synthesis.length")
    logger.warning("%s: beyond, it has seen nothing yet; or scale its rotary embedding", told)


def embedding_rows(*models: nn.Module | None) -> int:
    """How many token ids every one of the models takes; None is no model."""
    weights: list[Any] = [
        next(causal_lm(model).get_input_embeddings().parameters())
        for model in models
        if model is not None
    ]
    # ZeRO-3 leaves an empty tensor and keeps its shape beside it.
    return min(getattr(weight, "ds_shape", weight.shape)[0] for weight in weights)


def check_token_ids(ids: Sequence[int] | np.ndarray, rows: int, where: str) -> None:
    """Nothing, or ValueError for a token beyond an embedding of `rows`: a GPU would only abort."""
    beyond = np.asarray(ids)[np.asarray(ids) >= rows]
    if len(beyond):
        raise ValueError(
            f"{where}: token {beyond[0]} of the rows is beyond the model's embedding of {rows} "
            "rows: name the tokenizer that the model was trained with, or resize the embedding "
            "(`model.resize_token_embeddings`)"
        )


def check_tokens(groups: Iterable[Group], rows: int) -> None:
    """Nothing, or the first group with a token beyond an embedding of `rows`.

    A larger vocabulary whose tokens do not occur in the groups does no harm.

    Raises:
        ValueError: names source and row, token and size.
    """
    for group in groups:
        check_token_ids(group.token_ids, rows, f"{group.source or 'data'}, row {group.row}")


def padding_token(tokenizer: Any, rows: int) -> int:
    """A token to pad with: masked and never scored, so any that the embedding has will do."""
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) and pad < rows else 0


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
    rounded to the model's dtype (once by the product, up to three times by soft-cap and scale), at
    the label and in the log-sum-exp: $4 \epsilon \max|z|$, plus $2 \epsilon_{32} (|h| |W_v| +
    |\log p|)$ for fp32 sums in another order.

    Args:
        model: an attached or plain causal language model, perhaps wrapped; attached on return.
        groups: any groups of the data; the first two with the most responses are used, shortened.
        share_prompt: False checks the head only.

    Returns:
        SelfCheck; a sharing mismatch is logged in one line and reported, not raised.

    Raises:
        SelfCheckError: the model's own logits are not finite, or the fused head does not
            reproduce them.
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("self_check needs at least one group")
    attach(model)
    device = next(causal_lm(model).get_input_embeddings().parameters()).device
    chosen = sorted(groups, key=lambda group: -len(group.responses))[:2]
    small = [_shortened(group) for group in chosen]
    batches = {
        shared: _to(collate(small, share_prompt=shared, pad_token_id=pad_token_id), device)
        for shared in (False, True)
    }
    able, reason = can_share_prompt(model) if share_prompt else (False, "not asked for")
    error = bound = None
    with _evaluating(model), torch.no_grad():
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
                error = _largest(_logps(model, head, batches[True]) - padded)
            except SharingError as refusal:
                able, reason = False, str(refusal)
            else:
                bound = _sharing_bound(model, head, batches[False], padded)
                able = error <= bound
                reason = (
                    f"shared and padded log-probs differ by {error:.2e}, "
                    f"rounding explains {bound:.2e}"
                )
    if share_prompt and not able:
        logger.warning("prompts are not shared, every response gets its own row: %s", reason)
    return SelfCheck(able, reason, error, bound, head_error, head_bound)


def _shortened(group: Group) -> Group:
    def cut(response: Response) -> Response:
        ids, prompt = response.input_ids[:_RESPONSE_TOKENS], response.prompt_ids
        return replace(
            response,
            input_ids=ids,
            loss_mask=np.ones(len(ids), dtype=bool),
            token_weights=None,
            token_rewards=None,
            prompt_ids=None if prompt is None else prompt[-_PROMPT_TOKENS:],
        )

    positions = group.prompt_positions
    return replace(
        group,
        prompt_ids=group.prompt_ids[-_PROMPT_TOKENS:],
        prompt_positions=None if positions is None else positions[-_PROMPT_TOKENS:],
        responses=[cut(response) for response in group.responses],
        extras={role: cut(response) for role, response in group.extras.items()},
    )


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _logps(model: nn.Module, head: Head, batch: dict[str, Any]) -> Tensor:
    return head.logps(label_hidden(model, batch), batch["targets"]).double()


def _largest(difference: Tensor) -> float:
    """Largest magnitude; NaN, which no bound admits, counts as infinite."""
    return difference.abs().nan_to_num(nan=float("inf")).max().item()


def _sharing_bound(model: nn.Module, head: Head, batch: dict[str, Any], logps: Tensor) -> float:
    decoder = decoder_of(model)
    embeddings = decoder.get_input_embeddings()

    def one_rounding(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        eps = torch.finfo(output.dtype).eps
        signs = torch.ones(output.shape[-1], device=output.device, dtype=output.dtype)
        signs[::2] = -1
        return output * (1 + eps * signs)

    hook = embeddings.register_forward_hook(one_rounding)
    try:
        moved = _largest(_logps(model, head, batch) - logps)
    finally:
        hook.remove()
    eps = torch.finfo(head.weight.dtype).eps
    scale = logps.abs().max().item()
    return 2 * (2 * decoder.config.num_hidden_layers) ** 0.5 * (moved + eps * scale)


def _compare_head(
    model: nn.Module, head: Head, batch: dict[str, Any], jumps: bool
) -> tuple[float, float]:
    """(largest difference in log-probs, what rounding explains); `jumps`: positions have some."""
    targets, index = batch["targets"], batch["token_index"]
    # Not every family takes position_ids: without jumps a padded row counts from 0 by itself.
    names = ("input_ids", "attention_mask", *(["position_ids"] if jumps else []))
    inputs = {name: batch[name] for name in names}
    logits = causal_lm(model)(**inputs, use_cache=False).logits.flatten(0, 1)[index]
    logits = logits[:, : head.vocab_size]
    own = logps_from_logits(logits, targets, temperature=head.temperature).double()
    if bool(own.isnan().any()):
        name = type(causal_lm(model)).__name__
        broken = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
        raise SelfCheckError(
            f"{name} gives NaN: {len(broken)} of its weights hold NaN or infinity, the first is "
            f"{broken[0]}; load another checkpoint"
            if broken
            else f"{name} gives NaN with finite weights: {logits.dtype} overflows; load it with "
            "dtype=float32"
        )
    hidden = label_hidden(model, batch)
    error = _largest(head.logps(hidden, targets).double() - own)

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
    logps = eps * own.abs().max().item()
    return error, rounding / head.temperature + 2 * (summation + logps)
