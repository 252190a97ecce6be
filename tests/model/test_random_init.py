"""Random weights of the true shape: sizes, quantised as a loaded model is, and a byte tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpo.model.load import load_model
from fastpo.model.random_init import PRESETS, byte_tokenizer, model_config
from tests.model.tiny import FAMILIES, family

# Parameters as the checkpoints' own pages count them.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "gemma-2-2b": 2_614_341_888,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A config.json alone: Qwen2, whose projections have biases."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen2", **FAMILIES["qwen2"][1]}))
    return str(path)


def test_presets_have_the_published_sizes() -> None:
    assert PUBLISHED.keys() == PRESETS.keys()
    for name, count in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(name))
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_random_weights(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(shape, random_init=True, dtype="bfloat16", lora={"r": 2}, device="cpu")
    assert "random weights" in caplog.text
    base = model.get_base_model()  # pyright: ignore
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert base.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match="random_init reads no weights: drop gguf_file"):
        load_model(shape, random_init=True, gguf_file="q4.gguf")


def test_quantised_random_weights_are_like_loaded_ones(shape: str, tmp_path: Path) -> None:
    """The same modules, dtypes and shapes as bitsandbytes makes of a checkpoint; it computes."""
    four_bits = pytest.importorskip("bitsandbytes").nn.Linear4bit
    family("qwen2").save_pretrained(tmp_path / "whole")
    loaded = load_model(str(tmp_path / "whole"), quantization="nf4", dtype="float32")
    drawn = load_model(shape, random_init=True, quantization="nf4", dtype="float32", device="cpu")

    def facts(model: torch.nn.Module) -> dict[str, tuple]:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {n: (type(t), t.shape, t.dtype, t.requires_grad) for n, t in tensors.items()}

    assert facts(drawn) == facts(loaded)
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        assert getattr(drawn, name) == getattr(loaded, name)
    projection = drawn.model.layers[0].self_attn.q_proj  # pyright: ignore
    assert isinstance(projection, four_bits)
    assert projection.compute_dtype == torch.float32
    assert drawn.lm_head.weight is drawn.model.embed_tokens.weight  # pyright: ignore
    ids = torch.arange(9)[None]
    assert drawn(ids).logits.isfinite().all()
    assert not torch.equal(drawn(ids).logits[0, 0], drawn(ids).logits[0, 1])
    with pytest.raises(ValueError, match="four bits only"):
        load_model(shape, random_init=True, quantization={"load_in_8bit": True}, device="cpu")


def test_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer(model_config("llama-3-8b"))
    text = "na\u00efve \U0001f600\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="259 tokens, the model 128"):
        byte_tokenizer(family("llama").config)


def test_what_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: it has no model_type; name a config"):
        model_config(str(tmp_path / "x.json"))
