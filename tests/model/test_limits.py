"""What token ids and positions a model takes, and what is said of those that it does not."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastpo.model.limits import Positions, Vocabulary, vocabulary_size
from tests.train import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 100,
}
GPTJ: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 64}


def positions(model_type: str, **options: Any) -> Positions:
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **options)
        return Positions.of(AutoModelForCausalLM.from_config(config))


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


# Each kind of rope scaling, families that name the limit otherwise, tables and none.
@pytest.mark.parametrize(
    ("model_type", "options", "limit", "table"),
    [
        ("llama", SIZES, 100, False),
        ("llama", SIZES | rope("linear", factor=4.0), 400, False),
        ("llama", SIZES | rope("dynamic", factor=2.0), 200, False),
        (
            "llama",
            SIZES | rope("yarn", factor=8.0, original_max_position_embeddings=100),
            800,
            False,
        ),
        (
            "llama",
            SIZES | rope("yarn", factor=5.0, original_max_position_embeddings=20),
            100,
            False,
        ),
        (
            "llama",
            SIZES | rope("llama3", factor=8.0, original_max_position_embeddings=10, **LLAMA3),
            100,
            False,
        ),
        (
            "gemma3_text",
            SIZES
            | {
                "head_dim": 8,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            100,
            False,
        ),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 100}, 100, True),
        ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, 100, True),
        ("gptj", GPTJ | {"n_positions": 100}, 100, True),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}, None, False),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}, None, False),
        ("nemotron_h", {"max_position_embeddings": 100, "vocab_size": 64}, None, False),
    ],
    ids=str,
)
def test_how_far_positions_reach(
    model_type: str, options: dict[str, Any], limit: int | None, table: bool
) -> None:
    found = positions(model_type, **options)
    assert (found.limit, found.table) == (limit, table)
    assert found.beyond(10**9) is (limit is not None)
    assert limit is None or not found.beyond(limit)


def test_a_table_is_where_a_longer_row_fails() -> None:
    for model_type, options in (("gptj", GPTJ), ("gpt2", GPTJ), ("llama", SIZES)):
        config = AutoConfig.for_model(model_type, **{**options, "max_position_embeddings": 20})
        model = AutoModelForCausalLM.from_config(config)
        ids = torch.ones(1, 21, dtype=torch.long)
        if Positions.of(model).table:
            with pytest.raises((IndexError, RuntimeError), match=r"range|bounds"):
                model(input_ids=ids)
        else:
            model(input_ids=ids)


def test_the_longest_row_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    groups = tiny.groups(6)
    groups[3].prompt_ids = np.full(200, 5, np.int32)
    size = 200 + groups[3].longest
    groups[4].prompt_ids = np.full(150, 5, np.int32)
    found = Positions.of(tiny.model(max_position_embeddings=120))
    with caplog.at_level(logging.WARNING):
        found.check_groups(groups[:3])
        assert not caplog.records
        found.check_groups(groups)
    assert found.warned
    said = f"tiny.jsonl, row 3: {size} tokens of prompt and response, llama was made for 120: lower"
    assert [r.getMessage().startswith(said) for r in caplog.records] == [True]
    assert "max_position_embeddings" in caplog.text


def test_the_prompt_of_the_reference_counts(caplog: pytest.LogCaptureFixture) -> None:
    (group,) = tiny.groups(1)
    long = replace(group, short_prompt_ids=np.full(300, 5, np.int32))
    found = Positions.of(tiny.model(max_position_embeddings=120))
    with caplog.at_level(logging.WARNING):
        found.check_groups([group])
        assert not caplog.records
        found.check_groups([long])
    assert f"{300 + group.longest} tokens" in caplog.text


def test_the_shortest_of_two_models_rules() -> None:
    short, long = (tiny.model(max_position_embeddings=n) for n in (50, 90))
    assert Positions.of(long, None, short).limit == 50
    assert Positions.of(long, None).limit == 90


def test_whose_embedding_is_too_small() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    small, large = tiny.model(), tiny.model(vocab_size=tiny.VOCAB + 1)
    Vocabulary.of(tokenizer, large).check([tiny.VOCAB], "here")
    for models, owner in (((small, large), "the model"), ((large, small), "the reference")):
        with pytest.raises(ValueError, match=r"embedding") as caught:
            Vocabulary.of(tokenizer, *models).check([3, tiny.VOCAB], "a file, row 2")
        assert str(caught.value).startswith(
            f"a file, row 2: token {tiny.VOCAB} of the rows is beyond {owner}'s embedding of "
            f"{tiny.VOCAB} rows (it is '<new>', of a tokenizer with {tiny.VOCAB + 1} tokens): name "
        )
        assert "resize_embeddings: true" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_head_with_fewer_rows_than_the_embedding_counts() -> None:
    model = tiny.model()
    model.lm_head = torch.nn.Linear(32, 100, bias=False)
    assert Vocabulary.of(tiny.tokenizer(), model).rows == 100


def test_ids_with_gaps_need_rows_up_to_the_last() -> None:
    class Gaps(dict):
        def get_vocab(self) -> dict[str, int]:
            return self

    assert vocabulary_size(Gaps(a=0, b=9)) == 10
    assert vocabulary_size(tiny.tokenizer()) == tiny.VOCAB
