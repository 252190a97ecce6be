r"""One prompt copy per group: attention over a packed row by its segment table.

With prompt span p and response span r of one group, every query attends to

$$ q_{p,i}: \; p_{\le i} \qquad\qquad q_{r,i}: \; p \cup r_{\le i} $$

and to nothing else in the row. Distance, for sliding windows, is counted within prompt + own
response. A group's prompt and first response are neighbours in the row, so they are one ordinary
causal sequence: one call, no mask, no copy. Each further response takes its queries against
[prompt; own], bottom-right causal, which costs one copy of the prompt's keys and values and an
[R, P + R] mask at most (none on CUDA); no mask is ever quadratic in the row. Autograd sums the
prompt's dK and dV over the responses.

The function is registered with transformers' `AttentionInterface` under `NAME`, which is absent
from its mask registry: models then build no mask and leave the whole rule to this function.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PretrainedConfig

from fastpo.data.packing import Layout

NAME = "fastpo"

# Queries per block where scores are materialised (soft-cap, sinks): 32 heads of 512 queries
# against 8192 keys are 512 MiB of fp32 scores.
_EAGER_BLOCK = 512

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


class SharingError(ValueError):
    """A model whose attention cannot, or does not, go through the shared-prompt function."""


@dataclass
class SharedRow:
    """A layout on its way through one forward, with what the layers have in common.

    Args:
        layout: the segment table; its spans must follow each other and fill the row.
        calls, windowed: attention calls of the forward so far, and those with a sliding window.
        masks: (queries, keys, window, device) -> boolean mask, shared by all layers.
        outer: implementations to return to as attention modules are left, innermost last.

    Raises:
        ValueError: a layout with gaps, overlaps or an empty prompt.
    """

    layout: Layout
    calls: int = 0
    windowed: int = 0
    masks: dict[tuple, Tensor] = field(default_factory=dict)
    outer: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        end = 0
        for number, group in enumerate(self.layout.groups):
            for start, stop in (group.prompt, *group.responses):
                if start != end or stop < start:
                    raise ValueError(
                        f"group {number} of the layout has the span ({start}, {stop}) where the "
                        f"row is filled up to {end}: spans must follow each other without gaps"
                    )
                end = stop
            if group.prompt[0] == group.prompt[1]:
                raise ValueError(f"group {number} of the layout has an empty prompt")
        if end != self.layout.length:
            raise ValueError(f"the layout's spans end at {end}, its length is {self.layout.length}")

    def verify(self, config: PretrainedConfig) -> None:
        """SharingError unless each layer called the function once, with its window if it has one.

        Some families apply their window only through the mask that transformers builds (Qwen2-MoE,
        PhiMoE): their calls arrive without it.
        """
        layers = config.num_hidden_layers
        windowed = _num_windowed_layers(config)
        if self.calls != layers:
            raise SharingError(
                f"{config.model_type}: {self.calls} attention calls in a forward of {layers} "
                "layers: some layers bypass the shared-prompt attention"
            )
        if self.windowed != windowed:
            raise SharingError(
                f"{config.model_type}: {windowed} layers have a sliding window, but "
                f"{self.windowed} attention calls passed one"
            )

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """[queries, keys] bool, True = attend; the queries are the last of the keys."""
        key = (queries, keys, window, device)
        if key not in self.masks:
            offset = keys - queries
            band = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
            self.masks[key] = band if window is None else band.triu(offset - window + 1)
        return self.masks[key]


def _num_windowed_layers(config: PretrainedConfig) -> int:
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is not None:
        return sum(kind == "sliding_attention" for kind in types[:layers])
    uses_window = getattr(config, "use_sliding_window", True)
    return layers if uses_window and getattr(config, "sliding_window", None) else 0


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

    row.calls += 1
    row.windowed += bool(sliding_window)
    attend = _Attend(row, scaling, sliding_window or None, softcap, s_aux)
    outputs = []
    for group in row.layout.groups:
        start, prompt_end = group.prompt
        first_end = group.responses[0][1] if group.responses else prompt_end
        whole = slice(start, first_end)
        outputs.append(attend(query[:, :, whole], key[:, :, whole], value[:, :, whole]))
        # A window hides all but the prompt's last window - 1 tokens from any further response.
        seen = start if not sliding_window else max(start, prompt_end - sliding_window + 1)
        for a, b in group.responses[1:]:
            if a == b:
                continue
            k = torch.cat([key[:, :, seen:prompt_end], key[:, :, a:b]], dim=2)
            v = torch.cat([value[:, :, seen:prompt_end], value[:, :, a:b]], dim=2)
            outputs.append(attend(query[:, :, a:b], k, v))
    return torch.cat(outputs, dim=1), None


@dataclass
class _Attend:
    """Causal attention of queries that are the last positions of their keys."""

    row: SharedRow
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[1, H, n, D] against [1, Hk, m, D], m >= n: [1, n, H, Dv]."""
        n, m = query.shape[2], key.shape[2]
        eager = self.softcap is not None or self.sinks is not None
        window = self.window if self.window is not None and self.window < m else None
        size = min(window or n, _EAGER_BLOCK if eager else n)
        if size >= n:
            return self._block(query, key, value, window, eager).transpose(1, 2)
        # Blocks of queries with the keys they can see: memory linear in n under a window, and one
        # block of scores at a time where scores are materialised (the rest recomputed in backward).
        outputs = []
        for a in range(0, n, size):
            b = min(a + size, n)
            first = 0 if window is None else max(0, m - n + a - window + 1)
            keys = slice(first, m - n + b)
            inputs = (query[:, :, a:b], key[:, :, keys], value[:, :, keys], window, eager)
            if eager and torch.is_grad_enabled():
                block = checkpoint(
                    self._block, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                block = self._block(*inputs)
            outputs.append(block.transpose(1, 2))  # pyright: ignore[reportOptionalMemberAccess]
        return torch.cat(outputs, dim=1)

    def _block(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, eager: bool
    ) -> Tensor:
        n, m = query.shape[2], key.shape[2]
        if eager:
            mask = self.row.mask(n, m, window, query.device)
            return _eager(query, key, value, mask, self.scaling, self.softcap, self.sinks)
        mask, causal = None, False
        if window is None and n == m:
            causal = True
        elif window is None and query.is_cuda:
            # Reaches the flash kernel, whose causal rule is bottom-right, without a mask in memory.
            mask = causal_lower_right(n, m)
        else:
            mask = self.row.mask(n, m, window, query.device)
        groups = query.shape[1] // key.shape[1]
        native = groups == 1 or _groups_heads(query, key, value, masked=type(mask) is Tensor)
        if not native:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=self.scaling,
            enable_gqa=native and groups > 1,
        )


def _groups_heads(query: Tensor, key: Tensor, value: Tensor, masked: bool) -> bool:
    """Does a fused kernel take fewer key than query heads? Else SDPA would materialise scores.

    CPU: always. CUDA: the flash kernel only, so half precision, no mask, equal head widths <= 256.
    """
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and not masked and key.shape[-1] == value.shape[-1] <= 256


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,  # [n, m]
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with materialised scores in fp32 (fp64 for fp64), for what SDPA cannot do."""
    heads, n, width = query.shape[1:]
    kv_heads = key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(1, kv_heads, heads // kv_heads, n, width)
    scores = grouped.to(exact) @ key.to(exact).transpose(2, 3).unsqueeze(2)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sink = sinks.to(exact).reshape(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return (weights.to(value.dtype) @ value.unsqueeze(2)).reshape(1, heads, n, value.shape[-1])


AttentionInterface.register(NAME, shared_prompt_attention)
