"""Rows of messages, and texts rendered beforehand, through templates of every kind."""

from __future__ import annotations

import json

import pytest

from fastpo.data.bad_rows import BadField, BadRow
from fastpo.data.dataset import build_groups
from fastpo.data.formats import read_row
from fastpo.data.options import DataOptions
from fastpo.data.template_facts import TemplateFacts
from fastpo.data.templates import Encoder
from tests.data.conftest import CHATML, TEMPLATES
from tests.data.test_formats import CHAT, PAIR, assistant, one, user
from tests.data.test_templates import HEAD, shown

SYSTEM = {"role": "system", "content": "be kind"}
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}"
    "<call {{ f.name }}(ARGUMENTS)>{% endfor %}",
)
AS_DICT = CALLS.replace(
    "ARGUMENTS", "{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
)
AS_JSON = CALLS.replace("ARGUMENTS", "{{ f.arguments | tojson }}")
AS_TEXT = CALLS.replace("ARGUMENTS", "{{ '' + f.arguments }}")
AS_EITHER = CALLS.replace(
    "ARGUMENTS", "{{ f.arguments if f.arguments is string else f.arguments | tojson }}"
)
FLAT = AS_JSON.replace("c.function", "c")


def with_template(tokenizers, source):
    tokenizer = tokenizers()
    tokenizer.chat_template = TEMPLATES.get(source, source)
    return tokenizer


def scored(tokenizers, source, chosen, **row):
    tokenizer = with_template(tokenizers, source)
    return shown(tokenizer, one({**CHAT, "chosen": chosen, **row}, tokenizer).responses[0])


def refused(tokenizers, source, message, **row):
    with pytest.raises(BadRow, match=message):
        one({**CHAT, **row}, with_template(tokenizers, source))


# The forms that a template takes


# Templates that take text, parts, or strip what they take, times both forms in the row.
@pytest.mark.parametrize("content", ["a b", [{"type": "text", "text": "a"}, {"text": " b"}]])
@pytest.mark.parametrize(
    "source", ["chatml", PARTS, CHATML.replace("m['content']", "m.content|trim")]
)
def test_text_and_parts_are_the_same_content(tokenizers, source, content):
    assert scored(tokenizers, source, [assistant(content)], prompt=[user(content)]) == (
        "a b<|im_end|>"
    )


ARGUMENTS = {"city": 'Os"lo', "days": 3}


# Both forms of arguments and of calls in the row, times every form that a template takes.
@pytest.mark.parametrize("given", ["dict", "text"])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("source", "written"),
    [
        (AS_DICT, 'city=Os"lo;days=3;'),
        (AS_JSON, json.dumps(ARGUMENTS)),
        (AS_TEXT, json.dumps(ARGUMENTS)),
        (AS_EITHER, json.dumps(ARGUMENTS)),
        (FLAT, json.dumps(ARGUMENTS)),
    ],
)
def test_arguments_in_the_form_that_the_template_takes(tokenizers, source, written, wrapped, given):
    function = {"name": "rain", "arguments": ARGUMENTS}
    if given == "text":
        function["arguments"] = json.dumps(ARGUMENTS)
    call = {"type": "function", "function": function} if wrapped else function
    answer = [assistant("", tool_calls=[call])]
    assert scored(tokenizers, source, answer) == f"<call rain({written})><|im_end|>"


def test_arguments_that_no_mapping_can_be_made_of(tokenizers):
    call = {"function": {"name": "rain", "arguments": "city: Oslo"}}
    message = r"'chosen': tool_calls\[0\]\.function\.arguments is no JSON"
    refused(tokenizers, AS_DICT, message, chosen=[assistant("", tool_calls=[call])])


def test_reasoning_under_the_key_that_the_template_reads(tokenizers):
    source = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}",
    )
    answer = [assistant("blue", reasoning_content="why")]
    assert scored(tokenizers, source, answer) == "<think>why</think>blue<|im_end|>"
    refused(tokenizers, "chatml", "leaves out reasoning_content of message 0", chosen=answer)


# Without a thought, and with one.
@pytest.mark.parametrize("thought", ["", "why"])
def test_a_thought_that_the_header_writes_too(tokenizers, thought):
    """Qwen3 without thinking: an answer may begin with the empty thought that the prompt has."""
    source = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}",
    ).replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    answer = [assistant(f"<think>\n{thought}\n</think>\n\nblue")]
    written = scored(tokenizers, source, answer)
    assert written.endswith("blue<|im_end|>")
    assert thought in written
    facts = TemplateFacts(with_template(tokenizers, source), {})
    assert facts.describe()["thought"] == r"'<think>\n\n</think>' opens an answer"


# What a template or a tokenizer cannot take is a bad row


# Errors of type, of memory, of a name and of arithmetic inside a template.
@pytest.mark.parametrize(
    "expression", ["1 + m['content']", "m['content'] * 10**30", "nothing.at.all", "[][1:] + 1"]
)
def test_any_failure_of_a_template_is_a_bad_row(tokenizers, expression):
    source = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['content'] == 'bad' %}{{ EXPR }}{% else %}{{ m['content'] }}{% endif %}",
    ).replace("EXPR", expression)
    tokenizer = with_template(tokenizers, source)
    rows = [CHAT, {**CHAT, "chosen": [assistant("bad")]}]
    dataset = build_groups(rows, tokenizer, DataOptions(on_bad_row="skip"), progress=False)
    assert [(bad.row, bad.field) for bad in dataset.skipped] == [(1, "chosen")]


def test_memory_errors_pass(tokenizers, monkeypatch):
    tokenizer = tokenizers("chatml")
    encoder = Encoder(tokenizer)
    encoder.encode(read_row(CHAT))

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(tokenizer, "apply_chat_template", full)
    with pytest.raises(MemoryError):
        encoder.encode(read_row(CHAT))


# In the prompt, and in a response.
@pytest.mark.parametrize("field", ["prompt", "chosen"])
def test_a_lone_surrogate_is_a_bad_row(tokenizers, field):
    bad = "a \ud800 b"
    with pytest.raises(BadRow, match=f"'{field}': the tokenizer fails on it"):
        one({**PAIR, field: bad}, tokenizers())
    row = {**CHAT, field: [user(bad) if field == "prompt" else assistant(bad)]}
    with pytest.raises(BadRow, match=f"'{field}': the tokenizer fails on it"):
        one(row, tokenizers("chatml"))


# Ends


TEXT_ENDS = ["</s>", "</s>\n", "</s> ", "</s></s>", "\n</s> \n", "<|im_end|>", "<|im_end|>\n"]


# Texts that end with nothing, an end of turn, or both, times whether an EOS is wanted.
@pytest.mark.parametrize("end", TEXT_ENDS)
@pytest.mark.parametrize("append_eos", [True, False])
def test_a_text_that_was_rendered_beforehand_ends_once(tokenizers, end, append_eos):
    row = {**PAIR, "chosen": f" blue.{end}", "rejected": " green."}
    tokenizer = tokenizers("chatml")
    chosen, rejected = one(row, tokenizer, append_eos=append_eos).responses
    first = "<|im_end|>" if "im_end" in end else "</s>"
    blanks = end[: end.index("<")]
    assert shown(tokenizer, chosen) == f" blue.{blanks}{first}"
    assert shown(tokenizer, rejected) == (" green.</s>" if append_eos else " green.")


# EOS and the end of turn: each would cut the response.
@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_an_end_in_the_middle(tokenizers, end):
    with pytest.raises(
        BadRow, match=f"'chosen': '{end}' ends it before its last word".replace("|", r"\|")
    ):
        one({**PAIR, "chosen": f" blue{end} sea"}, tokenizers("chatml"))
    for typed in (end, "<|im_start|>"):
        for row in (
            {"chosen": [assistant(f"blue {typed} sea")]},
            {"prompt": [user(f"a {typed} b")]},
        ):
            refused(tokenizers, "chatml", "with which the chat template marks turns", **row)
    # In prompts of text they are the template's own.
    assert one({**PAIR, "prompt": HEAD}, tokenizers("chatml"))


def test_a_content_that_ends_with_the_end_of_turn(tokenizers):
    assert scored(tokenizers, "chatml", [assistant("blue<|im_end|>\n")]) == "blue<|im_end|>"
    refused(tokenizers, "chatml", "marks turns", chosen=[assistant("blue<|im_end|><|im_end|>")])


def test_an_answer_that_ends_with_a_special_token_ends_all_the_same(tokenizers):
    for template, end in (("plain", "</s>"), ("chatml", "<|im_end|>")):
        assert scored(tokenizers, template, [assistant("a <pad>")]).strip() == f"a <pad>{end}"


# Where a response begins and ends


ENDLESS = {
    "chatml": "blue",
    "llama2": " blue",
    "phi": "blue",
    "generation": "blue",
    "plain": " blue",
    "chatml_bare": "blue",
}


# One template for each way in which an answer ends.
@pytest.mark.parametrize("template", ENDLESS)
def test_conversations_without_their_end(tokenizers, template):
    tokenizer = tokenizers(template)
    response = one(CHAT, tokenizer, append_eos=False).responses[0]
    assert shown(tokenizer, response).rstrip() == ENDLESS[template]
    assert (
        shown(tokenizer, one({**CHAT, "append_eos": False}, tokenizer).responses[0]).rstrip()
        == (ENDLESS[template])
    )


def test_several_answers_without_the_last_end(tokenizers):
    row = {**CHAT, "chosen": [assistant("blue"), user("so"), assistant("sea")]}
    for template in ("chatml", "generation", "generation_text"):
        tokenizer = tokenizers(template)
        text = shown(tokenizer, one(row, tokenizer, append_eos=False).responses[0])
        assert text.startswith("blue<|im_end|>{")
        assert text.endswith("}sea")


STEP = {
    "prompt": [user("2+2?"), assistant("First, ")],
    "chosen": [assistant("it is 4.")],
    "rejected": [assistant("it is 5.")],
}


# Templates that differ in header, stripping and thoughts, times whether an EOS is wanted.
@pytest.mark.parametrize("template", ["chatml", "llama2", "phi", "generation", "thinking", "plain"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_a_message_that_goes_on(tokenizers, template, append_eos):
    tokenizer = tokenizers(template)
    options = {"continue_final_message": True, "append_eos": append_eos}
    group = one(STEP, tokenizer, **options)
    alone = one(
        {
            **STEP,
            "prompt": [user("2+2?")],
            "chosen": [assistant("First, it is 4.")],
            "rejected": [assistant("First, it is 5.")],
        },
        tokenizer,
        append_eos=append_eos,
    )
    assert [*group.prompt_ids, *group.responses[0].input_ids] == [
        *alone.prompt_ids,
        *alone.responses[0].input_ids,
    ]
    assert tokenizer.decode(group.prompt_ids).rstrip().endswith("First,")
    assert "it is 4." in shown(tokenizer, group.responses[0])
    assert group.responses[0].loss_mask.all()


def test_a_message_that_goes_on_and_more(tokenizers):
    tokenizer = tokenizers("chatml")
    row = {**STEP, "chosen": [*STEP["chosen"], user("so"), assistant("4")]}
    text = shown(tokenizer, one({**row, "continue_final_message": True}, tokenizer).responses[0])
    assert text.strip() == (
        "it is 4.<|im_end|>{\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n}4<|im_end|>"
    )


# Roles, tools, reasoning and rows where nothing has begun.
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CHAT, "continue_final_message": True}, "which is not an assistant's"),
        (STEP, "`continue_final_message: true` joins them"),
        (
            {**STEP, "chosen": [user("a"), assistant("b")], "continue_final_message": True},
            "role 'user'",
        ),
        ({**CHAT, "chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs': tokenize"),
    ],
)
def test_what_cannot_go_on(tokenizers, row, message):
    with pytest.raises(BadRow, match=message):
        one(row, tokenizers("chatml"))


# Arguments of `apply_chat_template` that would change what is returned.
@pytest.mark.parametrize("key", ["tokenize", "add_generation_prompt", "return_dict", "messages"])
def test_arguments_that_are_not_the_template_s(tokenizers, key):
    with pytest.raises(ValueError, match=f"chat_template_kwargs: {key}"):
        Encoder(tokenizers("chatml"), {key: True})


# Prompts of nothing


def test_bos_before_texts(tokenizers):
    with pytest.raises(BadRow, match=r"no tokens.*`bos: true`"):
        one({**PAIR, "prompt": ""}, tokenizers())
    tokenizer = tokenizers()
    for prompt, text in (("", "<s>"), ("The", "<s>The"), ("<s>The", "<s>The")):
        assert (
            tokenizer.decode(one({**PAIR, "prompt": prompt}, tokenizer, bos=True).prompt_ids)
            == text
        )
    with pytest.raises(ValueError, match="has no bos_token"):
        Encoder(tokenizers(bos=None), bos=True)


def test_conversations_without_a_question(tokenizers):
    example = read_row(CHAT)
    example.prompt = []
    tokenizer = tokenizers("chatml")
    encoded = Encoder(tokenizer).encode(example)
    assert tokenizer.decode(encoded.prompt) == "<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.responses[0][0]) == "blue<|im_end|>"
    tokenizer.chat_template = (
        "{{ raise_exception('who asks?') if messages[0].role != 'user' }}" + CHATML
    )
    with pytest.raises(BadField, match="a user message is needed"):
        Encoder(tokenizer).encode(example)


# Characters


# Templates that keep, divide, or strip the text.
@pytest.mark.parametrize(
    "source", ["chatml", PARTS, CHATML.replace("m['content']", "m.content|trim")]
)
def test_spans_count_the_row_s_characters(tokenizers, source):
    tokenizer = with_template(tokenizers, source)
    content = [{"type": "text", "text": " sea is "}, {"type": "text", "text": "blue hi"}]
    row = {**CHAT, "chosen": [assistant(content)], "chosen_spans": [[8, 12, 0.0]]}
    response = one(row, tokenizer).responses[0]
    masked = response.input_ids[response.token_weights == 0]
    assert tokenizer.decode(masked).strip() == "blue"
    step = {**STEP, "chosen_spans": [[6, 7, 0.0]], "continue_final_message": True}
    response = one(step, tokenizer).responses[0]
    assert "4" in tokenizer.decode(response.input_ids[response.token_weights == 0])
