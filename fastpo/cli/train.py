"""`fastpo train`: a recipe becomes a run, and a run that stopped goes on."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
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
from fastpo.cli.plan import host_needs
from fastpo.data.build import GroupDataset, GroupStream, build_groups
from fastpo.data.packing import counts_of
from fastpo.data.rows import load_rows
from fastpo.head import Workspace, plan_head
from fastpo.model.load import blend
from fastpo.objectives import OBJECTIVES
from fastpo.train.chart import short
from fastpo.train.checkpoint import latest_complete
from fastpo.train.config import PreferenceConfig
from fastpo.train.diagnosis import warnings_text
from fastpo.train.recipe import Recipe, fields_of_recipe, load_recipe
from fastpo.train.report import write_model_card, write_report
from fastpo.train.run import Run, environment
from fastpo.train.trainer import PreferenceTrainer
from fastpo.train.values import describe

INTERRUPTED = 130

# A run may go on with these changed: they leave the weights of the steps already done alone.
MAY_CHANGE = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
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
    "store": "log-probabilities on disk",
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


def _split_words(words: Sequence[str]) -> tuple[str | None, list[str], set[str]]:
    """The recipe's path, the recipe's flags, and the flags of the command itself."""
    rest = list(words)
    recipes = [w for w in rest if w.endswith((".yaml", ".yml")) and not w.startswith("--")]
    path = rest[0] if rest and not rest[0].startswith("--") else next(iter(recipes), None)
    if path is not None:
        rest.remove(path)
    # `debug` is also a key of the Trainer's: with a value it is the key, bare it is ours.
    bare = {
        w
        for i, w in enumerate(rest)
        if w in ("--overwrite", "--debug") and (i + 1 == len(rest) or rest[i + 1].startswith("--"))
    }
    return path, [w for w in rest if w not in bare], bare


def show_keys(word: str) -> str:
    """Every key of a recipe with its type and default, or those that contain a word."""
    import dataclasses

    from fastpo.train.recipe import DataSection, ModelSection, ReportSection

    defaults: dict[str, str] = {}
    for cls in (ModelSection, DataSection, ReportSection, PreferenceConfig):
        for f in dataclasses.fields(cls):
            missing = f.default is dataclasses.MISSING
            defaults[f.name] = "" if missing else f"{getattr(f.default, 'value', f.default)}"
    rows = [
        (name, defaults[name].replace("None", "null"), describe(kind))
        for name, kind in fields_of_recipe().items()
        if word in name
    ]
    width = max((len(name) for name, *_ in rows), default=0)
    return "\n".join(f"{n:<{width}}  {d or '-':<20}  {t}"[:140] for n, d, t in rows)


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
            **{k: counts[k] for k in ("groups", "responses", "tokens", "unshared_tokens")},
            "label_tokens": counts["label_tokens"],
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
    _, schedule, why = plan_head(
        max(1, round(label_tokens)),
        *head.weight.shape,
        device=trainer.args.device,
        dtype=head.weight.dtype,
        stats=("logps", "kl_ref_policy") if kl else ("logps",),
        num_grad_stats=2 if kl else 1,
        needs_head=head.weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or head.lora is not None,
        needs_weight=head.weight.requires_grad,
        with_reference=kl,
        backend=trainer.args.backend,
        workspace_mib=cast(Workspace, trainer.args.workspace_mib),
    )
    return f"{schedule.name}, {schedule.products} products ({schedule.reason}); {why}"


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
    from fastpo.train.report import metric_rows

    rows = [("", "first fifth", "last fifth", "last eval")]
    rows += [(key, *map(short, values)) for key, *values in metric_rows(run)]
    return table(rows) + "\n" + warnings_text(run)


# --- the run -------------------------------------------------------------------------------------

_RUN = ("preference_config.yaml", "run.json")  # one of them is in every run's folder
_MODEL = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_RECORDS = (
    "metrics.jsonl",
    "samples.jsonl",
    "skipped.jsonl",
    "recipe.yaml",
    "trainer_state.json",
    "training_args.bin",
    "report.html",
    *_RUN,  # last, so that a removal that was killed is taken up again
)


def forget(output_dir: Path, model: str) -> None:
    """Remove what an earlier run wrote: its checkpoints, model and records, nothing else.

    Raises:
        ValueError: the run's model is the one that is to be trained.
    """
    checkpoints = [p for p in output_dir.glob("*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    models, names = checkpoints, _RECORDS
    if any((output_dir / name).is_file() for name in _RUN):  # else the model in it is not ours
        models, names = [*checkpoints, output_dir], (*_MODEL, *_RECORDS)
    if Path(model).resolve() in [path.resolve() for path in models]:
        raise ValueError(
            f"--overwrite would remove {model}, which is to be trained: take another output_dir"
        )
    for path in checkpoints:
        shutil.rmtree(path)
    for path in (path for name in names for path in output_dir.glob(name)):
        path.unlink()


def _write_facts(output_dir: Path, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=1, ensure_ascii=False, default=str)
    (output_dir / "run.json").write_text(text, encoding="utf-8")


def _write_skipped(output_dir: Path, groups: GroupDataset | GroupStream) -> None:
    rows = [
        {name: getattr(bad, name) for name in ("source", "row", "field", "reason")}
        for bad in groups.skipped
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output_dir / "skipped.jsonl").write_text(text, encoding="utf-8")


def _close(output_dir: Path, facts: dict[str, Any], groups: Any, report: bool) -> None:
    """What a run leaves behind however it ended."""
    _write_facts(output_dir, facts)
    _write_skipped(output_dir, groups)  # a stream knows them only now
    if report:
        write_report(output_dir)


def refuse_mixture(recipe: Recipe, before: dict[str, Any], output_dir: Path) -> None:
    """A run goes on only as the run that it was.

    Raises:
        ValueError: a key that changes what the steps compute has another value now.
    """
    for key in {**before, **recipe.given}:
        old, new = before.get(key), recipe.given.get(key)
        if key not in MAY_CHANGE and old != new:
            raise ValueError(
                f"{output_dir} holds a run with {key} = {old!r}, now it is {new!r}: take another "
                "output_dir, or start over with --overwrite"
            )


def train(words: Sequence[str]) -> int:
    """Train from the words after `fastpo train`; the exit status."""
    if "--keys" in words:
        after = words[list(words).index("--keys") + 1 :]
        print(show_keys(after[0] if after else ""))
        return 0
    path, flags, bare = _split_words(words)
    recipe = load_recipe(path, flags)
    config = recipe.config()
    output_dir = Path(str(config.output_dir))
    main = config.process_index == 0
    show_log(logging.INFO if main else logging.ERROR)

    with config.main_process_first(local=False):
        if "--overwrite" in bare and main:
            forget(output_dir, recipe.model.model)
        before = Run.read(output_dir) if output_dir.is_dir() else Run(output_dir)
    resume = latest_complete(output_dir)
    finished = before.facts.get("status") == "finished"
    if resume is not None or finished:
        refuse_mixture(recipe, before.recipe, output_dir)
        same_length = all(
            before.recipe.get(key) == recipe.given.get(key)
            for key in ("max_steps", "num_train_epochs")
        )
        if finished and same_length:
            more = "more max_steps or num_train_epochs continue it, " if resume else ""
            print(
                f"{output_dir} is finished: {before.steps} steps, report in "
                f"{output_dir / 'report.html'}\n{more}--overwrite starts over, another output_dir "
                "keeps both"
            )
            return 0
        if resume is None:
            raise ValueError(
                f"{output_dir} is finished and has no checkpoint to go on from: take another "
                "output_dir, or start over with --overwrite"
            )

    if main and (needs := host_needs(recipe)) is not None:
        print(f"{'needs':<11}{needs}", flush=True)
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
    groups, held_out = prepare_data(recipe, config, tokenizer)
    lora = recipe.model.lora
    # A fresh adapter is drawn here, before the Trainer sets its seed.
    set_seed(config.seed)
    model = open_model(
        recipe.model.model,
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        random_init=recipe.model.random_init,
        attn_implementation=recipe.model.attn_implementation,
        lora={} if lora is True else (lora or None),
        trainable=True,
        **source,
        **gguf,
    )
    open_reference = partial(
        open_model,
        dtype=recipe.model.dtype,
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
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
        "command": shlex.join(["fastpo", "train", *words]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": model_facts(recipe.model.model, model),
        "data": data,
        "objective": objective_facts(recipe),
        "reference": reference,
        "sharing": {"on": trainer.collator.share_prompt, "reason": trainer.sharing_reason},
        "schedule": schedule_words(trainer, tokens * config.per_device_train_batch_size),
        "environment": environment(),
        "arguments": config.to_dict(),
    }
    if main:
        output_dir.mkdir(parents=True, exist_ok=True)
        recipe.save(output_dir)
        _write_facts(output_dir, facts)
        _write_skipped(output_dir, groups)
        print(introduction(facts, resume, str(output_dir)), flush=True)

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
            _close(output_dir, facts, groups, recipe.report.report)
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
    _close(output_dir, facts, groups, recipe.report.report)
    if stop.asked:
        found = latest_complete(output_dir)
        again = shlex.join(["fastpo", "train", *[w for w in words if w != "--overwrite"]])
        where = f"goes on from {Path(found).name}" if found else "starts over: nothing was saved"
        print(
            f"\ninterrupted at step {trainer.state.global_step}; this command {where}:\n  {again}"
        )
        return INTERRUPTED
    print("\n" + conclusion(Run.read(output_dir)))
    if recipe.report.report:
        write_model_card(output_dir)
        print(f"report     {output_dir / 'report.html'}")
    print(f"model      {output_dir}")
    return 0
