"""One packed row on its way through a model: its segment table, and what the layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastpo.batch import Layout


class SharingError(ValueError):
    """A model whose attention cannot, or does not, go through the shared-prompt function."""


class Part(NamedTuple):
    """Queries and keys of the row, half-open: a query q sees the keys k with q - k - gap >= 0.

    That difference is their distance in prompt + own response, which a sliding window is about;
    `gap` counts the other responses that lie between a response and its prompt.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    gap: int


class Rule(NamedTuple):
    """What one layer does with its scores.

    Args:
        scaling: factor on the scores; None: 1/sqrt(D).
        window: a query sees this many positions, itself included; None: all.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [H], a further logit of each head that takes weight, gives nothing (GPT-OSS).
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class SharedRow:
    """A layout on its way through one forward, with what the layers have in common.

    No dataclass: FSDP2 rebuilds those as it casts a layer's inputs, and layers would count on
    copies.

    Args:
        layout: the segment table; its spans must follow each other and fill the row.
        backend: the attention back end, or "auto".

    Attributes:
        calls, windowed: attention calls of the forward so far, and those with a sliding window.
        made: masks, index tables and the like, by what they depend on.
        outer: implementations to return to as attention modules are left, innermost last.

    Raises:
        ValueError: a layout with gaps, overlaps or an empty prompt.
    """

    def __init__(self, layout: Layout, backend: str = "auto") -> None:
        self.layout, self.backend = layout, backend
        self.calls = self.windowed = 0
        self.made: dict[tuple, Any] = {}
        self.outer: list[str | None] = []
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

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives, made by the first layer that asks; no layer may change it."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """[queries, keys] bool, True = attend; the queries are the last of the keys."""

        def make() -> Tensor:
            offset = keys - queries
            band = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
            return band if window is None else band.triu(offset - window + 1)

        return self.once(("mask", queries, keys, window, device), make)

    def parts(self, window: int | None) -> list[Part]:
        """The whole rule as parts: each prompt with its first response, then for each further
        response what it sees of the prompt and of itself. A window of w hides all but the prompt's
        last w - 1 tokens, and those from all but a response's first w - 1.
        """
        parts = []
        for group in self.layout.groups:
            start, prompt_end = group.prompt
            whole = (start, group.responses[0][1] if group.responses else prompt_end)
            parts.append(Part(whole, whole, 0))
            for a, b in group.responses[1:]:
                first, last = start, b
                if window is not None:
                    first, last = max(start, prompt_end - window + 1), min(b, a + window - 1)
                if first < prompt_end and a < last:
                    parts.append(Part((a, last), (first, prompt_end), a - prompt_end))
                if a < b:
                    parts.append(Part((a, b), (a, b), 0))
        return parts

    def copied_tokens(self, window: int | None) -> int:
        """Prompt tokens that a back end copies which gives every response its own [prompt; own]."""
        return sum(part.keys[1] - part.keys[0] for part in self.parts(window) if part.gap)


def _num_windowed_layers(config: PretrainedConfig) -> int:
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is not None:
        return sum(kind == "sliding_attention" for kind in types[:layers])
    uses_window = getattr(config, "use_sliding_window", True)
    return layers if uses_window and getattr(config, "sliding_window", None) else 0
