"""Loading: what is passed on, what is refused, and the padding token."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast, T5Config, ViTConfig

from fastpo.model import load
from fastpo.model.hidden import attach
from fastpo.model.load import (
    add_lora,
    disable_dropout,
    load_model,
    load_tokenizer,
    trained_adapter,
)
from tests.model.tiny import family


@pytest.fixture
def saved(tmp_path: Path) -> str:
    family("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    return str(tmp_path)


def test_dtype(
    saved: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert load_model(saved, device="cpu").dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with caplog.at_level(logging.INFO, logger="fastpo.model.load"):
        assert load_model(saved, device="cpu").dtype == torch.float32
    assert "no native bfloat16" in caplog.text
    assert load_model(saved, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'bf17'"):
        load_model(saved, dtype="bf17")


def test_lora(saved: str) -> None:
    model = attach(load_model(saved, lora={"r": 3}))
    adapted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-4] for n in adapted} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    with pytest.raises(ValueError, match="no argument 'rank'"):
        load_model(saved, lora={"rank": 3})


def test_what_an_adapter_stands_on(saved: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    add_lora(load_model(saved), {"r": 2}).save_pretrained(run / "checkpoint-3")
    assert trained_adapter(saved) is None
    assert trained_adapter("owner/name") is None
    (run / "recipe.yaml").write_text("gguf_file: q4.gguf\n")
    assert trained_adapter(str(run / "checkpoint-3")) == (saved, None, "q4.gguf")
    (run / "checkpoint-3").rename(run / "mine")  # no folder of that run
    assert trained_adapter(str(run / "mine")) == (saved, None, None)
    family("llama").save_pretrained(run / "mine")
    with pytest.raises(ValueError, match=r"mine holds a whole model .* and an adapter"):
        trained_adapter(str(run / "mine"))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = family("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load_model(str(tmp_path))


# An encoder-decoder, and a model without a language head.
@pytest.mark.parametrize(
    ("config", "message"),
    [(T5Config(), "encoder-decoder"), (ViTConfig(), "no causal language model")],
    ids=["t5", "vit"],
)
def test_other_models_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def test_options_that_cannot_be(saved: str) -> None:
    with pytest.raises(ValueError, match="switch by themselves"):
        load_model(saved, attn_implementation="fastpo")
    with pytest.raises(ValueError, match="unknown quantization 'nf5'"):
        load_model(saved, quantization="nf5")


def test_quantization_names() -> None:
    nf4 = load._quantization("nf4", torch.float16)
    assert isinstance(nf4, BitsAndBytesConfig)
    assert nf4.bnb_4bit_quant_type == "nf4"
    assert nf4.bnb_4bit_compute_dtype == torch.float16
    assert load._quantization({"load_in_8bit": True}, "auto").load_in_8bit
    assert load._quantization(nf4, "auto") is nf4


def test_disable_dropout() -> None:
    model = load.add_lora(family("gpt2"), {"r": 2, "lora_dropout": 0.3})
    for block in model.base_model.model.transformer.h:
        block.attn.resid_dropout.p = 0.1
    llama = family("llama")
    llama.model.layers[0].self_attn.attention_dropout = 0.2
    assert disable_dropout(llama) == 1
    assert llama.model.layers[0].self_attn.attention_dropout == 0.0
    assert disable_dropout(model) > 2
    assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
    assert disable_dropout(model) == 0


def test_padding_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="fastpo.model.load"):
        assert load_tokenizer(str(tmp_path)).pad_token_id == 0
    assert "padding with '<eos>'" in caplog.text
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a padding"):
        load_tokenizer(str(tmp_path / "none"))
