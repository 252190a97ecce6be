"""Take hidden states from a Hugging Face model: packed rows with shared prompts, or padded rows.

`attach` gives the underlying causal language model a forward that stops before the head when asked
to, so that DDP, FSDP, peft and accelerate wrappers are still entered through their own `__call__`.
The attention implementation belongs to the call and not to the model. A forward with a layout runs
under the shared-prompt attention, every other one under the model's own. The recomputation of a
checkpointed layer during backward uses the implementation that its forward had.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fastpo.batch import Batch, Layout
from fastpo.model.attention.dispatch import NAME
from fastpo.model.attention.shared_row import SharedRow
from fastpo.model.quantised import keep_trainable

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Attached:
    """Keep what `detach` needs: the forward that the instance had before, if any, and our hooks."""

    forward: Callable | None
    hooks: list = field(default_factory=list)
    attention_backend: str = "auto"


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside peft, DDP, FSDP or torch.compile wrappers.

    Raises:
        TypeError: no transformers model inside.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # peft
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DDP, FSDP1, DeepSpeed
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        else:
            raise TypeError(f"{type(model).__name__} holds no transformers.PreTrainedModel")
    return inner


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """Return the stack of layers, final norm included, head excluded.

    Raises:
        ValueError: the model has no such part by itself (ModernBERT's `decoder` is its head).
    """
    inner = causal_lm(model)
    decoder = inner.get_decoder()
    if (
        decoder is inner
    ):  # Llama-4's text model, whose base_model_prefix names its multimodal parent
        decoder = getattr(inner, "model", None)
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} has no separate decoder: its hidden states cannot be taken "
            "before the head"
        )
    return decoder


def attach(model: M, *, attention_backend: str | None = None) -> M:
    """Let the causal language model inside `model` return hidden states; returns `model` itself.

    Afterwards `model(..., fastpo_hidden=True)` runs the decoder only and returns its last hidden
    state [B, T, D], final norm included, without a cache; with `fastpo_layout=Layout` the one row
    of input shares its prompts. Any other call is the original forward. Survives `copy.deepcopy`;
    attaching twice changes the back end at most. Works before or after peft and accelerate wrap the
    model.

    Args:
        model: a causal language model, perhaps wrapped.
        attention_backend: backend of packed rows: a name of `fastpo.model.attention.BACKENDS`,
            which never falls back, or "auto". None keeps the present one, "auto" at first.

    Raises:
        TypeError, ValueError: as `causal_lm`, `decoder_of` and `keep_trainable`; a prompt-learning
            adapter; a model loaded under the shared-prompt attention itself.
    """
    inner = causal_lm(model)
    keep_trainable(model)
    refuse_prompt_learning(model)
    if "_fastpo" in inner.__dict__:
        if attention_backend is not None:
            inner.__dict__["_fastpo"].attention_backend = attention_backend
        return model
    decoder = decoder_of(inner)
    if decoder.config._attn_implementation == NAME:
        raise ValueError(
            f"attn_implementation={NAME!r}: load the model with its own ('sdpa', "
            "'flash_attention_2', ...); calls with a layout switch by themselves"
        )
    hooks = []
    for module in decoder.modules():
        # transformers finds attention layers by this name too (`_can_set_attn_implementation`).
        if "Attention" in type(module).__name__ and hasattr(module, "config"):
            hooks.append(module.register_forward_pre_hook(_enter_attention, with_kwargs=True))
            hooks.append(
                module.register_forward_hook(_leave_attention, with_kwargs=True, always_call=True)
            )
    inner.__dict__["_fastpo"] = _Attached(
        inner.__dict__.get("forward"), hooks, attention_backend or "auto"
    )
    inner.forward = MethodType(_forward_like(type(inner).forward), inner)
    return model


def refuse_prompt_learning(model: nn.Module) -> None:
    """Refuse an adapter of tokens instead of weights with a ValueError."""
    adapter: Any = getattr(model, "active_peft_config", None)
    if adapter is not None and (adapter.is_prompt_learning or adapter.is_adaption_prompt):
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        raise ValueError(
            f"{kind} puts tokens in front of what a row says, which packed rows have no place for: "
            "use LoRA or another adapter of weights"
        )


def detach(model: M) -> M:
    """Undo `attach`; returns `model` itself."""
    inner = causal_lm(model)
    attached = inner.__dict__.pop("_fastpo", None)
    if attached is not None:
        for hook in attached.hooks:
            hook.remove()
        if attached.forward is None:
            del inner.forward
        else:
            inner.forward = attached.forward
    return model


def target_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """Return [M, D] hidden states that predict the batch's targets, in their order.

    Args:
        model: an attached model or a wrapper around one.
        batch: shared or padded.

    Raises:
        ValueError: a model that `attach` has not seen: it would drop our arguments in silence.
    """
    hidden = _call(model, batch)
    return hidden.flatten(0, 1).index_select(0, batch.head_positions)


def _call(model: nn.Module, batch: Batch, **options: bool) -> Any:
    if "_fastpo" not in causal_lm(model).__dict__:
        raise ValueError(f"fastpo.model.hidden.attach({type(model).__name__}) comes first")
    inputs: dict[str, object] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.layout is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs["fastpo_layout"] = batch.layout
    return model(**inputs, fastpo_hidden=True, **options)


def target_hidden_and_balance(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    r"""Return `target_hidden`, and the load-balance loss of a mixture of experts, a scalar.

    $$ E \sum_e f_e P_e $$

    with f_e the share of tokens that choose expert e among their k, P_e its mean router
    probability, both over all layers and the batch's tokens without padding: transformers'
    `load_balancing_loss_func`. A shared row counts a prompt's tokens once, padded rows once for
    each response, so that its value depends on the form of the batch where that of preference
    losses does not. Paper: https://arxiv.org/abs/2101.03961.
    """
    hidden, balance = _call(model, batch, fastpo_balance=True)
    return hidden.flatten(0, 1).index_select(0, batch.head_positions), balance


def balance_coefficient(model: nn.Module, wanted: float | None) -> float:
    """Return the weight of the load-balance loss; 0 for dense models.

    Without `wanted` it is that of the configuration where `output_router_logits` is on, by which
    transformers and TRL add the loss; else 0.

    Raises:
        ValueError: a negative coefficient, or one for a model that gives no router logits.
    """
    if wanted is not None and wanted < 0:
        raise ValueError(f"router_aux_loss_coef={wanted} must be 0 (no load-balance loss) or more")
    config = decoder_of(model).config
    routed = hasattr(config, "output_router_logits") and _num_experts(config) is not None
    if wanted and not routed:
        raise ValueError(
            f"router_aux_loss_coef={wanted}: {config.model_type} gives no router logits to "
            "balance; leave it out"
        )
    if not routed:
        return 0.0
    if wanted is not None:
        return wanted
    return getattr(config, "router_aux_loss_coef", 0.0) if config.output_router_logits else 0.0


def _num_experts(config: PretrainedConfig) -> int | None:
    return getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)


def _forward_like(original: Callable) -> Callable:
    """Make a forward with the signature of `original`, without an instance: copies stay apart."""

    @functools.wraps(original)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fastpo_hidden: bool = False,
        fastpo_layout: Layout | None = None,
        fastpo_balance: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not fastpo_hidden:
            if fastpo_layout is not None:
                raise ValueError("fastpo_layout goes with fastpo_hidden=True")
            # accelerate or another tool may have put a forward on the instance before.
            earlier = self.__dict__["_fastpo"].forward
            return original(self, *args, **kwargs) if earlier is None else earlier(*args, **kwargs)
        return _hidden(self, fastpo_layout, fastpo_balance, *args, **kwargs)

    return forward


def _hidden(
    model: PreTrainedModel, layout: Layout | None, balance: bool, *args: Any, **kwargs: Any
) -> Any:  # [B, T, D], and the load-balance loss if asked for
    decoder = decoder_of(model)
    # peft passes every argument of the usual forward, most of them None (labels, return_dict, ...).
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    inputs["use_cache"] = False
    if balance:
        inputs["output_router_logits"] = True
    if layout is None:
        _drop_unused_positions(decoder, inputs)
        output = decoder(*args, **inputs)
        return _hidden_of(output, model, inputs.get("attention_mask"), balance)
    if "attention_mask" in inputs:
        raise ValueError("a packed row takes no attention_mask: its layout is its mask")
    if inputs.get("position_ids") is None:
        raise ValueError("a packed row needs position_ids: every response restarts at the prompt")
    row = SharedRow(layout, model.__dict__["_fastpo"].attention_backend)
    with _implementation(decoder.config, NAME):  # the decoder builds its masks under this name
        output = decoder(*args, **inputs, fastpo_layout=row)
    row.verify(decoder.config)
    return _hidden_of(output, model, None, balance)


def _hidden_of(output: Any, model: PreTrainedModel, mask: Tensor | None, balance: bool) -> Any:
    hidden: Tensor = output.last_hidden_state
    weight: Any = getattr(model.get_output_embeddings(), "weight", None)
    wide = getattr(weight, "dtype", None) is torch.float32
    if wide and not torch.is_autocast_enabled(hidden.device.type):
        # A head in float32 may stand above layers in half precision (`modules_to_save`).
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if not balance:
        return hidden
    config = decoder_of(model).config
    experts, chosen = _num_experts(config), config.num_experts_per_tok
    loss = load_balancing_loss_func(output.router_logits, experts, chosen, mask)
    return hidden, loss


def _drop_unused_positions(decoder: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Drop position_ids for models without positions (Mamba, ALiBi), which cannot honour jumps."""
    positions = inputs.get("position_ids")
    if positions is None or "position_ids" in inspect.signature(decoder.forward).parameters:
        return
    mask = inputs.get("attention_mask")
    usual = torch.arange(positions.shape[-1], device=positions.device)
    jumps = (positions != usual) if mask is None else (positions != usual) & mask.bool()
    if jumps.any():
        raise ValueError(
            f"{type(decoder).__name__} has no position_ids, so the positions of this batch, which "
            "are not 0, 1, 2, ..., cannot be honoured"
        )
    del inputs["position_ids"]


@contextmanager
def _implementation(config: PretrainedConfig, name: str) -> Iterator[None]:
    outer = config._attn_implementation
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = outer


def _enter_attention(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
    """Switch to shared prompts, also when backward recomputes a layer long after the forward."""
    row = kwargs.get("fastpo_layout")
    if isinstance(row, SharedRow):
        config: Any = module.config
        row.outer_implementations.append(config._attn_implementation)
        config._attn_implementation_internal = NAME


def _leave_attention(
    module: nn.Module, args: tuple, kwargs: dict[str, object], output: object
) -> None:
    row = kwargs.get("fastpo_layout")
    if isinstance(row, SharedRow):
        config: Any = module.config
        config._attn_implementation_internal = row.outer_implementations.pop()


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Switch to training or evaluation mode, without checkpointing; restore both afterwards.

    Checkpointing may not support `autograd.grad`.
    """
    before = {module: module.training for module in model.modules()}
    checkpointed = [m for m in before if getattr(m, "gradient_checkpointing", False)]
    model.train(training)
    for module in checkpointed:
        module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag
        for module in checkpointed:
            module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]


@contextmanager
def generation(model: nn.Module) -> Iterator[nn.Module]:
    """Prepare for `model.generate`: eval mode, cache on, no checkpointing; restore afterwards.

    Attention needs no switch, since only calls with a layout leave the model's own.
    """
    inner = causal_lm(model)
    configs = {id(c): c for c in (inner.config, decoder_of(inner).config, inner.generation_config)}
    caches = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    for config, _ in caches:
        config.use_cache = True
    try:
        with mode(model, training=False):
            yield model
    finally:
        for config, use_cache in caches:
            config.use_cache = use_cache
