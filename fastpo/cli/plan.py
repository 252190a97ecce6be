"""`fastpo plan`: memory and time of a training step, and the cheapest switch that makes it fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import Any

from transformers.training_args import OptimizerNames

from fastpo.cli.terminal import table
from fastpo.errors import nearest
from fastpo.planner.advice import Advice, advise
from fastpo.planner.jobs import JobFields, PlannedRun, host_needs, job_of_flags, job_of_run
from fastpo.planner.memory import CARDS, EFFICIENCY, GIB, Card, Job, Plan, plan
from fastpo.recipe.recipe import Recipe, load_recipe


def job_of(recipe: Recipe, flags: JobFields | None = None, card: Card | None = None) -> Job:
    """Return the training step that a recipe describes; flags win over it.

    Raises:
        ValueError: no length of the rows in the recipe or the flags.
    """
    config, model = recipe.config(), recipe.model
    loss = config.build_loss()
    run = PlannedRun(
        model=model.model,
        loss=loss,
        max_length=config.max_length,
        max_response_length=config.max_response_length,
        groups=config.per_device_train_batch_size,
        lora=model.lora,
        quantised=model.quantization is not None,
        dtype=model.dtype,
        optim=str(getattr(config.optim, "value", config.optim)),
        reference=config.reference,
        has_store=config.reference_store is not None,
        has_ref_model=model.ref_model is not None,
        storable=config.storable(loss) and not (model.ref_model2 or recipe.data.streaming),
        share_prompt=config.share_prompt != "false",
        offload=config.offload_activations,
        mlp_tile=config.mlp_tile,
        workspace_mib=config.workspace_mib,  # pyright: ignore[reportArgumentType]
        resize_embeddings=model.resize_embeddings,
    )
    return job_of_run(run, flags or {}, card)


def describe(job: Job, planned: Plan, card: Card, name: str) -> str:
    """Write the parts as a table, and the time of a step."""
    shape = job.shape
    head = (
        f"{shape.parameters / 1e9:.2f} B parameters, {job.method}, {job.weights}; {job.groups} x "
        f"(prompt {job.prompt} + {job.candidates} responses of {job.response}): {job.tokens:,} "
        f"tokens\n"
    )
    rows: list[tuple[str, ...]] = [("GiB", name, "host")]
    for part in dict.fromkeys((*planned.device, *planned.host)):
        sizes = (planned.device.get(part, 0), planned.host.get(part, 0))
        if any(sizes) or part == "logits":
            shown = [f"{size / GIB:.2f}" if size else "" for size in sizes]
            rows.append((part, *(shown if part != "logits" else ("never", ""))))
    rows.append(("peak", f"{planned.peak / GIB:.2f}", f"{planned.host_peak / GIB:.2f}"))
    rows.append(("there is", f"{card.memory:.2f}", ""))
    seconds = planned.seconds(card)
    return (
        f"{head}\n{table(rows)}\n\nThe head's buffers and a layer's working set are never alive "
        f"together: the larger counts.\n{planned.flop / 1e15:.2f} PFLOP a micro-batch: about "
        f"{seconds:.3g} s, {job.tokens / seconds:,.0f} tokens/s, at an assumed {EFFICIENCY:.0%} of "
        f"{card.tflops:g} TFLOP/s"
    )


def verdict(advice: Advice) -> str:
    """Say what fits, and with which switches."""
    longest = f"the largest context is {advice.longest:,} tokens"
    if advice.switches is None:
        return f"does not fit with every switch set; with them {longest}"
    if not advice.switches:
        return f"fits; {longest}"
    planned = plan(advice.job)
    lines = ["does not fit; the cheapest that makes it fit:", *(f"  {s}" for s in advice.switches)]
    peaks = f"{planned.peak / GIB:.2f} GiB, {planned.host_peak / GIB:.2f} GiB on the host"
    return "\n".join([*lines, f"with a peak of {peaks}; {longest}"])


def plan_step(arguments: argparse.Namespace) -> int:
    """Print what a step takes."""
    names = [f.name for f in dataclasses.fields(Job)]
    flags: Any = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    if isinstance(tile := flags.get("mlp_tile"), str) and tile != "auto":
        flags["mlp_tile"] = int(tile) if tile.isdecimal() else 0
        if flags["mlp_tile"] < 1:
            raise ValueError(f"--mlp_tile {tile} is neither a number of tokens nor auto")
    optimizers = [name.value for name in OptimizerNames]
    if arguments.optim is not None and arguments.optim not in optimizers:
        hint = nearest(arguments.optim, optimizers)
        raise ValueError(f"--optim {arguments.optim} is no optimiser of the Trainer's.{hint}")
    card = CARDS.get(arguments.gpu)
    if card is None:
        raise ValueError(f"--gpu {arguments.gpu} is not one of {', '.join(CARDS)}")
    if arguments.recipe is not None:
        if arguments.model is not None or arguments.objective is not None:
            raise ValueError("--recipe names the model and the objective: drop the other flag")
        job = job_of(load_recipe(arguments.recipe), flags, card)
    else:
        if arguments.model is None or arguments.context is None:
            raise ValueError("--model and --context are needed, or --recipe")
        job = job_of_flags(arguments.model, arguments.objective or "dpo", flags, card)
    if job.method == "full" and arguments.rank is not None:
        raise ValueError(
            f"--rank {arguments.rank} is of an adapter, and all weights are trained: drop it, or "
            "give --method lora"
        )
    planned = plan(job)
    host = math.inf if arguments.host_gib is None else arguments.host_gib * GIB
    if not host >= 0:  # inf is any
        raise ValueError(f"--host_gib {arguments.host_gib} must be at least 0")
    advice = advise(job, card.memory * GIB, host)
    if arguments.json:
        facts = {
            "job": {k: getattr(job, k) for k in names if k != "shape"},
            "device_bytes": planned.device,
            "host_bytes": planned.host,
            "peak_bytes": planned.peak,
            "host_peak_bytes": planned.host_peak,
            "flop": planned.flop,
            "seconds": planned.seconds(card),
            "fits": advice.switches == (),
            "switches": advice.switches,
            "longest_context": advice.longest,
            "positions": None if job.shape.positions is None else job.shape.positions.limit,
            "warning": job.warning,
        }
        print(json.dumps(facts, indent=1))
        return 0
    warning = "" if job.warning is None else f"\nwarning: {job.warning}"
    print(f"{describe(job, planned, card, arguments.gpu)}\n\n{verdict(advice)}{warning}")
    return 0


def recipe_needs(recipe: Recipe) -> str | None:
    """Return one line on the host memory of a run that moves layer inputs there, or None."""
    config = recipe.config()
    if not config.offload_activations or config.max_length is None:
        return None
    return host_needs(job_of(recipe))
