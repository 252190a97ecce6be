"""What is judged before the first step, so that a run that cannot work ends before it begins.

Data is held against objective, reference, positions, vocabulary and budget; models against sharing
and the head; the configuration against the machine. Each refusal names its remedy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from fastpo.data.columns import CONTEXT_ROLES
from fastpo.data.groups import Group
from fastpo.data.token_budget import check_budget
from fastpo.domain import Domain
from fastpo.head.head import Head
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.model.limits import Positions, Vocabulary
from fastpo.model.self_check import CHECKED, can_share_prompt, self_check
from fastpo.objectives.vocabulary import SCORES
from fastpo.train.config import PreferenceConfig
from fastpo.train.optimizers import lost_steps

if TYPE_CHECKING:
    from fastpo.train.trainer import PreferenceTrainer

log = logging.getLogger(__name__)

_JUDGED = 64  # groups of a stream that are searched for what hardly teaches anything

Grades = Sequence[tuple[str, Domain]]
"""Of every component of a loss that takes grades its name, and what they must be."""


def check_fit(
    loss: PreferenceLoss, groups: Iterable[Group], *, reference_prompt: str = "prompt"
) -> None:
    """Refuse the first group that the objective or its reference cannot take.

    Raises:
        ValueError: names source and row, what is missing, and what to do about it.
    """
    needs, grades = loss.needs, loss.grade_domains
    for group in groups:
        reason = _misfit(loss, needs, group)
        if reference_prompt != "prompt" and group.short_prompt_ids is None:
            reason = f"reference_prompt={reference_prompt!r} needs a `short_prompt` of every row"
        if reason is not None:
            raise ValueError(f"{_named(group)}: {reason}")
        check_grades(grades, group)


def check_grades(grades: Grades, group: Group) -> None:
    """Refuse a grade outside the domain of an objective: ValueError with source and row."""
    for name, domain in grades:
        for response in group.responses:
            if response.score is not None and not domain.holds(response.score):
                raise ValueError(
                    f"{_named(group)}: {name} takes grades that are {domain}, got "
                    f"{response.score:g}: rescale the `scores` column"
                )


def doubts(
    loss: PreferenceLoss, groups: Sequence[Group], *, seen: int, whole: bool = True
) -> Iterator[str]:
    """Yield a sentence, with a remedy, for all that the objective will hardly learn from.

    Args:
        loss: the objectives.
        groups: the groups that are trained on.
        seen: groups that a batch statistic is of.
        whole: whether those are all groups, not the first ones of a stream.
    """
    rows = f"{len(groups)} rows" if whole else f"the first {len(groups)} rows"
    names = " + ".join(c.objective.name for c in loss.components)
    compares = any(c.objective.family != "point" for c in loss.components)
    tied = [g for g in groups if compares and _tied(g, by_score="score" in loss.needs)]
    if tied:
        yield (
            f"{len(tied)} of {rows} grade all their responses alike, the first is "
            f"{_named(tied[0])}: {names} finds no preference in them; leave them out, or grade "
            "finer"
        )
    labels = {bool(response.label) for group in groups for response in group.responses}
    for component in loss.components:
        objective = component.objective
        for label in objective.labels:
            if label not in labels:
                kind, other = ("desirable", "undesirable")[:: 1 if label else -1]
                yield (
                    f"of {rows} no response is {kind}, all are {other}: {objective.name} needs "
                    f"some of which `label` is {str(label).lower()}"
                )
        if objective.statistics and seen == 1:
            yield (
                f"{objective.name} takes {', '.join(objective.statistics)} from batches of one "
                "group: raise per_device_train_batch_size, or set batch_statistics to exact and "
                "raise gradient_accumulation_steps"
            )
    if "population" in loss.needs and len({group.population for group in groups}) == 1:
        yield (
            f"all of {rows} are of one population: {names} needs rows whose `group` columns "
            "differ, else it is dpo"
        )


def _tied(group: Group, *, by_score: bool) -> bool:
    """Return whether several candidates have one rank, or one grade where that counts."""
    several = len(group.responses) > 1
    ranks, scores = ({getattr(r, of) for r in group.responses} for of in ("rank", "score"))
    return several and ((len(ranks) == 1 and None not in ranks) or (by_score and len(scores) == 1))


def _named(group: Group) -> str:
    return f"{group.source or 'rows'}, row {group.row}"


def _misfit(loss: PreferenceLoss, needs: frozenset[str], group: Group) -> str | None:
    count = len(group.responses)
    for component in loss.components:
        if not component.objective.takes(count):
            return component.objective.size_error(count, "the row")
    names = " + ".join(c.objective.name for c in loss.components)
    for name, score in SCORES.items():  # in the table's order, whatever the components' is
        if name in needs and score.column is not None and _lacks(group, name):
            return f"{names} needs {score.column}"
    for role in loss.extras:
        if role not in group.extras:
            column = f", from a `{CONTEXT_ROLES[role][0]}` column" if role in CONTEXT_ROLES else ""
            return f"{names} needs a {role!r} response of every row{column}"
    return None


def _lacks(group: Group, name: str) -> bool:
    """Return whether a group, or a response of it, has no value of a score that rows bring."""
    owners = [group] if SCORES[name].shape == "[G]" else group.responses
    return any(getattr(owner, name) is None for owner in owners)


# ---- Data ----


def is_sharded(trainer: Trainer) -> bool:
    """Return whether a rank holds only a part of the weights."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def first_groups(dataset: Any, count: int) -> list[Group]:
    """Return the first groups of a data set, of a stream, or of the first of several by name."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if isinstance(dataset, Sized):
        return [dataset[i] for i in range(min(count, len(dataset)))]  # pyright: ignore
    return dataset.head(count)


@dataclass(frozen=True)
class DataCheck:
    """Hold groups against what the run asks of them.

    Args:
        loss: the objectives.
        reference_prompt: column with the prompt that the reference sees.
        positions: those that every model has.
        vocabulary: the token ids that every model takes.
        max_tokens_per_row: the budget, or None.
        share_prompt: whether a row has one prompt copy per group.
    """

    loss: PreferenceLoss
    reference_prompt: str
    positions: Positions
    vocabulary: Vocabulary
    max_tokens_per_row: int | None
    share_prompt: bool

    def __call__(self, groups: Any) -> None:
        """Refuse the first group that cannot be trained on.

        Of a stream the beginning is looked at; what is wrong later stops the step that meets it.

        Raises:
            ValueError: names source and row, what is wrong, and what to do about it.
        """
        seen: Any = groups if isinstance(groups, Sized) else groups.head(CHECKED)
        check_fit(self.loss, seen, reference_prompt=self.reference_prompt)
        self.positions.check_groups(seen)
        self.vocabulary.check_groups(seen)
        if self.max_tokens_per_row is not None:
            check_budget(seen, self.max_tokens_per_row, share_prompt=self.share_prompt)


def refuse_stream(args: PreferenceConfig, data: Any, kind: str) -> None:
    """Refuse settings that training on a stream cannot follow.

    Args:
        args: the configuration.
        data: the training data: only a stream of groups can be refused.
        kind: of the reference.

    Raises:
        ValueError: names the setting and the remedy.
    """
    if data is None or isinstance(data, Sized):
        return
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


def refuse_no_step(args: PreferenceConfig, data: Any) -> None:
    """Refuse training data that gives no step.

    Raises:
        ValueError: no data, or no batch; gives the numbers.
    """
    if data is None:
        raise ValueError("nothing to train on: give PreferenceTrainer a train_dataset")
    if isinstance(data, Sized) and args.dataloader_drop_last:
        groups, batch = len(data), args.train_batch_size * args.world_size
        if groups < batch:
            ranks = f" ({args.world_size} processes)" if args.world_size > 1 else ""
            raise ValueError(
                f"dataloader_drop_last leaves no batch of {batch}{ranks} in {groups} groups: "
                "lower per_device_train_batch_size, or keep the last batch"
            )


# ---- The run ----


def refuse_unsupported(trainer: Trainer, *, keeps_model: bool) -> None:
    """Refuse combinations of settings and machines that would train on wrong numbers, or not fit.

    Args:
        trainer: the run.
        keeps_model: whether a whole reference model stays beside the policy.

    Raises:
        ValueError: names the settings and the remedy.
    """
    args: Any = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would mean DataParallel, which splits a "
            "packed batch along the wrong axis: start one process a GPU with `torchrun "
            f"--nproc-per-node {args.n_gpu}` or `accelerate launch`, or show one with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(
            f"cp_size={trainer.get_cp_size()}, sp_size={trainer.get_sp_size()}: packed rows are "
            "not split over ranks; use data parallelism (FSDP, ZeRO) and share_prompt"
        )
    if args.max_tokens_per_row is not None and trainer.is_deepspeed_enabled:
        raise ValueError(
            f"max_tokens_per_row={args.max_tokens_per_row}: DeepSpeed takes a step with "
            "every backward; use per_device_train_batch_size and gradient_accumulation_steps"
        )
    sharded = is_sharded(trainer)
    if keeps_model and sharded:
        raise ValueError(
            "reference='copy' would put a whole model on every rank of a sharded run: use "
            "reference='store' (computed once, on one process), or an adapter"
        )
    if args.token_masks != "none" and sharded:
        raise ValueError(
            f"token_masks={args.token_masks!r} in a sharded run, whose optimiser takes no "
            "other parameters: use data parallelism without sharding"
        )


def warn_of_doubts(trainer: Trainer, loss: PreferenceLoss) -> None:
    """Warn of what can be trained and hardly changes the model: weights, data, idle dropout."""
    args: Any = trainer.args
    assert trainer.model is not None
    lost = lost_steps(trainer.model, args, trainer.optimizer)  # pyright: ignore
    if lost is not None:
        log.warning("%s", lost.reason)
    seen = args.per_device_train_batch_size * args.world_size
    seen *= args.gradient_accumulation_steps if args.batch_statistics == "exact" else 1
    data: Any = trainer.train_dataset
    if data is not None:
        whole = isinstance(data, Sized)  # nobody knows how a stream goes on
        groups = first_groups(data, len(data) if whole else _JUDGED)
        for doubt in doubts(loss, groups, seen=seen, whole=whole):
            log.warning("%s", doubt)
    adapters = getattr(trainer.model, "peft_config", {}).values()
    rates = [rate for a in adapters if (rate := getattr(a, "lora_dropout", 0))]
    if rates and args.disable_dropout:
        log.warning(
            "lora_dropout=%g does nothing: disable_dropout=True switches every dropout off",
            rates[0],
        )


# ---- Shared prompts ----


def shares_prompts(model: nn.Module, asked: str) -> tuple[bool, str]:
    """Return whether prompts are shared, as far as the model's architecture says, and why.

    Args:
        model: the policy.
        asked: `auto`, `true` or `false`.

    Raises:
        ValueError: `true` is asked for, but this model cannot.
    """
    if asked == "false":
        return False, "share_prompt is false"
    possible, reason = can_share_prompt(model)
    if not possible and asked == "true":
        raise ValueError(
            f"share_prompt=true, but this model cannot: {reason}; use share_prompt=auto"
        )
    if not possible:
        log.warning("one prompt copy per response: %s", reason)
    return possible, reason


def check_numbers(
    model: nn.Module,
    head: Head,
    groups: Sequence[Group],
    pad_token_id: int,
    *,
    share_prompt: bool,
    asked: str,
) -> tuple[bool, str]:
    """Compare packed with padded and fused with the model's logits, on a few groups.

    Args:
        model, head: the policy.
        groups: some of the data.
        pad_token_id: for padded rows.
        share_prompt: whether prompts are to be shared.
        asked: `auto`, or `true`, which takes no other packing.

    Returns:
        whether shared prompts give the model's own numbers, and what was measured.

    Raises:
        RuntimeError: the fused head does not reproduce the model's own logits.
        ValueError: `true` is asked for, but shared prompts change the numbers.
    """
    result = self_check(model, head, groups, pad_token_id, share_prompt=share_prompt)
    if share_prompt and not result.share_prompt and asked == "true":
        raise ValueError(
            f"share_prompt=true, but the self-check failed: {result.reason}; use share_prompt=auto"
        )
    log.info(
        "self-check: %s; fused and plain head differ by %.2e, rounding explains %.2e",
        result.reason,
        result.head_error,
        result.head_bound,
    )
    return result.share_prompt, result.reason


def run_self_check(trainer: PreferenceTrainer, data: Any) -> bool:
    """Check a run's numbers on the first groups of its data, and settle how batches are packed.

    Afterwards the trainer's `collator.share_prompt` says how, and its `sharing_reason` why.

    Args:
        trainer: the run.
        data: groups, or None.

    Returns:
        whether there was anything to check, with weights at hand.

    Raises:
        RuntimeError, ValueError: as `check_numbers`.
    """
    args, collator = trainer.args, trainer.collator
    if not args.self_check or data is None:
        return False
    if is_sharded(trainer):
        log.info("no self-check: the weights are sharded")
        return False
    shares, reason = check_numbers(
        trainer.model,  # pyright: ignore[reportArgumentType]
        trainer.loss.head,  # pyright: ignore[reportArgumentType]
        first_groups(data, CHECKED),
        collator.pad_token_id,
        share_prompt=collator.share_prompt,
        asked=str(args.share_prompt),
    )
    if collator.share_prompt and not shares:
        collator.share_prompt, trainer.sharing_reason = False, reason
    return True
