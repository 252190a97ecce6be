"""The training step of a run: what the objective, the flags and the card decide."""

from __future__ import annotations

from typing import Any

import pytest

from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.planner.jobs import PlannedRun, host_needs, job_of_flags, job_of_run
from fastpo.planner.memory import CARDS, GIB, plan

H100 = CARDS["h100"]


def run(**fields: Any) -> PlannedRun:
    """Return a LoRA run of DPO on the smallest preset."""
    usual: dict[str, Any] = {
        "model": "smollm2-135m",
        "loss": PreferenceLoss("dpo"),
        "max_length": 2048,
        "max_response_length": None,
        "groups": 1,
        "lora": {"r": 8, "target_modules": ["q_proj"]},
        "quantised": False,
        "dtype": "auto",
        "optim": "adamw_torch",
        "reference": "auto",
        "has_store": False,
        "has_ref_model": False,
        "storable": True,
        "share_prompt": True,
        "offload": True,
        "mlp_tile": None,
        "workspace_mib": "auto",
        "resize_embeddings": False,
    }
    return PlannedRun(**{**usual, **fields})


# Families differ in how many responses a group has, and the divergence of TDPO in what it needs of
# the reference: its whole distribution, which no store holds.
@pytest.mark.parametrize(
    ("objective", "candidates", "reference"),
    [
        ("dpo", 2, "store"),
        ("logo", 3, "none"),
        ("kto", 2, "store"),  # brings a mismatched response
        ("npo", 1, "store"),
        ("tdpo1", 2, "copy"),
    ],
)
def test_an_objective_says_how_many_responses_and_whether_a_reference(
    objective: str, candidates: int, reference: str
) -> None:
    job = job_of_flags("smollm2-135m", objective, {"context": 4096, "method": "full"}, H100)
    assert (job.candidates, job.reference) == (candidates, reference)


def test_flags_win_over_the_run() -> None:
    job = job_of_run(run(), {})
    assert (job.method, job.weights, job.rank, job.targets) == ("lora", "bfloat16", 8, ("q_proj",))
    assert (job.context, job.response, job.reference) == (2048, 512, "adapter")
    full = job_of_run(run(), {"method": "full", "context": 1024, "reference": "copy"})
    assert (full.method, full.weights, full.context) == ("full", "float32", 1024)
    assert full.reference == "copy"
    with pytest.raises(ValueError, match="how long is a row"):
        job_of_run(run(max_length=None), {})


def test_half_precision_weights_come_with_an_optimiser_that_moves_them() -> None:
    flags: Any = {"context": 1024, "method": "full", "weights": "bfloat16"}
    assert job_of_flags("smollm2-135m", "dpo", flags, H100).optim == "adamw_torch_8bit"
    named = job_of_flags("smollm2-135m", "dpo", {**flags, "optim": "sgd"}, H100)
    assert named.optim == "sgd"


def test_the_host_is_said_in_one_line() -> None:
    job = job_of_run(run(), {})
    inputs = plan(job).host["layer inputs"] / GIB
    assert host_needs(job).endswith(
        f"max_length=2048, {inputs:.1f} of them pinned for layer inputs"
    )
