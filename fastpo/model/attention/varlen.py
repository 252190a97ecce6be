"""Share prompts by one variable-length flash call: every response gets its own prompt copy.

The prompt's keys and values are copied for each response but the first: 256 MiB for each copy and
layer of an 8B model at 64K. Queries stand at the last positions of their keys, which the flash
kernel's causal mask expects. Autograd sums the copies' dK and dV.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.model.attention.shared_row import AttentionOptions, SharedRow


def flash_source() -> str | None:
    """Name the package with variable-length flash attention: "torch", "flash-attn" or None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "torch"
    return "flash-attn" if importlib.util.find_spec("flash_attn") is not None else None


def varlen_attention(
    row: SharedRow,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, D]
    options: AttentionOptions,
) -> Tensor:
    """Compute [1, T, H, D] in one flash call."""
    window = options.window
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    sequences = row.once(("sequences", window), lambda: _sequences(row, window))
    if row.copied_tokens(window):
        cuts = row.once(("cuts",), lambda: _cuts(row))
        k, v = (_with_copies(t, cuts, sequences) for t in (k, v))
    first_query, first_key, longest_query, longest_key = row.once(
        ("tables", window, q.device), lambda: _tables(sequences, q.device)
    )
    return flash_varlen(
        q,
        k,
        v,
        first_query,
        first_key,
        longest_query,
        longest_key,
        options.scaling,
        window,
    )[None]


Span = tuple[int, int]


def _sequences(row: SharedRow, window: int | None) -> list[tuple[Span, list[Span]]]:
    """List each sequence as (span of queries, spans of its keys in order)."""
    prompts = {pair.queries[0]: pair.keys for pair in row.span_pairs(window) if pair.gap}
    spans = [pair.queries for pair in row.span_pairs(window) if not pair.gap]
    return [(span, [*([prompts[span[0]]] if span[0] in prompts else []), span]) for span in spans]


def _cuts(row: SharedRow) -> list[Span]:
    """List the row's prompts and responses in order."""
    return [span for group in row.layout.groups for span in (group.prompt, *group.responses)]


def _with_copies(
    tensor: Tensor, cuts: list[Span], sequences: list[tuple[Span, list[Span]]]
) -> Tensor:
    """Join the keys or values of all sequences, prompts copied."""
    # Split once, join once: the gradient of many slices would be as many tensors of the whole row.
    pieces = dict(zip(cuts, tensor.split([b - a for a, b in cuts]), strict=True))
    starts = {a: (a, b) for a, b in cuts if a < b}
    ends = {b: (a, b) for a, b in cuts if a < b}
    out = []
    for _, spans in sequences:
        for a, b in spans:
            if a in starts:  # one piece, or a prompt and its first response
                while a < b:
                    piece = starts[a]
                    out.append(pieces[piece])
                    a = piece[1]
            else:  # the last tokens of a prompt, under a window
                out.append(pieces[ends[b]][a - b :])
    return torch.cat(out)


def _tables(
    sequences: list[tuple[Span, list[Span]]], device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    """Return [S + 1] first queries, [S + 1] first keys, the most queries and the most keys."""
    queries = [b - a for (a, b), _ in sequences]
    keys = [sum(b - a for a, b in spans) for _, spans in sequences]
    first_query, first_key = (
        torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(device) for n in (queries, keys)
    )
    return first_query, first_key, max(queries), max(keys)


def flash_varlen(
    query: Tensor,  # [Tq, H, D]
    key: Tensor,  # [Tk, Hk, D]
    value: Tensor,  # [Tk, Hk, D]
    first_query: Tensor,  # [S + 1] int32
    first_key: Tensor,  # [S + 1] int32
    longest_query: int,
    longest_key: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Compute [Tq, H, D] for S causal sequences whose queries are the last of their keys."""
    inputs = query, key, value, first_query, first_key, longest_query, longest_key
    if flash_source() == "torch":
        from torch.nn.attention.varlen import varlen_attn

        # PyTorch 2.11 takes fewer key heads than query heads without being told.
        has_flag = _accepts(varlen_attn, "enable_gqa")
        grouped: Any = {"enable_gqa": True} if has_flag else {}
        return varlen_attn(
            *inputs, scale=scaling, window_size=(-1 if window is None else window - 1, 0), **grouped
        )  # pyright: ignore[reportReturnType]
    flash: Any = importlib.import_module("flash_attn")
    return flash.flash_attn_varlen_func(
        *inputs,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
    )


@functools.cache
def _accepts(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
