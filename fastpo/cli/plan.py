"""`fastpo plan`: memory and time of a training step, and the cheapest switch that makes it fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from fastpo.cli.models import table
from fastpo.head.schedule import auto_workspace_mib
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.load import check_place, trained_adapter
from fastpo.model.random_init import model_config
from fastpo.planner.memory import (
    CARDS,
    EFFICIENCY,
    GIB,
    Advice,
    Card,
    Job,
    Plan,
    Shape,
    advise,
    plan,
)
from fastpo.recipe.recipe import Recipe, load_recipe
from fastpo.reference.build import resolve_kind

# Responses of a group where neither a flag nor the objective says: lists as LOGO has them.
_CANDIDATES = {"point": 1, "pair": 2, "list": 3}


def _workspace(card: Card | None) -> int:
    return auto_workspace_mib(None if card is None else int(card.memory * GIB))


def job_of(recipe: Recipe, card: Card | None = None, **given: Any) -> Job:
    """The training step that a recipe describes, on a GPU.

    Args:
        recipe: a checked recipe.
        card: whose memory decides about `workspace_mib: auto`.
        given: fields of `Job` that win over it.

    Raises:
        ValueError: no length of the rows in the recipe or in `given`.
    """
    config, model = recipe.config(), recipe.model
    mib = config.workspace_mib
    loss = config.build_loss()
    adapter = trained_adapter(model.model)
    context = given.pop("context", None) or config.max_length
    if context is None:
        raise ValueError("how long is a row? set max_length in the recipe, or give --context")
    lora = {} if model.lora is True or model.lora is None else (model.lora or {})
    targets = lora.get("target_modules", "all-linear")
    method = "lora" if model.lora or adapter is not None else "full"
    if model.quantization is not None:
        method = "qlora"
    # Another method than the recipe's has its own default.
    dtype = model.dtype if given.get("method", method) == method else "auto"
    method = given.setdefault("method", method)
    fields: dict[str, Any] = {
        "response": config.max_response_length,
        "candidates": _candidates(loss),
        "groups": config.per_device_train_batch_size,
        "weights": _weights(dtype, method),
        "rank": lora.get("r"),
        "targets": None if targets == "all-linear" else tuple(targets),
        # As of a run where the tokenizer is the larger one; nothing is read here to find out.
        "embeddings": model.resize_embeddings and adapter is None,
        "optim": str(getattr(config.optim, "value", config.optim)),
        # A moving copy beside an adapter shares the weights under it, so `moves` is not told.
        "reference": resolve_kind(
            config.reference,
            needs_reference=loss.needs_reference,
            is_peft=method != "full",
            has_store=config.reference_store is not None and not loss.needs_kl,
            has_ref_model=model.ref_model is not None,
            storable=config.storable(loss) and not (model.ref_model2 or recipe.data.streaming),
        ),
        "share_prompt": config.share_prompt != "false",
        "offload": config.offload_activations,
        "mlp_tile": config.mlp_tile,
        "workspace_mib": _workspace(card) if mib == "auto" else mib,
    }
    fields = {k: v for k, v in {**fields, **given}.items() if v is not None}
    return _job(model.model, loss, context=context, **fields)


def _job(name: str, loss: PreferenceLoss, **fields: Any) -> Job:
    check_place(name)
    if (adapter := trained_adapter(name)) is not None:
        name = adapter.base
    return Job(
        Shape.of(model_config(name)),
        references=1 + loss.needs_second_reference,
        divergence=loss.needs_kl,
        **fields,
    )


def _candidates(loss: PreferenceLoss) -> int:
    families = [c.objective.family for c in loss.components]
    return max(_CANDIDATES[family] for family in families) + len(loss.extras)


def _weights(dtype: str, method: str) -> str:
    """As a run has them: in float32 where all of them are trained, else as most are stored."""
    trained = method == "full" and dtype == "auto"
    return "float32" if trained or dtype == "float32" else "bfloat16"


def describe(job: Job, planned: Plan, card: Card, name: str) -> str:
    """The parts as a table, and the time of a step."""
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
    """What fits, and with which switches."""
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
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    if isinstance(tile := given.get("mlp_tile"), str) and tile != "auto":
        given["mlp_tile"] = int(tile) if tile.isdecimal() else 0
        if given["mlp_tile"] < 1:
            raise ValueError(f"--mlp-tile {tile} is neither a number of tokens nor auto")
    card = CARDS.get(arguments.gpu)
    if card is None:
        raise ValueError(f"--gpu {arguments.gpu} is not one of {', '.join(CARDS)}")
    if arguments.recipe is not None:
        if arguments.model is not None or arguments.objective is not None:
            raise ValueError("--recipe names the model and the objective: drop the other flag")
        job = job_of(load_recipe(arguments.recipe), card, **given)
    else:
        if arguments.model is None or arguments.context is None:
            raise ValueError("--model and --context are needed, or --recipe")
        loss = PreferenceLoss(arguments.objective or "dpo")
        method = given.setdefault("method", "lora")
        given.setdefault("candidates", _candidates(loss))
        given.setdefault("workspace_mib", _workspace(card))
        if given.setdefault("weights", _weights("auto", method)) == "bfloat16" and method == "full":
            given.setdefault("optim", "adamw_torch_8bit")  # plain AdamW would not move them
        storable = not (loss.needs_kl or loss.needs_second_reference)
        given["reference"] = resolve_kind(
            given.get("reference", "auto"),
            needs_reference=loss.needs_reference,
            is_peft=method != "full",
            storable=storable,
        )
        job = _job(arguments.model, loss, **given)
    planned = plan(job)
    host = float("inf") if arguments.host_gib is None else arguments.host_gib * GIB
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


def host_needs(recipe: Recipe) -> str | None:
    """One line on the host memory of a run that moves layer inputs there, before it begins."""
    config = recipe.config()
    if not config.offload_activations or config.max_length is None:
        return None
    planned = plan(job_of(recipe))
    return (
        f"{planned.host_peak / GIB:.1f} GiB of host memory at max_length={config.max_length}, "
        f"{planned.host['layer inputs'] / GIB:.1f} of them pinned for layer inputs"
    )
