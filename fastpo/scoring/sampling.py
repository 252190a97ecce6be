"""Draw responses of a model to prompts, and check the prompts before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from fastpo.data.bad_rows import BadField
from fastpo.model.hidden import generation
from fastpo.model.limits import Positions, Vocabulary


class Draw(TypedDict, total=False):
    """Hold the arguments of `generate` that say how a token is drawn."""

    do_sample: bool
    temperature: float
    top_p: float
    top_k: int


def drawing(temperature: float, top_p: float = 1.0) -> Draw:
    """Return arguments of `generate`; temperature 0 is greedy.

    Raises:
        ValueError: a value out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature} must be at least 0 and top_p={top_p} in (0, 1]"
        )
    if temperature == 0:
        return {"do_sample": False}
    # top_k 0: the whole distribution, whatever the checkpoint's generation config says.
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, object]) -> list[int]:
    """Return the token ids of a row's prompt: a text as it stands, messages by the chat template.

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
            "a list of messages, but the tokenizer has no chat template; give a chat_template, or "
            "prompts as text",
        )
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[arg-type, return-value]


def check_prompts(
    vocabulary: Vocabulary,
    positions: Positions,
    prompts: Sequence[Sequence[int]],
    source: str,
    new_tokens: int,
) -> None:
    """Check prompts before a model responds; warn once of responses that may reach too far.

    Raises:
        ValueError: a token beyond the model's embedding, or a response that may reach beyond its
            table of positions, where the model would fail half-way.
    """
    for i, prompt in enumerate(prompts):
        vocabulary.check(prompt, f"{source}, prompt {i}")
    size, longest = max(((len(prompt), i) for i, prompt in enumerate(prompts)), default=(0, 0))
    if not positions.warned:
        positions.check(
            f"{source}, prompt {longest}: {size} tokens and {new_tokens} new ones",
            size + new_tokens,
            "shorten the prompt, or ask for fewer new tokens",
        )


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    *,
    max_new_tokens: int,
    count: int = 1,
) -> list[str]:
    """Return `count` responses to each prompt of one batch in turn.

    Args:
        model: inside `fastpo.model.hidden.generation`.
        tokenizer: of the model.
        prompts: token ids, padded on the left here.
        draw: of `drawing`.
        max_new_tokens: the longest response.
        count: responses a prompt.
    """
    longest = max(map(len, prompts))
    pad = Vocabulary.of(tokenizer, model).padding
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts]).to(model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]).to(ids)
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **draw,
        max_new_tokens=max_new_tokens,
        num_return_sequences=count,
        pad_token_id=pad,
    )
    return tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)


def sample_responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    *,
    count: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    source: str,
    limits: tuple[Vocabulary, Positions] | None = None,
) -> Iterator[list[str]]:
    """Yield `count` responses to each prompt; what cannot be answered is refused at the call.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        prompts: token ids, all of them.
        draw: of `drawing`.
        count, max_new_tokens: responses a prompt, and the longest of them.
        batch_size: prompts at a time.
        seed: set once, before the first batch.
        source: name of the prompts for messages.
        limits: of the model, from an earlier call, so that it is warned of once.

    Raises:
        ValueError: as `check_prompts`.
    """
    limits = limits or (Vocabulary.of(tokenizer, model), Positions.of(model))
    check_prompts(*limits, prompts, source, max_new_tokens)
    set_seed(seed)

    def batches() -> Iterator[list[str]]:
        how = {"max_new_tokens": max_new_tokens, "count": count}
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            # Left before the texts are handed out: the caller is not in inference mode.
            with generation(model), torch.inference_mode():
                texts = generate_texts(model, tokenizer, batch, draw, **how)
            for first in range(0, len(texts), count):
                yield texts[first : first + count]

    return batches()
