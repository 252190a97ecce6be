"""The task of `make demo`: one sentence about a person in, one JSON object out, judged exactly.

A reply is valid when all of it is one JSON object with exactly the keys name, age and city and
exactly the person's values (age a number), and the model ended it by itself. The model's own
samples judged this way are the preferences: valid is chosen, anything else rejected. No first
name, last name or city of the evaluation occurs in training.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("data")
PAIRS = DATA / "json_person_pairs.jsonl"
EVAL_PAIRS = DATA / "json_person_eval_pairs.jsonl"

MAX_NEW_TOKENS = 64  # a valid reply takes 20 to 40; what is longer fails as unfinished
EVAL_PEOPLE = 24
TEMPERATURE = 0.7  # of the samples that made the pairs, and of the evaluation

INSTRUCTION = (
    "Reply with a JSON object with the keys name (string), age (number) and city (string), "
    "and nothing else."
)
SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "In {city} lives {name}, aged {age}.",
)

# Words that are one token each: the task is the form of the answer, not the spelling of rare names.
FIRST_NAMES = {
    "train": (
        "Ahmed Alice Amy Ana Anna Antonio Boris Carlos Charlotte Chen Claire Daniel Diego Emma "
        "Erik Fernando Giovanni Grace Hannah Hans Hassan Henry Ian Isabel Ivan James Jin "
        "Joseph Julia Karen Karl Kim Lars Laura Li Lucas Luis Marco Maria Martin Mei Michael "
        "Mohammed Nicole Nina Noah Oliver Omar Pablo Pedro Raj Rosa Ruth Samuel Sofia Stephen "
        "Thomas Vera Victor Wei"
    ),
    "eval": "Aaron Bruce Diana Emily George Helen Jack Linda Max Olivia Peter Sarah",
}
LAST_NAMES = {
    "train": (
        "Adams Ali Anderson Bailey Bennett Berg Brown Carter Clark Cohen Costa Davis Evans "
        "Fischer Garcia Gray Green Hansen Harris Jackson Johnson Khan King Klein Kumar Lee "
        "Levy Liu Lopez Martinez Meyer Miller Moore Nelson Park Patel Rivera Rodriguez Ross "
        "Santos Schneider Silva Singh Smith Torres Wagner Wang Weber Wolf Zhang"
    ),
    "eval": "Baker Cooper Edwards Foster Hill Murphy Roberts Taylor Walker White",
}
CITIES = {
    "train": (
        "Amsterdam Athens Baghdad Beijing Berlin Boston Brussels Budapest Cairo Copenhagen "
        "Dallas Denver Dubai Dublin Geneva Havana Helsinki Istanbul Kyoto Lima Lisbon Madrid "
        "Melbourne Miami Milan Moscow Mumbai Munich Nairobi Naples Oslo Oxford Portland Prague "
        "Santiago Seoul Shanghai Singapore Sydney Tehran Tokyo Vancouver Vienna Warsaw Zurich"
    ),
    "eval": "Chicago Delhi Hamburg Houston London Montreal Paris Rome Stockholm Toronto",
}


@dataclass(frozen=True)
class Person:
    """What a sentence says and the reply must repeat."""

    name: str
    age: int
    city: str


def people(split: str, count: int, *, seed: int = 0) -> list[Person]:
    """`count` people of the split ("train" or "eval"), no name twice, the same ones every time."""
    firsts, lasts = FIRST_NAMES[split].split(), LAST_NAMES[split].split()
    names = [f"{first} {last}" for first in firsts for last in lasts]
    if not 0 <= count <= len(names):
        raise ValueError(f"count={count}: the {split} lists make {len(names)} different names")
    cities = CITIES[split].split()
    rng = random.Random(f"{split} {seed}")
    return [
        Person(name, rng.randint(18, 89), rng.choice(cities)) for name in rng.sample(names, count)
    ]


def prompt(person: Person, number: int) -> list[dict[str, str]]:
    """The conversation so far: one user message; `number` turns through the sentence forms."""
    sentence = SENTENCES[number % len(SENTENCES)].format(**asdict(person))
    return [{"role": "user", "content": f"{sentence}\n\n{INSTRUCTION}"}]


def fault(reply: str, person: Person, *, finished: bool = True) -> str | None:
    """What is wrong with a reply, in two or three words; None when it is valid.

    Args:
        reply: the decoded reply without its end-of-sequence token.
        person: what the prompt said.
        finished: whether the model ended the reply by itself.
    """
    if not finished:
        return "not finished"
    try:
        pairs = json.loads(reply, object_pairs_hook=_Pairs)
    except ValueError:
        return "not only JSON"
    if reply != reply.strip():
        return "space around it"
    if not isinstance(pairs, _Pairs):
        return "not an object"
    if sorted(key for key, _ in pairs) != ["age", "city", "name"]:
        return "wrong keys"
    found = dict(pairs)
    if type(found["age"]) is not int:  # bool is an int to isinstance; 41.0 == 41
        return "age not a number"
    return None if found == asdict(person) else "wrong value"


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its repeated keys, which a dict would hide."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
