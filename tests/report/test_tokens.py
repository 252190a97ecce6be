"""The page that colours every token by its reward."""

from __future__ import annotations

import re
from pathlib import Path

from fastpo.report.tokens import TokenRow, write_page
from tests.report.runs import HOSTILE, Page


def row(tokens: list[str], rewards: list[float], source: str = "s") -> TokenRow:
    values = [sum(rewards[: i + 1]) for i in range(len(rewards))]
    return {"source": source, "row": 3, "response": 0, "label": False, "reward": values[-1],
            "ids": [0] * len(tokens), "tokens": tokens, "rewards": rewards,
            "values": values}  # fmt: skip


def test_tokens_stand_as_they_were_written_in_their_colours(tmp_path: Path) -> None:
    path = tmp_path / "t.html"
    write_page(path, [row(["It", " is", "\n", "5"], [0.0, -1.0, 0.5, 1.0])], 7)
    page = Page(path.read_text())
    (body,) = re.findall(r'<div class="text tokens">(.*?)</div>', path.read_text(), re.S)
    assert re.sub("<[^>]*>", "", body) == "It is\n5"
    shades = re.findall(r"var\(--(.)\) (\d+)%", body)
    assert shades == [("b", "0"), ("b", "70"), ("a", "35"), ("a", "70")]
    assert "reward +0.5000, sum -0.5000" in dict.fromkeys(v for _, v in page.attributes)
    assert "The first 1 of 7 groups." in "".join(page.text)
    assert "s, row 3, response 0, rejected: reward +0.500" in page.text


def test_hostile_tokens_and_names_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "t.html"
    write_page(path, [row([HOSTILE], [1.0], source=HOSTILE)], 1)
    page = Page(path.read_text())
    assert not {"script", "img"} & set(page.tags)
    assert "".join(page.text).count(HOSTILE) == 2


def test_no_rows_make_a_page(tmp_path: Path) -> None:
    write_page(tmp_path / "t.html", [], 0)
    assert "The first 0 of 0 groups." in (tmp_path / "t.html").read_text()
