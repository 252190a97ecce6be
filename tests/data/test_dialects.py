"""Rows as other tools write them: recognised, read right, or refused by name."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import datasets
import numpy as np
import pytest

from fastpo.data.bad_rows import BadField, BadRow
from fastpo.data.builder import row_to_group
from fastpo.data.dataset import build_groups
from fastpo.data.dialects import DIALECTS, Columns
from fastpo.data.formats import read_row
from fastpo.data.messages import assistant, user
from fastpo.data.options import DataOptions
from fastpo.data.stream import GroupStream
from tests.data.test_formats import PAIR

Q, GOOD, BAD = user("Which metal is liquid?"), assistant("Mercury is."), assistant("Lead is.")
WHOLE = [Q, GOOD], [Q, BAD]
TOOLS = [{"type": "function", "function": {"name": "melt", "parameters": {}}}]

# Of each dialect rows, all about one question: (dialect, row, whether it is a pair).
PAIRS = {
    "ultrafeedback": (
        "trl",
        {
            "prompt": Q["content"],
            "prompt_id": "7",
            "chosen": WHOLE[0],
            "rejected": WHOLE[1],
            "messages": WHOLE[0],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
    ),
    "TRL": ("trl", {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}),
    "TRL, implied": ("trl", {"chosen": WHOLE[0], "rejected": WHOLE[1]}),
    "TRL, prompt repeated": ("trl", {"prompt": [Q], "chosen": WHOLE[0], "rejected": WHOLE[1]}),
    "TRL, texts after messages": (
        "trl",
        {"prompt": [Q], "chosen": GOOD["content"], "rejected": BAD["content"]},
    ),
    "TRL, a text before messages": (
        "trl",
        {"prompt": Q["content"], "chosen": [GOOD], "rejected": [BAD]},
    ),
    "one message each": ("trl", {"prompt": [Q], "chosen": GOOD, "rejected": BAD}),
    "OpenRLHF": ("trl", {"chosen": WHOLE[0], "rejected": WHOLE[1], "margin": 1.5}),
    "OpenAI": (
        "openai",
        {
            "input": {"messages": [Q], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
    ),
    "alpaca": (
        "alpaca",
        {
            "instruction": "Which metal",
            "input": "",
            "chosen": GOOD["content"],
            "rejected": BAD["content"],
        }
        | {"instruction": Q["content"]},
    ),
    "ShareGPT": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": Q["content"]}],
            "chosen": {"from": "gpt", "value": GOOD["content"]},
            "rejected": {"from": "gpt", "value": BAD["content"]},
        },
    ),
    "LLaMA-Factory, messages": ("axolotl", {"messages": [Q], "chosen": GOOD, "rejected": BAD}),
    "ms-swift": ("ms_swift", {"messages": WHOLE[0], "rejected_response": BAD["content"]}),
    "ms-swift, messages": ("ms_swift", {"messages": WHOLE[0], "rejected_response": [BAD]}),
    "ms-swift, whole": ("ms_swift", {"messages": WHOLE[0], "rejected_messages": WHOLE[1]}),
    "NeMo": (
        "nemo",
        {
            "context": [Q],
            "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}],
        },
    ),
    "older NeMo": (
        "axolotl",
        {
            "prompt": Q["content"],
            "chosen_response": GOOD["content"],
            "rejected_response": BAD["content"],
        },
    ),
    "axolotl, input": (
        "axolotl",
        {"input": Q["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
    ),
    "axolotl, messages as text": (
        "axolotl",
        {"messages": Q["content"], "chosen": [GOOD], "rejected": BAD["content"]},
    ),
    "axolotl, whole": ("axolotl", {"messages": [Q], "chosen": WHOLE[0], "rejected": WHOLE[1]}),
    "Argilla": (
        "axolotl",
        {
            "instruction": Q["content"],
            "chosen_response": GOOD["content"],
            "rejected_response": BAD["content"],
            "chosen_avg_rating": 4.5,
            "rejected_avg_rating": 1.0,
        },
    ),
    "orca": (
        "orca",
        {
            "system": "",
            "question": Q["content"],
            "chosen": GOOD["content"],
            "rejected": BAD["content"],
        },
    ),
    "distilabel": (
        "distilabel",
        {
            "instruction": Q["content"],
            "generations": [BAD["content"], GOOD["content"]],
            "ratings": [1.0, 5.0],
        },
    ),
}
POINTS = {
    "KTO": ("trl", {"prompt": [Q], "completion": [GOOD], "label": True}),
    "KTO, whole": ("trl", {"prompt": Q["content"], "completion": WHOLE[0], "label": "up"}),
    "messages and label": ("ms_swift", {"messages": WHOLE[0], "label": 1}),
    "ShareGPT, kto_tag": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": Q["content"]},
                {"from": "gpt", "value": GOOD["content"]},
            ],
            "kto_tag": True,
        },
    ),
    "messages, kto_tag": ("sharegpt", {"messages": WHOLE[0], "kto_tag": "true"}),
    "alpaca, kto_tag": (
        "alpaca",
        {"instruction": Q["content"], "input": "", "output": GOOD["content"], "kto_tag": True},
    ),
    "Argilla": (
        "argilla",
        {"instruction": Q["content"], "completion": GOOD["content"], "label": "yes"},
    ),
}
HH = "\n\nHuman: Which metal is liquid?\n\nAssistant:"
TEXTS = {
    "HH": ("hh", {"chosen": HH + " Mercury is.", "rejected": HH + " Lead is."}),
    "Nectar": (
        "nectar",
        {
            "prompt": HH + " ",
            "answers": [
                {"answer": "Lead is.", "rank": 4.0},
                {"answer": "Mercury is.", "rank": 1.0},
            ],
        },
    ),
}


STEP = {
    "prompt": "What is 2 + 3 + 4?",
    "initial_reason_steps": "Step 1: 2 + 3 is 5.\nStep 2: ",
    "chosen": "5 + 4 is 9.",
    "rejected": "5 + 4 is 8.",
    "full_chosen": "5 + 4 is 9.\nStep 3: It is 9.",
    "answer": "9",
}


def test_steps_go_on_and_stay_open(tokenizers):
    tokenizer = tokenizers("chatml")
    (group,) = row_to_group(STEP, tokenizer)
    prompt = tokenizer.decode(group.prompt_ids)
    assert prompt.endswith("<|im_start|>assistant\nStep 1: 2 + 3 is 5.\nStep 2: ")
    assert [tokenizer.decode(r.input_ids) for r in group.responses] == [
        "5 + 4 is 9.",
        "5 + 4 is 8.",
    ]
    (group,) = row_to_group(STEP | {"initial_reason_steps": ""}, tokenizer)
    assert tokenizer.decode(group.prompt_ids).endswith("<|im_start|>assistant\n")
    (group,) = row_to_group(STEP | {"append_eos": True}, tokenizer)
    assert tokenizer.decode(group.responses[0].input_ids) == "5 + 4 is 9.<|im_end|>"


def claimed(row):
    return [name for name, _ in Columns().readings(row)]


# Each dialect's row of the same pair.
@pytest.mark.parametrize("case", PAIRS)
def test_pairs_of_every_dialect(case):
    dialect, row = PAIRS[case]
    before = deepcopy(row)
    example = read_row(row)
    assert row == before
    assert claimed(row) == [dialect]
    prompt = example.prompt
    if prompt is None:  # the responses begin with it
        prompt, responses = example.responses[0][:1], [r[1:] for r in example.responses]
    else:
        responses = example.responses
    assert (prompt, responses) == ([Q], [[GOOD], [BAD]])
    assert example.ranks == [0, 1]
    assert example.labels == [True, False]


# Each dialect's row of one rated completion.
@pytest.mark.parametrize("case", POINTS)
def test_rated_completions_of_every_dialect(case):
    dialect, row = POINTS[case]
    example = read_row(row)
    assert claimed(row) == [dialect]
    assert (example.prompt, example.responses, example.labels) == ([Q], [[GOOD]], [True])


# Each dialect whose texts name their speakers.
@pytest.mark.parametrize("case", TEXTS)
def test_texts_with_speakers_stay_text_or_become_messages(case):
    dialect, row = TEXTS[case]
    example = read_row(row)
    assert claimed(row) == [dialect]
    assert example.prompt.rstrip() == HH
    assert [r.strip() for r in example.responses] == ["Mercury is.", "Lead is."]
    example = read_row(row, columns=Columns(text_as_messages=True))
    assert (example.prompt, example.responses) == ([Q], [[GOOD], [BAD]])


def test_every_dialect_has_a_row_here():
    rows = {dialect for cases in (PAIRS, POINTS, TEXTS) for dialect, _ in cases.values()}
    assert rows == DIALECTS.keys() - {"logo", "longpo", "step_dpo"}  # these have files of their own


def test_grades_beside_a_pair():
    for case, expected in (("ultrafeedback", [8.0, 3.5]), ("Argilla", [4.5, 1.0])):
        assert read_row(PAIRS[case][1], needs={"score"}).scores == expected


def test_system_messages_begin_the_conversation():
    system = {"role": "system", "content": "Be brief."}
    for case in ("orca", "alpaca", "ShareGPT", "axolotl, input", "TRL", "OpenRLHF"):
        example = read_row(PAIRS[case][1] | {"system": "Be brief."})
        start = example.prompt if example.prompt is not None else example.responses[0]
        assert start[:2] == [system, Q], case
    again = {"prompt": [system, Q], "chosen": [GOOD], "rejected": [BAD], "system": "Be brief."}
    assert read_row(again).prompt == [system, Q]
    with pytest.raises(BadField, match="another system message"):
        read_row(again | {"system": "Be long."})
    # A text with a system message can only be a turn.
    example = read_row({"prompt": "Sky?", "chosen": "a", "rejected": "b", "system": "Be brief."})
    assert example.prompt == [system, user("Sky?")]


def test_history_and_input_of_alpaca():
    row = PAIRS["alpaca"][1] | {"history": [["Hello", "Hi."]], "input": "Name it."}
    asked = user(f"{Q['content']}\nName it.")
    assert read_row(row).prompt == [user("Hello"), assistant("Hi."), asked]
    with pytest.raises(BadField, match="user, assistant") as caught:
        read_row(row | {"history": [["Hello"]]})
    assert caught.value.field == "history"


def test_calls_and_tools_of_other_tools():
    row = {
        "conversations": [
            {"from": "human", "value": "Melt it."},
            {"from": "function_call", "value": '{"name": "melt", "arguments": {"t": 30}}'},
            {"from": "observation", "value": "molten"},
        ],
        "tools": json.dumps(TOOLS),
        "chosen": {"from": "gpt", "value": "Done."},
        "rejected": {"from": "function_call", "value": '[{"name": "melt", "arguments": {}}]'},
    }
    example = read_row(row)
    call = {"type": "function", "function": {"name": "melt", "arguments": {"t": 30}}}
    assert example.prompt == [
        user("Melt it."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "molten"},
    ]
    assert example.responses[1][0]["tool_calls"][0]["function"]["name"] == "melt"
    assert example.template_kwargs == {"tools": TOOLS}
    openai = PAIRS["OpenAI"][1] | {"input": {"messages": [Q], "tools": TOOLS}}
    assert read_row(openai).template_kwargs == {"tools": TOOLS}


def test_rejected_response_replaces_all_behind_the_last_question():
    call = {"role": "assistant", "content": "", "tool_calls": TOOLS}
    tool = {"role": "tool", "content": "molten"}
    row = {"messages": [Q, call, tool, GOOD], "rejected_response": [call, tool, BAD]}
    example = read_row(row)
    assert (example.prompt, example.responses) == ([Q], [[call, tool, GOOD], [call, tool, BAD]])
    answered = {"role": "tool_response", "content": "molten"}
    row = {"messages": [Q, call, answered, GOOD], "rejected_response": BAD["content"]}
    example = read_row(row)  # a text is the answer to the tool
    assert (example.prompt, example.responses) == ([Q, call, tool], [[GOOD], [BAD]])


def test_lists_of_any_length():
    completions = [{"rank": r, "completion": [assistant(str(r))]} for r in (2, 0, 1, 5)]
    example = read_row({"context": [Q], "completions": completions})
    assert [r[0]["content"] for r in example.responses] == ["0", "1", "2", "5"]
    assert example.ranks == [0, 1, 2, 3]


# Every word of the tables in one spelling, and booleans, integers and floats.
@pytest.mark.parametrize(
    ("label", "good"),
    [
        *((label, True) for label in (True, 1, 1.0, "Yes", " good ", "desirable", "up")),
        *((label, False) for label in (False, 0, "no", "BAD", "undesirable", "down")),
    ],
)
def test_words_of_labels(label, good):
    row = {"prompt": "p", "completion": " a", "label": label}
    assert read_row(row).labels == [good]


CONFLICTS = [
    (PAIRS["alpaca"][1] | {"question": "Another?"}, {"alpaca", "orca"}),
    (PAIRS["ms-swift"][1] | {"conversations": [Q], "chosen": GOOD, "rejected": BAD}, {"sharegpt"}),
    (PAIR | {"question": "Another?"}, {"trl", "orca"}),
    (PAIRS["distilabel"][1] | {"chosen": "a", "rejected": "b"}, {"alpaca", "distilabel"}),
]


# Pairs of dialects whose columns overlap; the order of the names is that of the message.
@pytest.mark.parametrize(("row", "names"), CONFLICTS)
def test_a_row_that_two_dialects_read_differently(row, names):
    if len(names) > 1:
        with pytest.raises(BadField, match="read this row differently") as caught:
            read_row(row)
        assert all(f"dialect: {name}" in caught.value.reason for name in names)
    for name in names:
        read_row(row, columns=Columns(name))


def test_dialects_that_agree_are_no_conflict():
    row = PAIRS["ultrafeedback"][1] | {"question": Q["content"]}
    assert set(claimed(row)) == {"trl", "orca"}
    assert read_row(row).parts() == ([Q], [[GOOD], [BAD]])


def test_further_columns_beside_whole_conversations():
    row = PAIRS["ultrafeedback"][1] | {"short_prompt": "Liquid?"}
    for gold in ("Hg.", [Q, assistant("Hg.")]):
        example = read_row(row | {"gold": gold}, ("gold",), ("short_prompt",))
        assert example.extras == {"gold": [assistant("Hg.")]}
        assert example.prompts == {"short_prompt": [user("Liquid?")]}
    with pytest.raises(BadField, match="identical to chosen"):
        read_row(row | {"rejected": WHOLE[0]})


def test_an_explicit_dialect_makes_turns_of_text():
    example = read_row(PAIR, columns=Columns("axolotl"))
    assert example.prompt == [user(PAIR["prompt"])]
    with pytest.raises(ValueError, match="dialect='axolot': choose one of auto, trl"):
        DataOptions(dialect="axolot")


def test_faults_are_told_in_the_row_s_own_words():
    bad = PAIRS["OpenAI"][1] | {"non_preferred_output": 3}
    for row, field in (
        (bad, "non_preferred_output"),
        (PAIRS["OpenAI"][1] | {"input": {"messages": 7}}, "input.messages"),
        (PAIRS["distilabel"][1] | {"generations": ["a", ""]}, "generations[1]"),
        (PAIRS["distilabel"][1] | {"ratings": [1, None]}, "ratings[1]"),
        (PAIRS["NeMo"][1] | {"completions": [{"completion": [GOOD]}]}, "completions[0]"),
        (PAIRS["ms-swift"][1] | {"messages": [Q]}, "messages"),
        (PAIRS["orca"][1] | {"rejected": ""}, "rejected"),
        (PAIRS["Argilla"][1] | {"rejected_response": ""}, "rejected_response"),
        (POINTS["alpaca, kto_tag"][1] | {"kto_tag": "so so"}, "kto_tag"),
    ):
        with pytest.raises(BadField) as caught:
            read_row(row)
        assert caught.value.field == field


# All rows of the three tables above: no reader may drop the column.
@pytest.mark.parametrize("case", [*PAIRS, *POINTS, *TEXTS])
def test_every_dialect_has_a_system_message(case):
    row = (PAIRS | POINTS | TEXTS)[case][1]
    example = read_row(row | {"system": "Be brief."})
    assert example.parts()[0] == [{"role": "system", "content": "Be brief."}, Q]


# A column that another reader would use, beside each dialect that does not.
@pytest.mark.parametrize(
    ("case", "more", "field"),
    [
        ("Argilla", {"input": "Name it."}, "instruction"),
        ("older NeMo", {"input": "Name it."}, "input"),
        ("distilabel", {"input": "Name it."}, "input"),
        ("TRL", {"spans": [[0, 1, 0.5]]}, "spans"),
        ("NeMo", {"chosen_spans": [[0, 1, 0.5]]}, "chosen_spans"),
        ("TRL, implied", {"spans": [[0, 1, 0.5]]}, "spans"),
        (
            "ShareGPT",
            {"conversations": WHOLE[0], "kto_tag": True},
            "chosen, rejected, conversations",
        ),
        ("OpenAI", {"input": {"messages": [Q], "tools": TOOLS}, "tools": TOOLS}, "tools"),
    ],
)
def test_nothing_that_could_be_trained_on_is_left_unread(case, more, field):
    with pytest.raises(BadField) as caught:
        read_row(PAIRS[case][1] | more)
    assert caught.value.field == field


def test_what_is_left_unread_is_named():
    for case, more in (
        ("TRL", {"label": False, "ranks": [2, 1], "response": "Mercury is.", "labels": 3}),
        ("OpenAI", {"input": {"messages": [Q], "tool": TOOLS}}),
        ("alpaca", {"output": "Tin is.", "chosen_response": "Tin is."}),
    ):
        columns = Columns()
        read_row(PAIRS[case][1] | more, columns=columns)
        left = ["input.tool"] if "input" in more else list(more)
        assert list(columns.ignored) == left
    columns = Columns()
    read_row(PAIRS["TRL"][1] | {"chosen_score": 2.0, "rejected_score": 1.0}, columns=columns)
    assert not columns.ignored  # they are grades


def test_lists_and_messages_as_text():
    """As cells of CSV hold them."""
    for dialect, row in (*PAIRS.values(), *POINTS.values(), *TEXTS.values()):
        cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
        example, expected = read_row(cells), read_row(row)
        assert (example.dialect, example.parts()) == (dialect, expected.parts())
        assert (example.labels, example.ranks) == (expected.labels, expected.ranks)
    for text in ('{"role": "admin", "value": 3}', '{"role": "user", "rights": ["read"]}'):
        assert read_row(PAIR | {"chosen": text}).responses[0] == text  # an answer in JSON
    blank = {"history": "", "tools": " ", "input": "", "system": ""}
    assert read_row(PAIRS["alpaca"][1] | blank).prompt == [Q]


def test_numpy_in_rows():
    for case in ("OpenAI", "NeMo"):
        row = datasets.Dataset.from_list([PAIRS[case][1]]).with_format("numpy")[0]
        assert read_row(row).parts() == ([Q], [[GOOD], [BAD]])
    calls = np.array([{"name": "melt", "arguments": {"t": np.float32(1)}}, {"name": "cast"}])
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    row = {"chosen": np.array([Q, call, GOOD]), "rejected": np.array([Q, call, BAD])}
    prompt, _ = read_row(row).parts()
    assert prompt[1]["tool_calls"] == [
        {"name": "melt", "arguments": {"t": 1.0}},
        {"name": "cast"},
    ]


def test_an_hh_row_s_further_responses():
    row = TEXTS["HH"][1] | {"gold": HH + " Quicksilver is."}
    assert read_row(row, ("gold",)).extras == {"gold": " Quicksilver is."}
    columns = Columns(text_as_messages=True)
    gold = read_row(row, ("gold",), columns=columns).extras["gold"]
    assert gold == [assistant("Quicksilver is.")]
    for more in ({"gold": " Quicksilver is."}, {"chosen_spans": [[0, 2, 0.5]]}):
        with pytest.raises(BadField) as caught:
            read_row(row | more, ("gold",))
        assert caught.value.field in more


# Every dialect by name, on a row that has none of its columns.
@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_that_a_row_is_not_of(name):
    row = {"problem": "Which metal is liquid?", "good_one": "Mercury.", "bad_one": "Lead."}
    with pytest.raises(BadField) as caught:
        read_row(row, columns=Columns(name))
    assert caught.value.field in {"columns", *re.findall(r"\w+", DIALECTS[name].shape)}


def test_what_a_wrong_dialect_lacks():
    for name, field in (("alpaca", "instruction"), ("orca", "question"), ("hh", "rejected")):
        with pytest.raises(BadField) as caught:
            read_row(PAIR, columns=Columns(name))
        assert caught.value.field == field


def test_faults_of_tokenising_are_told_in_the_row_s_own_words(tokenizers):
    tokenizer = tokenizers("chatml")
    orca, named = PAIRS["orca"][1], {"prompt": "query", "chosen": "better", "rejected": "worse"}
    renamed = {own: PAIR[name] for name, own in named.items()}
    for row, options, field in (
        (PAIRS["OpenAI"][1], {"max_response_length": 1}, "preferred_output"),
        (orca, {"max_prompt_length": 1, "truncation": "error"}, "question"),
        (renamed, {"max_response_length": 1, "columns": named}, "better"),
        (renamed | {"worse": ""}, {"columns": named}, "worse"),
    ):
        with pytest.raises(BadRow) as caught:
            row_to_group(row, tokenizer, DataOptions(**options))
        assert caught.value.field == field


def test_a_fault_that_all_dialects_see_is_named():
    row = PAIRS["ultrafeedback"][1] | {"question": Q["content"], "rejected": [Q, assistant("")]}
    assert len(claimed(row)) == 2
    row["rejected"] = [user("Other?"), GOOD]
    with pytest.raises(BadField) as caught:
        read_row(row)
    assert caught.value.field == "prompt"


def test_the_table_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = [f"| `{name}` | {d.tools} | {d.shape} |" for name, d in DIALECTS.items()]
    assert "\n".join(rows) in page


# --- columns -------------------------------------------------------------------------------------


def test_columns_are_renamed_and_dropped():
    row = {"query": "Sky?", "better": " blue", "worse": " grey", "images": ["x.png"]}
    named = {"prompt": "query", "chosen": "better", "rejected": "worse", "images": None}
    example = read_row(row, columns=Columns(renamed=named))
    assert (example.prompt, example.responses) == ("Sky?", [" blue", " grey"])
    with pytest.raises(BadField, match="NAME"):
        read_row(row)


def test_columns_renamed_onto_others():
    swapped = Columns(renamed={"chosen": "rejected", "rejected": "chosen"})
    assert read_row(PAIR, columns=swapped).responses == [" green.", " blue."]
    with pytest.raises(BadField) as caught:
        read_row(PAIR | {"rejected": ""}, columns=swapped)
    assert caught.value.field == "rejected"
    columns = Columns(renamed={"prompt": "query"})
    assert read_row(PAIR | {"query": None}, columns=columns).prompt == PAIR["prompt"]
    assert not columns.ignored
    assert read_row(PAIR | {"query": "Sea?"}, columns=columns).prompt == "Sea?"
    assert list(columns.ignored) == ["prompt"]


def test_a_renamed_column_that_no_row_has(tokenizers):
    options = DataOptions(columns={"system": "sytem"})
    with pytest.raises(ValueError, match=r"columns=\{system: sytem\}, but no row has"):
        build_groups([PAIR], tokenizers(), options, progress=False)
    with pytest.raises(ValueError, match="no row has"):
        list(GroupStream([PAIR], tokenizers(), options))
    some = [PAIR, PAIR | {"sytem": "Be brief."}]
    with pytest.raises(ValueError, match="no chat template"):
        build_groups(some, tokenizers(), options, progress=False)


# Neither side of the mapping may be anything but a name.
@pytest.mark.parametrize("columns", [{"prompt": 3}, {"prompt": ""}, {3: "prompt"}, {"chose": "x"}])
def test_columns_that_are_no_names(columns):
    with pytest.raises(ValueError, match="columns="):
        DataOptions(columns=columns)


# Typing errors of each kind of column, and media that nothing reads.
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("choosen_spans", [], "is 'chosen_spans' meant"),
        ("wieght", 1.0, r"is 'weight' meant\? `columns: \{weight: wieght\}` reads it"),
        ("tool", TOOLS, "is 'tools' meant"),
        ("images", ["a.png"], "a column that nothing here reads"),
        ("image", b"", "a column that nothing here reads"),
        ("video", "a.mp4", "a column that nothing here reads"),
        ("chosen_prompt", "x", "a column that nothing here reads"),
        ("system_prompt", "x", "a column that nothing here reads"),
        ("rejected_images", ["a.png"], "a column that nothing here reads"),
    ],
)
def test_columns_that_look_as_if_they_mattered(name, value, message):
    with pytest.raises(BadField, match=message) as caught:
        read_row(PAIR | {name: value})
    assert caught.value.field == name
    assert f"`columns: {{{name}: null}}` drops it" in caught.value.reason
    assert read_row(PAIR | {name: value}, columns=Columns(renamed={name: None}))
    assert read_row(PAIR | {name: None})


def test_empty_lists_of_images_are_none():
    assert read_row(PAIR | {"images": []})


def test_a_prompt_of_another_name_is_not_guessed_from_common_words():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is grey."}
    assert read_row(row).prompt is None
    with pytest.raises(BadField, match=r"columns: \{prompt: query\}") as caught:
        read_row(row | {"query": "Sky?"})
    assert caught.value.field == "query"
    assert read_row(row | {"query": "Sky?"}, columns=Columns(renamed={"query": None}))


def test_one_line_names_the_ignored_columns(tokenizers, caplog):
    rows = [PAIR | {"source": "a"}, PAIR | {"number": 3, "source": "b"}]
    build_groups(rows, tokenizers(), progress=False, source="pairs")
    assert caplog.messages[0] == "pairs: ignored columns, which nothing here reads: source, number"


# --- text on a chat model ------------------------------------------------------------------------


def test_text_rows_on_a_chat_model_are_told_of_once(tokenizers, caplog):
    rows = [PAIR | {"prompt": "Sky?", "chosen": f"B{i}", "rejected": " g"} for i in range(3)]
    build_groups([*rows, PAIR], tokenizers("chatml"), progress=False)
    (line,) = (m for m in caplog.messages if "chat template" in m)
    assert "4 rows are text" in line
    assert "75%" in line
    assert "text_as_messages: true" in line
    caplog.clear()
    build_groups(rows, tokenizers(), progress=False)  # no template to use
    rendered = PAIR | {"prompt": "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"}
    build_groups([rendered], tokenizers("chatml"), progress=False)
    assert not [m for m in caplog.messages if "chat template" in m]


def test_text_as_messages(tokenizers):
    tokenizer = tokenizers("chatml")
    options = DataOptions(text_as_messages=True)
    as_text = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Grey."}
    as_chat = {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")]}
    as_chat["rejected"] = [assistant("Grey.")]
    (one,) = row_to_group(as_text, tokenizer, options)
    (other,) = row_to_group(as_chat, tokenizer)
    assert one.token_ids.tolist() == other.token_ids.tolist()
    listed = {"prompt": "Sky?", "responses": ["Grey.", "Blue."], "scores": [0, 1]}
    assert row_to_group(listed, tokenizer, options)
    single = {"prompt": "Sky?", "completion": "Blue.", "label": True}
    assert row_to_group(single, tokenizer, options)
    with pytest.raises(BadRow, match="field 'prompt': missing: a conversation is not divided"):
        row_to_group({"chosen": "a b", "rejected": "a c"}, tokenizer, options)


def test_hh_goes_on_with_the_human(tokenizers):
    more = " Mercury is.\n\nHuman: Sure?\n\nAssistant: Yes."
    row = {"chosen": HH + more, "rejected": HH + " Lead is."}
    with pytest.raises(BadRow, match="field 'chosen': goes on with the human's words"):
        row_to_group(row, tokenizers())
    tokenizer = tokenizers("chatml")
    (group,) = row_to_group(row, tokenizer, DataOptions(text_as_messages=True))
    chosen = group.responses[0]
    scored = tokenizer.decode(chosen.input_ids[chosen.loss_mask])
    assert "Sure?" not in scored
    assert "Yes." in scored
