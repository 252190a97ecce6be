"""What the numbers of a run say against it: what is likely, and what to try."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterator
from typing import Literal, NamedTuple

from fastpo.report.text import short
from fastpo.run.record import Curve, Run, ends, finite, number

ENOUGH = 10
"""Logged steps below which nothing is said about learning: batches differ more than they teach."""

_MATTERS = 0.005  # of a loss: below it two evaluations differ by less than anybody would act on
_SURE = 3.0  # standard errors; noise passes it once in 370 looks


class RunWarning(NamedTuple):
    """Say something that the reader should know before trusting the numbers."""

    level: Literal["stop", "warn", "note"]
    title: str
    text: str


def trend(curve: Curve) -> float:
    """Return last third minus first third of a curve in standard errors.

    It is 0 below `ENOUGH` points.

    Batches differ, so two noisy means always differ too: past 3 the change is hardly chance.
    """
    values = [v for _, v in finite(curve)]
    if len(values) < ENOUGH:
        return 0.0
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    change = statistics.fmean(last) - statistics.fmean(first)
    return change / error if error else math.copysign(math.inf, change) if change else 0.0


def _broken(run: Run) -> Iterator[RunWarning]:
    losses = run.curve("loss")
    broken = [s for s, v in losses if not math.isfinite(v)]
    if broken:
        yield RunWarning(
            "stop",
            f"The loss is not finite from step {broken[0]:.0f}",
            f"{len(broken)} logged steps have a NaN or infinite loss. What was trained after "
            "that is not usable; lower learning_rate, or train in bfloat16 instead of float16.",
        )
    elif len(losses) > 1 and not any(v for _, v in losses):
        yield RunWarning(
            "stop",
            "The loss is 0 at every step",
            "Nothing was learned. Likely: weights that are all 0 (the columns weight, "
            "token_weights or spans), a beta so large that every pair counts as won, or a hinge "
            "that is already met. Try the default beta, dpo in place of a hinge, or the rows "
            "without weights.",
        )
    elif len(losses) >= ENOUGH and len({v for _, v in losses}) == 1:
        yield RunWarning(
            "stop",
            f"The loss is {losses[0][1]:.4f} at every step",
            "Batches differ, so a model that moves has another loss at every step. Likely: "
            "learning_rate is 0, nothing is trainable, or weights in a dtype that small steps do "
            "not change. Try a larger learning_rate, and dtype: float32.",
        )


def _too_little(run: Run) -> Iterator[RunWarning]:
    count = len(finite(run.curve("loss")))
    if run.log and count < ENOUGH:
        yield RunWarning(
            "note",
            f"Too little to judge: {count} logged step{'s' * (count != 1)}",
            f"Below {ENOUGH} nothing is said about learning, chance or overfitting. Train longer; "
            "logging_steps: 1 logs every step.",
        )


def _falling(run: Run) -> Iterator[RunWarning]:
    """Answer "both rewards go down, is it broken?"."""

    def falls(side: str) -> bool:
        return min(trend(run.curve(f"{kind}/{side}")) for kind in ("rewards", "logps")) < -_SURE

    def went(key: str) -> str:
        return "{} went from {} to {}".format(key, *map(short, ends(run.curve(key))))

    if not falls("chosen"):
        return
    kind = "rewards" if finite(run.curve("rewards/chosen")) else "logps"
    moved = f"{went(f'{kind}/chosen')}, {went(f'{kind}/rejected')}"
    grows = trend(run.curve("rewards/margins"))
    if grows > _SURE:
        evaluated = [v for _, v in finite(run.curve("eval_rewards/accuracies"))]
        if len(evaluated) > 1:
            moved += f"; held-out accuracy from {evaluated[0]:.2f} to {evaluated[-1]:.2f}"
        names = run.objective.split(" + ")
        alone = f"objective: {{{names[0]}: 1, sft: 0.1}}"
        sft = f"an SFT term ({alone})" if len(names) == 1 else "a larger share of sft"
        before, after = ends(run.curve("logps/chosen"))
        # A tenth of the log-probability: the answer is no longer the one that was shown.
        far = math.isfinite(before) and before - after > 0.1 * abs(before)
        title = "Margins grow while the chosen responses become less likely"
        yield RunWarning(
            "warn" if far else "note",
            title if far else "Both rewards fall a little while their margin grows",
            f"{moved}. The loss sees their difference alone, and what pushes a rejected response "
            "down also lowers a chosen one that shares its words (likelihood displacement, arXiv "
            "2410.08847). Harmless while held-out accuracy rises and the samples read well; "
            "harmful once probability goes to answers that nobody rated, so read the samples. "
            f"What holds the chosen responses up: {sft}, a larger beta, a smaller learning_rate, "
            "fewer epochs, or leaving out pairs of nearly the same text (`fastpo score --ches` "
            "finds them).",
        )
    elif falls("rejected"):
        yield RunWarning(
            "warn",
            "Both rewards fall and their margin does not grow",
            f"{moved}: the model leaves its reference without telling the two apart. Likely: "
            "learning_rate is too high, or chosen and rejected are nearly alike or mixed up. Try a "
            "tenth of learning_rate, a larger beta, and look at some pairs.",
        )


def _accuracy(run: Run) -> Iterator[RunWarning]:
    accuracy = finite(run.curve("rewards/accuracies"))
    if len(accuracy) < ENOUGH:
        return
    values = [v for _, v in accuracy]
    easy = next((i for i in range(len(values)) if min(values[i:]) >= 0.99), None)
    if easy is not None and easy <= len(values) // 2:
        yield RunWarning(
            "warn",
            f"Every pair is ranked right from step {accuracy[easy][0]:.0f} on",
            "The rest of the run only widens margins. The pairs may be too easy, or tell "
            "chosen from rejected by something plain such as length or a fixed phrase.",
        )
    half = values[len(values) // 2 :]
    mean, error = statistics.fmean(half), statistics.stdev(half) / math.sqrt(len(half))
    if abs(mean - 0.5) <= 0.05 and error <= 0.05 and abs(trend(accuracy)) < _SURE:
        yield RunWarning(
            "warn",
            f"Accuracy ends at chance ({mean:.2f})",
            "The model has not learned which response is preferred: train longer, raise "
            "learning_rate, or check that chosen and rejected are the right way round.",
        )


def _evaluations(run: Run) -> Iterator[RunWarning]:
    evaluated = finite(run.curve("eval_loss"))
    if len(evaluated) < 3 or len(finite(run.curve("loss"))) < ENOUGH:
        return
    values = [v for _, v in evaluated]
    best = min(values)
    best_step, rise = evaluated[values.index(best)][0], values[-1] - best
    steady = all(a < b for a, b in itertools.pairwise(values))
    if steady and rise > _MATTERS * abs(best):
        yield RunWarning(
            "warn",
            "eval_loss rises at every evaluation",
            f"It went from {values[0]:.4f} to {values[-1]:.4f}: what is learned does not carry "
            "over to the held-out pairs. Likely: learning_rate is too high, beta too small, or the "
            "training rows are few or unlike the held-out ones. Try a tenth of learning_rate, one "
            "epoch, more rows; of this run the earliest checkpoint is the best.",
        )
    elif rise > 0.02 * abs(best) and trend(run.curve("loss")) < 0:
        yield RunWarning(
            "warn",
            f"Evaluation was best at step {best_step:.0f}",
            f"eval_loss rose from {best:.4f} to {values[-1]:.4f} while the training loss went "
            "down: the run overfits. Prefer the checkpoint nearest to that step, or train less.",
        )


def _gradients(run: Run) -> Iterator[RunWarning]:
    norms = [v for _, v in finite(run.curve("grad_norm"))]
    if len(norms) >= ENOUGH and max(norms) > 10 * statistics.median(norms) > 0:
        yield RunWarning(
            "note",
            "Gradient spikes",
            f"The largest gradient norm, {max(norms):.3g}, is more than ten times the median, "
            f"{statistics.median(norms):.3g}. A longer warm-up or max_grad_norm tames single rows.",
        )


def _facts(run: Run) -> Iterator[RunWarning]:
    if run.skipped:
        rows = number(run.section("data").get("rows"))
        share = f" ({len(run.skipped) / rows:.1%} of {rows:.0f})" if rows > 0 else ""
        yield RunWarning(
            "warn" if rows > 0 and len(run.skipped) > 0.01 * rows else "note",
            f"Skipped rows: {len(run.skipped)}{share}",
            f"The first: {run.skipped[0].reason or 'no reason given'}. All are listed in "
            "skipped.jsonl.",
        )
    sharing = run.section("sharing")
    if sharing.get("on") is False and sharing.get("reason"):
        yield RunWarning("note", "Prompts were not shared", f"{sharing['reason']}.")
    status = run.facts.get("status")
    if status and status != "finished":
        error = f"{run.facts['error']}. " if "error" in run.facts else ""
        yield RunWarning(
            "stop" if status == "failed" else "note",
            f"This run is {status}",
            f"{error}The numbers end at step {run.steps}.",
        )
    if run.torn:
        yield RunWarning(
            "note", "Torn lines", f"Lines cut off in the run's JSONL files: {run.torn}."
        )


_RULES = (_broken, _too_little, _falling, _accuracy, _evaluations, _gradients, _facts)


def find_warnings(run: Run) -> list[RunWarning]:
    """Return what the numbers of a run say against it, worst first."""
    order = ("stop", "warn", "note")
    warnings = (warning for rule in _RULES for warning in rule(run))
    return sorted(warnings, key=lambda warning: order.index(warning.level))


def warnings_text(run: Run) -> str:
    """Return the warnings as plain text for a terminal; nothing where there are none."""
    return "".join(
        f"\n{each.level:<5}{each.title}\n{textwrap.indent(textwrap.fill(each.text, 95), '     ')}\n"
        for each in find_warnings(run)
    )
