"""How responses are drawn, and what is refused before the first of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpo.data.bad_rows import BadField
from fastpo.model.limits import Positions, Vocabulary
from fastpo.model.load import load_model, load_tokenizer
from fastpo.scoring.sampling import check_prompts, drawing, prompt_ids, sample_responses
from tests.train import tiny as models


# Greedy drops every number of the draw; a temperature brings the whole distribution, top_k off.
@pytest.mark.parametrize(
    ("values", "draw"),
    [
        ((0.0,), {"do_sample": False}),
        ((0.7,), {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}),
        ((1.0, 0.9), {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}),
    ],
)
def test_how_a_token_is_drawn(values: tuple[float, ...], draw: dict[str, Any]) -> None:
    assert drawing(*values) == draw


# Each bound, just beyond it.
@pytest.mark.parametrize("values", [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_a_draw_out_of_range(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and top_p="):
        drawing(*values)


# Absent, empty as text, empty as a list, and of another type.
@pytest.mark.parametrize("prompt", [None, "", [], 3])
def test_a_row_without_a_prompt(tokenizers: Any, prompt: Any) -> None:
    with pytest.raises(BadField, match="neither text nor a list of messages"):
        prompt_ids(tokenizers(None), {"prompt": prompt})


def test_messages_need_a_template(tokenizers: Any) -> None:
    messages = [{"role": "user", "content": "Sky?"}]
    with pytest.raises(BadField, match="give a chat_template"):
        prompt_ids(tokenizers(None), {"prompt": messages})
    tokenizer = tokenizers("chatml")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = prompt_ids(tokenizer, {"prompt": messages})
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_batch_of_prompts_gets_the_responses_of_each_alone(tiny: Path) -> None:
    """Greedy, from prompts of two lengths: padding on the left changes nothing."""
    tokenizer: Any = load_tokenizer(str(tiny / "model"))
    model: Any = load_model(str(tiny / "model"), dtype="float32", device="cpu").train()
    prompts = [tokenizer(text)["input_ids"] for text in ("What is 1 plus 2? ", "Hi")]
    how: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 2, "seed": 0, "source": "p"}
    both = list(sample_responses(model, tokenizer, prompts, drawing(0.0), count=1, **how))
    for prompt, responses in zip(prompts, both, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            alone = model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=3, pad_token_id=0,
            )  # fmt: skip
        text = tokenizer.decode(alone[0, len(prompt) :], skip_special_tokens=True)
        assert responses == [text]
    assert not torch.is_inference_mode_enabled()
    model.train()
    twice = list(sample_responses(model, tokenizer, prompts, drawing(1.0), count=3, **how))
    assert [len(responses) for responses in twice] == [3, 3]
    again = list(sample_responses(model, tokenizer, prompts, drawing(1.0), count=3, **how))
    assert (twice, model.training) == (again, True)


def test_responses_that_may_leave_the_positions(caplog: pytest.LogCaptureFixture) -> None:
    """One warning of rotations; a table would fail half-way."""
    tokens = Vocabulary(64, "the model", models.tokenizer())
    prompts = [[5] * 3, [5] * 15]
    with caplog.at_level(logging.WARNING):
        rotary = Positions(20, "llama")
        check_prompts(tokens, rotary, prompts, "p.jsonl", 5)
        assert not caplog.records
        for _ in range(2):
            check_prompts(tokens, rotary, prompts, "p.jsonl", 6)
    (record,) = caplog.records
    assert record.getMessage().startswith("p.jsonl, prompt 1: 15 tokens and 6 new ones, llama was")
    table = Positions(20, "gpt2", table=True)
    check_prompts(tokens, table, prompts, "p.jsonl", 5)
    with pytest.raises(ValueError, match=r"prompt 1: 15 tokens and 6 new ones.* fewer new tokens"):
        check_prompts(tokens, table, prompts, "p.jsonl", 6)
