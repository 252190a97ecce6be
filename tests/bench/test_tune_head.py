"""The tuner's search, choice and table writing, on a clock that is made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import tune_head
from bench.tune_head import MARGIN, Regime, candidates, changes, regimes, render, rewrite, search
from bench.tune_head import updated as updated_rows
from fastpo.kernels import launch_table
from fastpo.kernels.launch_table import MEASURED, TABLE, launch
from fastpo.kernels.tile import Config

CURRENT, OTHER, THIRD = Config(64, 64, 32), Config(128, 64, 32), Config(64, 128, 32)


class Clock:
    """Seconds of each configuration, the same in every round; notes who was timed how often."""

    def __init__(self, seconds: dict[Config, float]) -> None:
        self.seconds, self.asked = seconds, []

    def __call__(self, runs, rounds):
        self.asked.append((list(runs), rounds))
        assert [run() for run in runs.values()] == list(runs)  # each call runs its own
        return {config: [self.seconds[config]] * rounds for config in runs}


def found(seconds: dict[Config, float], wrong=lambda config: None, tried=None):
    clock = Clock(seconds)
    chosen, last, refused = search(CURRENT, tried or seconds, lambda c: c, wrong, clock, 7)
    return chosen, last, refused, clock


def test_the_fastest_right_one_wins():
    chosen, last, refused, _ = found({CURRENT: 1.0, OTHER: 0.8, THIRD: 0.5})
    assert chosen == THIRD
    assert last == {CURRENT: 1.0, OTHER: 0.8, THIRD: 0.5}
    assert refused == {}


def test_noise_changes_nothing():
    chosen, *_ = found({CURRENT: 1.0, OTHER: 1.0 - MARGIN / 2})
    assert chosen == CURRENT
    chosen, *_ = found({CURRENT: 1.0, OTHER: 1.0 - 2 * MARGIN})
    assert chosen == OTHER


def test_a_wrong_one_is_never_timed():
    def wrong(config: Config) -> str | None:
        return "logps is off by 3" if config == THIRD else None

    chosen, last, refused, clock = found({CURRENT: 1.0, OTHER: 0.8, THIRD: 0.5}, wrong)
    assert chosen == OTHER
    assert THIRD not in last
    assert refused == {THIRD: "logps is off by 3"}
    assert all(THIRD not in configs for configs, _ in clock.asked)


def test_what_does_not_fit_the_chip_is_left_out():
    from triton.runtime.errors import OutOfResources

    def wrong(config: Config) -> None:
        if config == OTHER:
            raise OutOfResources(300000, 232448, "shared memory")

    chosen, _, refused, _ = found({CURRENT: 1.0, OTHER: 0.8}, wrong)
    assert chosen == CURRENT
    assert "shared memory" in refused[OTHER]


def test_a_table_that_is_wrong_is_no_baseline():
    with pytest.raises(RuntimeError, match="is wrong: NaN"):
        found({CURRENT: 1.0}, lambda config: "NaN")


def test_only_the_best_and_the_table_run_for_long():
    many = {replace(OTHER, stages=i): 2.0 - i / 100 for i in range(2, 12)}
    _, last, _, clock = found({CURRENT: 3.0} | many)
    (first, rounds), (finalists, more) = clock.asked
    assert len(first) == 11
    assert rounds < more == 7
    assert finalists[0] == CURRENT
    assert finalists == list(last)
    assert {c.stages for c in finalists[1:]} == {8, 9, 10, 11}


def test_every_regime_has_candidates_that_a_thread_can_hold():
    found = regimes(tma=True)
    assert {r.kernel for r in found} == set(TABLE)
    assert len(set(found)) == len(found)
    assert not any("pointers" in r.words for r in regimes(tma=False))
    for regime in found:
        tried = candidates(regime, tma=True)
        assert len(tried) == len(set(tried)) > 10
        for c in tried:
            assert c.BN * c.BV / (32 * c.warps) <= 128
            assert c.tma == (regime.kernel in tune_head.MATRIX_KERNELS) * (
                "pointers" not in regime.words
            )


def table_of(path: Path) -> tuple[dict, tuple]:
    spaces: dict = {"Config": Config, "Table": dict}
    exec(path.read_text().split("# <table>")[1].split("# </table>")[0], spaces)
    return spaces["TABLE"], spaces["MEASURED"]


def test_the_table_is_written_as_it_stands(tmp_path):
    source = Path(launch_table.__file__)
    path = tmp_path / "launch_table.py"
    path.write_text(source.read_text())
    rewrite(path, render(TABLE, MEASURED))
    assert path.read_bytes() == source.read_bytes()


def test_new_rows_are_found_by_the_lookup(tmp_path, monkeypatch):
    path = tmp_path / "launch_table.py"
    path.write_text(Path(launch_table.__file__).read_text())
    rows = {
        Regime("split_kernel", 16, ("rich", "narrow")): OTHER,
        Regime("epilogue_kernel", 32): THIRD,
    }
    new = updated_rows(TABLE, "sm_89", rows)
    assert changes(TABLE, new) == [
        f"split_kernel sm_89 16 rich narrow: no row -> {OTHER}",
        f"epilogue_kernel sm_89 32: no row -> {THIRD}",
    ]
    rewrite(path, render(new, (*MEASURED, "sm_89")))
    again, measured = table_of(path)
    assert again == new
    assert measured == (*MEASURED, "sm_89")
    assert all(len(line) <= 100 for line in path.read_text().splitlines())
    assert [p.name for p in tmp_path.iterdir()] == ["launch_table.py"]
    monkeypatch.setattr(launch_table, "TABLE", again)
    asked = {"rich": True, "width": 512, "described": False}
    assert launch("split_kernel", "sm_89", torch.bfloat16, **asked) == OTHER
    assert launch("epilogue_kernel", "sm_89", torch.float32) == THIRD
    assert (
        launch("split_kernel", "sm_89", torch.bfloat16, width=512)
        == TABLE["split_kernel"]["any", "16"]
    )


def test_a_file_without_marks_is_left_alone(tmp_path):
    path = tmp_path / "other.py"
    path.write_text("TABLE = {}\n")
    with pytest.raises(ValueError, match=r"other\.py lacks the marks"):
        rewrite(path, "MEASURED = ()")
    assert path.read_text() == "TABLE = {}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would tune")
def test_refuses_without_a_gpu(capsys):
    before = Path(launch_table.__file__).read_bytes()
    with pytest.raises(SystemExit, match="2"):
        tune_head.main([])
    assert "there is none" in capsys.readouterr().err
    assert Path(launch_table.__file__).read_bytes() == before
