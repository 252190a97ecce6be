"""The configuration of a run: `transformers.TrainingArguments` and what preferences add."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments
from transformers.training_args import trainer_log_levels
from transformers.utils import is_torch_bf16_gpu_available

from fastpo.data.options import DataOptions, DataSettings
from fastpo.data.positions import PositionSynthesis
from fastpo.domain import (
    Auto,
    Count,
    Natural,
    NonNegative,
    Positive,
    domain_of,
    fit_fields,
)
from fastpo.fields import documented
from fastpo.head.head import Head
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.device import default_device, native_bf16
from fastpo.objectives import OBJECTIVES, get_objective
from fastpo.objectives.user import is_reference
from fastpo.optional import require_transformers
from fastpo.redact import learn, redact, refuse_redacted
from fastpo.reference.moving import UpdateRule
from fastpo.train.elsewhere import TRAINER, refuse_keywords, unknown
from fastpo.train.optimizers import RANDOM_ROUNDING, TORCHAO, optimizer_name, optimizer_options
from fastpo.train.ranges import RANGES

log = logging.getLogger(__name__)


_published: ContextVar[bool] = ContextVar("published", default=False)


@contextmanager
def published() -> Iterator[None]:
    """Leave secrets out of a `PreferenceConfig` that is pickled in here; elsewhere they stay."""
    before = _published.set(True)
    try:
        yield
    finally:
        _published.reset(before)


def batch_words(batch: dict[str, int]) -> str:
    """Return `batch_facts` as one would say it."""
    ranks = f"{batch['ranks']} rank{'s' if batch['ranks'] > 1 else ''}"
    return (
        f"{batch['groups']} groups a device x {batch['accumulated']} accumulated x {ranks} = "
        f"{math.prod(batch.values())} groups a step"
    )


def _mapping(name: str, value: dict | str | None) -> dict[str, object]:
    """Return a mapping that a flag may bring as JSON, which `__post_init__` parses.

    Raises:
        ValueError: any other text.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} is no mapping of names to values")
    return {str(key): item for key, item in (value or {}).items()}


@documented
@dataclass(repr=False)
class PreferenceConfig(DataSettings, TrainingArguments):
    """Arguments of `PreferenceTrainer`.

    Batch sizes count groups (one prompt with its responses), not rows of the packed batch.
    Every field can be given in YAML or as a flag; `to_dict` is the resolved configuration, JSON
    and YAML safe, and `from_dict` reads it back. How rows become groups: `DataSettings`.

    Args:
        objective: name of an objective, or a mixture {name: weight} (JSON on the CLI).
        objective_args: hyper-parameters of the objective; 'dpo.beta' addresses one of a mixture.
        beta: short for objective_args: {beta: ...}.
        token_masks: token weights from the reference's hidden states (SparsePO): learned, common
            or one for divergences too, or fixed (activation).
        share_prompt: one prompt copy per group: auto (when the model can), true or false.
        max_tokens_per_row: a device's batch runs in rows of at most so many tokens, one after the
            other; the step stays the same. null: one row.
        attention_backend: implementation of attention with shared prompts.
        router_aux_loss_coef: weight of the load-balance loss of a mixture of experts; null: the
            model's own where its config has output_router_logits on, else 0.
        backend: implementation of the head.
        workspace_mib: memory for logits in MiB, whatever the vocabulary is; auto: 256, on a GPU the
            smaller of 1024 and a fiftieth of its memory.
        offload_activations: inputs of checkpointed layers wait in pinned host memory.
        mlp_tile: MLPs run in tiles of so many tokens; auto: the hidden size.
        layer_kernels: liger-kernel's norms, RoPE and activations; auto: where they can.
        batch_statistics: statistics (KTO's z0, ...) of a micro-batch, or exactly of the whole step
            for one more forward pass.
        disable_dropout: dropout off in policy and reference.
        self_check: compare packed with padded and fused with plain before step one.
        reference: adapter is the model with it switched off, copy a frozen one, store log-probs on
            disk from one pass before the first step; auto: the first of adapter, store and copy
            that can be.
        reference_store: folder of the store; null: <output_dir>/reference.
        reference_update: the reference follows the policy: {every: 512, mixup: 0.6} (TR-DPO) or
            {rule: bema, every: 400}.
        early_stopping_patience: stop after this many evaluations without improvement.
        kl_budget: stop when kl/chosen or kl/rejected, nats a response, exceeds this.
        num_samples: generate for this many prompts before and after training.
        sample_tokens: longest such response in tokens.
        learning_rate: initial learning rate.
        logging_steps: log every so many steps.
        logging_nan_inf_filter: unused: a loss that is not finite stops the run.
        remove_unused_columns: must stay off: a dataset item is a group.
        report_to: trackers; metrics.jsonl is always written.
        bf16: bfloat16 mixed precision; null: where the device has it.

    Raises:
        ValueError: a value is unknown, out of range, or contradicts another one; the message
            names the field, its value and the remedy.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "objective",
        "objective_args",
        "chat_template_kwargs",
        "token_weights",
        "reference_update",
        "position_synthesis",
        "columns",
    ]

    # What is optimised.
    objective: dict | str | None = "dpo"
    objective_args: dict | str | None = None
    beta: float | None = None
    token_masks: Literal["none", "common", "independent", "activation"] = "none"

    # How the model is run.
    share_prompt: bool | Annotated[str, Literal["auto", "true", "false"]] = "auto"
    max_tokens_per_row: Count | None = None
    attention_backend: Literal["auto", "segments", "varlen", "merge", "flex"] = "auto"
    router_aux_loss_coef: NonNegative | None = None
    backend: Literal["auto", "torch", "triton"] = "auto"
    workspace_mib: Count | Auto = "auto"
    offload_activations: bool = False
    mlp_tile: Count | Auto | None = None
    layer_kernels: Literal["none", "auto", "liger"] = "none"
    batch_statistics: Literal["local", "exact"] = "local"
    disable_dropout: bool = True
    self_check: bool = True

    # The reference.
    reference: Literal["auto", "adapter", "copy", "store", "none"] = "auto"
    reference_store: str | None = None
    reference_update: dict | str | None = None

    # What is watched.
    early_stopping_patience: Count | None = None
    kl_budget: Positive | None = None
    num_samples: Natural = 0
    sample_tokens: Count = 96

    # Defaults of TrainingArguments that preferences change.
    learning_rate: float = 1e-6
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    report_to: str | list[str] | None = "none"
    bf16: bool | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __new__(cls, *args: Any, **keywords: Any) -> PreferenceConfig:
        """Answer unknown keywords here, where `__init__` would only name them."""
        refuse_keywords(cls, keywords, partial(unknown_setting, keywords.get("objective")))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        learn(vars(self))
        require_transformers("fastpo.train")
        fit_fields(self, self._checked_here())
        self._resolve_precision()
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        if self.ddp_find_unused_parameters is None:
            # The head runs outside the wrapped forward: DDP's search would call its weight unused.
            self.ddp_find_unused_parameters = False
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if isinstance(self.share_prompt, bool):
            self.share_prompt = "true" if self.share_prompt else "false"
        super().__post_init__()
        options = optimizer_options(self)  # refuses what the optimiser does not take
        if optimizer_name(self) in TORCHAO and RANDOM_ROUNDING not in options:
            # Rounded to nearest, which is torchao's default, bfloat16 weights would stay.
            before = [self.optim_args] if self.optim_args else []
            self.optim_args = ",".join([*before, f"{RANDOM_ROUNDING}=True"])
        if self.accelerator_config.dispatch_batches is None:  # pyright: ignore
            # Dispatching slices batches along their first axis; a packed row has only one entry.
            self.accelerator_config.dispatch_batches = False  # pyright: ignore
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        self._validate()

    def _resolve_precision(self) -> None:
        device = default_device()
        on_cpu = self.use_cpu or device.type == "cpu"
        if self.bf16 is None:
            # transformers refuses bfloat16 on accelerators where it knows no support for it.
            possible = not on_cpu and not self.fp16 and is_torch_bf16_gpu_available()
            self.bf16 = possible and native_bf16(device)
        elif self.bf16 and on_cpu:
            if native_bf16(torch.device("cpu")):
                self.use_cpu = True
            else:
                log.warning("bf16 is off: this CPU emulates bfloat16, float32 is faster")
                self.bf16 = False

    @classmethod
    def annotations(cls) -> dict[str, object]:
        """Return field -> type, with the domain of its numbers."""
        return get_type_hints(cls, include_extras=True) | RANGES

    @classmethod
    def _checked_here(cls) -> dict[str, object]:
        """Return the annotations of fastpo's fields, and of others whose numbers have a domain.

        The Trainer's own checks, which come later, compare text and let NaN pass. `beta` is the
        objective's to judge: it may also be two numbers.
        """
        annotations = cls.annotations()
        here = {f.name for f in fields(DataSettings)} | set(PreferenceConfig.__annotations__)
        return {
            name: annotations[name]
            for name in (f.name for f in fields(cls))
            if (name in here and name != "beta") or domain_of(annotations[name]) is not None
        }

    def _validate(self) -> None:
        self._check_forms()
        self._check_switches()
        self.data_options()
        loss = self.build_loss()
        self._check_masks(loss)
        self._check_reference(loss)
        own_loop = sorted(name for name, score in loss.scores.items() if score.own_loop)
        if own_loop:
            raise ValueError(
                f"objective={self.objective!r} needs {own_loop[0]!r}, which no data set has: call "
                "fastpo.PreferenceLoss, or the objective's function, from your own loop"
            )

    def _check_switches(self) -> None:
        """Refuse settings of `TrainingArguments` that preferences cannot have."""
        if self.offload_activations and not self.activation_checkpointing:
            raise ValueError(
                "offload_activations=True moves the inputs of checkpointed layers: it needs "
                "activation_checkpointing=True"
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True would patch the policy after its reference was taken, and "
                "replace its head: use layer_kernels='liger'"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the groups: leave it False")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} smooths token labels, which "
                "no preference objective has; for noisy preferences set "
                "objective_args: {label_smoothing: ...}"
            )
        never = self.eval_strategy.value == "no"  # pyright: ignore[reportAttributeAccessIssue]
        if self.early_stopping_patience is not None and never:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs evaluations: "
                "set eval_strategy to 'steps' or 'epoch'"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' is not supported for groups: use "
                "'random', 'group_by_length' or 'sequential'"
            )

    def _check_reference(self, loss: PreferenceLoss) -> None:
        """Refuse a reference that the objective cannot use, or one that it lacks."""
        if self.reference_store is not None and self.reference not in ("auto", "store"):
            raise ValueError(
                f"reference_store={self.reference_store!r} is given but reference="
                f"{self.reference!r}: set reference to 'store' or drop the folder"
            )
        moves = self.update_rule is not None
        if moves and (not loss.needs_reference or self.reference not in ("auto", "copy")):
            raise ValueError(
                f"reference_update={self.reference_update} needs a reference that can move: "
                "reference='copy', and an objective that compares with one"
            )
        if loss.needs_reference and self.reference == "none":
            raise ValueError(
                f"reference='none', but objective={self.objective!r} compares with a reference: "
                "use 'auto', or a reference-free objective such as 'simpo', 'cpo' or 'orpo'"
            )
        if loss.needs_kl and self.reference == "store":
            raise ValueError(
                f"reference='store' keeps log-probabilities of the labels only, but "
                f"objective={self.objective!r} needs the reference's whole distribution: use "
                "reference='adapter' or 'copy'"
            )
        idle = {
            f"reference_prompt={self.reference_prompt!r}": self.reference_prompt != "prompt",
            f"kl_budget={self.kl_budget}": self.kl_budget is not None,
        }
        for setting in (s for s, set_ in idle.items() if set_ and not loss.needs_reference):
            raise ValueError(
                f"{setting}, but objective={self.objective!r} compares with no reference: drop it, "
                "or use one that does, such as 'dpo'"
            )

    def _check_forms(self) -> None:
        """Refuse values that TrainingArguments takes in any form and fails on much later."""
        levels = tuple(trainer_log_levels)
        words = {"log_level": levels, "log_level_replica": levels}
        if self.torch_compile_backend is not None:
            words["torch_compile_backend"] = tuple(torch.compiler.list_backends(()))
        if self.torch_compile_mode is not None:
            from torch._inductor import list_mode_options  # takes a second or two to import

            words["torch_compile_mode"] = tuple(list_mode_options())
        fit_fields(self, {name: Literal[listed] for name, listed in words.items()})
        for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs"):
            value = getattr(self, name)
            if not isinstance(value, dict | None):
                raise ValueError(f"{name}={value!r} is no mapping of names to values")
        if not isinstance(self.parallelism_config, ParallelismConfig | None):
            raise ValueError(
                f"parallelism_config={self.parallelism_config!r}: give accelerate's "
                "ParallelismConfig from Python, or start the run with `accelerate launch`"
            )

    def _check_masks(self, loss: PreferenceLoss) -> None:
        if self.token_masks == "none":
            return
        stored = self.reference == "store" or self.reference_store is not None
        if not loss.needs_reference or stored:
            raise ValueError(
                f"token_masks={self.token_masks!r} reads the hidden states of a reference that "
                "runs: use reference='adapter' or 'copy', and an objective that compares with one"
            )
        if self.token_masks == "independent" and not loss.needs_kl:
            raise ValueError(
                f"token_masks='independent' has a mask for divergences, but objective="
                f"{self.objective!r} has none: use 'common', or sparse_po"
            )

    def batch_facts(self) -> dict[str, int]:
        """Return what a step has: groups a device, accumulated batches, ranks with other data."""
        tensor_parallel = getattr(self.parallelism_config, "tp_size", None) or 1
        return {
            "groups": self.per_device_train_batch_size,
            "accumulated": self.gradient_accumulation_steps,
            "ranks": max(1, self.world_size // tensor_parallel),
        }

    @property
    def hyper(self) -> dict[str, object]:
        """Return the hyper-parameters of the objective, `beta` included."""
        hyper = _mapping("objective_args", self.objective_args)
        if self.beta is not None:
            if "beta" in hyper and hyper["beta"] != self.beta:
                raise ValueError(
                    f"beta={self.beta} contradicts objective_args['beta']={hyper['beta']}: give one"
                )
            hyper["beta"] = self.beta
        return hyper

    def build_loss(self, head: Head | None = None) -> PreferenceLoss:
        """Return the loss module of `objective`; an unknown one, or argument, raises ValueError."""
        if self.objective is None:
            raise ValueError("objective is None: name one, such as 'dpo'")
        return PreferenceLoss(self.objective, head, **self.hyper)

    @property
    def update_rule(self) -> UpdateRule | None:
        """Return how the reference follows the policy, or None where it stays."""
        values = _mapping("reference_update", self.reference_update)
        return UpdateRule.of(values) if values else None

    def storable(self, loss: PreferenceLoss) -> bool:
        """Return whether log-probs, taken once, are all that a run needs of its reference."""
        whole = loss.needs_kl or loss.needs_second_reference or self.token_masks != "none"
        return loss.needs_reference and not whole and self.update_rule is None

    @property
    def store_dir(self) -> str:
        """Return where the reference store lies."""
        return self.reference_store or f"{self.output_dir}/reference"

    def data_options(self) -> DataOptions:
        """Return the fields that say how rows become groups."""
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(DataSettings)}
        for name in ("chat_template_kwargs", "token_weights", "columns", "position_synthesis"):
            options[name] = _mapping(name, options[name])
        synthesis = options.pop("position_synthesis")
        if synthesis:
            options["position_synthesis"] = PositionSynthesis.of(synthesis)
        return DataOptions(**options, seed=self.seed)

    def to_dict(self) -> dict[str, object]:
        """Return every field, JSON and YAML safe; secrets are left out."""
        return redact({**super().to_dict(), "hub_token": None})

    def __repr__(self) -> str:
        return f"PreferenceConfig({self.to_dict()})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, object]:
        return redact({**vars(self), "hub_token": None}) if _published.get() else vars(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreferenceConfig:
        """Return the configuration with these fields; an unknown one raises ValueError."""
        for name, value in values.items():
            refuse_redacted(name, value, "from_dict")
        return cls(**values)


def unknown_argument(name: str, value: Any) -> str:
    """Return an answer to a keyword that `PreferenceTrainer` does not take."""
    if name in TRAINER:
        said = TRAINER[name]
    elif name in {f.name for f in fields(PreferenceConfig)}:
        said = f"it is a setting: args=PreferenceConfig({name}=...)"
    elif any(name in o.hyper for o in OBJECTIVES.values()):
        said = f"it is a setting: args=PreferenceConfig(objective_args={{{name!r}: ...}})"
    else:
        return unknown_setting(None, name, value)
    return f"PreferenceTrainer takes no {name!r}: {said}"


def unknown_setting(objective: Any, name: str, value: Any) -> str:
    """Return an answer to a keyword that is no field of `PreferenceConfig`."""
    from fastpo.train.sections import OUTSIDE

    named = objective if isinstance(objective, Mapping) else [str(objective or "dpo")]
    chosen = {str(n): get_objective(n) for n in named if n in OBJECTIVES or is_reference(n)}
    recipe = "key of recipes: from Python, models and data are arguments of PreferenceTrainer."
    if name in OUTSIDE:
        return f"unknown key {name!r}. It is a {recipe}"
    if any(name in o.hyper for o in chosen.values()):
        return f"unknown key {name!r}. Here it is objective_args={{{name!r}: {value!r}}}."
    said = unknown(name, value, [f.name for f in fields(PreferenceConfig) if f.init], chosen)
    here = re.search(r"Here it is (\w+)", said)
    if here and here[1] in OUTSIDE:
        return f"{said} That is a {recipe}"
    if here and here[1] != "beta" and any(here[1] in o.hyper for o in chosen.values()):
        return f"{said} It goes into objective_args."
    return said
