"""Nothing of a row is lost, or said twice, on its way through a template."""

from __future__ import annotations

import pytest

from fastpo.data.bad_rows import BadRow
from fastpo.data.kept import left_out
from tests.data.conftest import CHATML
from tests.data.test_formats import assistant, one, user
from tests.data.test_rendering import (
    CALLS,
    SYSTEM,
    refused,
    scored,
)
from tests.data.test_templates import HEAD

# What a template leaves out


def test_an_answer_that_also_stands_in_the_prompt(tokenizers):
    source = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m.role == 'user' }}")
    row = {"prompt": [user("hi or green")], "chosen": [assistant("hi")]}
    refused(tokenizers, source, "'chosen': .*leaves out content of message 0", **row)


def test_reasoning_that_is_also_the_answer(tokenizers):
    answer = [assistant("blue", reasoning="blue")]
    refused(tokenizers, "chatml", "'chosen': the chat template leaves out reasoning", chosen=answer)


# Keys of vendors' messages whose text a template would drop.
@pytest.mark.parametrize("key", ["function_call", "refusal", "audio", "thoughts"])
def test_further_keys_with_text(tokenizers, key):
    for value in ("No.", {"name": "rain", "arguments": "{}"}, [{"text": "No."}]):
        message = f"'chosen': the chat template leaves out {key}"
        refused(tokenizers, "chatml", message, chosen=[assistant("blue", **{key: value})])


# Bookkeeping, a flag, an empty text and a number: no template has to write them.
@pytest.mark.parametrize(
    "keys", [{"name": "Ann", "id": "a1"}, {"prefix": True}, {"audio": ""}, {"weight": 0.5}]
)
def test_keys_that_say_nothing(tokenizers, keys):
    assert scored(tokenizers, "chatml", [assistant("blue", **keys)]) == "blue<|im_end|>"


# A key at the top, and a number nested in a list.
@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"city": "Oslo", "days": 3}, r"arguments, key 'city'"),
        ({"at": {"lat": 59.9, "lon": [10.75]}}, r"arguments\.at\.lon\[0\]"),
    ],
)
def test_arguments_that_are_left_out(tokenizers, arguments, key):
    source = CALLS.replace("ARGUMENTS", "")
    call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
    refused(tokenizers, source, key, chosen=[assistant("", tool_calls=[call])])


def test_every_piece_needs_a_place_of_its_own():
    message = assistant(
        "ab", reasoning="ab", tool_calls=[{"name": "ab", "arguments": '{"a": "ab"}'}]
    )
    assert left_out(message, 'ab ab ab {"a":"ab"}') is None
    assert left_out(message, 'ab ab {"a":"ab"}') is not None
    assert left_out(assistant("a\nb"), " a b ") is None


def test_system_and_tools_of_the_prompt(tokenizers):
    source = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    refused(
        tokenizers,
        source,
        "'prompt': .*leaves out content of message 0 .system",
        prompt=[SYSTEM, user("hi")],
    )
    tool = {"type": "function", "function": {"name": "rain", "parameters": {}}}
    refused(
        tokenizers, "chatml", "'tools': the chat template leaves out the tool 'rain'", tools=[tool]
    )
    assert scored(
        tokenizers, "{{ tools | tojson if tools }}" + CHATML, [assistant("a")], tools=[tool]
    )


# What is said twice


def test_headers_that_the_prompt_has_already(tokenizers):
    tokenizer = tokenizers("chatml")
    row = {"prompt": HEAD, "chosen": "<|im_start|>assistant\nblue", "rejected": "green"}
    with pytest.raises(
        BadRow, match=r"'chosen': begins with '<\|im_start\|>assistant', with which"
    ):
        one(row, tokenizer)
    row = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " a", "rejected": "\n\nAssistant: b"}
    with pytest.raises(BadRow, match="'rejected': begins with 'Assistant:'"):
        one(row, tokenizer)
    refused(
        tokenizers,
        "plain",
        "'chosen': content begins with 'assistant:'",
        chosen=[assistant("assistant: blue")],
    )


def test_responses_that_repeat_the_prompt(tokenizers):
    row = {"prompt": "The sky", "chosen": "The sky is blue", "rejected": "The sky is green"}
    with pytest.raises(
        BadRow, match="repeats the prompt: keep only the answer, or drop the prompt"
    ):
        one(row, tokenizers())
    assert one({**row, "rejected": " is green"}, tokenizers())
