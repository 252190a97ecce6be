"""The planner against the tensors that are alive in a real step, and against closed forms."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bench.long_context import LiveBytes, Step, planned, predicted_extra
from fastpo.model.random_init import model_config
from fastpo.optional import require
from fastpo.planner.memory import CARDS, GIB, Job, Shape, plan
from tests.model.tiny import FAMILIES

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen2": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **SIZES, "head_dim": 32},
}


def case(model: str, method: str, **options: Any) -> dict[str, Any]:
    return {
        "model": MODELS[model],
        "context": 1536,
        "response": 64,
        "candidates": 3,
        "objective": "logo",
        "rank": 2,
        "method": method,
        "weights": "float32",
        "computed": "float32",
        "workspace_mib": 1,
        **options,
    }


BF16 = {"weights": "bfloat16", "computed": "bfloat16"}
AUTOCAST = {"weights": "float32", "computed": "bfloat16"}


# Each term of the sum decides at least one of these: method, dtypes, tiles, offload, soft-cap.
@pytest.mark.parametrize(
    "given",
    [
        case("llama", "full"),
        case("llama", "lora", mlp_tile=128),
        case("llama", "lora", mlp_tile=128, offload=True),
        case("llama", "lora", **BF16),
        case("llama", "lora", **BF16, mlp_tile=128),
        case("llama", "full", **AUTOCAST),
        case("qwen2", "lora"),
        case("qwen2", "full", **BF16, mlp_tile=128),
        case("gemma2", "full"),
    ],
    ids=lambda c: "-".join(
        [c["model"]["model_type"], c["method"], c["weights"], c["computed"]]
        + [k for k in ("mlp_tile", "offload") if k in c]
    ),
)
def test_prediction_is_within_a_tenth_of_what_is_alive(given: dict[str, Any]) -> None:
    step = Step(given, CPU)
    step()
    with LiveBytes(step.tensors) as counted:
        step()
    assert predicted_extra(given, CPU) == pytest.approx(counted.peak, rel=0.1)
    if given.get("offload"):
        inputs = planned(given).host["layer inputs"]
        assert inputs == pytest.approx(step.offload.host_bytes, rel=0.01)  # pyright: ignore
    assert plan(_job(given)).device["logits"] == 0


def _job(given: dict[str, Any]) -> Job:
    own = {k: v for k, v in given.items() if k not in ("model", "objective")}
    return Job(Shape.of(AutoConfig.for_model(**given["model"])), **own)


LLAMA_8B, LLAMA_70B = (Shape.of(model_config(name)) for name in ("llama-3-8b", "llama-3-70b"))
LONG = Job(LLAMA_8B, context=65536, response=512, candidates=3)


def test_known_sums() -> None:
    """Published and hand-computed: residual 256 KiB a token, 0.41 B adapter weights at rank 32."""
    parts = plan(LONG).device
    assert LONG.tokens == 65024 + 3 * 512
    assert parts["residual stream"] == LONG.tokens * 256 * 1024
    assert parts["weights"] == 2 * 8_030_261_248
    assert parts["key and value copies"] == 2 * 65536 * 2 * 1024 * 2
    assert plan(dataclasses.replace(LONG, candidates=4)).device["key and value copies"] == 0
    unshared = dataclasses.replace(LONG, share_prompt=False)
    assert unshared.tokens == 3 * 65536
    big = Job(LLAMA_70B, context=65536, method="qlora", rank=32, optim="paged_adamw_32bit")
    assert plan(big).device["adapter"] == 4 * 414_187_520
    assert plan(big).host["optimiser"] == 8 * 414_187_520
    assert plan(big).device["optimiser"] == 0
    assert plan(big).device["weights"] / GIB == pytest.approx(36.8, abs=0.05)
    mlps = dataclasses.replace(big, targets=("gate_proj", "up_proj", "down_proj"))
    assert plan(mlps).device["adapter"] == 4 * 32 * 80 * 3 * (8192 + 28672)


def test_embeddings_that_are_trained_beside_an_adapter() -> None:
    ends = 2 * 128256 * 4096  # of two matrices, in float32
    without, job = LONG, dataclasses.replace(LONG, embeddings=True)
    before, after = plan(without).device, plan(job).device
    assert after["adapter"] - before["adapter"] == 4 * ends
    assert after["gradients"] - before["gradients"] == 4 * ends
    assert after["optimiser"] - before["optimiser"] == 8 * ends
    assert after["head"] - before["head"] >= 4 * ends // 2
    tied = Job(Shape.of(model_config("smollm2-135m")), context=2048, embeddings=True)
    alone = dataclasses.replace(tied, embeddings=False)
    adapters = [plan(each).device["adapter"] for each in (tied, alone)]
    assert adapters[0] - adapters[1] == 4 * 49152 * 576


def test_full_training_and_references() -> None:
    full = dataclasses.replace(LONG, method="full", reference="copy", references=2)
    parts, count = plan(full).device, 8_030_261_248
    assert parts["adapter"] == 0
    assert parts["gradients"] == 2 * count
    assert parts["optimiser"] == 4 * count
    assert parts["reference model"] == 4 * count
    mixed = plan(dataclasses.replace(full, weights="float32")).device
    assert mixed["gradients"] == 4 * count
    assert mixed["weights cast by autocast"] == 2 * count


# Plain AdamW, and each optimiser that rounds its states.
@pytest.mark.parametrize(
    ("weights", "optim", "want"),
    [
        ("float32", "adamw_torch", 16),
        ("float32", "adamw_bnb_8bit", 10),
        ("bfloat16", "adamw_torch_8bit", 6),
        ("bfloat16", "adamw_torch_4bit", 5),
    ],
)
def test_bytes_of_a_trained_weight(weights: str, optim: str, want: float) -> None:
    """Of weights, gradients and states; a block of 256 states has a float32 scale."""
    job = dataclasses.replace(LONG, method="full", weights=weights, optim=optim)
    parts = plan(job).device
    total = parts["weights"] + parts["gradients"] + parts["optimiser"]
    scales = 2 * 4 / 256 if "bit" in optim else 0
    assert total / LLAMA_8B.parameters == pytest.approx(want + scales, rel=1e-6)


# Both widths of torchao's states.
@pytest.mark.parametrize("bits", [8, 4])
def test_torchaos_states_are_as_large_as_planned(bits: int) -> None:
    optim = require("torchao.optim", "8-bit states", "torchao")
    weight = torch.nn.Parameter(torch.zeros(256, 256, dtype=torch.bfloat16))
    optimizer = getattr(optim, f"AdamW{bits}bit")([weight], block_size=256)
    states = [optimizer._new_buffer(weight, signed) for signed in (True, False)]
    held = sum(t.numel() * t.element_size() for s in states for t in (s.codes, s.scale))
    job = dataclasses.replace(LONG, method="full", optim=f"adamw_torch_{bits}bit")
    assert plan(job).device["optimiser"] / LLAMA_8B.parameters == held / weight.numel()


def test_time() -> None:
    """FLOP of short rows are those of matrices; a window cuts attention; the link can be slower."""
    short = dataclasses.replace(LONG, context=64, response=32, candidates=1, mlp_tile=None)
    product = 2 * LLAMA_8B.matrices * 64
    head = 2 * (2 * 32 * 4096 * 128256)
    assert plan(short).flop == pytest.approx(3 * product + head, rel=0.01)
    full = dataclasses.replace(short, method="full")
    assert plan(full).flop / plan(short).flop == pytest.approx(4 / 3, rel=0.05)
    live = plan(dataclasses.replace(short, reference="adapter")).flop
    assert live - plan(short).flop == pytest.approx(product, rel=0.01)
    windowed = dataclasses.replace(LLAMA_8B, windows=(1024,) * 32)
    assert plan(dataclasses.replace(LONG, shape=windowed)).flop < 0.7 * plan(LONG).flop
    away = plan(dataclasses.replace(LONG, offload=True))
    assert away.seconds(CARDS["h100"]) == plan(LONG).seconds(CARDS["h100"])
    slow = CARDS["h100"]._replace(link=1)
    assert away.seconds(slow) == away.moved / 1e9


def test_what_is_not_planned() -> None:
    with pytest.raises(ValueError, match="context of 512 tokens has no room"):
        Job(LLAMA_8B, context=512)
    mixture = AutoConfig.for_model("mixtral", **FAMILIES["mixtral"][1])
    with pytest.raises(ValueError, match="mixtral is a mixture of experts"):
        Shape.of(mixture)
    with pytest.raises(ValueError, match="gpt2 has no MLP of linear layers"):
        Shape.of(AutoConfig.for_model("gpt2", **FAMILIES["gpt2"][1]))
