"""`fastpo train`: a recipe becomes a run, and a run that stopped goes on."""

from __future__ import annotations

import json
import logging
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
import yaml
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from fastpo.cli.models import open_model, open_tokenizer, show_log, table
from fastpo.cli.parser import parse_train
from fastpo.cli.plan import host_needs
from fastpo.data.dataset import GroupDataset, build_groups
from fastpo.data.packing import counts_of
from fastpo.data.rows import load_rows
from fastpo.data.stream import GroupStream
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions, Workspace
from fastpo.model.limits import vocabulary_size
from fastpo.model.load import trained_adapter
from fastpo.model.merge import blend
from fastpo.objectives import OBJECTIVES
from fastpo.recipe.keys import show_keys
from fastpo.recipe.recipe import Recipe, load_recipe
from fastpo.redact import is_secret, redact
from fastpo.report.chart import short
from fastpo.report.diagnosis import warnings_text
from fastpo.report.page import write_model_card, write_report
from fastpo.run.checkpoint import incomplete, latest_complete
from fastpo.run.folder import RECIPE, RECORDS, RunFolder, claim
from fastpo.run.record import Run, environment
from fastpo.train.config import PreferenceConfig, batch_words
from fastpo.train.optimizers import refuse_lost_steps, require_optimizer
from fastpo.train.trainer import PreferenceTrainer

INTERRUPTED = 130

# A run may go on with these changed: they leave the weights of the steps already done alone.
MAY_CHANGE = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "run_name",
    "report_to",
    "disable_tqdm",
    "log_level",
    "report",
    "num_samples",
    "sample_tokens",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "eval_steps",
    "eval_strategy",
    "eval_on_start",
    "eval_delay",
    "per_device_eval_batch_size",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "save_only_model",
    "load_best_model_at_end",
    "metric_for_best_model",
    "early_stopping_patience",
    "kl_budget",
    "self_check",
    "backend",
    "workspace_mib",
    "offload_activations",
    "mlp_tile",
    "layer_kernels",
    "share_prompt",
    "dataloader_num_workers",
    "reference_store",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}

REFERENCES = {
    "none": "not needed",
    "adapter": "the model with its adapter switched off",
    "copy": "a frozen copy of the model as it was at the start",
    "store": "log-probabilities on disk, from before the first step",
}


class StopCleanly(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once a signal has asked for it."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopCleanly:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write("\nfastpo: finishing this step and saving; Ctrl-C again stops at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to save and to stop, on every rank after the same step."""
        if args.world_size > 1:
            flag = torch.tensor(float(self.asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(flag.item())
        if self.asked:
            control.should_save = control.should_training_stop = True


# --- data ----------------------------------------------------------------------------------------


def hold_out(data: GroupDataset, fraction: float, seed: int) -> tuple[GroupDataset, GroupDataset]:
    """(training, held out) groups: whole prompts, so that none is on both sides.

    Raises:
        ValueError: one of the sides would be empty.
    """
    prompts = [g.prompt_ids.tobytes() for g in data.groups]
    distinct = sorted(set(prompts))
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = {distinct[i] for i in order[: round(fraction * len(distinct))]}
    sides = [
        [g for g, p in zip(data.groups, prompts, strict=True) if (p in held) is side]
        for side in (False, True)
    ]
    if not all(sides):
        raise ValueError(
            f"eval_fraction={fraction} of {len(distinct)} distinct prompts leaves "
            f"{len(sides[0])} groups to train on and {len(sides[1])} to evaluate on"
        )
    return (
        GroupDataset(sides[0], data.skipped, data.num_rows),
        GroupDataset(sides[1], [], data.num_rows),
    )


def prepare_data(
    recipe: Recipe, config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[GroupDataset | GroupStream, GroupDataset | GroupStream | None]:
    """The groups to train on and to evaluate on."""
    data = recipe.data
    options = config.data_options()
    loss = config.build_loss()
    form: dict[str, Any] = {"extras": loss.extras, "needs": loss.needs}

    def groups(source: str, split: str, limit: int | None) -> GroupDataset | GroupStream:
        rows = load_rows(
            source, split=split, name=data.dataset_name, streaming=data.streaming, origin=True
        )
        if limit is not None:
            rows = rows.take(limit)
        if data.streaming:
            return GroupStream(rows, tokenizer, options, **form, source=source)
        return build_groups(
            rows,
            tokenizer,
            options,
            **form,
            source=source,
            progress=config.process_index == 0,
        )

    train = groups(data.dataset, data.split, data.max_rows)
    if data.eval_fraction:
        assert isinstance(train, GroupDataset)
        return hold_out(train, data.eval_fraction, config.seed)
    if data.evaluates:
        return train, groups(data.eval_dataset or data.dataset, data.eval_split or "train", None)
    return train, None


# --- what is said about a run --------------------------------------------------------------------


def model_facts(name: str, model: nn.Module) -> dict[str, Any]:
    """Name, class and sizes of a model."""
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


def data_facts(name: str, train: Any, held_out: Any) -> dict[str, Any]:
    """Counts of the groups and their tokens; a stream has none before it is read."""
    facts: dict[str, Any] = {"name": name}
    if isinstance(train, GroupDataset):
        counts = counts_of(train.groups)
        facts |= {
            "rows": train.num_rows,
            **{k: getattr(counts, k) for k in ("groups", "responses", "tokens", "unshared_tokens")},
            "label_tokens": counts.target_tokens,
            "longest": max(len(g) for g in train.groups),
            "context": max(len(g.prompt_ids) + g.longest for g in train.groups),
        }
        if any(g.prompt_positions is not None for g in train.groups):
            facts["synthetic_context"] = max(g.span for g in train.groups)
    if isinstance(held_out, GroupDataset):
        facts["eval_groups"] = len(held_out)
    return facts


def objective_facts(recipe: Recipe) -> dict[str, Any]:
    """Name or mixture, formula, hyper-parameters in force, papers."""
    chosen = [OBJECTIVES[name] for name in recipe.hyper]
    mixed = len(chosen) > 1
    return {
        "name": recipe.given.get("objective", chosen[0].name),
        "formula": "\n".join(f"{o.name}: {o.formula}" if mixed else o.formula for o in chosen),
        "hyper": recipe.hyper if mixed else recipe.hyper[chosen[0].name],
        "paper": ", ".join(o.paper for o in chosen),
    }


def schedule_words(trainer: PreferenceTrainer, label_tokens: float) -> str:
    """What the head will do in a typical step of training."""
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


def step_words(batch: dict[str, int], drop_last: bool, groups: int | None) -> str:
    """What a step consists of, and what becomes of the groups that fill none."""
    words = f"{batch_words(batch)}; drop_last is {'on' if drop_last else 'off'}"
    at_once = math.prod(batch.values()) // (batch["accumulated"] if drop_last else 1)
    if groups is None or not (rest := groups % at_once):
        return words
    return f"{words}, an epoch's last {rest} are " + ("left out" if drop_last else "a smaller step")


def introduction(facts: dict[str, Any], resume: str | None, output_dir: str) -> str:
    """The lines that `train` begins with."""
    model, data, objective = facts["model"], facts["data"], facts["objective"]
    name = objective["name"]
    if isinstance(name, dict):
        name = " + ".join(f"{w:g} {n}" for n, w in name.items())
    hyper = objective["hyper"]
    if "groups" in data:
        saved = 1 - data["tokens"] / data["unshared_tokens"]
        held = f" + {data['eval_groups']} held out" if "eval_groups" in data else ""
        amount = f"{data['groups']:,} groups{held}, {data['tokens']:,} tokens"
        if facts["sharing"]["on"]:
            amount += f", {saved:.0%} saved by one prompt copy"
        if "synthetic_context" in data:
            amount += (
                f"; at most {data['context']:,} real tokens a context, spread over "
                f"{data['synthetic_context']:,} positions"
            )
    else:
        amount = "a stream"
    lines = {
        "model": f"{model['name']}, {model['class']}, {short(model['parameters'])} parameters, "
        f"{short(model['trainable'])} trained, {model['dtype']}",
        "data": f"{data['name']}, {amount}",
        "objective": f"{name}; "
        + yaml.safe_dump(hyper, default_flow_style=True, width=1000).strip()[1:-1],
        "step": facts["step"],
        "reference": facts["reference"],
        "head": facts["schedule"],
        "output": output_dir,
    }
    if not facts["sharing"]["on"]:
        lines["sharing"] = f"off: {facts['sharing']['reason']}"
    if resume is not None:
        lines["resumes"] = resume
    return "\n".join(f"{key:<11}{text}" for key, text in lines.items())


def conclusion(run: Run) -> str:
    """The table that `train` ends with, and what speaks against the run."""
    from fastpo.report.page import metric_rows

    rows = [(key, *map(short, values)) for key, *values in metric_rows(run)]
    shown = f"{table([('', 'first fifth', 'last fifth', 'last eval'), *rows])}\n" if rows else ""
    return shown + warnings_text(run)


# --- the run -------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print at once, without secrets."""
    print(redact(text), flush=True)


def _write_skipped(folder: RunFolder, groups: GroupDataset | GroupStream) -> None:
    rows = [
        redact({name: getattr(bad, name) for name in ("source", "row", "field", "reason")})
        for bad in groups.skipped
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    folder.write("skipped.jsonl", text)


def _close(folder: RunFolder, facts: dict[str, Any], groups: Any, report: bool) -> None:
    """What a run leaves behind however it ended."""
    folder.save(**facts)
    _write_skipped(folder, groups)  # a stream knows them only now
    if report:
        try:
            write_report(folder.path)
        except ValueError as error:  # edited while the run went on
            logging.getLogger(__name__).warning("no report: %s", error)


def refuse_mixture(recipe: Recipe, config: PreferenceConfig, before: Run) -> None:
    """A run goes on only as the run that it was; secrets are no part of that.

    The same groups a step may be spread over ranks and accumulated batches in another way, unless
    the objective has statistics of a batch.

    Raises:
        ValueError: a key, or the number of ranks, that changes what the steps compute.
    """
    earlier, now = (
        json.loads(json.dumps(redact(keys), default=str)) for keys in (before.recipe, recipe.given)
    )
    start_over = "take another output_dir, or start over with --overwrite"
    held, batch = before.facts.get("batch"), config.batch_facts()
    # Else what a step computes depends on how its groups are spread.
    spreads = (
        config.batch_statistics == "exact" or not config.build_loss().has_statistics
    ) and config.train_sampling_strategy != "group_by_length"
    alike = held is not None and spreads and math.prod(held.values()) == math.prod(batch.values())
    may_change = MAY_CHANGE | (
        {"per_device_train_batch_size", "gradient_accumulation_steps"} if alike else set()
    )
    for key in {**earlier, **now}:
        old, new = earlier.get(key), now.get(key)
        if key not in may_change and not is_secret(key) and old != new:
            raise ValueError(
                f"{before.folder} holds a run with {key} = {old!r}, now it is {new!r}: {start_over}"
            )
    if held is not None and held["ranks"] != batch["ranks"] and not alike:
        other = ", or set gradient_accumulation_steps so that steps have as many groups"
        raise ValueError(
            f"{before.folder} holds a run with {batch_words(held)}, now it is "
            f"{batch_words(batch)}: take as many ranks{other if spreads else ''}, or {start_over}"
        )


def read_by(recipe: Recipe) -> list[str]:
    """Every file, folder and name that a run of this recipe reads."""
    model, data = recipe.model, recipe.data
    names = [model.model, model.tokenizer, model.chat_template, data.dataset, data.eval_dataset]
    checkpoint = recipe.given.get("resume_from_checkpoint")
    names += [checkpoint] if isinstance(checkpoint, str) else []
    for reference in (model.ref_model, model.ref_model2):
        names += [reference] if isinstance(reference, str) else [*(reference or ())]
    adapters = [found for name in filter(None, names[:1]) if (found := trained_adapter(name))]
    return [*filter(None, names), *(adapter.base for adapter in adapters)]


def refuse_own_data(output_dir: Path, *sources: str | None) -> None:
    """Refuse an output_dir whose files would be read as rows.

    Raises:
        ValueError: it lies in a folder of data, or its files match a glob; names both.
    """
    place = output_dir.resolve()
    for source in filter(None, sources):
        path = Path(source).expanduser()
        inside = path.is_dir() and place.is_relative_to(path.resolve())
        pattern = str(path.absolute())
        if inside or any((place / name).match(pattern) for name in RECORDS):
            raise ValueError(
                f"output_dir {output_dir}: its files would be read as rows of {source}: take "
                "another output_dir"
            )


def train(words: Sequence[str]) -> int:
    """Train from the words after `fastpo train`; the exit status."""
    asked = parse_train(words)
    if asked.keys is not None:
        print(show_keys(asked.keys))
        return 0
    path, fresh = asked.recipe, asked.overwrite
    recipe = load_recipe(path, asked.flags)
    config = recipe.config()
    require_optimizer(config)
    output_dir = Path(str(config.output_dir))
    main = config.process_index == 0
    show_log(logging.INFO if main else logging.ERROR)

    folder = RunFolder.at(output_dir)
    with config.main_process_first(local=False):
        if main:
            refuse_own_data(output_dir, recipe.data.dataset, recipe.data.eval_dataset)
            folder = claim(
                output_dir,
                recipe=path,
                alone=config.push_to_hub,
                status="starting",
                command=_command(words),
            )
            if fresh:
                folder.refuse_removal(read_by(recipe))
        before = Run(output_dir) if fresh or not output_dir.is_dir() else Run.read(output_dir)
    try:
        return _train(words, recipe, config, folder, before, fresh=fresh)
    except BaseException as error:
        status = folder.facts.get("status")
        never_began = status == "failed" and "started" not in folder.facts
        if main and (status in ("starting", "running") or never_began):
            ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):
                folder.save(status=ended, error=f"{type(error).__name__}: {error}")
        raise


def _command(words: Sequence[str]) -> str:
    """The command line without secrets, which would have another form in quotes."""
    return shlex.join(redact(["fastpo", "train", *words]))


def _checkpoint(output_dir: Path, asked: str | None, *, fresh: bool) -> str | None:
    """The checkpoint to go on from: a named one, but of another folder at the start only.

    Raises:
        ValueError: the named one is not there or damaged.
    """
    newest = None if fresh else latest_complete(output_dir)
    if asked is None or asked == "auto":
        return newest
    reason = incomplete(asked)
    if reason is not None:
        raise ValueError(f"resume_from_checkpoint = {asked!r}: {reason}; name another, or none")
    return asked if newest is None or _holds(output_dir, asked) else newest


def _holds(folder: Path, checkpoint: str) -> bool:
    return Path(checkpoint).resolve().parent == folder.resolve()


def _train(
    words: Sequence[str],
    recipe: Recipe,
    config: PreferenceConfig,
    folder: RunFolder,
    before: Run,
    *,
    fresh: bool,
) -> int:
    """Train in a folder that is claimed; the exit status.

    Args:
        words: those after `fastpo train`.
        recipe: what to train.
        config: the recipe's, for the trainer.
        folder: where to.
        before: the run that goes on, if one lies there.
        fresh: whether it is removed instead, once all that the new one reads is open.
    """
    output_dir = folder.path
    main = config.process_index == 0
    resume = _checkpoint(output_dir, config.resume_from_checkpoint, fresh=fresh)
    finished = before.facts.get("status") == "finished"
    goes_on = resume is not None and _holds(output_dir, resume)
    if goes_on or finished:
        refuse_mixture(recipe, config, before)
        same_length = all(
            before.recipe.get(key) == recipe.given.get(key)
            for key in ("max_steps", "num_train_epochs")
        )
        if finished and same_length:
            more = "more max_steps or num_train_epochs continue it, " if goes_on else ""
            say(
                f"{output_dir} is finished: {before.steps} steps, report in "
                f"{output_dir / 'report.html'}\n{more}--overwrite starts over, another output_dir "
                "keeps both"
            )
            return 0
        if not goes_on:
            raise ValueError(
                f"{output_dir} is finished and has no checkpoint to go on from: take another "
                "output_dir, or start over with --overwrite"
            )

    if main and (needs := host_needs(recipe)) is not None:
        say(f"{'needs':<11}{needs}")
    source = {
        "revision": recipe.model.revision,
        "trust_remote_code": recipe.model.trust_remote_code,
    }
    gguf = {"gguf_file": recipe.model.gguf_file}
    tokenizer = open_tokenizer(
        recipe.model.model,
        recipe.model.tokenizer,
        recipe.model.chat_template,
        random_init=recipe.model.random_init,
        **source,
        **gguf,
    )
    lora = recipe.model.lora
    vocabulary = vocabulary_size(tokenizer) if recipe.model.resize_embeddings else None

    def opened_model() -> nn.Module:
        # A fresh adapter is drawn here, before the Trainer sets its seed.
        set_seed(config.seed)
        return open_model(
            recipe.model.model,
            dtype=recipe.model.dtype,
            quantization=recipe.model.quantization,
            random_init=recipe.model.random_init,
            attn_implementation=recipe.model.attn_implementation,
            lora={} if lora is True else (lora or None),
            trainable=True,
            vocabulary=vocabulary,
            **source,
            **gguf,
        )

    model = None
    if recipe.model.dtype == "bfloat16":  # judged before the data, which can take hours to prepare
        model = opened_model()
        refuse_lost_steps(model, config)
    groups, held_out = prepare_data(recipe, config, tokenizer)
    if model is None:
        model = opened_model()
    open_reference = partial(
        open_model,
        dtype=recipe.model.dtype,
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
        vocabulary=vocabulary,
    )

    def opened(named: str | dict[str, float] | None) -> Any:
        if named is None:
            return None
        return open_reference(named) if isinstance(named, str) else blend(named, open_reference)

    ref_model, ref_model2 = map(opened, (recipe.model.ref_model, recipe.model.ref_model2))
    stop = StopCleanly()
    trainer = PreferenceTrainer(
        model,  # type: ignore[arg-type]
        config,
        train_dataset=groups,
        eval_dataset=held_out,
        processing_class=tokenizer,
        ref_model=ref_model,  # type: ignore[arg-type]
        ref_model2=ref_model2,  # type: ignore[arg-type]
        callbacks=[stop],
    )
    trainer.refuse_no_step()
    trainer.check()  # before anything is said about how prompts are packed
    data = data_facts(recipe.data.dataset, groups, held_out)
    tokens = data["label_tokens"] / data["groups"] if "groups" in data else 512
    reference = REFERENCES[trainer.reference_kind]
    if ref_model is not None and trainer.reference_kind != "none":
        reference = str(recipe.model.ref_model)
    if ref_model2 is not None:
        reference += f", and {recipe.model.ref_model2}"
    facts: dict[str, Any] = {
        "status": "running",
        "command": _command(words),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": model_facts(recipe.model.model, model),
        "data": data,
        "step": step_words(config.batch_facts(), config.dataloader_drop_last, data.get("groups")),
        "objective": objective_facts(recipe),
        "reference": reference,
        "sharing": {"on": trainer.collator.share_prompt, "reason": trainer.sharing_reason},
        "schedule": schedule_words(trainer, tokens * config.per_device_train_batch_size),
        "environment": environment(),
        "arguments": config.to_dict(),
        "recipe": recipe.given,
    }
    if main:
        if fresh:
            folder.start_over()
        batch = folder.facts.get("batch")
        folder.facts = {} if batch is None else {"batch": batch}
        folder.save(**facts)
        if not folder.leaves(output_dir / RECIPE):
            recipe.save(output_dir)
        _write_skipped(folder, groups)
        say(introduction(facts, resume, str(output_dir)))

    begin = time.monotonic()
    spent = float(before.facts.get("seconds", 0.0)) if resume is not None else 0.0
    try:
        with stop:
            trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        stop.asked = True
    except BaseException as error:
        facts |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        if main:
            _close(folder, facts, groups, recipe.report.report)
        raise
    facts["seconds"] = spent + time.monotonic() - begin
    if stop.asked:
        facts["status"] = "interrupted"
    else:
        facts["status"] = "finished"
        if held_out is not None and trainer.state.global_step not in {
            line["step"] for line in trainer.state.log_history if "eval_loss" in line
        }:
            trainer.evaluate()
        trainer.save_model()
        trainer.save_state()
    if not main:
        return INTERRUPTED if stop.asked else 0
    _close(folder, facts, groups, recipe.report.report)
    if stop.asked:
        found = latest_complete(output_dir)
        left = [word for word in words if word != "--overwrite"]
        again = _command(left)
        where = f"goes on from {Path(found).name}" if found else "starts over: nothing was saved"
        say(f"\ninterrupted at step {trainer.state.global_step}; this command {where}:\n  {again}")
        return INTERRUPTED
    say("\n" + conclusion(Run.read(output_dir)))
    if recipe.report.report:
        write_model_card(output_dir)
        say(f"report     {output_dir / 'report.html'}")
    say(f"model      {output_dir}")
    return 0
