"""The attention function by itself, against a dense mask written down token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpo.batch import GroupSpan, Layout
from fastpo.model.attention import segments as attention_segments
from fastpo.model.attention.dispatch import shared_prompt_attention
from fastpo.model.attention.shared_row import SharedRow, SharingError
from fastpo.testing.three_way import assert_three_way
from tests.model.attention.cases import LAYOUT, WINDOWS, dense, inputs

MODULE: Any = SimpleNamespace(is_causal=True)


# Each window, times what forms scores; blocks of 2 queries cut every segment.
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("extra", "block"),  # blocks are for materialised scores
    [("plain", 512), ("softcap", 512), ("softcap", 2), ("sinks", 512), ("sinks", 2), ("both", 2)],
)
def test_equals_the_dense_mask(
    window: int | None, extra: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_segments, "_EAGER_BLOCK", block)

    def results(function: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, sinks = inputs(dtype)
        options = {
            "softcap": 1.5 if extra in ("softcap", "both") else None,
            "s_aux": sinks if extra in ("sinks", "both") else None,
        }
        if function == "ours":
            out, weights = shared_prompt_attention(
                MODULE, q, k, v, None, 0.3, 0.0, window, fastpo_layout=LAYOUT, **options
            )
            assert weights is None
        else:
            out = dense(q, k, v, window=window, **options)
        out.square().sum().backward()
        return [out, *(t.grad for t in (q, k, v, sinks) if t.grad is not None)]

    truth = results("dense", torch.float64)
    plain = results("dense", torch.float32)
    ours = results("ours", torch.float32)
    assert len(ours) == len(truth)
    for name, *three in zip(("out", "dq", "dk", "dv", "ds"), ours, plain, truth, strict=False):
        assert_three_way(*three, what=name)


def masks(row: SharedRow) -> list[Tensor]:
    return [mask for key, mask in row.cache.items() if key[0] == "mask"]


def test_no_mask_is_quadratic_in_the_row() -> None:
    length, window = 400, 7
    layout = Layout((GroupSpan((0, 300), ((300, 350), (350, length))),), length)
    q, k, v = (torch.randn(1, 2, length, 4) for _ in range(3))
    full, banded, merged = SharedRow(layout, "segments"), SharedRow(layout), SharedRow(layout)
    shared_prompt_attention(MODULE, q, k, v, None, fastpo_layout=full)
    shared_prompt_attention(MODULE, q, k, v, None, sliding_window=window, fastpo_layout=banded)
    shared_prompt_attention(MODULE, q, k, v, None, fastpo_layout=merged)
    assert [tuple(mask.shape) for mask in masks(full)] == [(50, 350)]
    assert max(mask.numel() for mask in masks(banded)) <= window * 2 * window
    assert not masks(merged)


# Each path through which scores are formed.
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_autocast_rounds_inputs_and_no_score(extra: str) -> None:
    """Rotary embeddings leave float32 queries and keys beside bfloat16 values."""
    q, k, v, sinks = (t.detach() for t in inputs(torch.float64, value_width=8))
    half = [t.to(torch.bfloat16) for t in (q, k, v)]
    options: dict[str, Any] = {
        "scaling": 0.3,
        "softcap": 1.5 if extra == "softcap" else None,
        "s_aux": sinks if extra == "sinks" else None,
        "fastpo_layout": LAYOUT,
    }
    plain, _ = shared_prompt_attention(MODULE, *half, None, **options)
    with torch.autocast("cpu", torch.bfloat16):
        given = (half[0].float(), half[1].float(), half[2])
        ours, _ = shared_prompt_attention(MODULE, *given, None, **options)
    assert torch.equal(ours, plain)


# One argument for each thing that a shared row cannot honour.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fastpo_layout": None}, "no segment table"),
        ({"attention_mask": torch.ones(1, 1, 26, 26)}, "mask of its own"),
        ({"dropout": 0.1}, "disable_dropout"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"cu_seq_lens_q": torch.zeros(1)}, "cu_seq_lens_q"),
        ({"is_causal": False}, "bidirectional"),
        ({"output_attentions": True}, "output_attentions"),
        ({"fastpo_layout": Layout((GroupSpan((0, 9), ((9, 27),)),), 27)}, "one row of 27 tokens"),
        ({"fastpo_layout": Layout((GroupSpan((0, 9), ((10, 26),)),), 26)}, "without gaps"),
        ({"fastpo_layout": Layout((GroupSpan((0, 9), ((9, 20),)),), 26)}, "end at 20"),
        ({"fastpo_layout": Layout((GroupSpan((0, 0), ((0, 26),)),), 26)}, "empty prompt"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    q, k, v, _ = inputs(torch.float32)
    given = {"attention_mask": None, "fastpo_layout": LAYOUT, **options}
    with pytest.raises(ValueError, match=message):
        shared_prompt_attention(MODULE, q, k, v, **given)


def test_refuses_a_batch() -> None:
    q, k, v, _ = (t.repeat(2, 1, 1, 1) if t.dim() == 4 else t for t in inputs(torch.float32))
    with pytest.raises(ValueError, match="2 x 26 tokens"):
        shared_prompt_attention(MODULE, q, k, v, None, fastpo_layout=LAYOUT)


def test_harmless_arguments_pass() -> None:
    q, k, v, _ = inputs(torch.float32)
    shared_prompt_attention(
        MODULE,
        q,
        k,
        v,
        None,
        fastpo_layout=LAYOUT,
        use_cache=False,
        position_ids=k,
        position_bias=None,
    )


def test_verify_names_the_count() -> None:
    row = SharedRow(LAYOUT)
    config: Any = SimpleNamespace(model_type="x", num_hidden_layers=2, layer_types=None)
    with pytest.raises(SharingError, match="0 attention calls in a forward of 2 layers"):
        row.verify(config)
