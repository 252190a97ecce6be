"""The benchmark of contexts: what it counts, and that a case runs by itself."""

from __future__ import annotations

import json

import pytest
import torch

from bench.harness import RESULTS
from bench.long_context import LiveBytes, cases, main, markdown, planned
from fastpo.optional import OLDEST_TRANSFORMERS
from tests.planner.test_memory import case


def test_live_bytes_counts_storages_once() -> None:
    held = torch.ones(1000)
    with LiveBytes([held]) as counted:
        held.view(10, 100)  # no storage of its own
        a = held * 2
        b = a.view(-1) + 1
        del a
        c = b.exp()
    assert counted.peak == 2 * 4000
    assert counted.live == 2 * 4000
    del b, c
    assert counted.live == 0


def test_a_case_runs_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)
    given = {**case("llama", "lora", offload=True), "context": 256}
    main(["--case", json.dumps(given)])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["fits"]
    assert facts["tokens"] == 192 + 3 * 64
    assert facts["host_bytes"] == pytest.approx(planned(given).host["layer inputs"], rel=0.01)


def test_the_docs_have_the_records_table() -> None:
    record = json.loads((RESULTS / "cpu-2-cores" / "long_context.json").read_text())
    page = RESULTS.parents[1] / "docs" / "long-context.md"
    assert markdown(record) in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_of_the_grid_can_be_planned(device: str) -> None:
    grid = cases(torch.device(device))
    assert len({json.dumps(c) for c in grid}) == len(grid)
    for given in grid[:: len(grid) // 4]:
        assert planned(given).peak > 2**30
