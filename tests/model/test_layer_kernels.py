"""Layer kernels: when liger's function is called, with what, and what is said when it is not."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch

from fastpo.model.layer_kernels import use_layer_kernels
from fastpo.model.load import add_lora
from tests.model.tiny import family

monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """liger's function for Llama with its own signature, patching nothing."""
    seen: list[dict[str, Any]] = []

    def record(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        seen.append(locals())

    monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", record)
    return seen


def test_layers_are_patched_and_the_head_is_not(calls: list) -> None:
    model = add_lora(family("llama"), {"r": 2})
    assert use_layer_kernels(model, "liger", GPU)
    assert use_layer_kernels(model, "auto", GPU)
    assert not use_layer_kernels(model, "none", GPU)
    assert len(calls) == 2
    assert calls[0]["model"] is model.get_base_model()  # pyright: ignore
    assert not calls[0]["fused_linear_cross_entropy"]
    assert not calls[0]["cross_entropy"]
    assert all(calls[0][part] for part in ("rope", "rms_norm", "swiglu"))


def test_where_they_cannot_be(
    calls: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llama, gpt2 = family("llama"), family("gpt2")
    for model, device, reason in (
        (llama, CPU, "on cpu"),
        (gpt2, GPU, "none for model type 'gpt2'"),
    ):
        with pytest.raises(ValueError, match=f"layer_kernels='liger': .*{reason}"):
            use_layer_kernels(model, "liger", device)
        with caplog.at_level(logging.INFO, logger="fastpo.model.layer_kernels"):
            assert not use_layer_kernels(model, "auto", device)
        assert reason in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="liger-kernel is not installed"):
        use_layer_kernels(llama, "liger", GPU)
    assert not calls
