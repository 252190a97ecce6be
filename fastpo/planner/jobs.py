"""Make the training step of a run from what its recipe or the flags of `fastpo plan` say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from fastpo.head.schedule import auto_workspace_mib
from fastpo.head.spec import Workspace
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.load import check_place, trained_adapter
from fastpo.model.random_init import model_config
from fastpo.planner.memory import GIB, Card, Job, Shape, plan
from fastpo.reference.build import resolve_kind

# Responses of a group where neither a flag nor the objective says: lists as LOGO has them.
_CANDIDATES = {"point": 1, "pair": 2, "list": 3}


class JobFields(TypedDict, total=False):
    """Hold fields of a `Job` beside what the model and the objective decide; None is as absent."""

    context: int | None
    response: int | None
    candidates: int
    groups: int
    method: Literal["full", "lora", "qlora"]
    weights: str
    rank: int | None
    targets: tuple[str, ...] | None
    embeddings: bool
    optim: str
    reference: str
    share_prompt: bool
    offload: bool
    mlp_tile: int | str | None
    workspace_mib: float


@dataclass(frozen=True)
class PlannedRun:
    """Say what of a run decides its step, in the words of a recipe.

    Args:
        model: name, preset or folder; one with an adapter stands for its base.
        loss: the objectives.
        max_length, max_response_length: the longest row and response in tokens, or None.
        groups: prompts a micro-batch.
        lora: whether an adapter is trained, and its arguments.
        quantised: whether the base weights are in four bits.
        dtype: of the weights, or auto.
        optim: the Trainer's name.
        reference: the kind that is asked for, or auto.
        has_store, has_ref_model, storable: as `fastpo.reference.build.resolve_kind` takes them.
        share_prompt, offload, mlp_tile, workspace_mib, resize_embeddings: as in recipes.
    """

    model: str
    loss: PreferenceLoss
    max_length: int | None
    max_response_length: int | None
    groups: int
    lora: bool | Mapping[str, Any] | None
    quantised: bool
    dtype: str
    optim: str
    reference: str
    has_store: bool
    has_ref_model: bool
    storable: bool
    share_prompt: bool
    offload: bool
    mlp_tile: int | str | None
    workspace_mib: Workspace
    resize_embeddings: bool


def job_of_run(run: PlannedRun, flags: JobFields, card: Card | None = None) -> Job:
    """Return the step of a run on a GPU; flags win over what the run says.

    Args:
        run: of a recipe.
        flags: fields that were given beside it.
        card: whose memory decides about `workspace_mib: auto`.

    Raises:
        ValueError: no length of the rows in the run or the flags.
    """
    context = flags.get("context")
    context = run.max_length if context is None else context
    if context is None:
        raise ValueError("how long is a row? set max_length in the recipe, or give --context")
    adapter = trained_adapter(run.model)
    lora: Mapping[str, Any] = run.lora if isinstance(run.lora, Mapping) else {}
    targets: str | Sequence[str] = lora.get("target_modules", "all-linear")
    trains_adapter = bool(run.lora) or adapter is not None
    usual = "qlora" if run.quantised else "lora" if trains_adapter else "full"
    method = flags.get("method") or usual
    fields: JobFields = {
        "response": run.max_response_length,
        "candidates": _candidates(run.loss),
        "groups": run.groups,
        "method": method,
        # Another method than the recipe's has its own default.
        "weights": _weights(run.dtype if method == usual else "auto", method),
        "rank": lora.get("r"),
        "targets": None if targets == "all-linear" else tuple(targets),
        # As in a run where the tokenizer is the larger one; nothing is read here to find out.
        "embeddings": run.resize_embeddings and adapter is None,
        "optim": run.optim,
        # A moving copy beside an adapter shares the weights under it, so `moves` is not told.
        "reference": resolve_kind(
            flags.get("reference", run.reference),
            needs_reference=run.loss.needs_reference,
            is_peft=method != "full",
            has_store=run.has_store and not run.loss.needs_kl,
            has_ref_model=run.has_ref_model,
            storable=run.storable,
        ),
        "share_prompt": run.share_prompt,
        "offload": run.offload,
        "mlp_tile": run.mlp_tile,
        "workspace_mib": _workspace(card) if run.workspace_mib == "auto" else run.workspace_mib,
    }
    resolved: JobFields = {"context": context, "reference": fields["reference"]}
    return _job(run.model, run.loss, {**fields, **flags, **resolved})


def job_of_flags(model: str, objective: str, flags: JobFields, card: Card) -> Job:
    """Return the step that flags alone describe.

    Args:
        model: as in `PlannedRun`.
        objective: decides how many responses a group has, and whether there is a reference.
        flags: the context at least.
        card: whose memory decides about the workspace.
    """
    loss = PreferenceLoss(objective)
    method = flags.get("method", "lora")
    weights = flags.get("weights", _weights("auto", method))
    fields: JobFields = {
        "candidates": _candidates(loss),
        "workspace_mib": _workspace(card),
        "method": method,
        "weights": weights,
        **flags,
    }
    if weights == "bfloat16" and method == "full":
        fields.setdefault("optim", "adamw_torch_8bit")  # plain AdamW would not move them
    fields["reference"] = resolve_kind(
        flags.get("reference", "auto"),
        needs_reference=loss.needs_reference,
        is_peft=method != "full",
        storable=not (loss.needs_kl or loss.needs_second_reference),
    )
    return _job(model, loss, fields)


def host_needs(job: Job) -> str:
    """Say in one line how much host memory a run takes that moves layer inputs there."""
    planned = plan(job)
    return (
        f"{planned.host_peak / GIB:.1f} GiB of host memory at max_length={job.context}, "
        f"{planned.host['layer inputs'] / GIB:.1f} of them pinned for layer inputs"
    )


def _job(name: str, loss: PreferenceLoss, fields: JobFields) -> Job:
    check_place(name)
    if (adapter := trained_adapter(name)) is not None:
        name = adapter.base
    known: Any = {key: value for key, value in fields.items() if value is not None}
    return Job(
        Shape.of(model_config(name)),
        references=1 + loss.needs_second_reference,
        divergence=loss.needs_kl,
        **known,
    )


def _workspace(card: Card | None) -> int:
    return auto_workspace_mib(None if card is None else int(card.memory * GIB))


def _candidates(loss: PreferenceLoss) -> int:
    families = [c.objective.family for c in loss.components]
    return max(_CANDIDATES[family] for family in families) + len(loss.extras)


def _weights(dtype: str, method: str) -> str:
    """Return a run's dtype: float32 where all weights are trained, else as most are stored."""
    trained = method == "full" and dtype == "auto"
    return "float32" if trained or dtype == "float32" else "bfloat16"
