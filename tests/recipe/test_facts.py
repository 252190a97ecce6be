"""What is said about a run."""

from __future__ import annotations

from fastpo.recipe.facts import step_words


def test_what_becomes_of_groups_that_fill_no_step() -> None:
    batch = {"groups": 3, "accumulated": 2, "ranks": 2}
    said = "3 groups a device x 2 accumulated x 2 ranks = 12 groups a step; drop_last is "
    assert step_words(batch, False, 25) == said + "off, an epoch's last 1 are a smaller step"
    assert step_words(batch, True, 29) == said + "on, an epoch's last 5 are left out"
    assert step_words(batch, True, None) == said + "on"
