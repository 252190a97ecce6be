"""A recipe becomes a run: its folder is claimed, what it names is opened, it trains and is closed.

`fastpo train` takes these steps one by one and says what there is to say in between; here nothing
is printed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastpo.data.dataset import GroupDataset
from fastpo.data.stream import GroupStream
from fastpo.recipe.facts import Facts, data_facts, run_facts
from fastpo.recipe.opening import recipe_groups, recipe_model, recipe_references, recipe_tokenizer
from fastpo.recipe.recipe import Recipe
from fastpo.recipe.resume import Start, judge_start, read_by, refuse_own_data
from fastpo.redact import redact
from fastpo.report.card import write_model_card
from fastpo.report.page import write_report
from fastpo.run.folder import RECIPE, RunFolder, claim
from fastpo.run.record import Run, Skipped, number
from fastpo.train.config import PreferenceConfig
from fastpo.train.optimizers import refuse_lost_steps
from fastpo.train.stop import StopCleanly
from fastpo.train.trainer import PreferenceTrainer

log = logging.getLogger(__name__)


@dataclass
class Launch:
    """Run in a folder that is claimed: `open`, `begin`, `train`, in this order.

    Attributes:
        recipe: what to train.
        config: the recipe's, for the trainer.
        folder: where to.
        before: the run that lies there, or an empty one.
        start: what it goes on from.
        command: the command line, without secrets.
        fresh: whether the run that lies there is removed, once all that this one reads is open.
        facts: what is known of the run; set by `open`.
        trainer: set by `open`.
        groups: the training data; set by `open`.
        stop: ends training when a signal asks for it.
    """

    recipe: Recipe
    config: PreferenceConfig
    folder: RunFolder
    before: Run
    start: Start
    command: str
    fresh: bool
    facts: Facts = field(init=False)
    trainer: PreferenceTrainer = field(init=False)
    groups: GroupDataset | GroupStream = field(init=False)
    stop: StopCleanly = field(default_factory=StopCleanly)

    @property
    def is_main(self) -> bool:
        """Return whether this process writes and speaks for the run."""
        return self.config.process_index == 0

    def open(self) -> None:
        """Open model, tokenizer, references and data, and check them; nothing is written yet.

        Raises:
            ValueError: what cannot be trained on or with; names the file, row or key.
        """
        recipe, config = self.recipe, self.config
        tokenizer = recipe_tokenizer(recipe)
        model = None
        if recipe.model.dtype == "bfloat16":  # judged before the data, which can take hours
            model = recipe_model(recipe, tokenizer, config.seed)
            refuse_lost_steps(model, config)
        self.groups, held_out = recipe_groups(recipe, config, tokenizer)
        if model is None:
            model = recipe_model(recipe, tokenizer, config.seed)
        ref_model, ref_model2 = recipe_references(recipe, tokenizer)
        self.trainer = PreferenceTrainer(
            model,  # type: ignore[arg-type]
            config,
            train_dataset=self.groups,
            eval_dataset=held_out,
            processing_class=tokenizer,
            ref_model=ref_model,  # type: ignore[arg-type]
            ref_model2=ref_model2,  # type: ignore[arg-type]
            callbacks=[self.stop],
        )
        self.trainer.refuse_no_step()
        self.trainer.check()  # before anything is said about how prompts are packed
        data = data_facts(recipe.data.dataset, self.groups, held_out)
        self.facts = run_facts(recipe, self.trainer, model, data, self.command)

    def begin(self) -> None:
        """Write down what the run is; a run that it takes the place of is removed here."""
        if not self.is_main:
            return
        folder = self.folder
        if self.fresh:
            folder.start_over()
        folder.facts = {k: v for k, v in folder.facts.items() if k == "batch"}
        folder.save(**self.facts)
        if not folder.leaves(folder.path / RECIPE):
            self.recipe.save(folder.path)
        self._write_skipped()

    def train(self) -> bool:
        """Train, and write what a run leaves behind however it ends.

        Returns:
            Whether it was interrupted, and may go on.
        """
        begin = time.monotonic()
        spent = number(self.before.facts.get("seconds")) if self.start.checkpoint else 0.0
        trainer, facts = self.trainer, self.facts
        try:
            with self.stop:
                trainer.train(resume_from_checkpoint=self.start.checkpoint)
        except KeyboardInterrupt:
            self.stop.asked = True
        except BaseException as error:
            facts |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            self._close()
            raise
        facts["seconds"] = (spent if math.isfinite(spent) else 0.0) + time.monotonic() - begin
        if self.stop.asked:
            facts["status"] = "interrupted"
        else:
            facts["status"] = "finished"
            evaluated = {line["step"] for line in trainer.state.log_history if "eval_loss" in line}
            if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
                trainer.evaluate()
            trainer.save_model()
            trainer.save_state()
        self._close()
        return self.stop.asked

    def _close(self) -> None:
        if not self.is_main:
            return
        self.folder.save(**self.facts)
        self._write_skipped()  # a stream knows them only now
        if self.recipe.report.report:
            try:
                write_report(self.folder.path)
            except ValueError as error:  # edited while the run went on
                log.warning("no report: %s", error)

    def _write_skipped(self) -> None:
        rows = [
            redact({name: getattr(bad, name) for name in Skipped._fields})
            for bad in self.groups.skipped
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.folder.write("skipped.jsonl", text)

    def write_card(self) -> None:
        """Write the model card, if the run is to have pages."""
        if self.recipe.report.report:
            write_model_card(self.folder.path)


@contextmanager
def claimed(
    recipe: Recipe, config: PreferenceConfig, *, path: str | None, command: str, fresh: bool
) -> Iterator[Launch]:
    """Claim the folder of a recipe; a run that fails inside says so in its run.json.

    Args:
        recipe: what to train.
        config: the recipe's, for the trainer.
        path: the recipe's file, which is left alone wherever it lies.
        command: the command line, without secrets.
        fresh: whether a run that lies there is to be removed.

    Raises:
        ValueError: a folder that is another's or in use, a run that this recipe would not continue,
            a checkpoint that cannot be resumed from, or data that the next run would remove.
    """
    output_dir = Path(str(config.output_dir))
    main = config.process_index == 0
    folder = RunFolder.at(output_dir)
    with config.main_process_first(local=False):
        if main:
            refuse_own_data(output_dir, recipe.data.dataset, recipe.data.eval_dataset)
            folder = claim(
                output_dir,
                recipe=path,
                alone=config.push_to_hub,
                status="starting",
                command=command,
            )
            if fresh:
                folder.refuse_removal(read_by(recipe))
        before = Run(output_dir) if fresh or not output_dir.is_dir() else Run.read(output_dir)
    try:
        start = judge_start(recipe, config, before, fresh=fresh)
        yield Launch(recipe, config, folder, before, start, command, fresh)
    except BaseException as error:
        status = folder.facts.get("status")
        never_began = status == "failed" and "started" not in folder.facts
        if main and (status in ("starting", "running") or never_began):
            ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):
                folder.save(status=ended, error=f"{type(error).__name__}: {error}")
        raise
