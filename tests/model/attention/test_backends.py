"""Every back end against a dense mask, on a CPU: kernels stand in, tables are ours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from fastpo.batch import GroupSpan, Layout
from fastpo.model.attention import dispatch as attention
from fastpo.model.attention import varlen as attention_varlen
from fastpo.model.attention.dispatch import choose_attention
from fastpo.model.attention.flex import block_mask, flex_shared_attention
from fastpo.model.attention.merge import Band, HostFlash, MergedAttention, Plain, merged_attention
from fastpo.model.attention.shared_row import AttentionOptions, SharedRow, SpanPair
from fastpo.model.attention.varlen import flash_varlen, varlen_attention
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import attach
from fastpo.model.self_check import self_check
from fastpo.testing.three_way import assert_three_way
from tests.model.attention.cases import (
    LAYOUT,
    VALUE_WIDTH,
    WIDTH,
    WINDOWS,
    dense,
    inputs,
    plain_varlen,
)
from tests.model.test_self_check import leak
from tests.model.tiny import PAD, family, groups


@pytest.fixture(autouse=True)
def kernels_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "flash_varlen", plain_varlen)


def results(
    attend: Any, dtype: torch.dtype, window: int | None, value_width: int = VALUE_WIDTH
) -> list[Tensor]:
    """[out, dq, dk, dv]."""
    q, k, v, _ = inputs(dtype, value_width=value_width)
    if attend is dense:
        out = dense(q, k, v, window=window)
    else:
        out = attend(SharedRow(LAYOUT), q, k, v, AttentionOptions(0.3, window))
    out.square().sum().backward()
    return [out, *(t.grad for t in (q, k, v))]  # pyright: ignore[reportReturnType]


# Both backends without a mask of scores, each window; values of another width for those that take
# them.
@pytest.mark.parametrize(
    ("attend", "window", "value_width"),
    [
        *((a, w, VALUE_WIDTH) for a in (varlen_attention, merged_attention) for w in WINDOWS),
        (merged_attention, None, WIDTH),  # the CPU's flash kernel
    ],
)
def test_equals_the_dense_mask(attend: Any, window: int | None, value_width: int) -> None:
    truth = results(dense, torch.float64, window, value_width)
    plain = results(dense, torch.float32, window, value_width)
    # ds = p (do.v - do.o): two terms that are one where a query sees a single key.
    rows = truth[0].square().sum(-1).abs().max() * 2
    terms = 0.3 * rows.item() * max(t.abs().max().item() for t in inputs(torch.float64)[:2])
    for name, *three in zip(
        ("out", "dq", "dk", "dv"),
        results(attend, torch.float32, window, value_width),
        plain,
        truth,
        strict=True,
    ):
        assert_three_way(*three, what=name, terms=terms if name in ("dq", "dk") else 0.0)


# Each window, times what alone FlexAttention does beside it.
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_flex_equals_the_dense_mask(window: int | None, extra: str) -> None:
    """Its backward is PyTorch's, on CUDA only."""

    def out(dtype: torch.dtype, ours: bool) -> Tensor:
        q, k, v, sinks = (t.detach() for t in inputs(dtype))
        softcap, sinks = 1.5 if extra == "softcap" else None, sinks if extra == "sinks" else None
        if not ours:
            return dense(q, k, v, window=window, softcap=softcap, s_aux=sinks)
        options = AttentionOptions(0.3, window, softcap, sinks)
        return flex_shared_attention(SharedRow(LAYOUT), q, k, v, options)

    truth = out(torch.float64, False)
    assert_three_way(out(torch.float32, True), out(torch.float32, False), truth)


LONG = Layout(
    (
        GroupSpan((0, 300), ((300, 420), (420, 700), (700, 710))),
        GroupSpan((710, 1000), ((1000, 1001), (1001, 1190))),
    ),
    1190,
)


# Windows below, at and above a block of 128 keys.
@pytest.mark.parametrize("window", [None, 1, 40, 200, 400])
def test_flex_skips_exactly_the_blocks_without_a_pair(window: int | None) -> None:
    mask = block_mask(SharedRow(LONG), window, torch.device("cpu"))
    place = torch.arange(LONG.length)
    pairs = mask.mask_mod(0, 0, place[:, None], place)  # pyright: ignore[reportArgumentType]
    padded = torch.zeros(1280, 1280, dtype=torch.bool)
    padded[:1190, :1190] = pairs
    expected = padded.unflatten(0, (10, 128)).unflatten(2, (10, 128)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), expected)
    assert not expected.all()


def test_merge_passes_gradcheck() -> None:
    row = SharedRow(LAYOUT)
    for window, value_width in ((None, VALUE_WIDTH), (5, VALUE_WIDTH), (None, WIDTH)):
        q, k, v, _ = inputs(torch.float64, value_width=value_width)
        options = AttentionOptions(0.3, window)
        assert torch.autograd.gradcheck(
            lambda *qkv, options=options: merged_attention(row, *qkv, options),
            (q, k, v),
            fast_mode=True,
        )


class _DropsItsLse(torch.autograd.Function):
    """A kernel for autograd as `torch.nn.attention.varlen` registers it: its backward takes the
    gradient of the output and ignores that of the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, band):
        out, lse = Plain.forward(q, k, v, 0.3, band)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.band = band
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *Plain.backward(grad, *ctx.saved_tensors, 0.3, ctx.band), None


def test_the_naive_merge_is_wrong_and_ours_exact() -> None:
    """One response against [prompt] and [own]: in float64 whatever is left is not rounding."""
    torch.manual_seed(0)
    prompt, own = 12, 7
    leaves = [
        torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True)
        for n, h in ((own, 4), (prompt + own, 2), (prompt + own, 2))
    ]
    over_prompt, causal = Band(False, -1), Band(True, -1)

    def grads(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), leaves))

    q, k, v = leaves
    truth = grads(Plain.forward(q, k, v, 0.3, causal)[0])

    a, lse_a = _DropsItsLse.apply(q, k[:prompt], v[:prompt], over_prompt)  # pyright: ignore
    b, lse_b = _DropsItsLse.apply(q, k[prompt:], v[prompt:], causal)  # pyright: ignore
    total = torch.logaddexp(lse_a, lse_b)
    naive = a * (lse_a - total).exp().T[..., None] + b * (lse_b - total).exp().T[..., None]
    parts = [
        (SpanPair((0, own), (0, prompt), 0), over_prompt),
        (SpanPair((0, own), (prompt, prompt + own), 0), causal),
    ]
    merged = MergedAttention.apply(q, k, v, parts, 0.3, Plain)
    torch.testing.assert_close(naive, merged, rtol=1e-14, atol=1e-14)  # forward: both are right

    def relative(found: list[Tensor]) -> float:
        return max((((f - t).norm() / t.norm()).item()) for f, t in zip(found, truth, strict=True))

    assert relative(grads(naive)) > 0.1
    assert relative(grads(merged)) < 1e-14


def test_merge_copies_nothing_and_copies_are_counted() -> None:
    row = SharedRow(LONG)
    # The second and third response of the first group, the second of the second one.
    assert row.copied_tokens(None) == 300 + 300 + 290
    assert row.copied_tokens(40) == 3 * 39
    assert row.copied_tokens(1) == 0


def test_the_cpus_flash_kernel_is_the_plain_one() -> None:
    """Forward, and a backward that is given another part's log-sum-exp and output."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((7, 4), (12, 2), (12, 2)))
    for band, m in ((Band(False, -1), 12), (Band(True, -1), 7)):
        given = (q, k[:m], v[:m])
        out, lse = Plain.forward(*given, 0.3, band)
        for found, expected in zip(HostFlash.forward(*given, 0.3, band), (out, lse), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        merged = (torch.randn_like(out), *given, 0.5 * out, lse + 0.7, 0.3, band)
        for found, expected in zip(
            HostFlash.backward(*merged), Plain.backward(*merged), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOST = {"device": CPU, "dtype": torch.float32, "width": 64}
BIG = {"device": CUDA, "dtype": torch.bfloat16, "width": 128}


# One case for each line of the choice, in its order.
@pytest.mark.parametrize(
    ("case", "name", "word"),
    [
        (HOST, "segments", "cpu has no flash"),
        ({**HOST, "copied_bytes": 1}, "merge", "would be copied"),
        ({**HOST, "copied_bytes": 1, "windowed": True}, "segments", "cpu has no flash"),
        ({**HOST, "copied_bytes": 1, "softcap": True}, "segments", "cpu has no flash"),
        ({**HOST, "copied_bytes": 1, "value_width": 32}, "segments", "cpu has no flash"),
        (BIG, "varlen", "torch"),
        ({**BIG, "copied_bytes": 2**30}, "merge", "pass 512 MiB"),
        ({**BIG, "softcap": True}, "flex", "soft-capped"),
        ({**BIG, "sinks": True}, "flex", "sinks"),
        ({**BIG, "dtype": torch.float32}, "segments", "float32"),
        ({**BIG, "value_width": 64}, "segments", "width 128 and 64"),
        ({**BIG, "width": 100}, "segments", "width 100"),
        ({**BIG, "wanted": "segments"}, "segments", "by name"),
        ({**BIG, "wanted": "flex"}, "flex", "by name"),
    ],
)
def test_choice(case: dict[str, Any], name: str, word: str) -> None:
    found, reason = choose_attention(**case)
    assert found == name
    assert word in reason


def test_choice_without_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_source", lambda: "flash-attn")
    assert choose_attention(**BIG, copied_bytes=2**30) == (
        "varlen",
        "flash attention from flash-attn",
    )
    with pytest.raises(ValueError, match="'merge': the log-sum-exp merge needs"):
        choose_attention("merge", **BIG)
    monkeypatch.setattr(attention, "flash_source", lambda: None)
    assert choose_attention(**BIG)[0] == "segments"


def accepts_groups(q, k, v, fq, fk, nq, nk, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """The arguments of PyTorch 2.13."""
    return ("told", enable_gqa, scale, window_size)


def knows_groups(q, k, v, fq, fk, nq, nk, *, scale=None, window_size=(-1, -1)):
    """The arguments of PyTorch 2.11."""
    return ("not told", scale, window_size)


def as_installed(*given, **named):
    """The arguments of the PyTorch that is here."""
    inspect.signature(INSTALLED).bind(*given, **named)
    return ("bound",)


INSTALLED = torch.nn.attention.varlen.varlen_attn
as_installed.__signature__ = inspect.signature(INSTALLED)  # pyright: ignore


# Signatures before and after `enable_gqa`, and the installed one.
@pytest.mark.parametrize(
    ("kernel", "result"),
    [
        (accepts_groups, ("told", True, 0.3, (6, 0))),
        (knows_groups, ("not told", 0.3, (6, 0))),
        (as_installed, ("bound",)),
    ],
)
def test_arguments_of_torchs_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, result: tuple
) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    q, kv, starts = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8), torch.tensor([0, 5])
    assert flash_varlen(q, kv, kv, starts, starts, 5, 5, scaling=0.3, window=7) == result


# float32 and float64 keep the result's dtype, bfloat16 casts it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merged_attention_compiles(dtype: torch.dtype) -> None:
    """Forward and backward are eager's to the bit, whether the result is cast or not."""
    torch._dynamo.reset()
    expected = results(merged_attention, dtype, None, WIDTH)
    compiled = torch.compile(merged_attention, backend="eager", fullgraph=True)
    for found, wanted in zip(results(compiled, dtype, None, WIDTH), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_named_back_end_never_falls_back() -> None:
    for name, kind in (("varlen", "llama"), ("merge", "mistral-window"), ("flex", "llama")):
        model = attach(family(kind), attention_backend=name)
        with pytest.raises(ValueError, match=f"attention_backend='{name}': .*; use 'auto'"):
            self_check(model, read_head(model), groups(), PAD)
    with pytest.raises(ValueError, match="choose one of auto, segments, varlen, merge, flex"):
        choose_attention("flash", **BIG)
    for case, word in (({"windowed": True}, "sliding window"), ({"sinks": True}, "no sinks")):
        with pytest.raises(ValueError, match=f"'merge': .*{word} on a CPU"):
            choose_attention("merge", **HOST, **case)
    with pytest.raises(ValueError, match=r"'merge': .* heads of width 64 and 32"):
        choose_attention("merge", **HOST, value_width=32)
    assert attach(model, attention_backend="segments") is model
    assert self_check(model, read_head(model), groups(), PAD).share_prompt


# With and without a window, every backend, right and wrong.
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_the_self_check_judges_every_back_end(
    backend: str, name: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right mask passes; a group's responses as one do not."""
    monkeypatch.setattr(attention, "choose_attention", lambda *_, **__: (backend, "test"))
    if wrong:
        monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leak)
    model = family(name)
    found = self_check(model, read_head(model), groups(), PAD)
    if backend == "flex" and not wrong:  # on a CPU
        assert not found.share_prompt
        assert "FlexAttention does not support backward" in found.reason
        found = self_check(model.requires_grad_(False), read_head(model), groups(), PAD)
    assert found.share_prompt is not wrong, found
    assert (found.sharing_error <= found.sharing_bound) is not wrong
