"""Find the cheapest switches of a recipe that make a step fit, and the longest context then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fastpo.planner.memory import Job, plan


class Lever(NamedTuple):
    """Describe a switch of the recipe that makes room.

    Args:
        switch: as the recipe says it.
        changes: what it changes in a job.
        alone: it takes the place of others that are `alone`.
    """

    switch: str
    changes: Mapping[str, object]
    alone: bool = False

    def after(self, switches: tuple[str, ...]) -> tuple[str, ...]:
        """Return these switches without those of the same keys, and this one."""
        keys = {part.partition(":")[0] for part in self.switch.split(", ")}
        kept = (each for each in switches if each.partition(":")[0] not in keys)
        return (*kept, self.switch)


def levers(job: Job) -> Iterator[Lever]:
    """Yield switches that `job` has not used: free ones first, then those that round."""
    if not job.share_prompt:
        yield Lever("share_prompt: auto", {"share_prompt": True})
    if job.reference == "copy":
        yield Lever("reference: store", {"reference": "store"})
    if job.mlp_tile is None:
        yield Lever("mlp_tile: auto", {"mlp_tile": "auto"})
    if not job.offload:
        yield Lever("offload_activations: true", {"offload": True})
    if job.workspace_mib > 256:
        yield Lever("workspace_mib: 256", {"workspace_mib": 256})
    whole, half = job.method == "full", job.weights == "bfloat16"
    if "8bit" not in job.optim and not (whole and half):
        yield Lever("optim: paged_adamw_8bit", {"optim": "paged_adamw_8bit"})
    if whole:
        # Only optimisers that round at random, or sum remainders, move bfloat16 weights.
        for optim in ("adamw_torch_8bit", "adamw_torch_4bit"):
            if not (half and job.optim in (optim, "adamw_torch_4bit")):
                switch = f"optim: {optim}" if half else f"dtype: bfloat16, optim: {optim}"
                yield Lever(switch, {"weights": "bfloat16", "optim": optim}, alone=True)
        lora = {"method": "lora", "weights": "bfloat16"}
        yield Lever("lora: true", {**lora, "reference": _without_copy(job)}, alone=True)
    if job.method != "qlora":
        nf4 = {"method": "qlora", "weights": "bfloat16", "reference": _without_copy(job)}
        yield Lever("lora: true, quantization: nf4", nf4, alone=True)


def _without_copy(job: Job) -> str:
    return "adapter" if job.reference == "copy" else job.reference


class Advice(NamedTuple):
    """Hold switches that make a job fit, none where it fits as it is, None where none do."""

    switches: tuple[str, ...] | None
    job: Job  # with the switches set
    longest: int  # largest context that fits with them, in tokens; 0 where not even 1024 do


def fits(job: Job, device: float, host: float) -> bool:
    """Return whether a step stays within so many device and host bytes."""
    planned = plan(job)
    return planned.peak <= device and planned.host_peak <= host


def advise(job: Job, device: float, host: float = float("inf")) -> Advice:
    """Find the first lever that makes `job` fit alone, else the fewest from the cheapest on.

    Args:
        job: what is to be run.
        device, host: bytes there are.
    """
    if fits(job, device, host):
        return Advice((), job, _longest(job, device, host))
    available = list(levers(job))
    for lever in available:
        changed = dataclasses.replace(job, **lever.changes)
        if fits(changed, device, host):
            return Advice((lever.switch,), changed, _longest(changed, device, host))
    switches: tuple[str, ...] = ()
    changed = job
    for lever in available:
        changed, said = dataclasses.replace(job, **lever.changes), lever.after(switches)
        if fits(changed, device, host):
            return Advice(said, changed, _longest(changed, device, host))
        if not lever.alone:
            job, switches = changed, said
    return Advice(None, changed, _longest(changed, device, host))


def _longest(job: Job, device: float, host: float) -> int:
    """Return the largest context that fits, in steps of 1024 tokens."""

    def at(thousands: int) -> bool:
        return fits(dataclasses.replace(job, context=thousands * 1024), device, host)

    low = high = job.response // 1024 + 1
    if not at(low):
        return 0
    while high < 2**14 and at(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) else (low, middle)
    return low * 1024
