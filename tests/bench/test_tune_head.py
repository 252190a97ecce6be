"""The tuner's search, choice and table writing, on a clock that is made up."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from bench import ahead, harness, tune_head
from bench.head import Inputs
from bench.tune_head import (
    MARGIN,
    Found,
    Regime,
    candidates,
    changes,
    likeliest,
    regimes,
    render,
    rewrite,
    search,
)
from bench.tune_head import updated as updated_rows
from fastpo.kernels import launch_table
from fastpo.kernels.aot import TARGETS
from fastpo.kernels.launch_table import MEASURED, TABLE, launch
from fastpo.kernels.tile import INTERPRETED, Config

CURRENT, OTHER, THIRD = Config(64, 64, 32), Config(128, 64, 32), Config(64, 128, 32)


class Clock:
    """Seconds of each configuration, the same in every round; notes who was timed how often."""

    def __init__(self, seconds: dict[Config, float]) -> None:
        self.seconds, self.asked = seconds, []

    def __call__(self, runs, rounds):
        self.asked.append((list(runs), rounds))
        assert [run() for run in runs.values()] == list(runs)  # each call runs its own
        return {config: [self.seconds[config]] * rounds for config in runs}


def found(seconds: dict[Config, float], wrong=lambda config: None, spent=lambda: False):
    clock = Clock(seconds)
    chosen, last, refused, _ = search(CURRENT, seconds, lambda c: c, wrong, clock, 7, spent)
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


class PTXASError(Exception):
    """As triton's, which is no subclass of what its other stages raise."""


ERRORS = {
    "shared memory": triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
    "ptxas": PTXASError("PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:"),
    "LLVM": RuntimeError("PassManager::run failed"),
    "an assertion": AssertionError(),
    "a launch": ValueError("Triton Error [CUDA]: invalid argument"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_the_compiler_or_the_driver_refuses_is_left_out(what):
    def wrong(config: Config) -> None:
        if config == OTHER:
            raise ERRORS[what]

    chosen, _, refused, _ = found({CURRENT: 1.0, OTHER: 0.8, THIRD: 0.9}, wrong)
    assert chosen == THIRD
    said = str(ERRORS[what]).splitlines()[:1]
    assert refused == {OTHER: f"{type(ERRORS[what]).__name__}: {''.join(said)}"}


def test_an_interrupt_ends_the_search():
    def wrong(config: Config) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found({CURRENT: 1.0}, wrong)


def test_what_was_started_in_time_is_chosen_from():
    ticks = itertools.count(1)  # one look at the clock before each candidate but the table's own
    seconds = {CURRENT: 1.0, OTHER: 0.8, THIRD: 0.5}
    result = search(
        CURRENT, seconds, lambda c: c, lambda c: None, Clock(seconds), 7, lambda: next(ticks) > 1
    )
    assert result == Found(OTHER, {CURRENT: 1.0, OTHER: 0.8}, {}, 1)
    result = search(CURRENT, seconds, lambda c: c, lambda c: None, Clock(seconds), 7, lambda: True)
    assert result == Found(CURRENT, {CURRENT: 1.0}, {}, 2)


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


def test_regimes_come_in_the_order_of_their_worth():
    names = [f"{r.kernel} {r.key}" for r in regimes(tma=True)]
    assert names[:3] == ["epilogue_kernel 32", "coefficients_kernel 16", "split_kernel 16"]
    wide = [any(name.startswith(f"{k} 32") for k in tune_head.MATRIX_KERNELS) for name in names]
    assert wide == sorted(wide), "products of fp32 inputs last"
    words = [len(r.words) for r, last in zip(regimes(tma=True), wide, strict=True) if not last]
    assert words == sorted(words)


def test_the_likeliest_are_few_and_the_first_are_these():
    found = {f"{r.kernel} {r.key}": r for r in regimes(tma=True)}
    for regime in found.values():
        tried = likeliest(regime, tma=True)
        assert len(tried) == len(set(tried)) <= 8
        assert all(c.BN * c.BV / (32 * c.warps) <= 128 for c in tried)
        assert all(c.tma <= ("pointers" not in regime.words) for c in tried)
    epilogue = likeliest(found["epilogue_kernel 32"], tma=False)
    assert [(c.BN, c.BV, c.warps) for c in epilogue] == [
        (1, 4096, 8), (1, 8192, 16), (1, 2048, 8), (1, 4096, 16),
    ]  # fmt: skip
    for kernel in tune_head.MATRIX_KERNELS:
        tiles = likeliest(found[f"{kernel} 16"], tma=True)
        assert [(c.BN, c.BV, c.BD, c.warps, c.stages) for c in tiles] == [
            (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 128, 64, 4, 4),
        ]  # fmt: skip
        assert all(c.tma for c in tiles)


def test_no_block_ends_where_a_shape_does():
    for regime in regimes(tma=True):
        n, _, v = tune_head.shape_of(regime)
        assert n % 16 == tune_head.GATE_ROWS % 16 == v % 16 == 0
        if regime.kernel in tune_head.MATRIX_KERNELS:
            for c in candidates(regime, tma=True):
                assert v % c.BV
                assert tune_head.GATE_ROWS % c.BN
        else:
            assert all(v % c.BV for c in candidates(regime, tma=False))


SPECIALISED = (
    Regime("epilogue_kernel", 32),
    Regime("divergence_coefficients_kernel", 32),
    Regime("coefficients_kernel", 16),
    Regime("split_kernel", 16, ("rich", "pointers")),
)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")
def test_gate_and_timing_launch_what_was_compiled_ahead(tmp_path):
    """In a process in which no other test gave kernels their keys: see `hash_in_order`."""
    process = multiprocessing.get_context("spawn").Process(
        target=compile_ahead_then_launch, args=(tmp_path,)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def compile_ahead_then_launch(cache):
    def zeros(shape, dtype, device):
        (n, d, v), cotangents = shape, torch.zeros(shape[0])
        hidden = torch.zeros(n, d, dtype=dtype)
        labels = torch.zeros(n, dtype=torch.int64)
        return Inputs(hidden, torch.zeros(v, d, dtype=dtype), labels, hidden, cotangents)

    def some_statistics(first, *_, want, **__):
        return {name: torch.zeros(len(first)) for name in want}

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    jobs = [(regime, likeliest(regime, tma=regime.bits == 16)[0]) for regime in SPECIALISED]
    call = functools.partial(tune_head.compile_candidate, programs=528)
    with ahead.Ahead(TARGETS["sm_90"], processes=2) as processes:
        assert processes.compile(call, jobs) == dict.fromkeys(jobs)
    before = set(cache.rglob("*.cubin"))
    assert len(before) == len(jobs) + 1  # and merge_kernel, which follows split_kernel

    ahead.pretend(TARGETS["sm_90"])
    tune_head.make_inputs = zeros
    for name in ("linear_stats_reference", "divergence_reference"):
        setattr(tune_head, name, some_statistics)
    runs = [
        tune_head.bind(regime, tune_head.shape_of(regime), torch.device("cpu"), 528, rows)[0]
        for rows in (None, tune_head.GATE_ROWS, tune_head.GATE_ROWS - 1)
        for regime, _ in jobs
    ]
    timed_and_gated, odd = runs[: 2 * len(jobs)], runs[2 * len(jobs) :]
    for run, (_, config) in zip(timed_and_gated, 2 * jobs, strict=True):
        run(config)
    assert set(cache.rglob("*.cubin")) == before
    for run, (_, config) in zip(odd, jobs, strict=True):
        run(config)
    assert len(set(cache.rglob("*.cubin"))) >= len(before) + len(jobs), "another N compiles"


GONE = "the compiler died or took over 6 s"
FAULTS = {
    "pass": None,
    "raise RuntimeError('PassManager::run failed\\nand a page of IR')": (
        "RuntimeError: PassManager::run failed"
    ),
    "1": None,
    "import time; time.sleep(600)": GONE,
    "import os; os._exit(1)": GONE,
}
"""What a compiler may do -> what is said of it."""


@pytest.mark.slow
def test_a_compiler_that_hangs_or_dies_costs_its_candidate_alone(monkeypatch):
    with ahead.Ahead(TARGETS["sm_90"], processes=2) as processes:
        monkeypatch.setattr(ahead, "SECONDS", 60.0)
        assert processes.compile(exec, ["2", "3"]) == {"2": None, "3": None}
        monkeypatch.setattr(ahead, "SECONDS", 2.0)
        assert processes.compile(exec, list(FAULTS)) == FAULTS
        monkeypatch.setattr(ahead, "SECONDS", 60.0)  # the dead one's successor imports triton first
        assert processes.compile(exec, ["4"]) == {"4": None}
        start = time.monotonic()
        assert processes.compile(exec, ["import time; time.sleep(600)"], seconds=0.5) == {}
        assert time.monotonic() - start < 60


def test_the_first_regimes_finish_within_a_budget(gpu, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tune_head, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def tune(regime, chip, device, rounds, tried, ahead, deadline):
        now[0] += 20
        gpu.tuned.append(f"{regime.kernel} {regime.key}")
        assert deadline == 50
        return Found(tried[1], {tried[0]: 2.0, tried[1]: 1.0}, {}, left=3 * (now[0] > 50))

    monkeypatch.setattr(tune_head, "tune", tune)
    tune_head.main(["--budget", "50", "--out", str(gpu.out)])
    assert gpu.tuned == list(tune_head.FIRST)
    table, measured = table_of(gpu.table)
    assert measured == (*MEASURED, "sm_90")
    assert table["epilogue_kernel"]["sm_90", "32"] == Config(1, 8192, warps=16)
    assert table["coefficients_kernel"]["sm_90", "16"].stages == 4
    # A later run goes on with what was cut short, and knows the method that it finds in the file.
    now[0] = 0.0
    tune_head.main(["--budget", "50", "--out", str(gpu.out)])
    assert gpu.tuned[3] == tune_head.FIRST[2]
    assert not set(gpu.tuned[4:]) & set(tune_head.FIRST)


def test_a_regime_that_fails_leaves_its_row_and_the_others_run(gpu, monkeypatch, capsys):
    def tune(regime, chip, device, rounds, tried, ahead, deadline):
        if regime.kernel == "epilogue_kernel":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Found(tried[1], {}, {OTHER: "why"}, 0)

    monkeypatch.setattr(tune_head, "tune", tune)
    tune_head.main(["--out", str(gpu.out)])
    assert "epilogue_kernel 32 failed: OutOfMemoryError: CUDA out of memory" in (
        capsys.readouterr().out
    )
    table, _ = table_of(gpu.table)
    assert ("sm_90", "32") not in table["epilogue_kernel"]
    assert table["split_kernel"]["sm_90", "16"].stages == 4
    assert len(json.loads(gpu.out.read_text())["cases"]) == len(regimes(tma=True))


def test_the_table_stays_where_nothing_finished(gpu):
    before = gpu.table.read_bytes()
    tune_head.main(["--budget", "0", "--out", str(gpu.out)])
    assert gpu.table.read_bytes() == before


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that is only named, and a copy of the table."""
    table = tmp_path / "launch_table.py"
    table.write_text(Path(launch_table.__file__).read_text())

    class NoProcesses:
        def __init__(self, target):
            assert target == TARGETS["sm_90"]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    active = SimpleNamespace(get_current_target=lambda: TARGETS["sm_90"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "environment", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(tune_head, "device_slug", lambda device: "a-gpu")
    monkeypatch.setattr(tune_head, "chip_of", lambda device: "sm_90")
    monkeypatch.setattr(tune_head, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(tune_head, "Ahead", NoProcesses)
    monkeypatch.setattr(tune_head, "launch_table", SimpleNamespace(__file__=str(table)))
    return SimpleNamespace(table=table, out=tmp_path / "tune_head.json", tuned=[])


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
