"""Token ids and scored tokens, written out token by token where it matters."""

from __future__ import annotations

import logging

import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.dataset import build_groups
from tests.data.conftest import TEMPLATES
from tests.data.test_formats import CHAT, PAIR, assistant, one, user

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


# Conversations: which tokens are scored

MULTI = {
    "prompt": [user("hi")],
    "chosen": [assistant("blue"), user("and?"), assistant("sea")],
    "rejected": [assistant("green")],
}
NEXT = "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
SPANS = {
    "chatml": f"blue<|im_end|>{{\n{NEXT}}}sea<|im_end|>",
    "chatml_bare": f"blue<|im_end|>{{\n{NEXT}}}sea<|im_end|>",
    "bos": f"blue<|im_end|>{{\n{NEXT}}}sea<|im_end|>",
    "phi": f"blue<|im_end|>{{\n{NEXT}}}sea<|im_end|>",
    "generation": f"blue<|im_end|>{{\n{NEXT}}}sea<|im_end|>",
    "generation_text": f"blue<|im_end|>{{\n{NEXT}}}sea<|im_end|>",
    "thinking": f"blue<|im_end|>{{\n{NEXT}}}sea<|im_end|>",
    "llama2": " blue </s>{<s>[INST] and? [/INST]} sea </s>",
}


@pytest.mark.parametrize("template", SPANS)
def test_multi_turn_scores_the_assistant(tokenizers, template):
    tokenizer = tokenizers(template)
    chosen, rejected = one(MULTI, tokenizer).responses
    assert shown(tokenizer, chosen) == SPANS[template]
    assert rejected.loss_mask.all()
    everything = one(MULTI, tokenizer, assistant_only=False).responses[0]
    assert everything.loss_mask.all()
    assert everything.input_ids.tolist() == chosen.input_ids.tolist()


def test_one_message_is_scored_from_the_generation_prompt_on(tokenizers):
    """What the template puts before the text is the model's to write, block or no block."""
    tokenizer = tokenizers()
    tokenizer.chat_template = TEMPLATES["generation"].replace(
        "{% generation %}", "(so)\n{% generation %}"
    )
    response = one(CHAT, tokenizer).responses[0]
    assert shown(tokenizer, response) == "(so)\nblue<|im_end|>"
    chosen = one(MULTI, tokenizer).responses[0]
    assert shown(tokenizer, chosen) == f"{{(so)\n}}blue<|im_end|>{{\n{NEXT}(so)\n}}sea<|im_end|>"


def test_user_opens_the_response(tokenizers):
    """An assistant's turn ends the prompt: no header follows, the user's turn is context."""
    row = {
        "chosen": [user("hi"), assistant("blue"), user("more"), assistant("x")],
        "rejected": [user("hi"), assistant("blue"), user("less"), assistant("x")],
    }
    for template in ("chatml", "phi", "generation"):
        tokenizer = tokenizers(template)
        group = one(row, tokenizer)
        assert tokenizer.decode(group.prompt_ids) == HEAD + "blue<|im_end|>\n"
        assert shown(tokenizer, group.responses[1]) == (
            "{<|im_start|>user\nless<|im_end|>\n<|im_start|>assistant\n}x<|im_end|>"
        )


def test_tool_call_ends_with_its_own_token(tokenizers):
    """A turn may end in another special token than answers do (Llama 3.1's <|eom_id|>)."""
    tokenizer = tokenizers()
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "<|im_end|>\n{% endfor %}",
        "{% if m['tool_calls'] %}call {{ m['tool_calls'][0]['name'] }}<|eom|>"
        "{% else %}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}",
    )
    call = {"role": "assistant", "tool_calls": [{"name": "fly"}]}
    row = {**CHAT, "chosen": [call, {"role": "tool", "content": "7"}, assistant("seven")]}
    chosen = one(row, tokenizer).responses[0]
    assert shown(tokenizer, chosen) == (
        "call fly<|eom|>{\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n}seven<|im_end|>"
    )
    alone = one({**CHAT, "chosen": [call]}, tokenizer).responses[0]
    assert shown(tokenizer, alone) == "call fly<|eom|>"


def test_content_in_parts(tokenizers):
    tokenizer = tokenizers()
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "m['content']", "m['content'] if m['content'] is string else m['content'][0]['text']"
    )
    row = {**CHAT, "chosen": [assistant([{"type": "text", "text": "blue"}])]}
    assert shown(tokenizer, one(row, tokenizer).responses[0]) == "blue<|im_end|>"


# Conversations: templates that do not extend


def test_template_that_opens_a_thought(tokenizers, caplog):
    """The header's <think> is left out of a finished answer, so the response begins before it."""
    tokenizer = tokenizers("thinking")
    with caplog.at_level(logging.WARNING):
        (group,) = build_groups([CHAT], tokenizer)
    assert tokenizer.decode(group.prompt_ids) == HEAD
    assert "in 1 rows" in caplog.text


def test_an_answer_that_begins_as_that_thought_does(tokenizers):
    """The `<` of `<b>` is the answer's, not the one of the header's <think>."""
    tokenizer = tokenizers("thinking")
    row = {**CHAT, "chosen": [assistant("<b>blue"), user("and?"), assistant("<b>sea")]}
    for single in (row["chosen"][:1], row["chosen"]):
        group = one({**row, "chosen": single, "rejected": [assistant("<i>")]}, tokenizer)
        assert tokenizer.decode(group.prompt_ids) == HEAD
        scored = group.responses[0].input_ids[group.responses[0].loss_mask]
        assert tokenizer.decode(scored).startswith("<b>blue<|im_end|>")
    assert tokenizer.decode(scored).endswith("<b>sea<|im_end|>")


def test_an_earlier_answer_is_written_without_its_empty_thought(tokenizers):
    tokenizer = tokenizers("last_thought")
    chosen, rejected = one(MULTI, tokenizer).responses
    assert shown(tokenizer, chosen) == (
        f"blue<|im_end|>{{\n{NEXT}}}<think>\n\n</think>\n\nsea<|im_end|>"
    )
    assert shown(tokenizer, rejected) == "<think>\n\n</think>\n\ngreen<|im_end|>"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            "thinking",
            {**CHAT, "chosen": [assistant("<think>why</think>blue")]},
            r"'chosen': the chat template leaves out content of message 0 .*: its reasoning before",
        ),
        ("counting", CHAT, "'prompt': the chat template writes the prompt differently once"),
        ("rewriting", MULTI, "'chosen': cannot tell which tokens are message 0's"),
        (
            "rewriting",
            {
                **MULTI,
                "prompt": [user("a"), assistant("b")],
                "rejected": [user("c"), assistant("d")],
                "chosen": [user("e"), assistant("f")],
            },
            "'prompt': the chat template writes the prompt differently once",
        ),
    ],
)
def test_templates_that_rewrite(tokenizers, template, row, message):
    with pytest.raises(BadRow, match=message):
        one(row, tokenizers(template))
