"""Follow-ups as the user's next turn: which tokens they are, and where they are joined."""

from __future__ import annotations

import numpy as np
import pytest

from fastpo.data.dataset import build_groups
from fastpo.data.options import DataOptions
from fastpo.scoring.follow_ups import FOLLOW_UPS, followed_up, next_turns

ROW = {
    "prompt": [{"role": "user", "content": "Sky?"}],
    "chosen": [{"role": "assistant", "content": "Blue."}],
    "rejected": [{"role": "assistant", "content": "Green."}],
}
SAID = ["Thank you.", "That is wrong!"]


def joined(tokenizers, template: str | None, row: dict = ROW) -> list[tuple[str, list[str]]]:
    """(whole text, scored texts) of every follow-up of every response."""
    tokenizer = tokenizers(template)
    (group,) = build_groups([row], tokenizer, DataOptions()).groups
    turns = next_turns(tokenizer, SAID)
    found = []
    for each in followed_up(group, turns, tokenizer.eos_token_id):
        for turn in each.responses:
            ids = np.concatenate([each.prompt_ids, turn.input_ids])
            found.append((tokenizer.decode(ids), tokenizer.decode(turn.input_ids[turn.loss_mask])))
    return found


# Templates that differ in how a turn ends and the user's begins.
@pytest.mark.parametrize("template", ["chatml", "chatml_bare", "bos", "llama2", "phi", "plain"])
def test_the_whole_is_what_the_template_writes(tokenizers, template: str) -> None:
    """One tokenisation of the conversation, up to the last word of the follow-up."""
    tokenizer = tokenizers(template)
    expected = []
    for side in ("chosen", "rejected"):
        for said in SAID:
            messages = [*ROW["prompt"], *ROW[side], {"role": "user", "content": said}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            expected.append((text[: text.rindex(said) + len(said)], said))
    assert joined(tokenizers, template) == expected


def test_without_a_template_it_is_the_next_line(tokenizers) -> None:
    row = {"prompt": "Sky? ", "chosen": "Blue.", "rejected": "Green."}
    assert joined(tokenizers, None, row) == [
        (f"Sky? {answer}\n{said}", said) for answer in ("Blue.", "Green.") for said in SAID
    ]


def test_a_template_that_swallows_the_turn_is_refused(tokenizers) -> None:
    tokenizer = tokenizers("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}probe"
    with pytest.raises(ValueError, match=r"does not write 'Thank you.'"):
        next_turns(tokenizer, SAID)


def test_as_much_praise_as_complaint() -> None:
    assert len(set(FOLLOW_UPS.positive)) == len(set(FOLLOW_UPS.negative)) == 12
