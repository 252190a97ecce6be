"""`fastpo train`: a recipe becomes a run, and a run that stopped goes on."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from fastpo.cli.parser import INTERRUPTED, parse_train
from fastpo.cli.plan import recipe_needs
from fastpo.cli.terminal import show_log, table
from fastpo.recipe.facts import Facts
from fastpo.recipe.keys import show_keys
from fastpo.recipe.launch import Launch, claimed
from fastpo.recipe.recipe import load_recipe
from fastpo.redact import redact
from fastpo.report.diagnosis import warnings_text
from fastpo.report.text import metrics, short
from fastpo.run.checkpoint import latest_complete
from fastpo.run.record import Run
from fastpo.train.optimizers import require_optimizer


def introduction(facts: Facts, resume: str | None, output_dir: str) -> str:
    """Return the lines that `train` begins with."""
    model, objective, name = facts["model"], facts["objective"], facts["objective"]["name"]
    if isinstance(name, dict):
        name = " + ".join(f"{weight:g} {each}" for each, weight in name.items())
    hyper = yaml.safe_dump(objective["hyper"], default_flow_style=True, width=1000).strip()[1:-1]
    lines = {
        "model": f"{model['name']}, {model['class']}, {short(model['parameters'])} parameters, "
        f"{short(model['trainable'])} trained, {model['dtype']}",
        "data": f"{facts['data']['name']}, {_amount(facts)}",
        "objective": f"{name}; {hyper}",
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


def _amount(facts: Facts) -> str:
    """Say how much data there is."""
    data = facts["data"]
    if "groups" not in data:
        return "a stream"
    tokens, unshared = data.get("tokens", 0), data.get("unshared_tokens", 1)
    held_out = f" + {data['eval_groups']} held out" if "eval_groups" in data else ""
    words = f"{data['groups']:,} groups{held_out}, {tokens:,} tokens"
    if facts["sharing"]["on"]:
        words += f", {1 - tokens / unshared:.0%} saved by one prompt copy"
    if "synthetic_context" in data:
        words += (
            f"; at most {data.get('context', 0):,} real tokens a context, spread over "
            f"{data['synthetic_context']:,} positions"
        )
    return words


def conclusion(run: Run) -> str:
    """Return the table that `train` ends with, and what speaks against the run."""
    rows = metrics(run)
    shown = f"{table([('', 'first fifth', 'last fifth', 'last eval'), *rows])}\n" if rows else ""
    return shown + warnings_text(run)


def say(text: str) -> None:
    """Print at once, without secrets."""
    print(redact(text), flush=True)


def command_line(words: Sequence[str]) -> str:
    """Return the command without secrets, which would have another form in quotes."""
    return shlex.join(redact(["fastpo", "train", *words]))


def _already_finished(launch: Launch) -> str:
    output_dir = launch.folder.path
    longer = "more max_steps or num_train_epochs continue it, " if launch.start.continues else ""
    return (
        f"{output_dir} is finished: {launch.before.steps} steps, report in "
        f"{output_dir / 'report.html'}\n{longer}--overwrite starts over, another output_dir "
        "keeps both"
    )


def _interrupted(launch: Launch, words: Sequence[str]) -> str:
    newest = latest_complete(launch.folder.path)
    where = f"goes on from {Path(newest).name}" if newest else "starts over: nothing was saved"
    again = command_line([word for word in words if word != "--overwrite"])
    step = launch.trainer.state.global_step
    return f"\ninterrupted at step {step}; this command {where}:\n  {again}"


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
    main = config.process_index == 0
    show_log(logging.INFO if main else logging.ERROR)
    with claimed(recipe, config, path=path, command=command_line(words), fresh=fresh) as launch:
        if launch.start.finished:
            say(_already_finished(launch))
            return 0
        if main and (needs := recipe_needs(recipe)) is not None:
            say(f"{'needs':<11}{needs}")
        launch.open()
        launch.begin()
        output_dir = launch.folder.path
        if main:
            say(introduction(launch.facts, launch.start.checkpoint, str(output_dir)))
        interrupted = launch.train()
        if main and interrupted:
            say(_interrupted(launch, words))
        elif main:
            say("\n" + conclusion(Run.read(output_dir)))
            launch.write_card()
            if recipe.report.report:
                say(f"report     {output_dir / 'report.html'}")
            say(f"model      {output_dir}")
    return INTERRUPTED if interrupted else 0
