"""Random conversations through every chat template that TRL comes with.

Whatever a template does, a row is read as the template alone writes it, or refused by the name of
a key. What it should have written is found by rendering every form that a row can have.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions

FOUND = find_spec("trl")
FOLDER = Path(FOUND.origin).parent / "chat_templates" if FOUND and FOUND.origin else Path("absent")
PATHS = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PATHS, reason="no chat templates of TRL"),
]

SPECIAL = re.compile(
    r"<\|\w+\|?>|<\w+\|>|<\uff5c[\w▁]+\uff5c>|<(?:start|end)_of_\w+>|</?s>|\[gMASK\]|<sop>|\[/?INST\]"
)
# The end of an answer, the most particular first.
ENDS = (
    *("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<|end|>"),
    *("<|END_OF_TURN_TOKEN|>", "<\uff5cend▁of▁sentence\uff5c>", "<end_of_utterance>", "</s>"),
)
# After a tool call, or before another answer, some end otherwise.
OTHER_ENDS = ("<|eom|>", "<|call|>", "<|end|>", "<|tool_response>", "<|eot_id|>", "<|observation|>")
REASONING = ("reasoning_content", "reasoning", "thinking")


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each token of its own that the template writes."""
    source = PATHS[name].read_text(encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = sorted({*SPECIAL.findall(source), "<s>", "<|endoftext|>"})
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    end = end_of(name)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>" if end in (None, "<|end|>") else end,
        extra_special_tokens=[token for token in tokens if token not in ("<s>", end)],
        chat_template=source,
    )


def end_of(name: str) -> str | None:
    if name == "glm4moe_training":  # the next speaker ends an answer
        return "<|user|>"
    source = PATHS[name].read_text(encoding="utf-8")
    return next((end for end in ENDS if end in source), None)


# Rows


class Words:
    """Words that stand in no template and are never drawn twice."""

    def __init__(self, seed: int):
        self.random, self.count, self.seed = random.Random(seed), 0, seed

    def one(self) -> str:
        self.count += 1
        return f"zq{self.seed}x{self.count}w"

    def text(self, blanks: bool = True) -> str:
        joints = [" ", "  ", "\n", ", ", " é ", " 天 ", " 🙂 ", " 7 ", "\n\n", "\t"]
        some = [self.one() for _ in range(self.random.randint(1, 4))]
        text = "".join(word + self.random.choice(joints) for word in some)
        return text if blanks and self.random.random() < 0.3 else text.strip()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def tool(name):
    parameters = {"type": "object", "properties": {"zplace": {"type": "string"}}}
    function = {"name": name, "description": "Look it up.", "parameters": parameters}
    return {"type": "function", "function": function}


def call(words, name, kind):
    arguments = {"zplace": words.one(), "zcount": words.random.randint(1000, 9999), "zyes": True}
    if kind == "call_nested":
        arguments["zmore"] = {"zlist": [words.one(), 2.5]}
    function = {"name": name, "arguments": arguments}
    if kind == "call_text":
        function["arguments"] = json.dumps(arguments)
    if kind == "call_flat":
        return function
    return {"type": "function", "id": "callabcde", "function": function}


def answer(words, kind):
    """A response of the kind."""
    if kind in REASONING:
        return [assistant(words.text(), **{kind: words.text(False)})]
    if kind == "same_reasoning":
        text = words.text(False)
        return [assistant(text, reasoning_content=text, thinking=text)]
    if kind == "inline_reasoning":
        return [assistant(f"<think>\n{words.text(False)}\n</think>\n\n{words.text(False)}")]
    if kind == "refusal":
        return [assistant(words.text(), refusal=words.text())]
    if kind.startswith("call_"):
        calling = assistant("", tool_calls=[call(words, "zlookup", kind)])
        if kind == "call_bare":
            del calling["content"]
        if kind == "call_said":
            calling["content"] = words.text(False)
        if kind == "call_two":
            calling["tool_calls"].append(call(words, "zlookup", kind))
        if kind != "call_answered":
            return [calling]
        result = {"role": "tool", "tool_call_id": "callabcde", "name": "zlookup"}
        return [calling, {**result, "content": words.text(False)}, assistant(words.text(False))]
    if kind == "several":
        return [assistant(words.text()), user(words.text()), assistant(words.text())]
    return [assistant(words.text())]


CALLS = [f"call_{x}" for x in ("dict", "text", "flat", "bare", "said", "two", "nested", "answered")]
CHAT = ["plain", "turns", "same_as_question", "parts", "ended"]
KINDS = [
    *CHAT,
    *("system", "several", "tools", "inline_reasoning", "same_reasoning", "refusal"),
    *REASONING,
    *CALLS,
]


def row_of(kind: str, seed: int) -> dict:
    words = Words(seed)
    prompt = [user(words.text())]
    if kind == "system":
        prompt.insert(0, {"role": "system", "content": words.text(False)})
    if kind == "turns":
        prompt += [assistant(words.text()), user(words.text())]
    row = {"prompt": prompt, "chosen": answer(words, kind), "rejected": answer(words, kind)}
    if kind in ("tools", "call_two", "call_answered"):
        row["tools"] = [tool("zlookup")]
    if kind == "same_as_question":
        row["chosen"] = [assistant(prompt[0]["content"])]
    if kind == "parts":
        for message in (*prompt, *row["chosen"], *row["rejected"]):
            text = message["content"]
            half = len(text) // 2
            halves = (text[:half], text[half:])
            message["content"] = [{"type": "text", "text": each} for each in halves]
    return row


# What the template alone writes


def text_of(message):
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def forms(messages):
    """The messages in every form that a template may take, which say the same."""
    for parts, dicts, wrapped, key in itertools.product((False, True), repeat=4):
        changed = copy.deepcopy(messages)
        for message in changed:
            text = text_of(message)
            message["content"] = [{"type": "text", "text": text}] if parts else text
            calls = []
            for one in message.get("tool_calls", ()):
                function = dict(one.get("function", one))
                arguments = function["arguments"]
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                function["arguments"] = arguments if dicts else json.dumps(arguments)
                calls.append({"type": "function", "id": "callabcde", "function": function})
                if not wrapped:
                    calls[-1] = function
            if calls:
                message["tool_calls"] = calls
            thought = next((message.pop(k) for k in REASONING if k in message), None)
            if thought is not None:
                message["thinking" if key else "reasoning_content"] = thought
        yield changed


def said(messages) -> list[str]:
    """The words and numbers of the assistant's messages, one for each place that they stand in."""
    everything = []
    for message in messages:
        if message["role"] == "assistant":
            everything += re.findall(r"zq\d+x\d+w|zlookup", text_of(message))
            for key in ("refusal", *REASONING):
                everything += re.findall(r"zq\d+x\d+w", message.get(key, ""))
            # The text of arguments has every key and value, whatever its form.
            calls = json.dumps(message.get("tool_calls", []))
            everything += re.findall(r"zq\d+x\d+w|zlookup|z[a-z]+(?=\\?\":)|\d{4,}|2\.5", calls)
    return everything


def heard(messages) -> set[str]:
    """The words of all others."""
    texts = [text_of(m) for m in messages if m["role"] != "assistant"]
    return set(re.findall(r"zq\d+x\d+w", " ".join(texts)))


def has_all(text: str, wanted: list[str]) -> bool:
    return all(text.count(word) >= wanted.count(word) for word in set(wanted))


def rendered(tokenizer, messages, tools, opens=False) -> Iterator[str]:
    """The texts of all forms of a conversation, one at a time: each takes a millisecond."""
    for form in forms(messages):
        try:
            text = tokenizer.apply_chat_template(
                form, tools=tools, tokenize=False, add_generation_prompt=opens
            )
        except Exception:
            continue
        if not re.search(r"""['"]text['"]: |\{'z|\\"z""", text):  # Python's or a twofold JSON
            yield text


def check_read(name, kind, row, group):
    """What was read is what the template writes, and what is scored is what the answers say."""
    tokenizer, end = tokenizer_of(name), end_of(name)
    ids_of_ends = [tokenizer.convert_tokens_to_ids(e) for e in {end, *OTHER_ENDS} if e]
    for key, response in zip(("chosen", "rejected"), group.responses, strict=True):
        messages = row["prompt"] + row[key]
        whole = tokenizer.decode([*group.prompt_ids, *response.input_ids])
        if end is None:
            whole = whole.removesuffix("<|endoftext|>")
        texts = rendered(tokenizer, messages, row.get("tools"))
        assert any(text.startswith(whole) for text in texts), whole
        scored = tokenizer.decode(response.input_ids[response.loss_mask])
        assert has_all(scored, said(row[key])), (scored, said(row[key]))
        outside = heard(messages) - set(said(row[key]))
        outside |= set(said(row["prompt"]))
        assert not [word for word in outside if word in scored], scored
        assert not any(word in tokenizer.decode(group.prompt_ids) for word in said(row[key])) or (
            kind in ("same_as_question", *CALLS)
        )
        # An end at the end, and one for each answer.
        last = int(response.input_ids[-1])
        assert response.loss_mask[-1]
        assert last in (*ids_of_ends, tokenizer.eos_token_id)
        if end is not None and kind not in CALLS:
            assert scored.endswith(end)
        if end is not None and kind not in (*CALLS, *REASONING):  # a thought may end like a turn
            count = sum(scored.count(one) for one in {end, *OTHER_ENDS})
            assert count == sum(m["role"] == "assistant" for m in row[key])


def is_justified(name, row, bad) -> bool:
    """Whether no form of the row is written in full, or the prompt changes with what follows."""
    tokenizer = tokenizer_of(name)
    for key in ("chosen", "rejected"):
        messages, tools = row["prompt"] + row[key], row.get("tools")
        before = set(rendered(tokenizer, row["prompt"], tools))
        written = any(
            text.startswith(opening.removesuffix("<|endoftext|>"))
            and has_all(text[len(opening) :], said(row[key]))
            and has_all(opening, list(heard(row["prompt"])))
            and (not tools or opening.count("zlookup"))
            for text in rendered(tokenizer, messages, tools)
            for opening in before
        )
        if not written:
            return True
    # Several answers need every part of a conversation to be written alike.
    return "cannot tell which tokens" in bad.reason


# What a refusal may name.
KEYS = ("content", "refusal", "tools", "tool_calls", *REASONING, "chat template")


# Every template that TRL ships: other people wrote them, and people train with them.
@pytest.mark.parametrize("name", PATHS)
def test_read_whole_or_refused_by_name(name):
    rows = [row_of(kind, seed) for seed, kind in enumerate(KINDS, start=1)]
    dataset = build_groups(rows, tokenizer_of(name), DataOptions(on_bad_row="skip"), progress=False)
    refused = {bad.row: bad for bad in dataset.skipped}
    for group in dataset.groups:
        check_read(name, KINDS[group.row], rows[group.row], group)
    for index, bad in refused.items():
        assert any(key in bad.reason for key in KEYS), bad
        assert is_justified(name, rows[index], bad), (KINDS[index], str(bad))
    assert not {KINDS[index] for index in refused} & set(CHAT)
