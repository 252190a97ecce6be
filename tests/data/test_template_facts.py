"""What is learnt of a chat template."""

from __future__ import annotations

import pytest

from fastpo.data.template_facts import TemplateFacts
from tests.data.conftest import CHATML
from tests.data.test_formats import CHAT, one
from tests.data.test_rendering import AS_DICT, with_template


def test_facts(tokenizers):
    facts = TemplateFacts(with_template(tokenizers, AS_DICT), {})
    assert facts.describe() == {
        "content": "text",
        "system": "written",
        "tools": "none",
        "tool calls": 'as {"function": ...}, arguments as dicts',
        "reasoning": "none",
        "header": r"'<|im_start|>assistant'",
        "thought": "none",
        "end of turn": "'<|im_end|>'",
        "past turns": "alike whatever follows",
        "generation": "none",
    }
    assert not TemplateFacts(tokenizers("rewriting"), {}).stable
    assert TemplateFacts(tokenizers("generation"), {}).generation
    assert TemplateFacts(tokenizers("thinking"), {}).thought == "<think>"


# A template that fails, and one that writes something else.
@pytest.mark.parametrize(
    ("source", "reason"),
    [("{% for", "the chat template refuses it: "), ("hello", "it leaves out the question or")],
)
def test_facts_of_a_template_that_reads_no_conversation(tokenizers, source, reason):
    facts = TemplateFacts(with_template(tokenizers, source), {})
    assert facts.describe()["template"].startswith(f"no conversation can be read with it: {reason}")


def test_several_templates_of_which_none_is_meant(tokenizers):
    tokenizer = tokenizers()
    tokenizer.chat_template = {"one": CHATML, "two": AS_DICT}
    with pytest.raises(ValueError, match=r"chat templates one, two.*\{chat_template: one\}"):
        one(CHAT, tokenizer)
    assert one(CHAT, tokenizer, chat_template_kwargs={"chat_template": "one"})
