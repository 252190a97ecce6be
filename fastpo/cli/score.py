"""`fastpo score`: log-probabilities, implicit rewards and pairwise accuracy on preferences."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections import defaultdict
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastpo.cli.models import json_lines, open_model, open_tokenizer, show_log, table
from fastpo.data.build import DataOptions, build_groups
from fastpo.data.groups import Group
from fastpo.data.packing import collate
from fastpo.data.rows import load_rows
from fastpo.head import Head, linear_logps
from fastpo.model.check import self_check
from fastpo.model.device import default_device
from fastpo.model.facts import read_head
from fastpo.model.hidden import label_hidden
from fastpo.scores import score_responses


class Scorer:
    """A model that is ready to score batches, checked on a few groups of the data."""

    def __init__(self, model: nn.Module, groups: list[Group], pad_token_id: int) -> None:
        self.model = model.eval()
        self.head: Head = read_head(model)
        self.shares = self_check(model, self.head, groups[:8], pad_token_id).share_prompt

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """[N] log-probabilities of the batch's label tokens."""
        head = self.head
        hidden = label_hidden(self.model, batch).to(head.weight.dtype)
        return linear_logps(hidden, head.weight, batch["targets"], bias=head.bias, **head.facts())


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
        rows.append({"source": group.source, "row": group.row, "responses": responses})
    return rows


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

    def add(self, row: dict[str, Any]) -> None:
        """Count one output row."""
        responses = row["responses"]
        for i, response in enumerate(responses):
            good = response.get("label", i == 0)
            for name in ("logps", "mean_logps", "reward", "tokens"):
                if name in response:
                    self.values[name, "chosen" if good else "rejected"].append(response[name])
        for a, b in combinations(responses, 2):
            if _worse(a, b):
                for name in ("logps", "mean_logps", "reward"):
                    if name in a:
                        self.right[name].append(float(a[name] > b[name]))

    def __str__(self) -> str:
        def mean(values: list[float]) -> str:
            return f"{math.fsum(values) / len(values):.4f}" if values else "-"

        rows = [("", "chosen", "rejected", "pairs right")]
        rows += [
            (name, *(mean(self.values[name, kind]) for kind in ("chosen", "rejected")), mean(right))
            for name in ("logps", "mean_logps", "reward", "tokens")
            if self.values[name, "chosen"] or self.values[name, "rejected"]
            for right in [self.right[name]]
        ]
        return table(rows)


def score(arguments: argparse.Namespace) -> int:
    """Score every response of a data set."""
    show_log(logging.WARNING)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} must be at least 1")
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
    options = DataOptions(
        max_length=arguments.max_length,
        on_bad_row="skip" if arguments.skip_bad_rows else "error",
    )
    data = build_groups(rows, tokenizer, options, source=arguments.dataset)

    where = default_device()
    model = open_model(arguments.model, dtype=arguments.dtype, device=where, **source)
    pad: Any = tokenizer.pad_token_id
    policy = Scorer(model, data.groups, pad)
    reference: Scorer | None = None
    if arguments.ref_model == "base":
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"--ref-model base: {arguments.model} has no adapter to switch off; name a model"
            )
        reference = policy
    elif arguments.ref_model is not None:
        reference = Scorer(
            open_model(
                arguments.ref_model,
                dtype=arguments.dtype,
                device=where,
                trust_remote_code=arguments.trust_remote_code,
            ),
            data.groups,
            pad,
        )
    shares = policy.shares and (reference is None or reference.shares)
    summary = Summary()
    bar = tqdm(total=len(data), desc="scoring", unit="group", disable=None)
    with json_lines(arguments.out) as write, bar:
        for start in range(0, len(data), arguments.batch_size):
            groups = data.groups[start : start + arguments.batch_size]
            batch = collate(groups, share_prompt=shares, pad_token_id=pad)
            batch = {k: v.to(where) if hasattr(v, "to") else v for k, v in batch.items()}
            logps = policy(batch)
            ref_logps = None
            if reference is not None:
                off = model.disable_adapter() if reference is policy else nullcontext()  # type: ignore[operator]
                with off:
                    ref_logps = reference(batch)
            scores = score_responses({"logps": logps}, batch["segments"], ref_logps=ref_logps)
            for row in _rows_of(groups, scores, arguments.beta):
                summary.add(row)
                write(row)
            bar.update(len(groups))
    skipped = f", {len(data.skipped)} rows skipped" if data.skipped else ""
    sys.stderr.write(f"{len(data)} groups of {arguments.dataset}{skipped}\n{summary}\n")
    return 0
