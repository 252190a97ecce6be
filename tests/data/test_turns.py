"""Which tokens of a conversation are scored, and templates that do not extend."""

from __future__ import annotations

import logging

import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.dataset import build_groups
from tests.data.conftest import TEMPLATES
from tests.data.test_formats import CHAT, assistant, one, user
from tests.data.test_templates import HEAD, shown

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


# Templates that differ in how a turn begins and ends.
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


# Templates that drop, renumber or replace what an earlier turn said.
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
