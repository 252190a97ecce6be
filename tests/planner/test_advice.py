"""The cheapest switches that make a step fit, in the order of their price."""

from __future__ import annotations

import dataclasses

from fastpo.planner.advice import Lever, advise, fits, levers
from fastpo.planner.memory import GIB, Job
from tests.planner.test_memory import LLAMA_8B, LLAMA_70B, LONG


def test_advice_is_the_cheapest_that_fits() -> None:
    memory = 78 * GIB
    fine = advise(LONG, memory)
    assert fine.switches == ()
    assert fits(dataclasses.replace(LONG, context=fine.longest), memory, float("inf"))
    assert not fits(dataclasses.replace(LONG, context=fine.longest + 1024), memory, float("inf"))
    copied = dataclasses.replace(LONG, context=8192, method="full", reference="copy")
    assert advise(copied, memory).switches == ("reference: store",)
    big = Job(LLAMA_70B, context=65536, method="qlora")
    assert advise(big, memory).switches == ("mlp_tile: auto", "offload_activations: true")
    assert advise(big, memory, 64 * GIB).switches is None  # the host is too small for the inputs
    nothing = advise(big, GIB)
    assert nothing.switches is None
    assert nothing.longest == 0
    whole = advise(dataclasses.replace(big, method="full", context=4096), memory)
    assert whole.switches == ("lora: true, quantization: nf4",)
    trained = Job(LLAMA_8B, context=4096, method="full", weights="float32")
    assert advise(trained, memory).switches == ("dtype: bfloat16, optim: adamw_torch_8bit",)
    half = Lever("dtype: bfloat16, optim: adamw_torch_8bit", {})
    assert half.after(("mlp_tile: auto", "optim: paged_adamw_8bit")) == (
        "mlp_tile: auto",
        half.switch,
    )
    # Ways to hold the weights exclude each other; the others add up.
    said = [each.switch for each in levers(trained)]
    assert said[-5:] == [
        "optim: paged_adamw_8bit",
        "dtype: bfloat16, optim: adamw_torch_8bit",
        "dtype: bfloat16, optim: adamw_torch_4bit",
        "lora: true",
        "lora: true, quantization: nf4",
    ]
    long = advise(dataclasses.replace(trained, context=131072), memory).switches
    assert long is not None
    assert sum("lora" in s or "dtype" in s for s in long) == 1
