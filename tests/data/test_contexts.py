"""Further prompts of a row: columns to groups, groups to batches, and what the reference sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastpo.data.bad_rows import BadRow
from fastpo.data.columns import CONTEXT_ROLES
from fastpo.data.dataset import build_groups
from fastpo.data.groups import Group
from fastpo.data.options import DataOptions
from fastpo.data.packing import collate, counts_of, group_key
from fastpo.data.stream import GroupStream
from tests.data.test_formats import CHAT, PAIR, user
from tests.train import tiny

ROLES = tuple(CONTEXT_ROLES)
OTHERS = {"context_prompt": "The sea is", "bare_prompt": "It is", "short_prompt": "Sky:"}
LIST = {**OTHERS, "prompt": "The sky is", "responses": [" blue.", " grey.", " green."]}


def build(row, tokenizer, extras=ROLES, **options) -> list[Group]:
    options = {"reference_prompt": "short_prompt", **options}
    return list(build_groups([row], tokenizer, DataOptions(**options), extras=extras))


# Rows to groups


def test_text_columns(tokenizers):
    tokenizer = tokenizers(adds="<s> $A")
    (group,) = build({**PAIR, **OTHERS}, tokenizer)
    assert tokenizer.decode(group.prompt_ids) == "<s>The sky is"
    assert tokenizer.decode(group.short_prompt_ids) == "<s>Sky:"
    for role, (column, slot) in CONTEXT_ROLES.items():
        response = group.extras[role]
        assert tokenizer.decode(response.prompt_ids) == f"<s>{OTHERS[column]}"
        assert response.input_ids is group.responses[slot].input_ids


def test_conversations(tokenizers):
    tokenizer = tokenizers("chatml")
    others = {name: [user(text)] for name, text in OTHERS.items()}
    (group,) = build({**CHAT, **others}, tokenizer)
    opened = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(group.short_prompt_ids) == opened.format("Sky:")
    assert tokenizer.decode(group.extras["bare_chosen"].prompt_ids) == opened.format("It is")


def test_unasked_columns_cost_nothing(tokenizers):
    (group,) = build({**PAIR, **OTHERS}, tokenizers(), (), reference_prompt="prompt")
    assert not group.extras
    assert group.short_prompt_ids is None
    bare = {**PAIR, "context_prompt": None}
    with pytest.raises(BadRow, match="row 0, field 'context_prompt': missing"):
        build({**bare, "short_prompt": "x"}, tokenizers())
    with pytest.raises(BadRow, match="row 0, field 'short_prompt': missing"):
        build(bare, tokenizers(), ())
    with pytest.raises(
        ValueError, match="reference_prompt='gold': name a column that ends with '_prompt'"
    ):
        DataOptions(reference_prompt="gold")  # pyright: ignore[reportArgumentType]


def test_pairs_of_a_list_each_have_their_rejected_response(tokenizers):
    groups = build(LIST, tokenizers(), list_to_pairs="best_rest")
    assert len(groups) == 2
    for group in groups:
        chosen, rejected = group.extras["context_chosen"], group.extras["context_rejected"]
        assert chosen.input_ids is group.responses[0].input_ids
        assert rejected.input_ids is group.responses[1].input_ids


def test_a_response_scored_again_has_the_same_token_weights(tokenizers):
    row = {**PAIR, **OTHERS, "chosen_spans": [[1, 5, 0.0]]}
    (group,) = build(row, tokenizers(), token_weights={"sampo": True})
    chosen, again = group.responses[0], group.extras["context_chosen"]
    assert chosen.token_weights is not None
    assert set(chosen.token_weights) == {0.0, 1.0}
    assert again.token_weights is chosen.token_weights


def test_further_prompts_are_cut_like_the_prompt(tokenizers):
    long = {name: 9 * text for name, text in OTHERS.items()}
    tokenizer = tokenizers(adds="<s> $A")
    (group,) = build({**PAIR, **long}, tokenizer, max_length=20)
    longest = max(len(r.input_ids) for r in group.responses)
    for prompt in (group.short_prompt_ids, group.extras["bare_chosen"].prompt_ids):
        assert len(prompt) == 20 - longest
        assert tokenizer.decode(prompt[:1]) == "<s>"
    with pytest.raises(BadRow, match=r"field 'context_prompt': .* tokens, but .* fit"):
        build({**PAIR, **long}, tokenizers(), max_length=20, truncation="error")


# Text and messages each fail in their own way: divided otherwise, empty, or of another form.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"chosen": "blue.", "rejected": "green.", "short_prompt": "The sky is "},
            "after it chosen is divided into other tokens",
        ),
        ({"short_prompt": 3}, "neither text nor a list of messages"),
        ({"short_prompt": ""}, "no tokens"),
        (
            {"prompt": None, "chosen": "a sky", "rejected": "a sea", "short_prompt": "x"},
            "stands in for a `prompt` column, which is missing",
        ),
    ],
    ids=["border", "number", "empty", "implied prompt"],
)
def test_bad_prompts_are_named(tokenizers, change, message):
    with pytest.raises(BadRow, match=f"row 0, field 'short_prompt': {message}"):
        build({**PAIR, **OTHERS, **change}, tokenizers(), ())


def test_streams_build_the_same(tokenizers):
    rows = [{**PAIR, **OTHERS}, {**PAIR, **OTHERS, "short_prompt": "Sea:"}]
    options = DataOptions(reference_prompt="short_prompt")
    whole = build_groups(rows, tokenizers(), options, extras=ROLES)
    stream = list(GroupStream(rows, tokenizers(), options, extras=ROLES))
    assert [group_key(g) for g in whole] == [group_key(g) for g in stream]
    assert group_key(whole[0]) != group_key(whole[1])


# Groups to batches

GROUPS = tiny.groups(5, extras=(*ROLES, "gold"), short_prompt=True)


def spelled_out(group: Group) -> list[Group]:
    """Every prompt as a group of its own."""
    return [
        replace(group, prompt_ids=prompt, responses=responses, extras={})
        for prompt, responses, _ in group.contexts
    ]


# A shared row and padded rows place the further prompt by different code.
@pytest.mark.parametrize("share_prompt", [True, False])
def test_another_prompt_is_packed_as_a_further_group(share_prompt):
    ours = collate(GROUPS, share_prompt=share_prompt, pad_token_id=0)
    parts = [part for group in GROUPS for part in spelled_out(group)]
    assert len(parts) == 3 * len(GROUPS)
    plain = collate(parts, share_prompt=share_prompt, pad_token_id=0)
    for name in ("input_ids", "position_ids", "attention_mask", "head_positions"):
        value, expected = getattr(ours, name), getattr(plain, name)
        assert (value is None) == (expected is None)
        assert value is None or torch.equal(value, expected)
    assert torch.equal(ours.tokens.targets, plain.tokens.targets)
    assert ours.layout == plain.layout
    assert torch.equal(ours.tokens.segments.response, plain.tokens.segments.response)
    for name in ("tokens", "unshared_tokens", "target_tokens"):
        assert getattr(ours.counts, name) == getattr(plain.counts, name)


def test_roles_point_at_their_responses_after_their_prompts():
    batch = collate(GROUPS, share_prompt=False, pad_token_id=0)
    segments = batch.tokens.segments
    assert set(segments.extras) == {*ROLES, "gold"}
    for role, numbers in segments.extras.items():
        for group, number in zip(GROUPS, numbers, strict=True):
            response = group.extras[role]
            prompt = group.prompt_ids if role == "gold" else response.prompt_ids
            row = batch.input_ids[number][batch.attention_mask[number].bool()]
            assert row.tolist() == [*prompt, *response.input_ids]
            tokens = batch.tokens.targets[segments.response == number]
            assert tokens.tolist() == response.input_ids.tolist()


def test_one_copy_of_a_prompt_serves_both_responses():
    group = tiny.groups(1, extras=("context_chosen", "context_rejected"))[0]
    chosen, rejected = group.extras["context_chosen"], group.extras["context_rejected"]
    both = len(chosen.input_ids) + len(rejected.input_ids)
    once = len(group.prompt_ids) + len(chosen.prompt_ids) + 2 * both
    assert len(group) == counts_of([group]).tokens == once
    same = replace(chosen, prompt_ids=group.prompt_ids)
    again = replace(group, extras={"context_chosen": same})  # no further copy of the group's prompt
    assert len(again) == len(group.prompt_ids) + both + len(chosen.input_ids)


def test_an_empty_prompt_is_refused():
    empty = replace(GROUPS[0].extras["bare_chosen"], prompt_ids=np.array([], dtype=np.int32))
    broken = replace(GROUPS[0], extras={**GROUPS[0].extras, "bare_chosen": empty})
    with pytest.raises(ValueError, match="row 0: the prompt has no tokens"):
        collate([broken], pad_token_id=0)


# A shared row and padded rows place the reference's prompt by different code.
@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_reference_sees_the_short_prompt_and_the_same_label_tokens(share_prompt):
    long = collate(GROUPS, share_prompt=share_prompt, pad_token_id=0)
    seen = [group.for_reference for group in GROUPS]
    short = collate(seen, share_prompt=share_prompt, pad_token_id=0)
    assert torch.equal(long.tokens.targets, short.tokens.targets)
    assert torch.equal(long.tokens.segments.response, short.tokens.segments.response)
    assert not torch.equal(long.head_positions, short.head_positions)
    for group, other in zip(GROUPS, seen, strict=True):
        assert other.prompt_ids is group.short_prompt_ids
        assert other.for_reference is other


def test_the_key_is_of_what_the_reference_sees():
    group = GROUPS[0]
    key = group_key(group)
    assert key == group_key(replace(group, prompt_ids=group.prompt_ids[1:]))
    assert key == group_key(group.for_reference)
    moved = replace(group.extras["bare_chosen"], prompt_ids=group.prompt_ids)
    changed = [
        replace(group, short_prompt_ids=None),
        replace(group, short_prompt_ids=group.short_prompt_ids[1:]),
        replace(group, extras={**group.extras, "bare_chosen": moved}),
    ]
    assert len({key, *map(group_key, changed)}) == 1 + len(changed)
