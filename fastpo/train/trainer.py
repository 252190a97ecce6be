"""`PreferenceTrainer`: the loop is transformers.Trainer's, the step is the picture.

    batch -> hidden states -> statistics -> scores -> loss

What is overridden, and what goes wrong without it:

- A dataset item is a group and the batch has no `labels` key: with one, the Trainer counts tokens
  and gradients come out `gradient_accumulation_steps` times too large.
- `get_batch_samples` counts groups and tokens of the whole optimiser step over all ranks, so that
  1 x 8, 2 x 4 and 8 x 1 (batch x accumulation) give the same loss and the same gradients.
- `evaluation_loop` and `prediction_step` divide by the counts of the whole evaluation set: the
  Trainer's mean of batch means gives a short last batch too much weight.
- A stream is trained on as one endless pass: the Trainer resumes within the first pass only.
- `_run_epoch` takes no step where all are done: resumed at its last step the Trainer takes another.
- Checkpoints are written aside and renamed last: the Trainer resumes from torn ones.
- Files of others in `output_dir` stay: the Trainer writes over them and rotates their checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.utils.data
import yaml
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers import ProgressCallback as HFProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from fastpo.data.build import GroupStream
from fastpo.data.groups import Group
from fastpo.data.packing import counts_of
from fastpo.data.token_budget import check_budget, token_rows
from fastpo.loss.preference_loss import LossOutput, PreferenceLoss
from fastpo.model.adapters import adapter_effect, copied
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import (
    attach,
    balance_coefficient,
    generation,
    label_hidden,
    label_hidden_and_balance,
    refuse_prompt_learning,
)
from fastpo.model.layer_kernels import use_layer_kernels
from fastpo.model.limits import Positions, Vocabulary
from fastpo.model.load import disable_dropout
from fastpo.model.merge import write_merged
from fastpo.model.offload import LayerInputOffload
from fastpo.model.self_check import can_share_prompt, few_tokens, self_check
from fastpo.model.tiled_mlp import tile_mlps
from fastpo.reading import reading
from fastpo.redact import redact
from fastpo.reference.live import (
    AdapterReference,
    ModelReference,
    NoReference,
    Reference,
    SecondReference,
    StoredReference,
    adapter_parameters,
    fill_store,
    live_reference,
    starting_reference,
)
from fastpo.reference.moving import ReferenceUpdate
from fastpo.reference.store import ReferenceStore, key_digest, store_key
from fastpo.train.batches import (
    Collator,
    EpochSampler,
    PaddedGroups,
    Passes,
    as_groups,
    of_workers,
)
from fastpo.train.checkpoint import TRAINER_STATE
from fastpo.train.checkpointing import CheckpointWriter, LossState, checkpoint_to_resume
from fastpo.train.config import (
    PreferenceConfig,
    batch_words,
    published,
    resolve_kind,
    unknown_argument,
)
from fastpo.train.elsewhere import refuse_keywords
from fastpo.train.folder import CONFIG, STAGING, RunFolder, claim, whole
from fastpo.train.masking import MaskTraining
from fastpo.train.metrics import (
    JsonlCallback,
    KLBudget,
    MetricWindow,
    ProgressCallback,
    Stopwatch,
    peak_memory_gib,
    refuse_missing_trackers,
)
from fastpo.train.optimizers import lost_steps, optimizer_options, require_optimizer
from fastpo.train.preflight import check_fit, doubts
from fastpo.train.report import write_model_card

log = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
_JUDGED = 64  # groups of a stream that are searched for what hardly teaches anything
_CHECKED = 8  # groups of a stream, or of a self-check, that are looked at before the first step
MASK_DROPOUT = 0.01  # SparsePO's
# Groups that a stream's next one is drawn from: a second of tokenising, and a few MB.
STREAM_BUFFER = 1000
_ANOTHER = "it is no checkpoint of this run: name another"


def _streams(data: Any) -> bool:
    """Whether data, of any form that the trainer takes, has no known length."""
    each = data.values() if isinstance(data, Mapping) else [data]
    return any(not isinstance(d, Sized | Path | None) for d in each)


class PreferenceTrainer(Trainer):
    """Trains a causal language model on preferences.

    `fastpo.train.report.write_report(output_dir)` draws what a run leaves in its folder.

    Args:
        model: a causal language model, or a PEFT model around one.
        args: the configuration.
        train_dataset: groups (`GroupDataset`, `GroupStream`), or rows in any form that
            `fastpo.data.rows.load_rows` takes; rows become groups with `args.data_options()`.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer.
        ref_model: the reference, where it is not the model as it is now.
        ref_model2: the second reference, of objectives that compare with two (D2O).
        callbacks: further callbacks.
        optimizers: (optimizer, scheduler) that replace those of `args`.

    Raises:
        ValueError: several GPUs in one process, sequence parallelism, a stream without `max_steps`,
            a reference that does not fit the model or objective, files of others in the way in
            `output_dir`, or another process that trains there; each names its remedy.
        PackageError: a tracker of `report_to` that is not installed.
    """

    # compute_loss divides by the counts of the whole step, so accumulation must not divide again.
    loss_is_scaled_for_ga = True

    args: PreferenceConfig

    def __new__(cls, *args: Any, **keywords: Any) -> PreferenceTrainer:
        """Keywords of other trainers are answered; `__init__` would only name them."""
        refuse_keywords(cls, keywords, unknown_argument)
        return super().__new__(cls)

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PreferenceConfig,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase,
        ref_model: PreTrainedModel | PeftModel | None = None,
        ref_model2: PreTrainedModel | PeftModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        refuse_missing_trackers(args.report_to or ())
        require_optimizer(args)
        refuse_prompt_learning(model)
        if train_dataset is not None and args.process_index == 0:  # before anything lies there
            RunFolder.at(str(args.output_dir)).refuse_others(alone=args.push_to_hub)
        if args.disable_dropout:
            for each in (model, ref_model, ref_model2):
                if each is not None:
                    disable_dropout(each)
        for each in (model, ref_model, ref_model2):
            if each is not None:
                use_layer_kernels(each, args.layer_kernels, args.device)
                if args.mlp_tile is not None:
                    tile_mlps(each, args.mlp_tile)
        head = read_head(model)
        loss = args.build_loss(head)
        if loss.needs_second_reference and ref_model2 is None:
            raise ValueError(
                f"objective={args.objective!r} compares with two references: give the second one "
                "as ref_model2"
            )
        if ref_model2 is not None and not loss.needs_second_reference:
            raise ValueError(
                f"ref_model2 is given, but objective={args.objective!r} does not compare with two "
                "references: drop it"
            )
        kind = resolve_kind(
            args.reference,
            needs_reference=loss.needs_reference,
            is_peft=isinstance(model, PeftModel),
            has_store=args.reference_store is not None and not loss.needs_kl,
            has_ref_model=ref_model is not None,
            moves=args.update_rule is not None,
            storable=args.storable(loss)
            and ref_model2 is None
            and not any(map(_streams, (train_dataset, eval_dataset))),
        )
        # A copy is taken before `attach` binds a forward to the policy.
        live = None if kind in ("none", "store") else live_reference(kind, model, head, ref_model)
        attach(model, attention_backend=args.attention_backend)
        self._balance = balance_coefficient(model, args.router_aux_loss_coef)
        shares, self.sharing_reason = self._shares_prompts(model, args)
        self._checked = False
        vocabulary = Vocabulary.of(processing_class, model, ref_model, ref_model2)
        positions = Positions.of(model, ref_model, ref_model2)

        def groups_of(data: Any, source: str) -> Any:
            if data is None:
                return None
            wanted = {"extras": loss.extras, "needs": loss.needs}
            groups = as_groups(data, processing_class, args, **wanted, source=source)
            # Of a stream the beginning; what is wrong later stops the step that meets it.
            looked_at: Any = groups if isinstance(groups, Sized) else groups.head(_CHECKED)
            check_fit(loss, looked_at, reference_prompt=args.reference_prompt)
            positions.check_groups(looked_at)
            vocabulary.check_groups(looked_at)
            if args.max_tokens_per_row is not None:
                check_budget(looked_at, args.max_tokens_per_row, share_prompt=shares)
            return groups

        self._groups_of = groups_of  # an evaluation may bring data of its own
        train_dataset = groups_of(train_dataset, "train data")
        if isinstance(eval_dataset, dict):
            eval_dataset = {n: groups_of(d, f"eval data {n}") for n, d in eval_dataset.items()}
        else:
            eval_dataset = groups_of(eval_dataset, "eval data")
        if train_dataset is not None and not isinstance(train_dataset, Sized):
            if args.max_steps <= 0:
                raise ValueError(
                    f"max_steps={args.max_steps}, but the training data is a stream of unknown "
                    "length: set max_steps"
                )
            if kind == "store":
                raise ValueError(
                    "reference='store' needs all training data before the first step, but it is a "
                    "stream: use reference='copy' or 'adapter', or do not stream"
                )
            if args.dataloader_num_workers and args.on_bad_row == "skip":
                raise ValueError(
                    f"dataloader_num_workers={args.dataloader_num_workers}, on_bad_row='skip' and "
                    "a stream: only the loader's processes would know which rows were skipped; set "
                    "dataloader_num_workers=0 or on_bad_row='error', or do not stream"
                )
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(
                vocabulary.padding,
                shares,
                vocabulary=vocabulary,
                positions=positions,
                grades=loss.grade_domains,
            ),
            train_dataset=train_dataset,  # pyright: ignore[reportArgumentType]
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss = loss.to(self.args.device)
        if isinstance(live, AdapterReference):
            live = starting_reference(args.reference, live, self._adapter_effect())
            kind = "adapter" if isinstance(live, AdapterReference) else "copy"
        # A second reference that is not stored is a whole model too.
        self._refuse_unsupported("copy" if ref_model2 is not None and kind != "store" else kind)
        self._warn_of_lost_steps()
        self._warn_of_doubts(loss)
        self.reference_kind = kind
        self.reference: Reference = NoReference()
        if kind == "store":
            self.reference = self._stored_reference(ref_model, ref_model2)
        elif live is not None:
            self.reference = live
            frozen = [live.model] if isinstance(live, ModelReference) else []
            if ref_model2 is not None:
                second = ModelReference.frozen(ref_model2)
                self.reference = SecondReference(live, second, self._head_options)
                frozen.append(second.model)
            if self.place_model_on_device:
                for each in frozen:
                    self._move_model_to_device(each, self.args.device)
        self._update: ReferenceUpdate | None = None
        if args.update_rule is not None:
            assert isinstance(live, ModelReference)
            self._update = ReferenceUpdate(args.update_rule, model, live.model)
            self.add_callback(self._update)

        self._masking: MaskTraining | None = None
        if args.token_masks != "none":
            assert isinstance(live, AdapterReference | ModelReference)
            self._masking = MaskTraining(
                args.token_masks,
                live.model,
                seed=args.seed,
                dropout=0.0 if args.disable_dropout else MASK_DROPOUT,
                max_grad_norm=args.max_grad_norm,
            )
            self.add_callback(self._masking)

        carried = [LossState(self.loss), self._update, self._masking]
        self._checkpoints = CheckpointWriter([each for each in carried if each is not None])
        self._offload = LayerInputOffload() if args.offload_activations else nullcontext()
        self._window = MetricWindow()
        self._watch: Stopwatch | None = None
        self._window_tokens = 0.0
        self._eval_window = MetricWindow()
        self._eval_totals: dict[str, float] | None = None
        if self.pop_callback(HFProgressCallback) is not None:
            self.add_callback(ProgressCallback())
        self.add_callback(JsonlCallback())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.kl_budget is not None:
            self.add_callback(KLBudget(args.kl_budget))

    # ---- Setting up ----

    @staticmethod
    def _shares_prompts(model: nn.Module, args: PreferenceConfig) -> tuple[bool, str]:
        if args.share_prompt == "false":
            return False, "share_prompt is false"
        possible, reason = can_share_prompt(model)
        if not possible and args.share_prompt == "true":
            raise ValueError(
                f"share_prompt=true, but this model cannot: {reason}; use share_prompt=auto"
            )
        if not possible:
            log.warning("one prompt copy per response: %s", reason)
        return possible, reason

    def _warn_of_lost_steps(self) -> None:
        """Warn of weights that the optimiser would leave as they are: training would do nothing."""
        assert self.model is not None
        found = lost_steps(self.model, self.args, self.optimizer)  # pyright: ignore
        if found is not None:
            log.warning("%s", found.reason)

    def _warn_of_doubts(self, loss: PreferenceLoss) -> None:
        """Warn of what can be trained and hardly teaches anything."""
        exact = self.args.batch_statistics == "exact"
        seen = self.args.per_device_train_batch_size * self.args.world_size
        seen *= self.args.gradient_accumulation_steps if exact else 1
        data: Any = self.train_dataset
        if data is not None:
            whole = isinstance(data, Sized)  # of a stream nobody knows the rest
            groups = self._first_groups(data, len(data) if whole else _JUDGED)
            for doubt in doubts(loss, groups, seen=seen, whole=whole):
                log.warning("%s", doubt)
        adapters = getattr(self.model, "peft_config", {}).values()
        rates = [rate for a in adapters if (rate := getattr(a, "lora_dropout", 0))]
        if rates and self.args.disable_dropout:
            log.warning(
                "lora_dropout=%g does nothing: disable_dropout=True switches every dropout off",
                rates[0],
            )

    def _adapter_effect(self) -> float:
        """Of the model's adapter as it is now, on a few tokens of the data."""
        data = self.eval_dataset if self.train_dataset is None else self.train_dataset
        model: Any = self.model
        if data is None or not isinstance(model, PeftModel):
            return 0.0
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            log.warning("not checked that the model without its adapter is the model at the start")
            return 0.0
        effect = [0.0]
        if self.is_world_process_zero():
            groups = self._first_groups(data, _CHECKED)
            batch = few_tokens(groups, self.collator.pad_token_id, model.device)
            effect = [adapter_effect(model, self.loss.head, batch)]  # pyright: ignore
        return broadcast_object_list(effect)[0]

    def _refuse_unsupported(self, kind: str) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would mean DataParallel, which splits a "
                "packed batch along the wrong axis: start one process a GPU with `torchrun "
                f"--nproc-per-node {self.args.n_gpu}` or `accelerate launch`, or show one with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                f"cp_size={self.get_cp_size()}, sp_size={self.get_sp_size()}: packed rows are not "
                "split over ranks; use data parallelism (FSDP, ZeRO) and share_prompt"
            )
        if self.args.max_tokens_per_row is not None and self.is_deepspeed_enabled:
            raise ValueError(
                f"max_tokens_per_row={self.args.max_tokens_per_row}: DeepSpeed takes a step with "
                "every backward; use per_device_train_batch_size and gradient_accumulation_steps"
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if kind == "copy" and sharded:
            raise ValueError(
                "reference='copy' would put a whole model on every rank of a sharded run: use "
                "reference='store' (computed once, on one process), or an adapter"
            )
        if self.args.token_masks != "none" and sharded:
            raise ValueError(
                f"token_masks={self.args.token_masks!r} in a sharded run, whose optimiser takes no "
                "other parameters: use data parallelism without sharding"
            )

    def _stored_reference(
        self,
        ref_model: PreTrainedModel | PeftModel | None,
        ref_model2: PreTrainedModel | PeftModel | None,
    ) -> StoredReference:
        if self.train_dataset is not None:  # run.json comes before the store
            self._claim()
        self.check()  # before a number is written: what it finds decides how batches are packed
        store, store2 = self._filled_store(ref_model, self.args.store_dir), None
        if ref_model2 is not None:
            store2 = self._filled_store(ref_model2, f"{self.args.store_dir}-2")
        # Set last: a collator with a store leaves out what a live reference runs on.
        self.collator.store, self.collator.store2 = store, store2
        return StoredReference(store)

    def _filled_store(
        self, ref_model: PreTrainedModel | PeftModel | None, folder: str
    ) -> ReferenceStore:
        source: Any = ref_model if ref_model is not None else self.model
        home = source.device
        if ref_model is not None and self.place_model_on_device:
            self._move_model_to_device(ref_model, self.args.device)
        options = self.args.data_options()
        if ref_model is not None:
            reference = ModelReference.frozen(ref_model)
        else:
            reference = ModelReference(source, self.loss.head)  # pyright: ignore
        # An adapter that does nothing yet is no part of the reference, and is drawn anew each time.
        inert = ref_model is None and self._adapter_effect() == 0
        key = store_key(
            source,
            self.processing_class,
            precision=f"{source.dtype}, autocast {self.args.mixed_precision}",
            truncation={
                name: getattr(options, name)
                for name in ("max_length", "max_prompt_length", "max_response_length", "truncation")
            },
            chat_template_kwargs=options.chat_template_kwargs,
            share_prompt=self.collator.share_prompt,
            **({"skip": adapter_parameters(source)} if inert else {}),
        )
        info = {
            "name": source.config._name_or_path,
            "revision": getattr(source.config, "_commit_hash", None),
        }
        own = self.args.reference == "auto" and self.args.reference_store is None
        if own:  # nobody asked for a store, so nobody has to remove one of other weights or options
            folder = f"{folder}/{key_digest(key)}"
        # The folder and its key first, by one process; then everybody opens it.
        with self.args.main_process_first(local=False):
            store = ReferenceStore(folder, key, info=info, writer=self.args.process_index)
        evals = self.eval_dataset
        evals = list(evals.values()) if isinstance(evals, dict) else [evals]
        trained: Any = self._reached() if own else self.train_dataset
        jobs = [(trained, self._train_batch_size)]
        jobs += [(each, self.args.per_device_eval_batch_size) for each in evals]
        for dataset, batch_size in jobs:
            if dataset is None:
                continue
            if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and store.missing(dataset):
                raise ValueError(
                    f"the reference store {store.path} is not complete and the model of this run "
                    "is sharded: fill it first by starting the same run on one process, with "
                    "reference='store'"
                )
            with self.autocast_smart_context_manager():
                fill_store(
                    store,
                    dataset,
                    reference,
                    lambda groups: self._prepare_inputs(self.collator(groups)),
                    batch_size=batch_size,
                    rows=self._within_budget,
                    options=self._head_options,
                    rank=self.args.process_index,
                    world_size=self.args.world_size,
                    progress=not self.args.disable_tqdm,
                )
            self.accelerator.wait_for_everyone()
            store.refresh()
        if ref_model is not None and source.device != home:
            ref_model.to(home)  # its work is done; the policy needs the memory  # pyright: ignore
        return store

    def _reached(self) -> list[Group] | None:
        """The groups that the steps come to, in the order of the first pass.

        Batches of them are those of the steps, so that policy and reference agree to the bit.
        """
        dataset: Any = self.train_dataset
        if dataset is None:
            return None
        batch = self._train_batch_size * self.args.world_size
        step, steps = batch * self.args.gradient_accumulation_steps, self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * math.ceil(len(dataset) / step))
        sampler: Any = self._get_train_sampler(dataset)
        # accelerate's loader is one batch ahead.
        return [dataset[i] for i in islice(sampler, steps * step + batch)]

    def _within_budget(self, groups: list[Group]) -> list[list[Group]]:
        """The groups of each row of a batch."""
        most = self.args.max_tokens_per_row
        if most is None:
            return [groups]
        rows = token_rows(groups, most, share_prompt=self.collator.share_prompt)
        return [[groups[i] for i in row] for row in rows]

    @property
    def collator(self) -> Collator:
        """What packs groups into batches."""
        return self.data_collator  # pyright: ignore[reportReturnType]

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.at(str(self.args.output_dir))

    @property
    def _head_options(self) -> dict[str, Any]:
        return {"backend": self.args.backend, "workspace_mib": self.args.workspace_mib}

    # ---- The step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, float] | None = None,
    ) -> Any:
        """batch -> hidden states -> statistics -> scores -> loss.

        Args:
            model: the policy, wrapped or not.
            inputs: a packed batch.
            return_outputs: also return the loss module's output.
            num_items_in_batch: counts of the whole optimiser step, from `get_batch_samples`.

        Returns:
            the loss, or (loss, LossOutput).
        """
        output = self._output(model, inputs, num_items_in_batch)
        loss = output.loss
        if model.training:
            self._refuse_non_finite(output, inputs)
            self._window.add(output.metrics, output.counts)
            if num_items_in_batch is not None:
                # Gradients are averaged over ranks, but the counts are already global.
                loss = loss * self._num_data_ranks
        return (loss, output) if return_outputs else loss

    def _output(
        self, model: nn.Module, inputs: dict[str, Any], totals: Mapping[str, float] | None
    ) -> LossOutput:
        self.loss.train(model.training)
        self.loss.seed, self.loss.step = self.args.seed, self.state.global_step
        self.loss.progress = self.state.global_step / max(1, self.state.max_steps)
        # The reference first: no activations are alive yet.
        if self._masking is None:
            beside = {"token_weights": inputs["token_weights"], **self.reference(model, inputs)}
        else:
            beside = self._masking(self.reference, model, inputs)
        balanced = model.training and self._balance > 0
        with self._offload:
            if balanced:
                hidden, balance = label_hidden_and_balance(model, inputs)
            else:
                hidden, balance = label_hidden(model, inputs), None
        output = self.loss(
            hidden,
            inputs["targets"],
            inputs["segments"],
            token_rewards=inputs["token_rewards"],
            totals=totals,
            **beside,
            **self._head_options,
        )
        if balance is None:
            return output
        # A row's share of the step: the loss is a mean over tokens, as those rows count them.
        tokens = "tokens" if "layout" in inputs else "unshared_tokens"
        count = inputs["counts"][tokens]
        share = count / totals[tokens] if totals is not None else 1.0
        return output._replace(
            loss=output.loss + self._balance * share * balance,
            metrics={**output.metrics, "aux_loss": balance.detach()},
            counts={**output.counts, "aux_loss": balance.new_tensor(count)},
        )

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of each row of a batch; ranks exchange gradients with the last."""
        *early, last = inputs
        loss = 0.0
        for row in early:
            with self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, row, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> int:
        """Of every row of a batch."""
        return sum(super(PreferenceTrainer, self).floating_point_ops(row) for row in inputs)

    @torch.no_grad()
    def _observe(self, batches: Iterable[dict[str, Any]]) -> None:
        """The statistics of a whole optimiser step, before its first gradient."""
        model: Any = self.model_wrapped
        model.train()
        with self.compute_loss_context_manager(), self.loss.observing():
            for batch in batches:
                self._output(model, self._prepare_inputs(batch), None)

    @property
    def _num_data_ranks(self) -> int:
        return self.accelerator.num_processes // self.get_tp_size()

    def _refuse_non_finite(self, output: LossOutput, batch: dict[str, Any]) -> None:
        if bool(torch.isfinite(output.loss)):
            return
        bad = (~torch.isfinite(output.losses)).tolist()
        rows = list(zip(batch["sources"], batch["rows"], strict=True))
        named = [f"{s or 'rows'} row {r}" for (s, r), b in zip(rows, bad, strict=True) if b]
        raise FloatingPointError(
            f"the loss is {output.loss.item()} in step {self.state.global_step + 1}, from "
            f"{', '.join(named or [f'{s} row {r}' for s, r in rows])}; look at these rows, lower "
            f"learning_rate={self.args.learning_rate}, or resume from a checkpoint before it"
        )

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Autocast around the whole step: the head runs outside the model's wrapped forward."""
        return self.accelerator.autocast()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Tensors and segments to the device; the layout stays plain integers."""
        device = self.args.device
        batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in inputs.items()}
        if "reference" in batch:
            batch["reference"] = self._prepare_inputs(batch["reference"])
        return batch

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's.

        Raises:
            ValueError: `lr_scheduler_kwargs` that this schedule does not take, or lacks.
        """
        kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            raise ValueError(
                f"lr_scheduler_kwargs={self.args.lr_scheduler_kwargs!r} do not fit "
                f"lr_scheduler_type={kind!r}: {error}"
            ) from error

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, with the token masks as one more group."""
        optimizer = super().create_optimizer(model)
        if self._masking is not None:
            self._masking.add_to(optimizer, self.args.weight_decay)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """The Trainer's, which hands some numbers and truths of `optim_args` on as text."""
        made, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
        told = {k: v for k, v in optimizer_options(args).items() if not isinstance(v, str)}
        return made, {name: told.get(name, value) for name, value in keywords.items()}

    # ---- Counting ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of one optimiser step, and its counts over all ranks."""
        if self._watch is None:
            self._watch = Stopwatch()
        with of_workers():
            batches = [self._rows(batch) for batch in islice(epoch_iterator, num_batches)]
        rows = [row for batch in batches for row in batch]
        totals = self._over_ranks(self._sum_counts(row["counts"] for row in rows))
        self.state.num_input_tokens_seen += round(totals["tokens"])
        self._window_tokens += totals["tokens"]
        if totals["tokens"]:
            shared = all("layout" in row for row in rows)  # as they were packed
            sharing = totals["unshared_tokens"] / totals["tokens"] if shared else 1.0
            self._window.add({"sharing": sharing}, {"sharing": totals["tokens"]})
            if shared and (most := self.args.max_tokens_per_row) is not None:
                fill = [row["counts"]["tokens"] / most for row in rows]
                self._window.add({"row_fill": sum(fill) / len(fill)}, {"row_fill": len(fill)})
        if batches and self.args.batch_statistics == "exact" and self.loss.has_statistics:
            self._observe(rows)
        return batches, totals

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        """Under a token budget loaders give groups, since ranks agree on the number of rows."""
        return data_collator if self.args.max_tokens_per_row is None else list

    def _rows(self, batch: Any) -> list[dict[str, Any]]:
        """A batch of a loader as packed rows: one, or as many as the token budget asks for."""
        most = self.args.max_tokens_per_row
        if most is None:
            return [batch]
        shared = self.collator.share_prompt
        groups = [item if isinstance(item, Group) else item.group for item in batch]
        rows = token_rows(groups, most, share_prompt=shared)
        if self.accelerator.num_processes > 1:
            # Statistics over ranks and sharded weights meet in every forward.
            num = torch.tensor([len(rows)], device=self.args.device)
            at_least = int(self.accelerator.gather(num).max())  # pyright: ignore
            rows = token_rows(groups, most, share_prompt=shared, at_least=at_least)
        return [self.collator([batch[i] for i in row]) for row in rows]

    @staticmethod
    def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, float]:
        total: dict[str, float] = dict.fromkeys(counts_of([]), 0.0)
        for each in counts:
            for name, value in each.items():
                total[name] += value
        return total

    def _over_ranks(self, counts: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return counts
        local = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.args.device)
        total: Any = self.accelerator.reduce(local)
        return dict(zip(counts, (total / self.get_tp_size()).tolist(), strict=True))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Nothing: `get_batch_samples` counts distinct tokens once and over all ranks."""

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Sized) or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        by_length = self.args.train_sampling_strategy == "group_by_length"
        return EpochSampler(
            dataset,
            self._data_seed,
            lambda: int(self.state.epoch or 0),
            by_length=self._train_batch_size if by_length else None,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the window's means, throughput and peak memory to a training record."""
        if "loss" in logs and self._watch is not None:
            logs.update(self._window.means())
            logs["num_tokens"] = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = self._window_tokens / self._watch.lap()
            logs["peak_memory_gib"] = peak_memory_gib(self.args.device)
            self._window_tokens = 0.0
        super().log(logs, start_time)

    # ---- Evaluation ----

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        if description != "Training":
            held = self.eval_dataset
            known = [held, self.train_dataset, *(held.values() if isinstance(held, dict) else ())]
            if all(dataset is not each for each in known):  # those were judged at the start
                dataset = self._groups_of(dataset, f"{description} data".lower())
            if self.args.world_size > 1 and isinstance(dataset, Sized):
                dataset = PaddedGroups(dataset, batch_size * self.args.world_size)
        elif isinstance(dataset, GroupStream):
            random = self.args.train_sampling_strategy != "sequential"
            dataset = Passes(dataset, self._data_seed, STREAM_BUFFER if random else 0)
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over the groups of the whole set, as if it were one batch."""
        dataset = getattr(dataloader, "dataset", None)
        if isinstance(dataset, PaddedGroups):
            dataset = dataset.dataset
        self._eval_totals = None  # a stream: batch means, weighted by groups
        if isinstance(dataset, Sized):
            self._eval_totals = self._sum_counts(counts_of([g]) for g in dataset)  # pyright: ignore
        self._eval_window = MetricWindow()
        pause = self._watch.paused() if self._watch is not None else nullcontext()
        with pause, of_workers():
            output = super().evaluation_loop(
                dataloader, description, True, ignore_keys, metric_key_prefix
            )
            means = self._eval_window.means()
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in means.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of one batch of an evaluation."""
        total = torch.zeros((), device=self.args.device)
        for row in map(self._prepare_inputs, self._rows(inputs)):
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, output = self.compute_loss(
                    model, row, return_outputs=True, num_items_in_batch=self._eval_totals
                )
            if row["counted"]:
                groups = row["counts"]["groups"]
                # A sum over rows, written as a mean: every row's share is already divided.
                share = 1.0 if self._eval_totals is None else self._eval_totals["groups"] / groups
                self._eval_window.add({"loss": loss * share}, {"loss": groups})
                self._eval_window.add(output.metrics, output.counts)
            total = total + loss
        return total, None, None

    # ---- The run ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of `output_dir`, "auto"
                for the same or the start where there is none, or a checkpoint's path; by default
                what `args.resume_from_checkpoint` says.
            trial: a trial of a hyper-parameter search.
            ignore_keys_for_eval: unused, kept for the Trainer's signature.

        Raises:
            ValueError: there is no complete checkpoint to resume from, or no step to take; says
                what is missing. Or `output_dir` holds files of others that would be written over,
                or another process trains there; names them.
            FloatingPointError: the loss is not finite; names the rows.
        """
        self.refuse_no_step()
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self._claim()
        resume = checkpoint_to_resume(self._folder.path, resume_from_checkpoint)
        if self.is_world_process_zero():
            self._note_batch(resume)
            self._folder.write(CONFIG, yaml.safe_dump(self.args.to_dict(), sort_keys=False))
        self.check()
        if resume is None:
            self._sample("before")
        self._watch = None
        self._window, self._window_tokens = MetricWindow(), 0.0
        output = super().train(resume, trial, ignore_keys_for_eval)
        if self.state.global_step == 0:
            raise ValueError("the training data gave no batch, so no step was taken")
        self.save_state()
        self._sample("after")
        return output

    def _claim(self) -> None:
        """Take `output_dir` for this process, or refuse it."""
        if self.is_world_process_zero():
            claim(str(self.args.output_dir), alone=self.args.push_to_hub)

    def refuse_no_step(self) -> None:
        """Find out before training whether there would be a step.

        Raises:
            ValueError: no data, or no batch; gives the numbers.
        """
        args = self.args
        if self.train_dataset is None:
            raise ValueError("nothing to train on: give PreferenceTrainer a train_dataset")
        if isinstance(self.train_dataset, Sized) and args.dataloader_drop_last:
            groups, batch = len(self.train_dataset), args.train_batch_size * args.world_size
            if groups < batch:
                ranks = f" ({args.world_size} processes)" if args.world_size > 1 else ""
                raise ValueError(
                    f"dataloader_drop_last leaves no batch of {batch}{ranks} in {groups} groups: "
                    "lower per_device_train_batch_size, or keep the last batch"
                )

    def _note_batch(self, resume: str | None) -> None:
        """Write down what a step consists of; a run that goes on with other steps is told."""
        batch, before = self.args.batch_facts(), self._folder.facts.get("batch")
        if resume is not None and before is not None and before != batch:
            log.warning(
                "goes on with %s, where its checkpoint was trained with %s",
                batch_words(batch),
                batch_words(before),
            )
        self._folder.save(batch=batch)

    def _run_epoch(self, **how: Any) -> None:
        """A pass over the data, unless the run that is resumed has done all its steps."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**how)
        else:
            self.control.should_training_stop = True

    def check(self) -> None:
        """Packed against padded, fused against the model's logits, on a few groups; once.

        Afterwards `collator.share_prompt` is how batches are packed, and `sharing_reason` why.

        Raises:
            RuntimeError: the fused head does not reproduce the model's own logits.
            ValueError: share_prompt=true, but shared prompts change the numbers.
        """
        data = self.eval_dataset if self.train_dataset is None else self.train_dataset
        if self._checked or not self.args.self_check or data is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            log.info("no self-check: the weights are sharded")
            return
        result = self_check(
            self.model,  # pyright: ignore[reportArgumentType]
            self.loss.head,  # pyright: ignore[reportArgumentType]
            self._first_groups(data, _CHECKED),
            self.collator.pad_token_id,
            share_prompt=self.collator.share_prompt,
        )
        if self.collator.share_prompt and not result.share_prompt:
            if self.args.share_prompt == "true":
                raise ValueError(
                    f"share_prompt=true, but the self-check failed: {result.reason}; use "
                    "share_prompt=auto"
                )
            self.collator.share_prompt, self.sharing_reason = False, result.reason
        self._checked = True
        log.info(
            "self-check: %s; fused and plain head differ by %.2e, rounding explains %.2e",
            result.reason,
            result.head_error,
            result.head_bound,
        )

    @staticmethod
    def _first_groups(dataset: Any, count: int) -> list[Group]:
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        if isinstance(dataset, Sized):
            return [dataset[i] for i in range(min(count, len(dataset)))]  # pyright: ignore
        return dataset.head(count)

    @torch.no_grad()
    def _sample(self, when: str) -> None:
        """Greedy responses to the first prompts, appended to samples.jsonl."""
        if not self.args.num_samples:
            return
        tokenizer: Any = self.processing_class
        dataset = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        records = []
        with generation(self.model):  # pyright: ignore
            for group in self._first_groups(dataset, self.args.num_samples):
                prompt = torch.from_numpy(group.prompt_ids).long()[None].to(self.args.device)
                tokens = self.model.generate(  # pyright: ignore
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=self.args.sample_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=self.collator.pad_token_id,
                )
                response = tokens[0, prompt.shape[1] :]
                records.append(
                    {
                        "when": when,
                        "step": self.state.global_step,
                        "row": group.row,
                        "source": redact(group.source),
                        "prompt": tokenizer.decode(group.prompt_ids),
                        "response": tokenizer.decode(response, skip_special_tokens=True),
                        "chosen": tokenizer.decode(
                            group.responses[0].input_ids, skip_special_tokens=True
                        ),
                    }
                )
        if self.is_world_process_zero():
            mode = "w" if when == "before" else "a"
            with (self._folder.path / SAMPLES_FILE).open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)

    # ---- Checkpoints ----

    def create_model_card(self, *args: Any, model_name: str | None = None, **kwargs: Any) -> None:
        """README.md from the files of the run, as `fastpo train` writes it; also before a push.

        Args:
            args, kwargs: what the Trainer's own card says, unused.
            model_name: the card's heading; by default the name of `output_dir`.
        """
        if self.is_world_process_zero():
            write_model_card(self._folder.path, title=model_name)

    def save_state(self) -> None:
        """Write trainer_state.json, which appears whole."""
        if self.is_world_process_zero():
            self._folder.add(TRAINER_STATE)
            with whole(self._folder.path / TRAINER_STATE) as partial:
                self.state.save_to_json(str(partial))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write SPLIT_results.json and all_results.json, over nobody else's."""
        if self.is_world_process_zero():
            self._folder.add(f"{split}_results.json", "all_results.json")
        super().save_metrics(split, metrics, combined)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer, ready for `from_pretrained`; all files appear at once.

        Args:
            output_dir: a folder; by default that of the run.
            _internal_call: whether the Trainer asks, who then pushes itself.

        Raises:
            ValueError: a file there that this tool did not write; names it.
        """
        folder = self._folder if output_dir is None else RunFolder.at(output_dir)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if output_dir is not None and _internal_call:  # a checkpoint, published as a whole later
            super().save_model(output_dir, _internal_call=True)
        elif self.is_world_process_zero():
            with folder.placing() as staging:
                super().save_model(str(staging), _internal_call=True)
                if sharded:
                    self.accelerator.wait_for_everyone()
        else:  # every rank of a sharded run writes its part
            apart = sharded and not self.args.should_save
            super().save_model(str(folder.path / STAGING) if apart else output_dir, True)
            if sharded:
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with published():
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():  # these are copied into the run's folder
            self._folder.add(*(p.name for p in Path(checkpoint_folder).iterdir() if p.is_file()))
        with published():
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a complete checkpoint under its name, or none."""
        with self._watch.paused() if self._watch is not None else nullcontext():
            self._checkpoints.write(self, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write also what else is carried: BCO's shift, a moving reference, token masks."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._checkpoints.save_carried(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint, _ANOTHER):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint), _ANOTHER):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint), _ANOTHER):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self._checkpoints.load_carried(checkpoint)

    def save_merged(self, path: str | Path) -> None:
        """Write the model without adapters, safetensors and tokenizer, ready for `from_pretrained`.

        A PEFT model is merged in a copy, which takes the memory of the model once more.

        Raises:
            ValueError: a file there that this tool did not write; names it. Or the merged model is
                another than was trained.
        """
        if not self.args.should_save:
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        with RunFolder.at(path).placing() as staging:
            if isinstance(model, PeftModel):
                write_merged(lambda: copied(model), staging)
            else:
                model.save_pretrained(str(staging))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(staging))
