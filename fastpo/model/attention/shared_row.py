"""Carry a packed row's segment table through a model, with what its layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastpo.batch import Layout


class SharingError(ValueError):
    """Refuse a model whose attention cannot, or does not, go through the shared-prompt function."""


class SpanPair(NamedTuple):
    """Pair a span of queries with a span of keys: query q sees the keys k with q - k - gap >= 0.

    That difference is the distance within the prompt and the own response, which a sliding window
    limits.

    Args:
        queries, keys: half-open intervals of positions in the row.
        gap: number of tokens of other responses between a response and its prompt.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    gap: int


class AttentionOptions(NamedTuple):
    """Hold scaling, window, soft-cap and sinks of one layer's attention.

    Args:
        scaling: factor on the scores, or None for 1/sqrt(D).
        window: number of positions that a query sees, itself included, or None for all.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [H], a further logit of each head that takes weight and adds no value (GPT-OSS).
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class SharedRow:
    """Carry a layout on its way through one forward, with what the layers have in common.

    This is no dataclass: FSDP2 rebuilds those when it casts a layer's inputs, and each layer would
    count its calls on a copy.

    Args:
        layout: the segment table; its spans must follow each other and fill the row.
        backend: name of the attention backend, or "auto".

    Attributes:
        calls, windowed: attention calls of the forward so far, and those with a sliding window.
        cache: masks and index tables that the layers share, keyed by what they depend on.
        outer_implementations: what to return to when an attention module ends, innermost last.

    Raises:
        ValueError: a layout with gaps, overlaps or an empty prompt.
    """

    def __init__(self, layout: Layout, backend: str = "auto") -> None:
        self.layout, self.backend = layout, backend
        self.calls = self.windowed = 0
        self.cache: dict[tuple, Any] = {}
        self.outer_implementations: list[str | None] = []
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
        """Check that each layer called the function once, with its window if it has one.

        Some families apply their window only through the mask that transformers builds (Qwen2-MoE,
        PhiMoE): their calls arrive without it.

        Raises:
            SharingError: calls are missing, or come without their window.
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

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return what `make` returned to the first layer that asked; no layer may change it."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Return [queries, keys] bool, True = attend; the queries are the last of the keys."""

        def make() -> Tensor:
            offset = keys - queries
            band = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
            return band if window is None else band.triu(offset - window + 1)

        return self.once(("mask", queries, keys, window, device), make)

    def span_pairs(self, window: int | None) -> list[SpanPair]:
        """Cut the mask into pairs of spans.

        Each prompt and its first response are one pair. Each further response has a pair with the
        prompt and a pair with itself. A window of w hides all but the prompt's last w - 1 tokens,
        and hides those from all but a response's first w - 1.
        """
        pairs = []
        for group in self.layout.groups:
            start, prompt_end = group.prompt
            whole = (start, group.responses[0][1] if group.responses else prompt_end)
            pairs.append(SpanPair(whole, whole, 0))
            for a, b in group.responses[1:]:
                first, last = start, b
                if window is not None:
                    first, last = max(start, prompt_end - window + 1), min(b, a + window - 1)
                if first < prompt_end and a < last:
                    pairs.append(SpanPair((a, last), (first, prompt_end), a - prompt_end))
                if a < b:
                    pairs.append(SpanPair((a, b), (a, b), 0))
        return pairs

    def copied_tokens(self, window: int | None) -> int:
        """Count the prompt tokens that are copied where every response gets its own prompt."""
        return sum(p.keys[1] - p.keys[0] for p in self.span_pairs(window) if p.gap)


def _num_windowed_layers(config: PretrainedConfig) -> int:
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is not None:
        return sum(kind == "sliding_attention" for kind in types[:layers])
    uses_window = getattr(config, "use_sliding_window", True)
    return layers if uses_window and getattr(config, "sliding_window", None) else 0
