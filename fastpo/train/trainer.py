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

What surrounds the step has files of its own: `setup` and `preflight` come before it, then
`fastpo.reference.build` and `precompute`. `batches` gives packed rows, `counting` what a step is
divided by, `evaluation` the means of a whole set. `samples`, `saving` and `checkpointing` write
what a run leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers import ProgressCallback as HFProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from fastpo.batch import Batch, Counts
from fastpo.data.stream import GroupStream
from fastpo.head.spec import HeadOptions
from fastpo.loss.metrics import LossOutput
from fastpo.model.head_facts import read_head
from fastpo.model.hidden import (
    attach,
    balance_coefficient,
    target_hidden,
    target_hidden_and_balance,
)
from fastpo.model.limits import Positions, Vocabulary
from fastpo.model.offload import LayerInputOffload
from fastpo.model.self_check import CHECKED
from fastpo.reading import reading
from fastpo.reference.build import ReferenceBuilder, effect_at_start
from fastpo.reference.live import AdapterReference, ModelReference, Reference, StoredReference
from fastpo.reference.moving import ReferenceUpdate
from fastpo.report.card import write_model_card
from fastpo.run.checkpoint import TRAINER_STATE
from fastpo.run.folder import CONFIG, RunFolder, claim, whole
from fastpo.train.batches import (
    Collator,
    EpochSampler,
    data_seed,
    endless,
    of_workers,
    packed_rows,
)
from fastpo.train.checkpointing import (
    CheckpointWriter,
    LossState,
    checkpoint_to_resume,
    note_batch,
)
from fastpo.train.config import PreferenceConfig, published, unknown_argument
from fastpo.train.counting import TrainingMeter, over_ranks, with_balance
from fastpo.train.elsewhere import refuse_keywords
from fastpo.train.evaluation import Evaluation, filled_up, is_one_of
from fastpo.train.finite import FiniteLosses
from fastpo.train.masking import MaskTraining
from fastpo.train.metrics import JsonlCallback, KLBudget, ProgressCallback
from fastpo.train.optimizers import as_told, schedule_told
from fastpo.train.precompute import stored_reference
from fastpo.train.preflight import (
    DataCheck,
    first_groups,
    refuse_no_step,
    refuse_stream,
    refuse_unsupported,
    run_self_check,
    shares_prompts,
    warn_of_doubts,
)
from fastpo.train.samples import sample
from fastpo.train.saving import save_merged, save_model
from fastpo.train.setup import GroupMaker, has_stream, prepare_layers, refuse_early

_ANOTHER = "it is no checkpoint of this run: name another"

TRAINER_PRIVATES = (
    "_get_collator_with_removed_columns(data_collator, description)",
    "_get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)",
    "_get_output_dir(trial)",
    "_get_train_sampler(train_dataset)",
    "_load_from_checkpoint(resume_from_checkpoint, model)",
    "_load_optimizer_and_scheduler(checkpoint)",
    "_load_rng_state(checkpoint)",
    "_move_model_to_device(model, device)",
    "_prepare_inputs(inputs)",
    "_push_from_checkpoint(checkpoint_folder)",
    "_run_epoch(model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
    "steps_trained_in_current_epoch)",
    "_save(output_dir, state_dict)",
    "_save_checkpoint(model, trial)",
    "_save_optimizer_and_scheduler(output_dir)",
    "_save_rng_state(output_dir)",
    "_save_scaler(output_dir)",
    "_track_num_input_tokens(inputs)",
    "_train_batch_size",
)
"""Private members of transformers.Trainer that are overridden here, or called by this package.

A release may change them without notice: a test compares names and parameters with what is there.
"""


class PreferenceTrainer(Trainer):
    """Train a causal language model on preferences.

    `fastpo.report.page.write_report(output_dir)` draws what a run leaves in its folder.

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
        """Answer keywords of other trainers; `__init__` would only name them."""
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
        refuse_early(model, args, trains=train_dataset is not None)
        prepare_layers([m for m in (model, ref_model, ref_model2) if m is not None], args)
        head = read_head(model)
        loss = args.build_loss(head)
        references = ReferenceBuilder(
            model,
            head,
            loss,
            ref_model,
            ref_model2,
            objective=args.objective,
            asked=args.reference,
            has_store=args.reference_store is not None,
            moves=args.update_rule is not None,
            storable=args.storable(loss) and not has_stream(train_dataset, eval_dataset),
        )
        attach(model, attention_backend=args.attention_backend)
        self._balance = balance_coefficient(model, args.router_aux_loss_coef)
        shares, self.sharing_reason = shares_prompts(model, str(args.share_prompt))
        self._checked = False

        vocabulary = Vocabulary.of(processing_class, model, ref_model, ref_model2)
        positions = Positions.of(model, ref_model, ref_model2)
        check = DataCheck(
            loss,
            reference_prompt=args.reference_prompt,
            positions=positions,
            vocabulary=vocabulary,
            max_tokens_per_row=args.max_tokens_per_row,
            share_prompt=shares,
        )
        # An evaluation may bring data of its own.
        self._groups_of = GroupMaker(processing_class, args, loss, check)
        train_dataset = self._groups_of(train_dataset, "train data")
        eval_dataset = self._groups_of.by_name(eval_dataset, "eval data")
        refuse_stream(args, train_dataset, references.kind)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(  # pyright: ignore
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
        references.settle(self._adapter_effect)
        refuse_unsupported(self, keeps_model=references.keeps_model)
        warn_of_doubts(self, loss)
        self.reference_kind = references.kind
        self.reference: Reference = references.running(self._head_options, self._place)
        if references.kind == "store":
            self.reference = self._stored_reference(ref_model, ref_model2)
        self._carry(references.live)
        self._offload = LayerInputOffload() if args.offload_activations else nullcontext()
        self._meter = TrainingMeter()
        self._finite = FiniteLosses()
        self._evaluation = Evaluation()
        self._add_callbacks()

    # ---- Setting up ----

    def _carry(self, live: AdapterReference | ModelReference | None) -> None:
        """Set up what goes from step to step beside model and optimiser, and into checkpoints.

        Args:
            live: the reference that runs, or None.
        """
        args = self.args
        self._update: ReferenceUpdate | None = None
        if args.update_rule is not None:
            assert isinstance(live, ModelReference)
            policy: Any = self.model
            self._update = ReferenceUpdate(args.update_rule, policy, live.model)
            self.add_callback(self._update)
        self._masking: MaskTraining | None = None
        if args.token_masks != "none":
            assert live is not None
            self._masking = MaskTraining.of(args, live.model)
            self.add_callback(self._masking)
        carried = [LossState(self.loss), self._update, self._masking]
        self._checkpoints = CheckpointWriter([each for each in carried if each is not None])

    def _add_callbacks(self) -> None:
        if self.pop_callback(HFProgressCallback) is not None:
            self.add_callback(ProgressCallback())
        self.add_callback(self._finite)
        self.add_callback(JsonlCallback())
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        if self.args.kl_budget is not None:
            self.add_callback(KLBudget(self.args.kl_budget))

    def _place(self, model: nn.Module) -> None:
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)

    def _adapter_effect(self) -> float:
        """Return how far the adapter changes log-probs now; 0 without data or adapter."""
        data, model = self._data_at_hand, self.model
        if data is None or not isinstance(model, PeftModel):
            return 0.0
        groups, head = first_groups(data, CHECKED), self.loss.head
        return effect_at_start(model, head, groups, self.collator.pad_token_id)  # pyright: ignore

    def _stored_reference(self, ref_model: Any, ref_model2: Any) -> StoredReference:
        if self.train_dataset is not None:  # run.json comes before the store
            self._claim()
        self.check()  # before a number is written: its outcome decides how batches are packed
        return stored_reference(self, ref_model, ref_model2)

    @property
    def _data_at_hand(self) -> Any:
        """Return what the model is tried on before the first step, or None."""
        return self.eval_dataset if self.train_dataset is None else self.train_dataset

    @property
    def collator(self) -> Collator:
        """Return what packs groups into batches."""
        return self.data_collator  # pyright: ignore[reportReturnType]

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.at(str(self.args.output_dir))

    @property
    def _head_options(self) -> HeadOptions:
        return HeadOptions(self.args.backend, self.args.workspace_mib)  # pyright: ignore

    # ---- The step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        """Take a batch to hidden states, statistics, scores and the loss.

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
            self._finite.add(output, inputs)
            if self.is_deepspeed_enabled:  # whose backward takes the step
                self._finite.on_pre_optimizer_step(self.args, self.state, self.control)
            self._meter.window.add(output.metrics, output.counts)
            if num_items_in_batch is not None:
                # Gradients are averaged over ranks, but the counts are already global.
                loss = loss * self._num_data_ranks
        return (loss, output) if return_outputs else loss

    def _output(self, model: nn.Module, batch: Batch, totals: Counts | None) -> LossOutput:
        self.loss.train(model.training)
        self.loss.seed, self.loss.step = self.args.seed, self.state.global_step
        self.loss.progress = self.state.global_step / max(1, self.state.max_steps)
        # The reference first: no activations are alive yet.
        if self._masking is None:
            tokens, of_reference = self.reference(model, batch)
        else:
            tokens, of_reference = self._masking(self.reference, model, batch)
        with self._offload:
            if model.training and self._balance > 0:
                hidden, balance = target_hidden_and_balance(model, batch)
            else:
                hidden, balance = target_hidden(model, batch), None
        output = self.loss.of_tokens(
            hidden,
            tokens,
            reference=of_reference,
            totals=None if totals is None else totals._asdict(),
            options=self._head_options,
        )
        if balance is None:
            return output
        return with_balance(output, balance, self._balance, batch, totals)

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
        """Count every row of a batch."""
        ids = [{"input_ids": row.input_ids} for row in inputs]
        return sum(super(PreferenceTrainer, self).floating_point_ops(each) for each in ids)

    @torch.no_grad()
    def _observe(self, batches: Iterable[Batch]) -> None:
        """Take the statistics of a whole optimiser step, before its first gradient."""
        model: Any = self.model_wrapped
        model.train()
        with self.compute_loss_context_manager(), self.loss.observing():
            for batch in batches:
                self._output(model, self._prepare_inputs(batch), None)

    @property
    def _num_data_ranks(self) -> int:
        return self.accelerator.num_processes // self.get_tp_size()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Wrap the whole step in autocast: the head runs outside the model's wrapped forward."""
        return self.accelerator.autocast()

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Return the batch on this rank's device; the layout stays plain integers."""
        return inputs.to(self.args.device, non_blocking=True)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the Trainer's schedule.

        Raises:
            ValueError: `lr_scheduler_kwargs` that this schedule does not take, or lacks.
        """
        with schedule_told(self.args):
            return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimiser, with the token masks as one more group."""
        optimizer = super().create_optimizer(model)
        if self._masking is not None:
            self._masking.add_to(optimizer, self.args.weight_decay)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Return the Trainer's, with the numbers and truths of `optim_args` as such."""
        made, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return made, as_told(args, keywords)

    # ---- Counting ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Return the micro-batches of one optimiser step, and its counts over all ranks."""
        self._meter.start()
        with of_workers():
            batches = [self._rows(batch) for batch in islice(epoch_iterator, num_batches)]
        rows = [row for batch in batches for row in batch]
        totals = self._over_ranks(Counts.total(row.counts for row in rows))
        self.state.num_input_tokens_seen += round(totals.tokens)
        self._meter.count(rows, totals, self.args.max_tokens_per_row)
        if batches and self.args.batch_statistics == "exact" and self.loss.has_statistics:
            self._observe(rows)
        return batches, totals

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        """Let loaders give groups under a token budget, since ranks agree on the number of rows."""
        return data_collator if self.args.max_tokens_per_row is None else list

    def _rows(self, batch: Any) -> list[Batch]:
        return packed_rows(batch, self.collator, self.args.max_tokens_per_row, self.accelerator)

    def _over_ranks(self, counts: Counts) -> Counts:
        return over_ranks(counts, self.accelerator, self.get_tp_size())

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Do nothing: `get_batch_samples` counts distinct tokens once and over all ranks."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Sized) or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        by_length = self.args.train_sampling_strategy == "group_by_length"
        return EpochSampler(
            dataset,
            data_seed(self.args),
            lambda: int(self.state.epoch or 0),
            by_length=self._train_batch_size if by_length else None,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means, throughput and peak memory to a training record."""
        if "loss" in logs:
            logs.update(self._meter.record(self.args.device, self.state.num_input_tokens_seen))
        super().log(logs, start_time)

    # ---- Evaluation ----

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        if description != "Training":
            if not is_one_of(dataset, self.eval_dataset, self.train_dataset):  # judged at the start
                dataset = self._groups_of(dataset, f"{description} data".lower())
            dataset = filled_up(dataset, batch_size, self.args.world_size)
        elif isinstance(dataset, GroupStream):
            dataset = endless(dataset, self.args)
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return means over the groups of the whole set, as if it were one batch."""
        self._evaluation = Evaluation(getattr(dataloader, "dataset", None))
        with self._meter.paused(), of_workers():
            output = super().evaluation_loop(
                dataloader, description, True, ignore_keys, metric_key_prefix
            )
            return self._evaluation.completed(output, metric_key_prefix, self._over_ranks)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of one batch of an evaluation."""
        total = torch.zeros((), device=self.args.device)
        for row in map(self._prepare_inputs, self._rows(inputs)):
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, output = self.compute_loss(
                    model, row, return_outputs=True, num_items_in_batch=self._evaluation.totals
                )
            self._evaluation.add(row, loss, output)
            total = total + loss
        return total, None, None

    # ---- The run ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

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
            note_batch(self._folder, self.args.batch_facts(), resumes=resume is not None)
            self._folder.write(CONFIG, yaml.safe_dump(self.args.to_dict(), sort_keys=False))
        self.check()
        if resume is None:
            sample(self, self._folder.path, "before")
        self._meter = TrainingMeter()
        output = super().train(resume, trial, ignore_keys_for_eval)
        if self.state.global_step == 0:
            raise ValueError("the training data gave no batch, so no step was taken")
        self.save_state()
        sample(self, self._folder.path, "after")
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
        refuse_no_step(self.args, self.train_dataset)

    def _run_epoch(self, **how: Any) -> None:
        """Pass over the data, unless the run that is resumed has done all its steps."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**how)
        else:
            self.control.should_training_stop = True

    def check(self) -> None:
        """Compare packed with padded, and fused with the model's logits, on a few groups; once.

        Afterwards `collator.share_prompt` is how batches are packed, and `sharing_reason` why.

        Raises:
            RuntimeError: the fused head does not reproduce the model's own logits.
            ValueError: share_prompt=true, but shared prompts change the numbers.
        """
        self._checked = self._checked or run_self_check(self, self._data_at_hand)

    # ---- Checkpoints ----

    def create_model_card(self, *args: Any, model_name: str | None = None, **kwargs: Any) -> None:
        """Write README.md from the files of the run, as `fastpo train` does; also before a push.

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
        if output_dir is not None and _internal_call:  # a checkpoint, published as a whole later
            super().save_model(output_dir, _internal_call=True)
        else:
            folder = self._folder.path if output_dir is None else Path(output_dir)
            save_model(self, super().save_model, folder)
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
        with self._meter.paused():
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
        save_merged(self, path)
