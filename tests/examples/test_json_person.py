"""The demo's verifier, and the preference data that ships with it."""

from __future__ import annotations

import json

import json_person as task
import pytest
from make_json_pairs import pairs_of
from smollm2 import Reply

ANN = task.Person("Ann Lee", 41, "Rome")
GOOD = '{"name": "Ann Lee", "age": 41, "city": "Rome"}'


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        '{\n  "city": "Rome",\n  "age": 41,\n  "name": "Ann Lee"\n}',
        '{"name":"\\u0041nn Lee","age":41,"city":"Rome"}',
    ],
    ids=["compact", "pretty, other order", "escaped"],
)
def test_valid_replies_have_no_fault(reply: str) -> None:
    assert task.fault(reply, ANN) is None


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (f"Here it is: {GOOD}", "not only JSON"),
        (f"{GOOD}\n\nThis is the JSON.", "not only JSON"),
        (f"```json\n{GOOD}\n```", "not only JSON"),
        (f"{GOOD}{GOOD}", "not only JSON"),
        (GOOD.replace('"', "'"), "not only JSON"),
        (GOOD.replace("}", ",}"), "not only JSON"),
        ("", "not only JSON"),
        (f"{GOOD}\n", "space around it"),
        (f" {GOOD}", "space around it"),
        (f"[{GOOD}]", "not an object"),
        ('[["name", "Ann Lee"], ["age", 41], ["city", "Rome"]]', "not an object"),
        ('"Ann Lee"', "not an object"),
        (GOOD.replace("}", ', "country": "Italy"}'), "wrong keys"),
        (GOOD.replace("}", ', "age": 41}'), "wrong keys"),
        ('{"name": "Ann Lee", "age": 41}', "wrong keys"),
        (GOOD.replace("name", "Name"), "wrong keys"),
        (GOOD.replace("41", '"41"'), "age not a number"),
        (GOOD.replace("41", "41.0"), "age not a number"),
        (GOOD.replace("41", "true"), "age not a number"),
        (GOOD.replace("41", "null"), "age not a number"),
        (GOOD.replace("41", "42"), "wrong value"),
        (GOOD.replace("Rome", "rome"), "wrong value"),
        (GOOD.replace('"Rome"', '{"name": "Rome"}'), "wrong value"),
        (GOOD.replace('"Ann Lee"', "null"), "wrong value"),
    ],
)
def test_faults_are_named(reply: str, fault: str) -> None:
    assert task.fault(reply, ANN) == fault


def test_a_reply_without_its_end_is_never_valid() -> None:
    assert task.fault(GOOD, ANN, finished=False) == "not finished"


def test_people_are_distinct_and_the_same_every_time() -> None:
    people = task.people("train", 200)
    assert len({person.name for person in people}) == 200
    assert people == task.people("train", 200)
    assert people != task.people("train", 200, seed=1)
    with pytest.raises(ValueError, match="count=1000"):
        task.people("eval", 1000)


def test_each_sentence_says_everything() -> None:
    texts = [task.prompt(ANN, number)[0]["content"] for number in range(len(task.SENTENCES))]
    assert len(set(texts)) == len(task.SENTENCES)
    assert all(word in text for text in texts for word in ("Ann Lee", "41", "Rome"))


def test_pairs_use_no_reply_twice_and_none_that_was_cut_off() -> None:
    other, bad, worse = GOOD.replace(", ", ","), "Ann Lee", "Rome"
    replies = [
        Reply(bad, True, []),
        Reply(GOOD, True, []),
        Reply(GOOD, True, []),
        Reply(bad, True, []),
        Reply(other, False, []),
        Reply("unfinished", False, []),
    ]
    (pair,) = pairs_of(ANN, task.prompt(ANN, 0), replies)
    assert pair["chosen"] == [{"role": "assistant", "content": GOOD}]
    assert pair["rejected"] == [{"role": "assistant", "content": bad}]
    assert pair["fault"] == "not only JSON"
    more = [*replies, Reply(other, True, []), Reply(worse, True, [])]
    assert [row["chosen"][0]["content"] for row in pairs_of(ANN, [], more)] == [GOOD, other]


@pytest.mark.parametrize("path", [task.PAIRS, task.EVAL_PAIRS], ids=lambda path: path.stem)
def test_shipped_pairs_are_what_the_verifier_says(path) -> None:
    rows = task.read_rows(path)
    assert len(rows) >= 16
    for row in rows:
        person = task.Person(row["name"], row["age"], row["city"])
        assert row["prompt"] in [task.prompt(person, n) for n in range(len(task.SENTENCES))]
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        assert task.fault(chosen["content"], person) is None
        assert task.fault(rejected["content"], person) == row["fault"]
        assert row["fault"] not in (None, "not finished")
    assert len({json.dumps([r["prompt"], r["chosen"], r["rejected"]]) for r in rows}) == len(rows)


def test_training_and_evaluation_share_no_name_and_no_city() -> None:
    for words in (task.FIRST_NAMES, task.LAST_NAMES, task.CITIES):
        assert not set(words["train"].split()) & set(words["eval"].split())
    train, held_out = task.read_rows(task.PAIRS), task.read_rows(task.EVAL_PAIRS)
    for column in ("name", "city"):
        assert not {row[column] for row in train} & {row[column] for row in held_out}
    evaluated = {person.name for person in task.people("eval", task.EVAL_PEOPLE)}
    assert {row["name"] for row in held_out} <= evaluated
    assert not {row["name"] for row in train} & evaluated
