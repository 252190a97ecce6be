"""Shared prompts by one variable-length flash call: every response has its own [prompt; own].

The prompt's keys and values are copied for each response but the first (8B at 64K: 256 MiB a copy
and layer), and queries are the last positions of their keys, which is the flash kernel's causal
rule. Autograd sums the copies' dK and dV.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.model.attention.shared_row import Rule, SharedRow


def flash_source() -> str | None:
    """Where variable-length flash attention comes from here: "torch", "flash-attn" or None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "torch"
    return "flash-attn" if importlib.util.find_spec("flash_attn") is not None else None


def varlen_attention(
    row: SharedRow,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, D]
    rule: Rule,
) -> Tensor:
    """[1, T, H, D]."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    sequences = row.once(("sequences", rule.window), lambda: _sequences(row, rule.window))
    if row.copied_tokens(rule.window):
        cuts = row.once(("cuts",), lambda: _cuts(row))
        k, v = (_with_copies(t, cuts, sequences) for t in (k, v))
    first_query, first_key, longest_query, longest_key = row.once(
        ("tables", rule.window, q.device), lambda: _tables(sequences, q.device)
    )
    return flash_varlen(
        q,
        k,
        v,
        first_query,
        first_key,
        longest_query,
        longest_key,
        rule.scaling,
        rule.window,
    )[None]


Span = tuple[int, int]


def _sequences(row: SharedRow, window: int | None) -> list[tuple[Span, list[Span]]]:
    """(queries, spans of the row that are their keys, in order) of each sequence."""
    prompts = {p.queries[0]: p.keys for p in row.parts(window) if p.gap}
    own = [part.queries for part in row.parts(window) if not part.gap]
    return [(span, [*([prompts[span[0]]] if span[0] in prompts else []), span]) for span in own]


def _cuts(row: SharedRow) -> list[Span]:
    """The row's prompts and responses in order."""
    return [span for group in row.layout.groups for span in (group.prompt, *group.responses)]


def _with_copies(
    tensor: Tensor, cuts: list[Span], sequences: list[tuple[Span, list[Span]]]
) -> Tensor:
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
    """(first query of each sequence and the end, the same of keys, longest of both)."""
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
    """[Tq, H, D]: causal attention of S sequences whose queries are the last of their keys."""
    given = query, key, value, first_query, first_key, longest_query, longest_key
    if flash_source() == "torch":
        from torch.nn.attention.varlen import varlen_attn

        # PyTorch 2.11 takes fewer key heads than query heads without being told.
        grouped: dict[str, Any] = {"enable_gqa": True} if _takes(varlen_attn, "enable_gqa") else {}
        return varlen_attn(
            *given, scale=scaling, window_size=(-1 if window is None else window - 1, 0), **grouped
        )  # pyright: ignore[reportReturnType]
    flash: Any = importlib.import_module("flash_attn")
    return flash.flash_attn_varlen_func(
        *given,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
    )


@functools.cache
def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
