"""What is a secret, what is not, and that neither keys nor texts let one through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from peft import LoraConfig

from fastpo.objectives import OBJECTIVES
from fastpo.recipe.keys import fields_of_recipe
from fastpo.redact import REDACTED, is_secret, redact


@pytest.mark.parametrize(
    "key",
    [
        "hub_token",
        "token",
        "HF_TOKEN",
        "use_auth_token",
        "accessToken",
        "api-key",
        "OPENAI_API_KEY",
        "apiKey",
        "db_passwd",
        "aws_secret_access_key",
        "password",
        "authorization",
        "credentials",
        "a.hub_token",
        "user_token",
        "new_token",
        "dpo.api_key",
    ],
)
def test_secret_keys(key: str) -> None:
    assert is_secret(key)
    assert redact({"a": [{key: "xyzzy-plugh-42"}], "b": "so xyzzy-plugh-42 it is"}) == {
        "a": [{key: REDACTED}],
        "b": f"so {REDACTED} it is",
    }


@pytest.mark.parametrize(
    "key",
    [
        "eos_token",
        "pad_token",
        "bos_token_id",
        "image_token",
        "sample_tokens",
        "max_new_tokens",
        "token_weights",
        "loss_per_token",
        "tokenizer",
        "token_masks",
        "hub_private_repo",
        "num_tokens",
    ],
)
def test_keys_that_are_none(key: str) -> None:
    assert not is_secret(key)
    assert redact({key: "</s> and more"}) == {key: "</s> and more"}


def test_only_the_hub_token_is_a_secret_of_ours() -> None:
    ours = [*fields_of_recipe(), *(h for o in OBJECTIVES.values() for h in o.hyper)]
    assert [name for name in ours if is_secret(name)] == ["hub_token"]
    assert not [f.name for f in dataclasses.fields(LoraConfig) if is_secret(f.name)]
    for objective in OBJECTIVES.values():
        assert redact(objective.formula) == objective.formula


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("train r.yaml --hub_token ab --beta 1", "train r.yaml --hub_token <redacted> --beta 1"),
        ('--a \'{"api_key": "zz"}\' -x', '--a \'{"api_key": "<redacted>"}\' -x'),
        ("--password=ab c", "--password=<redacted> c"),
        ("https://me:p@ss@host/x?token=ab&y=1", "https://<redacted>@host/x?token=<redacted>&y=1"),
        ("https://host/x?X-Amz-Signature=9&b", "https://host/x?X-Amz-Signature=<redacted>&b"),
        ("postgres://a:b@host/db", "postgres://<redacted>@host/db"),
        ("hub_token = 12345 (int), not text", "hub_token = <redacted> (int), not text"),
        ("see hf_ABCdefGHI1234567890abc.", "see <redacted>."),
        ("sk-abcdefghijklmnop1234", "<redacted>"),
        ("of eyJhbGciOiJub25lIn0.eyJzdWIiOiJtZSJ9. here", "of <redacted> here"),
        ("see .hub_token=ab", "see .hub_token=<redacted>"),
        ("1hub_token: ab", "1hub_token: <redacted>"),
        ("-https://me:pw@host", "-https://<redacted>@host"),
        ("hub_token=[ab, cd\nx", "hub_token=<redacted>\nx"),
        ("hub_token = b'ab' (bytes)", "hub_token = <redacted> (bytes)"),
        ("--hub_token: hub_token = ab", "--hub_token: hub_token = <redacted>"),
        ("//me:pw@host/x", "//<redacted>@host/x"),
    ],
)
def test_texts(text: str, left: str) -> None:
    assert redact(text) == left


def test_words_of_a_command_line() -> None:
    words = ["a.yaml", "--hub_token", "a'b", "--x", '--my_api_key=c"d', "e", "--x", "-pwd", "f"]
    assert redact(words) == [
        *("a.yaml", "--hub_token", REDACTED, "--x", f"--my_api_key={REDACTED}", REDACTED),
        *("--x", "-pwd", REDACTED),
    ]


def test_a_path_that_was_an_address() -> None:
    told = redact(
        ["https://me:xyzzy-plugh-43@host/x", "no file /home/https:/me:xyzzy-plugh-43@host"]
    )
    assert told[1] == f"no file /home/https:/{REDACTED}@host"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/key",
        "ssh://git@github.com/x",
        "/data/hf_checkpoints/model",
        "b94d27b9934d3e08a52e52d7da7dabfac484efe3",
        "the token: it ends a response",
        "mail a@b.com or http://x.y/@z",
        "--hub_token --push_to_hub true",
        "--hf_token: unknown key 'hf_token'",
        "hub_token=None",
        "a task-force-of-some-more-words",
    ],
)
def test_texts_without_a_secret(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("value", [None, True])
def test_what_a_key_does_not_hide(value: Any) -> None:
    assert redact({"token": value}) == {"token": value}


@pytest.mark.parametrize("piece", ["x", ".", "a.", "sk-", "-eyJ", "a:", "ssh://a@", "secret=[ "])
def test_a_long_text_is_read_once(piece: str) -> None:
    """A pattern that looks ahead from each place of it would take hours."""
    length = 1 << 20
    secret = "secret_token=swordfish-1"
    found = redact(f"{piece * (length // len(piece))}\n{secret}")
    assert found.endswith(f"secret_token={REDACTED}")
