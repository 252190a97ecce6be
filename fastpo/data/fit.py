"""Do these groups have what an objective compares? Asked once, before the first step."""

from __future__ import annotations

from collections.abc import Iterable

from fastpo.data.formats import CONTEXTS
from fastpo.data.groups import Group
from fastpo.loss import PreferenceLoss


def check_fit(
    loss: PreferenceLoss, groups: Iterable[Group], *, reference_prompt: str = "prompt"
) -> None:
    """Nothing, or the first group that the objective or its reference cannot take.

    Raises:
        ValueError: names source and row, what is missing, and what to do about it.
    """
    needs = loss.needs
    for group in groups:
        reason = _misfit(loss, needs, group)
        if reference_prompt != "prompt" and group.short_prompt_ids is None:
            reason = f"reference_prompt={reference_prompt!r} needs a `short_prompt` of every row"
        if reason is not None:
            raise ValueError(f"{group.source or 'rows'}, row {group.row}: {reason}")


def _misfit(loss: PreferenceLoss, needs: frozenset[str], group: Group) -> str | None:
    count = len(group.responses)
    for component in loss.components:
        if not component.objective.takes(count):
            return component.objective.size_error(count, "the row")
    names = " + ".join(c.objective.name for c in loss.components)
    if "score" in needs and any(r.score is None for r in group.responses):
        return f"{names} needs a grade of every response: a `scores` column (higher is better)"
    if "margin" in needs and group.margin is None:
        return f"{names} needs a `margin` column: how much better the chosen response is"
    if "cohort" in needs and group.cohort is None:
        return f"{names} needs a `group` column: the population that the row comes from"
    if "token_rewards" in needs and any(r.token_rewards is None for r in group.responses):
        return (
            f"{names} needs a `token_rewards` column, a signed number for every token: "
            "`fastpo weigh --rule treg` writes one"
        )
    for role in loss.extras:
        if role not in group.extras:
            column = f", from a `{CONTEXTS[role][0]}` column" if role in CONTEXTS else ""
            return f"{names} needs a {role!r} response of every row{column}"
    return None
