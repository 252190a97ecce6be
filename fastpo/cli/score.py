"""`fastpo score`: log-probabilities, implicit rewards and pairwise accuracy on preferences."""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from tqdm.auto import tqdm

from fastpo.cli.output import check_outputs, json_lines
from fastpo.cli.reading import Source, data_options, source_of
from fastpo.cli.terminal import show_log, table
from fastpo.data.dataset import build_groups
from fastpo.data.rows import load_rows
from fastpo.model.device import default_device
from fastpo.model.opening import check_adapter, open_model, open_tokenizer
from fastpo.report.tokens import SHOWN, token_rows, write_page
from fastpo.scoring.follow_ups import read_follow_ups
from fastpo.scoring.preferences import ScoringOptions, score_preferences
from fastpo.scoring.scorer import AdapterOff, Scorer
from fastpo.scoring.summary import Summary


def _scorers(arguments: argparse.Namespace, source: Source) -> tuple[Scorer, Scorer | None]:
    """Open the policy and the reference that `--ref_model` names."""
    place = {"dtype": arguments.dtype, "device": default_device()}
    policy = Scorer(open_model(arguments.model, **place, **source))
    if arguments.ref_model is None:
        return policy, None
    if arguments.ref_model == "base":
        check_adapter(policy.model, "--ref_model", arguments.model)
        return policy, AdapterOff(policy)
    code = {"trust_remote_code": arguments.trust_remote_code}
    return policy, Scorer(open_model(arguments.ref_model, **place, **code))


def score(arguments: argparse.Namespace) -> int:
    """Score every response of a data set."""
    show_log(logging.WARNING)
    if arguments.token_rewards is not None and arguments.ref_model is None:
        raise ValueError("--token_rewards compares with a reference: name one with --ref_model")
    token_file = Path(arguments.token_rewards) if arguments.token_rewards else None
    check_outputs(
        arguments.out,
        *([token_file, token_file.with_suffix(".html")] if token_file else []),
        inputs=[arguments.dataset, arguments.chat_template, arguments.follow_up],
        overwrite=arguments.overwrite,
    )
    source = source_of(arguments)
    rows = load_rows(
        arguments.dataset, split=arguments.split, name=arguments.dataset_name, origin=True
    )
    if arguments.max_rows is not None:
        rows = rows.take(arguments.max_rows)
    tokenizer = open_tokenizer(
        arguments.model, arguments.tokenizer, arguments.chat_template, **source
    )
    data = build_groups(rows, tokenizer, data_options(arguments), source=arguments.dataset)
    follow_ups = None if arguments.follow_up is None else read_follow_ups(arguments.follow_up)
    scored = score_preferences(
        data.groups,
        tokenizer,
        lambda: _scorers(arguments, source),
        ScoringOptions(
            arguments.beta,
            arguments.batch_size,
            arguments.ches,
            arguments.entanglement,
            per_token=token_file is not None,
            follow_ups=follow_ups,
        ),
    )

    summary, on_page, over, done = Summary(), [], arguments.overwrite, 0
    tokens = json_lines(token_file, over=over) if token_file else nullcontext()
    bar = tqdm(total=len(data), desc="scoring", unit="group", disable=None)
    with json_lines(arguments.out, over=over) as write, tokens as write_tokens, bar:
        for batch in scored:
            for row in batch.rows:
                summary.add(row)
                write(row.columns())
            if write_tokens is not None:
                for row in token_rows(batch.groups, batch.scores, arguments.beta, tokenizer):
                    write_tokens(row)
                    if done < SHOWN:
                        on_page.append(row)
            done += len(batch.groups)
            bar.update(len(batch.groups))
    if token_file is not None:
        write_page(token_file.with_suffix(".html"), on_page, len(data))
        sys.stderr.write(f"{token_file.with_suffix('.html')} shows the rewards of tokens\n")
    skipped = f", {len(data.skipped)} rows skipped" if data.skipped else ""
    sys.stderr.write(f"{len(data)} groups of {arguments.dataset}{skipped}\n")
    sys.stderr.write("\n\n".join(map(table, summary.tables())) + "\n")
    return 0
