"""`fastpo sample`: responses to prompts, the raw material of preferences."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial

from tqdm.auto import tqdm

from fastpo.cli.output import check_outputs, json_lines
from fastpo.cli.reading import source_of
from fastpo.cli.terminal import show_log
from fastpo.data.rows import load_rows
from fastpo.data.source_rows import good_rows
from fastpo.model.device import default_device
from fastpo.model.opening import open_model, open_tokenizer
from fastpo.scoring.sampling import drawing, prompt_ids, sample_responses


def sample(arguments: argparse.Namespace) -> int:
    """Respond to every prompt of a file."""
    show_log(logging.WARNING)
    draw = drawing(arguments.temperature, arguments.top_p)
    if arguments.temperature == 0 and arguments.num_samples > 1:
        raise ValueError("--temperature 0 gives one answer a prompt: drop --num_samples")
    check_outputs(
        arguments.out,
        inputs=[arguments.prompts, arguments.chat_template],
        overwrite=arguments.overwrite,
    )
    source = source_of(arguments)
    tokenizer = open_tokenizer(
        arguments.model, arguments.tokenizer, arguments.chat_template, **source
    )
    good = good_rows(
        load_rows(arguments.prompts, origin=True),
        partial(prompt_ids, tokenizer),
        source=arguments.prompts,
        on_bad_row="skip" if arguments.skip_bad_rows else "error",
    )
    rows, prompts = zip(*good, strict=True)
    model = open_model(arguments.model, dtype=arguments.dtype, device=default_device(), **source)
    responses = sample_responses(
        model,
        tokenizer,
        prompts,
        draw,
        count=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        source=arguments.prompts,
    )
    bar = tqdm(total=len(rows), desc="sampling", unit="prompt", disable=None)
    with json_lines(arguments.out, over=arguments.overwrite) as write, bar:
        for row, samples in zip(rows, responses, strict=True):
            write({**row, "samples": samples})
            bar.update()
    if arguments.out is not None:
        sys.stderr.write(f"{len(rows)} prompts, {arguments.num_samples} answers each\n")
    return 0
