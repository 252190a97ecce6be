"""`fastpo score`: log-probabilities, implicit rewards and pairwise accuracy on preferences."""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from fastpo.batch import Batch
from fastpo.cli.models import (
    check_adapter,
    open_model,
    open_tokenizer,
    show_log,
    table,
)
from fastpo.cli.output import check_outputs, json_lines
from fastpo.cli.reading import data_options
from fastpo.data.dataset import build_groups
from fastpo.data.groups import Group, Response
from fastpo.data.rows import load_rows
from fastpo.loss.scores import score_responses
from fastpo.model.device import default_device
from fastpo.model.diagnostics import ches, entanglement
from fastpo.redact import redact
from fastpo.report.tokens import SHOWN, token_rows, write_page
from fastpo.scoring.follow_ups import followed_up, next_turns, read_follow_ups
from fastpo.scoring.scorer import Packer, Scorer

_SCORES = ("logps", "mean_logps", "reward", "follow_up")


def _rows_of(batch: list[Group], scores: dict[str, Tensor], beta: float) -> list[dict[str, Any]]:
    """One output row a group."""
    shown = {"logps": "logps", "mean_logps": "mean_logps", "ref_logps": "ref_logps"}
    lists = {name: scores[key].tolist() for name, key in shown.items() if key in scores}
    length = scores["length"].tolist()
    if "ratio" in scores:
        lists["reward"] = (beta * scores["ratio"]).tolist()
    rows = []
    for g, group in enumerate(batch):
        responses = []
        for k, response in enumerate(group.responses):
            row: dict[str, Any] = {"tokens": int(length[g][k])}
            row |= {name: round(values[g][k], 6) for name, values in lists.items()}
            for name in ("label", "rank", "score"):
                if getattr(response, name) is not None:
                    row[name] = getattr(response, name)
            responses.append(row)
        rows.append({"source": redact(group.source), "row": group.row, "responses": responses})
    return rows


def _follow_up_rewards(
    groups: Sequence[Group],
    turns: tuple[list[Response], list[Response]],
    eos: int | None,
    pack: Callable[[list[Group]], Batch],
    policy: Scorer,
) -> list[float]:
    """Of every response in order; see `fastpo.scoring.follow_ups`."""
    positive, negative = turns
    every = [each for group in groups for each in followed_up(group, [*positive, *negative], eos)]
    batch = pack(every)
    scores = score_responses({"logps": policy(batch)}, batch.tokens.segments)
    likelihood = scores["mean_logps"]  # [responses, follow-ups]
    praise, complaint = likelihood.split([len(positive), len(negative)], dim=1)
    return (praise.mean(1) - complaint.mean(1)).tolist()


def _worse(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether b, which stands after a, is worse by the data's own judgement."""
    if "rank" in a and "rank" in b:
        return a["rank"] < b["rank"]
    return bool(a.get("label")) and not b.get("label", True)


class Summary:
    """Means by kind of response, and how many pairs are ranked right."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.right: dict[str, list[float]] = defaultdict(list)
        self.of_pairs: dict[str, list[float]] = defaultdict(list)

    def add(self, row: dict[str, Any]) -> None:
        """Count one output row."""
        responses = row["responses"]
        for name, value in row.get("pair", {}).items():
            self.of_pairs[name].append(float(value))
        for i, response in enumerate(responses):
            good = response.get("label", i == 0)
            for name in (*_SCORES, "tokens"):
                if name in response:
                    self.values[name, "chosen" if good else "rejected"].append(response[name])
        for a, b in itertools.combinations(responses, 2):
            if _worse(a, b):
                for name in _SCORES:
                    if name in a:
                        self.right[name].append(float(a[name] > b[name]))

    def __str__(self) -> str:
        def mean(values: list[float]) -> str:
            return f"{math.fsum(values) / len(values):.4f}" if values else "-"

        rows = [("", "chosen", "rejected", "pairs right")]
        rows += [
            (name, *(mean(self.values[name, kind]) for kind in ("chosen", "rejected")), mean(right))
            for name in (*_SCORES, "tokens")
            if self.values[name, "chosen"] or self.values[name, "rejected"]
            for right in [self.right[name]]
        ]
        of_pairs = [(name, mean(values)) for name, values in self.of_pairs.items()]
        return "\n\n".join(table(each) for each in (rows, of_pairs) if each)


def _require_pairs(groups: Sequence[Group]) -> None:
    for group in groups:
        if len(group.responses) < 2:
            raise ValueError(
                "--ches and --entanglement compare a chosen with a rejected response, but "
                f"{group.source}, row {group.row} has one response: drop the flag"
            )


def score(arguments: argparse.Namespace) -> int:
    """Score every response of a data set."""
    show_log(logging.WARNING)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} must be at least 1")
    if arguments.token_rewards is not None and arguments.ref_model is None:
        raise ValueError("--token-rewards compares with a reference: name one with --ref-model")
    token_file = Path(arguments.token_rewards) if arguments.token_rewards else None
    check_outputs(
        arguments.out,
        *([token_file, token_file.with_suffix(".html")] if token_file else []),
        inputs=[arguments.dataset, arguments.chat_template, arguments.follow_up],
        overwrite=arguments.overwrite,
    )
    source = {
        "revision": arguments.revision,
        "trust_remote_code": arguments.trust_remote_code,
        "gguf_file": arguments.gguf_file,
    }
    rows = load_rows(
        arguments.dataset, split=arguments.split, name=arguments.dataset_name, origin=True
    )
    if arguments.max_rows is not None:
        rows = rows.take(arguments.max_rows)
    tokenizer = open_tokenizer(
        arguments.model, arguments.tokenizer, arguments.chat_template, **source
    )
    form = {"max_length": arguments.max_length, "reference_prompt": arguments.reference_prompt}
    options = data_options(arguments, **form)
    data = build_groups(rows, tokenizer, options, source=arguments.dataset)
    if arguments.ches or arguments.entanglement:
        _require_pairs(data.groups)
    turns: tuple[list[Response], list[Response]] | None = None
    if arguments.follow_up is not None:
        positive, negative = read_follow_ups(arguments.follow_up)
        turns = next_turns(tokenizer, positive), next_turns(tokenizer, negative)

    place = {"dtype": arguments.dtype, "device": default_device()}
    model: Any = open_model(arguments.model, **place, **source)
    eos: Any = tokenizer.eos_token_id
    policy = Scorer(model)
    reference: Scorer | None = None
    if arguments.ref_model == "base":
        check_adapter(model, "--ref-model", arguments.model)
        reference = policy
    elif arguments.ref_model is not None:
        code = {"trust_remote_code": arguments.trust_remote_code}
        reference = Scorer(open_model(arguments.ref_model, **place, **code))
    scorers = [policy] if reference in (None, policy) else [policy, reference]
    packed = Packer(scorers, data.groups, tokenizer)
    for turn in itertools.chain(*(turns or ())):
        packed.vocabulary.check(turn.input_ids, "--follow-up")

    summary, on_page = Summary(), []
    over = arguments.overwrite
    tokens = json_lines(token_file, over=over) if token_file else nullcontext()
    bar = tqdm(total=len(data), desc="scoring", unit="group", disable=None)
    with json_lines(arguments.out, over=over) as write, tokens as write_tokens, bar:
        for start in range(0, len(data), arguments.batch_size):
            groups = data.groups[start : start + arguments.batch_size]
            batch = packed(groups)
            hidden = policy.hidden(batch)
            logps, ref_logps = policy.logps(hidden, batch), None
            if reference is not None:
                off = model.disable_adapter() if reference is policy else nullcontext()
                with off:
                    ref_logps = reference(packed([group.for_reference for group in groups]))
            segments = batch.tokens.segments
            scores = score_responses(
                {"logps": logps}, segments, ref_logps=ref_logps, per_token=token_file is not None
            )
            rows_out = _rows_of(groups, scores, arguments.beta)
            of_pairs = ches(hidden, segments) if arguments.ches else {}
            if arguments.entanglement:
                of_pairs |= entanglement(hidden, policy.head, batch.tokens.targets, segments)
            for name, values in of_pairs.items():
                for row, value in zip(rows_out, values.tolist(), strict=True):
                    row.setdefault("pair", {})[name] = value
            if turns is not None:
                rewards = _follow_up_rewards(groups, turns, eos, packed, policy)
                every = [response for row in rows_out for response in row["responses"]]
                for response, reward in zip(every, rewards, strict=True):
                    response["follow_up"] = reward
            for row in rows_out:
                summary.add(row)
                write(row)
            if write_tokens is not None:
                for row in token_rows(groups, scores, arguments.beta, tokenizer):
                    write_tokens(row)
                    if start < SHOWN:
                        on_page.append(row)
            bar.update(len(groups))
    if token_file is not None:
        write_page(token_file.with_suffix(".html"), on_page, len(data))
        sys.stderr.write(f"{token_file.with_suffix('.html')} shows the rewards of tokens\n")
    skipped = f", {len(data.skipped)} rows skipped" if data.skipped else ""
    sys.stderr.write(f"{len(data)} groups of {arguments.dataset}{skipped}\n{summary}\n")
    return 0
