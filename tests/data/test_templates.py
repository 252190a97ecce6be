"""Token ids and scored tokens, written out token by token where it matters."""

from __future__ import annotations

import logging

import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.dataset import build_groups
from tests.data.test_formats import CHAT, PAIR, one, user

EOS_KINDS = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}


def shown(tokenizer, response):
    """The response's text with what is not scored in braces."""
    result, scored = "", True
    for token, mask in zip(response.input_ids, response.loss_mask, strict=True):
        if mask != scored:
            result += "{" if scored else "}"
        result, scored = result + tokenizer.decode([token]), mask
    return result if scored else result + "}"


# Plain text: BOS and EOS


# What tokenizers add to texts, times texts that end themselves once or twice.
@pytest.mark.parametrize("adds", EOS_KINDS)
@pytest.mark.parametrize("ending", ["", "</s>", "</s></s>"])
def test_text_has_one_bos_and_one_eos(tokenizers, adds, ending):
    tokenizer = tokenizers(adds=EOS_KINDS[adds])
    row = {"prompt": "The sky is", "chosen": f" blue.{ending}", "rejected": " green."}
    group = one(row, tokenizer)
    bos = [tokenizer.bos_token_id] if "<s>" in EOS_KINDS[adds] else []
    plain = tokenizer("The sky is", add_special_tokens=False)["input_ids"]
    assert group.prompt_ids.tolist() == bos + plain
    for response in group.responses:
        assert (response.input_ids == tokenizer.eos_token_id).sum() == 1
        assert response.input_ids[-1] == tokenizer.eos_token_id
        assert response.loss_mask.all()


def test_bos_in_the_text_is_not_doubled(tokenizers):
    tokenizer = tokenizers(adds="<s> $A")
    group = one({**PAIR, "prompt": "<s>The sky is"}, tokenizer)
    assert tokenizer.decode(group.prompt_ids) == "<s>The sky is"
    implicit = one({"chosen": "<s>The sky is blue", "rejected": "<s>The sky is green"}, tokenizer)
    assert tokenizer.decode(implicit.prompt_ids) == "<s>The sky is"


def test_pad_equal_to_eos_keeps_eos(tokenizers):
    tokenizer = tokenizers(pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert [shown(tokenizer, r) for r in one(PAIR, tokenizer).responses] == [
        " blue.</s>",
        " green.</s>",
    ]


def test_empty_prompt_with_bos(tokenizers):
    group = one({**PAIR, "prompt": ""}, tokenizers(adds="<s> $A"))
    assert group.prompt_ids.tolist() == [0]


def test_without_eos(tokenizers):
    tokenizer = tokenizers()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        one(PAIR, tokenizer)


# Plain text: the border


def test_every_sequence_is_the_tokenisation_of_its_text(tokenizers, caplog):
    tokenizer = tokenizers()
    row = {"prompt": "The sky is ", "chosen": "blue.", "rejected": "green."}
    with caplog.at_level(logging.WARNING):
        (group,) = build_groups([row], tokenizer)
    # " blue" is one token, so the prompt's blank belongs to the responses.
    assert tokenizer.decode(group.prompt_ids) == "The sky is"
    for response, text in zip(group.responses, ("blue.", "green."), strict=True):
        whole = tokenizer("The sky is " + text, add_special_tokens=False)["input_ids"]
        assert [*group.prompt_ids, *response.input_ids[:-1]] == whole
    assert "in 1 rows a token spans the border" in caplog.text


# The common part ends at a token's border, within a word, a letter, and a letter's bytes.
@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is blue.", None),
        ("The sky is blue x", "The sky is blueish", "The sky is blue"),
        ("I like it", "I liked it", "I"),  # " like" and " liked" are one token each
        ("sky \u00e9", "sky \u00e8", "sky "),  # the two share their first byte token
        ("sky \u20ac", "sky \u20ad", "sky "),  # the two share two of three
    ],
)
def test_implicit_text_prompt(tokenizers, chosen, rejected, prompt):
    tokenizer = tokenizers()
    if prompt is None:
        with pytest.raises(BadRow, match="'chosen': empty response"):
            one({"chosen": chosen, "rejected": rejected}, tokenizer)
        return
    group = one({"chosen": chosen, "rejected": rejected}, tokenizer)
    assert tokenizer.decode(group.prompt_ids) == prompt
    for response, text in zip(group.responses, (chosen, rejected), strict=True):
        assert tokenizer.decode([*group.prompt_ids, *response.input_ids]) == text + "</s>"


# Conversations: end of turn, BOS

HEAD = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
SINGLE = {
    "chatml": (HEAD, "blue<|im_end|>"),
    "chatml_bare": (HEAD, "blue<|im_end|>"),
    "bos": ("<s>" + HEAD, "blue<|im_end|>"),
    "llama2": ("<s>[INST] hi [/INST]", " blue </s>"),
    "phi": (HEAD, "blue<|im_end|>"),
    "generation": (HEAD, "blue<|im_end|>"),
    "generation_text": (HEAD, "blue<|im_end|>"),
    "thinking": (HEAD, "blue<|im_end|>"),
    "rewriting": (HEAD, "blue<|im_end|>"),
    "plain": ("user: hi\nassistant:", " blue</s>"),
}


# What tokenizers add, times templates that write their own BOS and ends.
@pytest.mark.parametrize("adds", EOS_KINDS)
@pytest.mark.parametrize("template", SINGLE)
def test_single_turn(tokenizers, template, adds):
    """One BOS at most, one end of turn, nothing after it, whatever the tokenizer adds to texts."""
    tokenizer = tokenizers(template, adds=EOS_KINDS[adds])
    group = one(CHAT, tokenizer)
    prompt, response = SINGLE[template]
    assert tokenizer.decode(group.prompt_ids) == prompt
    assert shown(tokenizer, group.responses[0]) == response


def test_no_template(tokenizers):
    with pytest.raises(ValueError, match=r"no chat template: set tokenizer\.chat_template"):
        one(CHAT, tokenizers())


def test_template_that_refuses(tokenizers):
    row = {**CHAT, "prompt": [{"role": "system", "content": "s"}, user("a"), user("b")]}
    with pytest.raises(BadRow, match=r"'prompt': the chat template refuses it: roles must"):
        one(row, tokenizers("llama2"))
