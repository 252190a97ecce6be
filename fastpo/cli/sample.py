"""`fastpo sample`: answers to prompts, the raw material of preferences."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from fastpo.cli.models import open_model, open_tokenizer, show_log
from fastpo.cli.output import check_outputs, json_lines
from fastpo.data.bad_rows import BadField
from fastpo.data.rows import load_rows
from fastpo.data.source_rows import good_rows
from fastpo.model.device import default_device
from fastpo.model.hidden import generation
from fastpo.model.limits import Positions, Vocabulary


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """Token ids of a row's prompt: text as it stands, messages through the chat template.

    Raises:
        BadField: no prompt, or messages and a tokenizer without a chat template.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return tokenizer(prompt)["input_ids"]  # type: ignore[return-value]
    if not isinstance(prompt, list) or not prompt:
        raise BadField("prompt", "neither text nor a list of messages", prompt)
    if not tokenizer.chat_template:
        raise BadField(
            "prompt",
            "a list of messages, but the tokenizer has no chat template; give --chat-template, or "
            "prompts as text",
        )
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[arg-type, return-value]


def sampling(temperature: float, top_p: float = 1.0) -> dict[str, Any]:
    """Arguments of `generate`; temperature 0 is greedy.

    Raises:
        ValueError: a value out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"--temperature {temperature} must be at least 0 and --top-p {top_p} in (0, 1]"
        )
    if temperature == 0:
        return {"do_sample": False}
    # top_k 0: the whole distribution, whatever the checkpoint's generation config says.
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **how: Any) -> list[str]:
    """What the model says to a batch of prompts, `num_return_sequences` texts each in turn."""
    longest = max(map(len, prompts))
    pad = Vocabulary.of(tokenizer, model).padding
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts]).to(model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]).to(ids)
    tokens = model.generate(input_ids=ids, attention_mask=mask, **how, pad_token_id=pad)
    return tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)


def check_prompts(
    vocabulary: Vocabulary,
    positions: Positions,
    prompts: Sequence[Sequence[int]],
    source: str,
    new_tokens: int,
) -> None:
    """Check what a model is about to answer; one warning of answers that may reach too far.

    Raises:
        ValueError: a token beyond the model's embedding, or an answer that may reach beyond its
            table of positions, where the model would fail among the answers.
    """
    for i, prompt in enumerate(prompts):
        vocabulary.check(prompt, f"{source}, prompt {i}")
    size, longest = max(((len(prompt), i) for i, prompt in enumerate(prompts)), default=(0, 0))
    if not positions.told:
        positions.check(
            f"{source}, prompt {longest}: {size} tokens and {new_tokens} new ones",
            size + new_tokens,
            "shorten the prompt, or ask for fewer new tokens",
        )


def sample(arguments: argparse.Namespace) -> int:
    """Answer every prompt of a file."""
    show_log(logging.WARNING)
    for name in ("num_samples", "max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(arguments, name)} must be at least 1")
    how = sampling(arguments.temperature, arguments.top_p)
    if arguments.temperature == 0 and arguments.num_samples > 1:
        raise ValueError("--temperature 0 gives one answer a prompt: drop --num-samples")
    check_outputs(
        arguments.out,
        inputs=[arguments.prompts, arguments.chat_template],
        overwrite=arguments.overwrite,
    )
    source = {
        "revision": arguments.revision,
        "trust_remote_code": arguments.trust_remote_code,
        "gguf_file": arguments.gguf_file,
    }
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
    limits = Vocabulary.of(tokenizer, model), Positions.of(model)
    check_prompts(*limits, prompts, arguments.prompts, arguments.max_new_tokens)
    set_seed(arguments.seed)
    bar = tqdm(total=len(rows), desc="sampling", unit="prompt", disable=None)
    lines = json_lines(arguments.out, over=arguments.overwrite)
    with lines as write, bar, generation(model), torch.inference_mode():
        for start in range(0, len(rows), arguments.batch_size):
            part = range(start, min(start + arguments.batch_size, len(rows)))
            found = answers(
                model,
                tokenizer,
                [prompts[i] for i in part],
                **how,
                max_new_tokens=arguments.max_new_tokens,
                num_return_sequences=arguments.num_samples,
            )
            for j, i in enumerate(part):
                mine = found[j * arguments.num_samples : (j + 1) * arguments.num_samples]
                write({**rows[i], "samples": mine})
            bar.update(len(part))
    if arguments.out is not None:
        sys.stderr.write(f"{len(rows)} prompts, {arguments.num_samples} answers each\n")
    return 0
