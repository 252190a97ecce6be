"""Do these groups have what an objective compares? Asked once, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fastpo.data.columns import CONTEXT_ROLES
from fastpo.data.groups import Group
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.objectives.domain import Domain

Grades = Sequence[tuple[str, Domain]]
"""Of every component of a loss that takes grades its name, and what they must be."""


def check_fit(
    loss: PreferenceLoss, groups: Iterable[Group], *, reference_prompt: str = "prompt"
) -> None:
    """Nothing, or the first group that the objective or its reference cannot take.

    Raises:
        ValueError: names source and row, what is missing, and what to do about it.
    """
    needs, grades = loss.needs, loss.grade_domains
    for group in groups:
        reason = _misfit(loss, needs, group)
        if reference_prompt != "prompt" and group.short_prompt_ids is None:
            reason = f"reference_prompt={reference_prompt!r} needs a `short_prompt` of every row"
        if reason is not None:
            raise ValueError(f"{_named(group)}: {reason}")
        check_grades(grades, group)


def check_grades(grades: Grades, group: Group) -> None:
    """ValueError, with source and row, for a grade outside the domain of an objective."""
    for name, domain in grades:
        for response in group.responses:
            if response.score is not None and not domain.holds(response.score):
                raise ValueError(
                    f"{_named(group)}: {name} takes grades that are {domain}, got "
                    f"{response.score:g}: rescale the `scores` column"
                )


def doubts(
    loss: PreferenceLoss, groups: Sequence[Group], *, seen: int, whole: bool = True
) -> Iterator[str]:
    """What the objective can take, and will hardly learn from: a sentence each, with a remedy.

    Args:
        loss: the objectives.
        groups: the groups that are trained on.
        seen: groups that a batch statistic is of.
        whole: whether those are all groups, not the first ones of a stream.
    """
    rows = f"{len(groups)} rows" if whole else f"the first {len(groups)} rows"
    names = " + ".join(c.objective.name for c in loss.components)
    compares = any(c.objective.family != "point" for c in loss.components)
    tied = [g for g in groups if compares and _tied(g, by_score="score" in loss.needs)]
    if tied:
        yield (
            f"{len(tied)} of {rows} grade all their responses alike, the first is "
            f"{_named(tied[0])}: {names} finds no preference in them; leave them out, or grade "
            "finer"
        )
    labels = {bool(response.label) for group in groups for response in group.responses}
    for component in loss.components:
        objective = component.objective
        for label in objective.labels:
            if label not in labels:
                kind, other = ("desirable", "undesirable")[:: 1 if label else -1]
                yield (
                    f"of {rows} no response is {kind}, all are {other}: {objective.name} needs "
                    f"some of which `label` is {str(label).lower()}"
                )
        if objective.statistics and seen == 1:
            yield (
                f"{objective.name} takes {', '.join(objective.statistics)} from batches of one "
                "group: raise per_device_train_batch_size, or set batch_statistics to exact and "
                "raise gradient_accumulation_steps"
            )
    if "cohort" in loss.needs and len({group.cohort for group in groups}) == 1:
        yield (
            f"all of {rows} are of one population: {names} needs rows whose `group` columns "
            "differ, else it is dpo"
        )


def _tied(group: Group, *, by_score: bool) -> bool:
    """Whether several candidates have one rank, or one grade where that counts."""
    several = len(group.responses) > 1
    ranks, scores = ({getattr(r, of) for r in group.responses} for of in ("rank", "score"))
    return several and ((len(ranks) == 1 and None not in ranks) or (by_score and len(scores) == 1))


def _named(group: Group) -> str:
    return f"{group.source or 'rows'}, row {group.row}"


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
            column = f", from a `{CONTEXT_ROLES[role][0]}` column" if role in CONTEXT_ROLES else ""
            return f"{names} needs a {role!r} response of every row{column}"
    return None
