r"""Follow-up likelihood: what the user would say next is a grade of what was said.

$$\mathrm{mean}_{f \in F^+}\,\bar\ell(f) - \mathrm{mean}_{f \in F^-}\,\bar\ell(f)$$

with $\bar\ell(f)$ the mean log-probability of the tokens of $f$ as the user's next turn after
response y to prompt x; $F^+$ are praises and $F^-$ complaints of the six kinds of the paper. The
official script averages logits one position off; this is the paper's likelihood.
Paper: https://arxiv.org/abs/2409.13948

A response becomes a prompt and its follow-ups the responses of one group, so that however many
there are, the conversation before them is computed once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastpo.data.groups import Group, Response
from fastpo.reading import read_text


class FollowUps(NamedTuple):
    """Hold utterances of a user who is content, and of one who is not."""

    positive: Sequence[str]
    negative: Sequence[str]


# Understanding, relevance, correctness, engagement, information, instructions: two of each. Our
# wording; the authors' 120 are in utils.py of their repository, e0397123/FLR.
FOLLOW_UPS = FollowUps(
    positive=(
        "You understood exactly what I meant.",
        "Now it makes sense to me.",
        "That is just what I was asking about.",
        "Yes, this answers my question.",
        "That is correct.",
        "You got the facts right.",
        "That was a pleasure to read.",
        "How interesting, tell me more!",
        "I learned a lot from this.",
        "Thank you for the useful details.",
        "You did precisely what I asked for.",
        "Great, you followed my instructions.",
    ),
    negative=(
        "You did not understand what I meant.",
        "This makes no sense to me.",
        "That is not what I was asking about.",
        "No, this does not answer my question.",
        "That is wrong.",
        "You got the facts wrong.",
        "That was dull to read.",
        "How boring, let us talk about something else.",
        "I learned nothing from this.",
        "This is too vague to be of use.",
        "You did not do what I asked for.",
        "You ignored my instructions.",
    ),
)


def read_follow_ups(path: str) -> FollowUps:
    """Read utterances from JSON `{"positive": [...], "negative": [...]}`; "" is `FOLLOW_UPS`.

    Raises:
        ValueError: the file is no such object.
    """
    if not path:
        return FOLLOW_UPS
    text = read_text(path)
    try:
        utterances = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error

    def texts(name: str) -> list[str]:
        each = utterances.get(name) if isinstance(utterances, dict) else None
        if isinstance(each, list) and each and all(isinstance(t, str) and t for t in each):
            return each
        raise ValueError(
            f"{path}: `{name}` must be a list of texts and not empty; the file is "
            '{"positive": [...], "negative": [...]}'
        )

    return FollowUps(texts("positive"), texts("negative"))


def next_turns(tokenizer: PreTrainedTokenizerBase, utterances: Sequence[str]) -> list[Response]:
    """Encode what follows a response where the user then says this; the utterance is scored.

    By the chat template: the answer's end of turn, the user's header and the utterance. Without
    one the utterance is the next line.

    Raises:
        ValueError: the template does not write the utterance as it stands.
    """
    probe, turns = "probe", []
    for utterance in utterances:
        text = f"{probe}\n{utterance}"
        if tokenizer.chat_template:
            messages = [("user", "x"), ("assistant", probe), ("user", utterance)]
            text = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages], tokenize=False
            )
        after = str(text).partition(probe)[2]
        start = after.rfind(utterance)
        if start < 0:
            raise ValueError(f"the chat template does not write {utterance!r} as a user's turn")
        encoded = tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
        begin, end = np.array(encoded["offset_mapping"]).T
        length = int((begin < start + len(utterance)).sum())  # what closes the turn is left out
        ids = np.asarray(encoded["input_ids"][:length], np.int32)
        turns.append(Response(ids, end[:length] > start))
    return turns


def followed_up(group: Group, turns: Sequence[Response], eos: int | None) -> list[Group]:
    """Return a group a candidate: the conversation up to its last word, and the turns behind."""
    opening = turns[0].input_ids[~turns[0].loss_mask]
    groups = []
    for response in group.responses:
        ids = response.input_ids
        # The turns begin with the end of the answer, which the answer has already.
        ends = (n for n in range(len(opening), 0, -1) if np.array_equal(ids[-n:], opening[:n]))
        twice = next(ends, int(len(ids) > 0 and ids[-1] == eos))
        prompt = np.concatenate([group.prompt_ids, ids[: len(ids) - twice]])
        groups.append(Group(prompt, list(turns), row=group.row, source=group.source))
    return groups
