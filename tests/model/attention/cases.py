"""A packed row, its mask token by token, and stand-ins that run GPU back ends' tables on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.batch import GroupSpan, Layout
from fastpo.model.attention.segments import _eager
from fastpo.model.attention.shared_row import AttentionOptions

# Two groups: three responses, one of them empty; and a prompt of one token with one response.
LAYOUT = Layout(
    (GroupSpan((0, 9), ((9, 16), (16, 16), (16, 20))), GroupSpan((20, 21), ((21, 26),))), 26
)
HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
WINDOWS = [None, 1, 3, 9, 12, 100]


def dense(
    query: Tensor, key: Tensor, value: Tensor, *, window=None, softcap=None, s_aux=None, scaling=0.3
) -> Tensor:
    """Compute [1, T, H, Dv] with a mask that is written token by token."""
    distance = torch.full((LAYOUT.length, LAYOUT.length), -1)
    for group in LAYOUT.groups:
        prompt = list(range(*group.prompt))
        for span in ((0, 0), *group.responses):
            sequence = prompt + list(range(*span))
            for i, q in enumerate(sequence):
                for j, k in enumerate(sequence[: i + 1]):
                    distance[q, k] = i - j
    distance = distance.to(query.device)
    seen = (distance >= 0) & (distance < (window or LAYOUT.length))
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(1, HEADS, LAYOUT.length, 1)
        scores = torch.cat([scores, sink], dim=-1)
    return (scores.softmax(-1)[..., : LAYOUT.length] @ value).transpose(1, 2)


def inputs(
    dtype: torch.dtype, *, width: int = WIDTH, value_width: int = VALUE_WIDTH, device: str = "cpu"
) -> list[Tensor]:
    """[query, key, value, sinks], leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, width), (KV_HEADS, width), (KV_HEADS, value_width))
    tensors = [
        2 * torch.randn(1, h, LAYOUT.length, d, generator=generator, dtype=torch.float64)
        for h, d in shapes
    ]
    sinks = torch.randn(HEADS, generator=generator, dtype=torch.float64)
    return [t.to(device, dtype).requires_grad_() for t in (*tensors, sinks)]


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_query: Tensor,
    first_key: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Compute what `varlen.flash_varlen` does, sequence by sequence in plain PyTorch."""
    out = []
    for a, b, c, d in zip(first_query, first_query[1:], first_key, first_key[1:], strict=False):
        n, m = int(b - a), int(d - c)
        assert n <= longest_query
        assert m <= longest_key
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        if window is not None:
            seen = seen.triu(m - n - window + 1)
        q, k, v = (
            t.transpose(0, 1)[None] for t in (query[int(a) : b], key[int(c) : d], value[int(c) : d])
        )
        out.append(_eager(q, k, v, seen, AttentionOptions(scaling))[0].transpose(0, 1))
    assert int(first_query[-1]) == len(query)
    assert int(first_key[-1]) == len(key) == len(value)
    return torch.cat(out)
