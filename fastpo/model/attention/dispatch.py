r"""Compute attention over a packed row by its segment table, with one prompt copy per group.

With prompt span p and response span r of one group, every query attends to

$$ q_{p,i}: \; p_{\le i} \qquad\qquad q_{r,i}: \; p \cup r_{\le i} $$

and to nothing else in the row. A sliding window counts distances within the prompt and the query's
own response.

The function is registered with transformers' `AttentionInterface` under `NAME`. Its mask registry
does not hold that name, so models build no mask and leave masking to this function. The backend is
chosen for each call: see `choose_attention`.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastpo.batch import Layout
from fastpo.model.attention.flex import flex_shared_attention
from fastpo.model.attention.merge import merged_attention
from fastpo.model.attention.segments import segment_attention
from fastpo.model.attention.shared_row import AttentionOptions, SharedRow, SharingError
from fastpo.model.attention.varlen import flash_source, varlen_attention

log = logging.getLogger(__name__)

NAME = "fastpo"

BACKENDS = {
    "segments": segment_attention,
    "varlen": varlen_attention,
    "merge": merged_attention,
    "flex": flex_shared_attention,
}

# Limit of copied prompt keys and values in one layer: two copies at 64K in an 8B model.
COPIES_MIB = 512

# Arguments that models pass down to every attention function and that do not change the maths.
_NEUTRAL = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def choose_attention(
    wanted: str = "auto",
    *,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    value_width: int | None = None,
    softcap: bool = False,
    sinks: bool = False,
    windowed: bool = False,
    copied_bytes: int = 0,
) -> tuple[str, str]:
    """Choose the backend of one attention call from its shape and device, and say why.

    Args:
        wanted: a name of `BACKENDS`, or "auto".
        device, dtype: device and dtype of the queries.
        width, value_width: width of a head's keys and of its values.
        softcap, sinks, windowed: whether the layer has a soft-cap, sinks, a sliding window.
        copied_bytes: size of the prompt keys and values that "varlen" and "segments" would copy.

    Returns:
        (name of the backend, reason).

    Raises:
        ValueError: an unknown name, or a backend that cannot compute this call; says why.

    >>> choose_attention(device=torch.device("cpu"), dtype=torch.float32, width=64)
    ('segments', 'cpu has no flash attention of packed rows')
    """
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"attention_backend={wanted!r}: choose one of auto, {', '.join(BACKENDS)}")
    value_width = value_width or width
    unusual = "soft-capped scores" if softcap else "sinks" if sinks else None
    source = flash_source()
    no_flash = no_merge = no_flex = None
    if device.type != "cuda":
        no_flash = f"{device.type} has no flash attention of packed rows"
        no_flex = "FlexAttention has a backward on CUDA only"
    elif source is None:
        no_flash = "neither torch.nn.attention.varlen nor flash-attn is installed"
    elif dtype not in (torch.float16, torch.bfloat16):
        no_flash = f"flash attention takes no {dtype}"
    elif unusual is not None:
        no_flash = f"flash attention of packed rows has no {unusual}"
    elif width % 8 or not width == value_width <= 256:
        no_flash = f"flash attention takes no heads of width {width} and {value_width}"
    if device.type != "cpu":
        has_kernel = source == "torch"
        no_merge = None if has_kernel else "the log-sum-exp merge needs torch.nn.attention.varlen"
        no_merge = no_flash or no_merge
    elif unusual is not None or windowed:
        no_merge = f"the log-sum-exp merge has no {unusual or 'sliding window'} on a CPU"
    elif width != value_width:
        no_merge = f"the log-sum-exp merge takes no heads of width {width} and {value_width}"
    refusals = {"varlen": no_flash, "merge": no_merge, "flex": no_flex}
    if wanted != "auto":
        if refusal := refusals.get(wanted):
            raise ValueError(f"attention_backend={wanted!r}: {refusal}; use 'auto'")
        return wanted, "asked for by name"
    if unusual is not None and no_flex is None:
        return "flex", f"{unusual} without a matrix of scores"
    if device.type == "cpu" and copied_bytes and no_merge is None:
        return "merge", "prompt keys and values would be copied"
    if no_flash is not None:
        return "segments", no_flash
    if copied_bytes > COPIES_MIB * 2**20 and no_merge is None:
        return "merge", f"copies of prompt keys and values would pass {COPIES_MIB} MiB a layer"
    return "varlen", f"flash attention from {source}"


@functools.cache
def _announce(name: str, reason: str) -> None:
    log.info("attention of packed rows: %s: %s", name, reason)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    fastpo_layout: SharedRow | Layout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute attention of one packed row, [1, T, H, Dv], as the module's docstring says.

    Args:
        scaling: factor on the scores; 1/sqrt(D) by default.
        sliding_window: number of positions that a query sees, itself included.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: [H] sinks, a further logit of each head that takes weight, adds no value (GPT-OSS).
        fastpo_layout: the segment table; it travels as a keyword argument of the model's forward.

    Raises:
        SharingError: no layout, a mask, a bidirectional module, or a further argument that would
            change the result and is not modelled here; the message names it.
        ValueError: a batch, a cache, dropout, or output_attentions.
    """
    if fastpo_layout is None:
        raise SharingError(
            f"{type(module).__name__} under attn_implementation={NAME!r} got no segment table: "
            "pass fastpo_layout=batch['layout'], or set_attn_implementation('sdpa') for ordinary "
            "calls; a model that was given one drops it on the way, so use share_prompt=False"
        )
    row = fastpo_layout if isinstance(fastpo_layout, SharedRow) else SharedRow(fastpo_layout)
    length = row.layout.length
    if query.shape[0] != 1 or query.shape[2] != length or key.shape[2] != length:
        raise ValueError(
            f"a packed row is one row of {length} tokens without a cache: got queries of "
            f"{query.shape[0]} x {query.shape[2]} tokens and {key.shape[2]} keys"
        )
    if attention_mask is not None:
        raise SharingError(
            f"{type(module).__name__} brings an attention mask of its own, of shape "
            f"{tuple(attention_mask.shape)}; a packed row's layout is its mask"
        )
    if dropout:
        raise ValueError(
            f"attention dropout {dropout}: the responses of a group would share the noise of their "
            "one prompt; set it to 0 (fastpo.model.load.disable_dropout) or do not share prompts"
        )
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise SharingError(f"{type(module).__name__} is bidirectional: prompts cannot be shared")
    for name, argument in kwargs.items():
        if argument is not None and argument is not False and name not in _NEUTRAL:
            raise SharingError(
                f"{type(module).__name__} passes {name!r} to its attention, which shared prompts "
                "do not model: use share_prompt=False"
            )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: shared prompts return no attention weights")

    query, key, value = (_cast_for_autocast(t) for t in (query, key, value))
    row.calls += 1
    row.windowed += bool(sliding_window)
    options = AttentionOptions(scaling, sliding_window or None, softcap, s_aux)
    backend = BACKENDS[_backend_name(row, query, key, value, options)]
    return backend(row, query, key, value, options), None


def _cast_for_autocast(tensor: Tensor) -> Tensor:
    """Cast as autocast does for SDPA: rotary embeddings leave float32 queries and keys."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _backend_name(
    row: SharedRow, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> str:
    """Choose the backend once for all layers of the same shape."""
    width, value_width = key.shape[3], value.shape[3]
    unusual = {"softcap": options.softcap is not None, "sinks": options.sinks is not None}

    def choose() -> str:
        per_token = key.shape[1] * (width + value_width) * key.element_size()
        name, reason = choose_attention(
            row.backend,
            device=query.device,
            dtype=query.dtype,
            width=width,
            value_width=value_width,
            windowed=options.window is not None,
            copied_bytes=row.copied_tokens(options.window) * per_token,
            **unusual,
        )
        _announce(name, reason)
        return name

    shape = (query.device, query.dtype, key.shape[1], width, value_width)
    return row.once(("backend", options.window, *unusual.values(), *shape), choose)


AttentionInterface.register(NAME, shared_prompt_attention)
