"""`fastpo weigh`: weights or rewards of single tokens, from two scorers, as a column of rows."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from fastpo.cli.output import check_outputs, json_lines
from fastpo.cli.reading import data_options
from fastpo.cli.terminal import show_log
from fastpo.data.rows import load_rows
from fastpo.model.device import default_device
from fastpo.model.opening import check_adapter, open_model, open_tokenizer
from fastpo.reference.live import AdapterReference, LiveReference, ModelReference
from fastpo.scoring.rules import get_rule
from fastpo.scoring.weigh import weigh as weighed


def _arguments_of(text: str) -> Mapping[str, float]:
    try:
        args = json.loads(text)
    except json.JSONDecodeError:
        args = None
    if not isinstance(args, dict):
        raise ValueError(f'--rule_args {text!r} is no JSON such as {{"mu": 0.5}}')
    return args


def weigh(arguments: argparse.Namespace) -> int:
    """Score every token of a data set twice and write the rows with what the rule makes of it."""
    show_log(logging.WARNING)
    check_outputs(
        arguments.out,
        inputs=[arguments.dataset, arguments.chat_template],
        overwrite=arguments.overwrite,
        goes_on=True,
    )
    rule = get_rule(arguments.rule, _arguments_of(arguments.rule_args))
    negative = arguments.negative or arguments.positive
    prompts = (arguments.positive_prompt, arguments.negative_prompt)
    if negative == arguments.positive and prompts[0] == prompts[1]:
        raise ValueError(
            "both scorers are the same model after the same prompt: give --negative, or "
            "--positive_prompt and --negative_prompt"
        )
    rows: Any = load_rows(
        arguments.dataset, split=arguments.split, name=arguments.dataset_name, origin=True
    )
    if arguments.max_rows is not None:
        rows = rows.take(arguments.max_rows)
    source = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = open_tokenizer(
        arguments.positive, arguments.tokenizer, arguments.chat_template, **source
    )

    def opened(name: str) -> LiveReference:
        model: Any = open_model(name, dtype=arguments.dtype, device=default_device(), **source)
        return ModelReference.frozen(model)

    def base(positive: LiveReference) -> LiveReference:
        check_adapter(positive.model, "--negative", arguments.positive)
        return AdapterReference(positive.model, positive.head)

    # A model that plays both parts is read once; of two, each leaves when its part is done.
    if negative in ("base", arguments.positive):
        first = cache(lambda: opened(arguments.positive))
        second = (lambda: base(first())) if negative == "base" else first
    else:
        first, second = (lambda: opened(arguments.positive)), (lambda: opened(negative))
    weighted = weighed(
        rows,
        tokenizer,
        rule,
        first,
        second,
        f"{arguments.out}.scores",
        prompts=prompts,
        options=data_options(arguments),
        batch_size=arguments.batch_size,
        source=arguments.dataset,
    )
    with json_lines(arguments.out, over=True) as write:
        for row in weighted:
            write(row)
    sys.stderr.write(f"{len(rows)} rows with `{rule.column}` in {arguments.out}\n")
    return 0
