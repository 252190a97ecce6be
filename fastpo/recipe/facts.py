"""What is said about a run, in its first lines and in run.json."""

from __future__ import annotations

import math
import time
from typing import NotRequired, TypedDict, cast

from peft import PeftModel
from torch import nn

from fastpo.data.dataset import GroupDataset
from fastpo.data.packing import counts_of
from fastpo.data.stream import GroupStream
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions, Workspace
from fastpo.objectives import get_objective
from fastpo.recipe.recipe import Recipe
from fastpo.run.record import Environment, environment
from fastpo.train.config import batch_words
from fastpo.train.trainer import PreferenceTrainer

_REFERENCES = {
    "none": "not needed",
    "adapter": "the model with its adapter switched off",
    "copy": "a frozen copy of the model as it was at the start",
    "store": "log-probabilities on disk, from before the first step",
}
_TYPICAL = 512  # target tokens of a group, where a stream has not been counted

ModelFacts = TypedDict(
    "ModelFacts", {"name": str, "class": str, "parameters": int, "trainable": int, "dtype": str}
)


class DataFacts(TypedDict):
    """Hold counts of groups and tokens; a stream has none before it is read."""

    name: str
    rows: NotRequired[int]
    groups: NotRequired[float]
    responses: NotRequired[float]
    tokens: NotRequired[float]
    unshared_tokens: NotRequired[float]
    label_tokens: NotRequired[float]
    longest: NotRequired[int]
    context: NotRequired[int]
    synthetic_context: NotRequired[int]
    eval_groups: NotRequired[int]


class ObjectiveFacts(TypedDict):
    """Hold a name or a mixture, formula, hyper-parameters in force, papers."""

    name: str | dict[str, float]
    formula: str
    hyper: dict[str, object]
    paper: str


class SharingFacts(TypedDict):
    """Say whether responses share one copy of their prompt, or why not."""

    on: bool
    reason: str


class Facts(TypedDict):
    """Hold what run.json says about a run that has begun."""

    status: str
    command: str
    started: str
    model: ModelFacts
    data: DataFacts
    step: str
    objective: ObjectiveFacts
    reference: str
    sharing: SharingFacts
    schedule: str
    environment: Environment
    arguments: dict[str, object]
    recipe: dict[str, object]
    seconds: NotRequired[float]
    error: NotRequired[str]


def model_facts(name: str, model: nn.Module) -> ModelFacts:
    """Return name, class and sizes of a model."""
    # Four-bit weights lie two in a byte: peft and bitsandbytes both count them as they were.
    sizes = [
        (p.numel() * (2 if p.__class__.__name__ == "Params4bit" else 1), p.requires_grad)
        for p in model.parameters()
    ]
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "name": name,
        "class": type(inner).__name__,
        "parameters": sum(n for n, _ in sizes),
        "trainable": sum(n for n, trained in sizes if trained),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def data_facts(
    name: str, train: GroupDataset | GroupStream, held_out: GroupDataset | GroupStream | None
) -> DataFacts:
    """Count groups and their tokens."""
    facts: DataFacts = {"name": name}
    if isinstance(train, GroupDataset):
        counts = counts_of(train.groups)
        facts = {
            "name": name,
            "rows": train.num_rows,
            "groups": counts.groups,
            "responses": counts.responses,
            "tokens": counts.tokens,
            "unshared_tokens": counts.unshared_tokens,
            "label_tokens": counts.target_tokens,
            "longest": max(len(g) for g in train.groups),
            "context": max(len(g.prompt_ids) + g.longest for g in train.groups),
        }
        if any(g.prompt_positions is not None for g in train.groups):
            facts["synthetic_context"] = max(g.span for g in train.groups)
    if isinstance(held_out, GroupDataset):
        facts["eval_groups"] = len(held_out)
    return facts


def objective_facts(recipe: Recipe) -> ObjectiveFacts:
    """Return name or mixture, formula, hyper-parameters in force and papers."""
    named = recipe.settings["objective"]
    chosen = [get_objective(name) for name in ([named] if isinstance(named, str) else named)]
    mixed = len(chosen) > 1
    return {
        "name": named,
        "formula": "\n".join(f"{o.name}: {o.formula}" if mixed else o.formula for o in chosen),
        "hyper": {**recipe.hyper} if mixed else recipe.hyper[chosen[0].name],
        "paper": ", ".join(o.paper for o in chosen),
    }


def reference_words(recipe: Recipe, kind: str) -> str:
    """Say what the policy is compared with; `kind` is the trainer's."""
    model = recipe.model
    named = model.ref_model is not None and kind != "none"
    words = str(model.ref_model) if named else _REFERENCES[kind]
    return words if model.ref_model2 is None else f"{words}, and {model.ref_model2}"


def schedule_words(trainer: PreferenceTrainer, label_tokens: float) -> str:
    """Say what the head will do in a typical step of training, of so many target tokens."""
    head = trainer.loss.head
    assert head is not None
    bias = head.bias
    kl = trainer.loss.needs_kl
    work = Workload(
        max(1, round(label_tokens)),
        *head.weight.shape,
        dtype=head.weight.dtype,
        want=("logps", "kl_ref_policy") if kl else ("logps",),
        num_grad_stats=2 if kl else 1,
        needs_head=head.weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or head.lora is not None,
        needs_weight=head.weight.requires_grad,
        with_reference=kl,
    )
    options = HeadOptions(trainer.args.backend, cast(Workspace, trainer.args.workspace_mib))
    _, schedule, why = plan_head(work, options, device=trainer.args.device)
    return f"{schedule.name}, {schedule.matmuls} products ({schedule.reason}); {why}"


def step_words(batch: dict[str, int], drop_last: bool, groups: float | None) -> str:
    """Say what a step consists of, and what becomes of the groups that fill none."""
    words = f"{batch_words(batch)}; drop_last is {'on' if drop_last else 'off'}"
    at_once = math.prod(batch.values()) // (batch["accumulated"] if drop_last else 1)
    if groups is None or not (spare := groups % at_once):
        return words
    return f"{words}, an epoch's last {spare} are " + (
        "left out" if drop_last else "a smaller step"
    )


def run_facts(
    recipe: Recipe,
    trainer: PreferenceTrainer,
    model: nn.Module,
    data: DataFacts,
    command: str,
) -> Facts:
    """Return what is known of a run before its first step.

    Args:
        recipe: what is trained.
        trainer: of the run, checked.
        model: its policy.
        data: counts of its data.
        command: the command line, without secrets.
    """
    config = trainer.args
    groups = data.get("groups")
    tokens = _TYPICAL if groups is None else data.get("label_tokens", 0) / groups
    return {
        "status": "running",
        "command": command,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": model_facts(recipe.model.model, model),
        "data": data,
        "step": step_words(config.batch_facts(), config.dataloader_drop_last, groups),
        "objective": objective_facts(recipe),
        "reference": reference_words(recipe, trainer.reference_kind),
        "sharing": {"on": trainer.collator.share_prompt, "reason": trainer.sharing_reason},
        "schedule": schedule_words(trainer, tokens * config.per_device_train_batch_size),
        "environment": environment(),
        "arguments": config.to_dict(),
        "recipe": recipe.settings,
    }
