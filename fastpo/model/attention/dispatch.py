r"""One prompt copy per group: attention over a packed row by its segment table.

With prompt span p and response span r of one group, every query attends to

$$ q_{p,i}: \; p_{\le i} \qquad\qquad q_{r,i}: \; p \cup r_{\le i} $$

and to nothing else in the row. Distance, for sliding windows, is counted within prompt + own
response.

The function is registered with transformers' `AttentionInterface` under `NAME`, which is absent
from its mask registry: models then build no mask and leave the whole rule to this function. Which
back end computes it is a property of the call: see `choose_attention`.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastpo.batch import Layout
from fastpo.model.attention.flex import flex_rule_attention
from fastpo.model.attention.merge import merged_attention
from fastpo.model.attention.segments import segment_attention
from fastpo.model.attention.shared_row import Rule, SharedRow, SharingError
from fastpo.model.attention.varlen import flash_source, varlen_attention

logger = logging.getLogger(__name__)

NAME = "fastpo"

BACKENDS = {
    "segments": segment_attention,
    "varlen": varlen_attention,
    "merge": merged_attention,
    "flex": flex_rule_attention,
}

# Copies of prompt keys and values that one layer may hold: two of an 8B model's at 64K.
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
    """The back end of one attention call, and why: a pure function of the call's shape and place.

    Args:
        wanted: a name of `BACKENDS`, or "auto".
        device, dtype: of the queries.
        width, value_width: of a head's keys and of its values.
        softcap, sinks, windowed: whether the layer has them; a sliding window.
        copied_bytes: prompt keys and values that "varlen" and "segments" would copy.

    Raises:
        ValueError: an unknown name, or a back end that cannot do this; says why.

    >>> choose_attention(device=torch.device("cpu"), dtype=torch.float32, width=64)
    ('segments', 'cpu has no flash attention of packed rows')
    """
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"attention_backend={wanted!r}: choose one of auto, {', '.join(BACKENDS)}")
    value_width = value_width or width
    odd = "soft-capped scores" if softcap else "sinks" if sinks else None
    source = flash_source()
    no_flash = no_merge = no_flex = None
    if device.type != "cuda":
        no_flash = f"{device.type} has no flash attention of packed rows"
        no_flex = "FlexAttention has a backward on CUDA only"
    elif source is None:
        no_flash = "neither torch.nn.attention.varlen nor flash-attn is installed"
    elif dtype not in (torch.float16, torch.bfloat16):
        no_flash = f"flash attention takes no {dtype}"
    elif odd is not None:
        no_flash = f"flash attention of packed rows has no {odd}"
    elif width % 8 or not width == value_width <= 256:
        no_flash = f"flash attention takes no heads of width {width} and {value_width}"
    if device.type != "cpu":
        by_torch = source == "torch"
        no_merge = None if by_torch else "the log-sum-exp merge needs torch.nn.attention.varlen"
        no_merge = no_flash or no_merge
    elif odd is not None or windowed:
        no_merge = f"the log-sum-exp merge has no {odd or 'sliding window'} on a CPU"
    elif width != value_width:
        no_merge = f"the log-sum-exp merge takes no heads of width {width} and {value_width}"
    refusals = {"varlen": no_flash, "merge": no_merge, "flex": no_flex}
    if wanted != "auto":
        if refusal := refusals.get(wanted):
            raise ValueError(f"attention_backend={wanted!r}: {refusal}; use 'auto'")
        return wanted, "asked for by name"
    if odd is not None and no_flex is None:
        return "flex", f"{odd} without a matrix of scores"
    if device.type == "cpu" and copied_bytes and no_merge is None:
        return "merge", "prompt keys and values would be copied"
    if no_flash is not None:
        return "segments", no_flash
    if copied_bytes > COPIES_MIB * 2**20 and no_merge is None:
        return "merge", f"copies of prompt keys and values would pass {COPIES_MIB} MiB a layer"
    return "varlen", f"flash attention from {source}"


@functools.cache
def _announce(name: str, reason: str) -> None:
    logger.info("attention of packed rows: %s: %s", name, reason)


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
    """Attention of one packed row, [1, T, H, Dv], by the rule in the module's docstring.

    Args:
        scaling: factor on the scores, 1/sqrt(D) by default.
        sliding_window: a query sees this many positions, itself included.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: [H] sinks, a further logit of each head that takes weight, gives nothing (GPT-OSS).
        fastpo_layout: the segment table; travels as a keyword argument of the model's forward.

    Raises:
        SharingError: no layout, a mask, a bidirectional module, or an argument, named, that would
            change the result and is not modelled here.
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
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _NEUTRAL:
            raise SharingError(
                f"{type(module).__name__} passes {name!r} to its attention, which shared prompts "
                "do not model: use share_prompt=False"
            )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: shared prompts return no attention weights")

    query, key, value = (_autocast(t) for t in (query, key, value))
    row.calls += 1
    row.windowed += bool(sliding_window)
    rule = Rule(scaling, sliding_window or None, softcap, s_aux)
    return BACKENDS[_chosen(row, query, key, value, rule)](row, query, key, value, rule), None


def _autocast(tensor: Tensor) -> Tensor:
    """As autocast hands tensors to SDPA: rotary embeddings leave float32 queries and keys."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _chosen(row: SharedRow, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> str:
    width, value_width = key.shape[3], value.shape[3]
    odd = {"softcap": rule.softcap is not None, "sinks": rule.sinks is not None}

    def choose() -> str:
        per_token = key.shape[1] * (width + value_width) * key.element_size()
        name, reason = choose_attention(
            row.backend,
            device=query.device,
            dtype=query.dtype,
            width=width,
            value_width=value_width,
            windowed=rule.window is not None,
            copied_bytes=row.copied_tokens(rule.window) * per_token,
            **odd,
        )
        _announce(name, reason)
        return name

    shape = (query.device, query.dtype, key.shape[1], width, value_width)
    return row.once(("backend", rule.window, *odd.values(), *shape), choose)


AttentionInterface.register(NAME, shared_prompt_attention)
