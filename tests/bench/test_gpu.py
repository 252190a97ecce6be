"""`python -m bench.gpu`: its runner, its parts' tools, the folder that it packs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import head, long_context, predict, tune_head
from bench.gpu import head as gpu_head
from bench.gpu import measure, pack, pieces, right, run, smoke, warm
from bench.gpu.book import BOOK, Book, Options
from bench.gpu.run import Ended, Part
from fastpo.head.schedule import Workload
from fastpo.head.select import plan_head
from fastpo.head.spec import HeadOptions

CPU = torch.device("cpu")
A, B, C = (Part("smoke", name, seconds, f"what of {name}?") for name, seconds in
           (("a", 10), ("b", 20), ("c", 40)))  # fmt: skip


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """(part, limit) of every child; none is started. Time stands still but for what a part took."""
    seen: list[tuple[str, float]] = []
    clock = [0.0]

    def child(part: Part, out: Path, device: torch.device, limit: float) -> Ended:
        seen.append((part.name, limit))
        code = CODES.get(part.name, 0)
        spent = limit if code is None else TOOK.get(part.name, 1.0)
        clock[0] += spent
        return Ended(code, spent, ["the last line"])

    monkeypatch.setattr(run, "child_of", child)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run, "SECONDS_ON_CPU", None)
    CODES.clear()
    TOOK.clear()
    return seen


CODES: dict[str, int | None] = {}
TOOK: dict[str, float] = {}
CUDA = torch.device("cuda")  # of the limits alone


def statuses(out: Path) -> dict[str, str]:
    return {name: part["status"] for name, part in Book(out).read()["parts"].items()}


def test_a_hanging_child_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    mine = f"77.{os.getpid()}"  # nobody else's
    text = "import subprocess, sys, time; print('begun', flush=True)\n"
    text += f"subprocess.Popen(['sleep', '{mine}']); time.sleep(77)"
    begin = time.monotonic()
    ended = run.run_child([sys.executable, "-c", text], 2, tmp_path / "log.txt", "hanging")
    assert ended.code is None
    assert time.monotonic() - begin < 20
    assert ended.tail == ["begun"]

    def alive() -> list[bytes]:
        found = []
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(command.read_bytes())
        return [words for words in found if words.split(b"\0")[:2] == [b"sleep", mine.encode()]]

    while alive() and time.monotonic() - begin < 20:
        time.sleep(0.1)  # a signal takes a moment to end what it was sent to
    assert not alive()


def test_the_last_lines_of_a_failing_child_are_kept(tmp_path: Path) -> None:
    text = "print(*range(100), sep='\\n'); raise SystemExit(3)"
    ended = run.run_child([sys.executable, "-c", text], 60, tmp_path / "log.txt", "failing")
    assert ended.code == 3
    assert ended.tail == [str(n) for n in range(80, 100)]
    assert "==== failing" in (tmp_path / "log.txt").read_text()


def test_a_failure_does_not_stop_the_next_part(started, tmp_path: Path) -> None:
    CODES.update(a=1, b=None)
    assert not run.run([A, B, C], tmp_path, CUDA, 70)
    assert [name for name, _ in started] == ["a", "b", "c"]
    assert statuses(tmp_path) == {"a": "failed", "b": "over its limit", "c": "ok"}
    assert Book(tmp_path).part("a")["tail"] == ["the last line"]


def test_a_rerun_does_what_is_missing(started, tmp_path: Path) -> None:
    CODES.update(b=1)
    run.run([A, B, C], tmp_path, CUDA, 70)
    CODES.clear()
    started.clear()
    assert run.run([A, B, C], tmp_path, CUDA, 70)
    assert [name for name, _ in started] == ["b"]
    assert "tail" in Book(tmp_path).part("b")
    assert not Book(tmp_path).part("b")["tail"]


def test_limits_are_scaled_to_the_budget_and_pass_on_what_is_left(started, tmp_path: Path) -> None:
    run.run([A, B, C], tmp_path, CUDA, 140)
    assert started == [("a", 20), ("b", 140 - 1 - 80), ("c", 138)]


def test_what_a_budget_does_not_reach_is_no_failure(started, tmp_path: Path) -> None:
    TOOK.update(a=5, b=10)
    assert run.run([A, B, C], tmp_path, CUDA, 20)
    # At half speed b gets its 10 s; the 5 s after it are less than half of c's 20.
    assert [name for name, _ in started] == ["a", "b"]
    assert statuses(tmp_path)["c"] == "not reached"


def test_parts_are_in_order_of_value_and_write_eight_files() -> None:
    options = run.parse(["--measure", "--only", "step", "tune"])
    assert [part.name for part in run.chosen(options)] == ["tune", "step"]
    assert [part.name for part in run.chosen(run.parse(["--only", "70b", "env"]))] == ["env", "70b"]
    assert len(run.FILES) == 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in run.FILES)
    assert sum(part.seconds for part in run.PARTS if part.phase == "measure") <= 480


def test_a_torn_book_is_never_left(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.add("env", "one", value=1)
    with pytest.raises(TypeError):
        book.add("env", "two", value=object())
    assert book.part("env")["results"] == {"one": {"value": 1}}
    json.loads((tmp_path / BOOK).read_text())


def test_results_of_another_environment_are_refused(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.open(CPU)
    book.put("env", status="ok")
    data = book.read() | {"environment": {"device": "another"}}
    book.path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="--fresh"):
        book.open(CPU)
    book.open(CPU, forget=["env"])
    assert book.read()["parts"] == {}


@pytest.mark.parametrize("text", ['{"parts": {"en', "[]", "{}", '{"parts": []}'])
def test_what_is_no_book_is_refused_in_one_line(text, tmp_path: Path, capsys) -> None:
    (tmp_path / BOOK).write_text(text)
    assert run.main(["--only", "tune", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert re.fullmatch(r"bench.gpu: .* remove it\n", capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert run.main(["--only", "tune", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"bench.gpu: .*File exists.*\n", capsys.readouterr().err)


def test_a_second_run_into_a_folder_is_refused(tmp_path: Path, capsys) -> None:
    with run.lock(tmp_path):
        assert run.main(["--only", "tune", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "another run writes to" in capsys.readouterr().err
    assert not (tmp_path / BOOK).exists()


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf"])
def test_a_budget_is_a_positive_number(seconds, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.parse(["--measure", "--budget", seconds])
    assert f"--budget {seconds} must be a positive number" in capsys.readouterr().err


def test_parts_of_the_other_phase_alone_are_refused(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.parse(["--smoke", "--only", "head_a"])
    assert "--only head_a: of the other phase" in capsys.readouterr().err


def test_the_table_fits_a_screen_whatever_parts_say(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for part in run.PARTS:
        book.put(part.name, status="failed", digest=["words " * 60] * 30, tail=["end"])
    lines = run.table(book, run.PARTS).splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) < 120
    assert all(any(line.startswith(part.name) for line in lines) for part in run.PARTS)


@pytest.mark.parametrize("task", ["logps", "dpo"])
def test_a_sampled_truth_is_the_whole_ones(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "NUM_PAIRS", gpu_head.NUM_PAIRS)
    monkeypatch.setattr(gpu_head, "TRUTH_BLOCK", 24)
    monkeypatch.setattr(head, "dpo", lambda a, b: DPO(a, b, gpu_head.NUM_PAIRS))
    inputs = head.make_inputs((64, 16, 96), torch.float64, CPU)
    rows, columns = torch.tensor([0, 1, 30, 63]), [0, 9]
    whole, _ = head.by_hand(inputs, task, "trained", torch.float64)
    whole = gpu_head.picked(whole, task, rows, columns)
    found = gpu_head.sampled(inputs, task, "trained", torch.float64, rows, columns)
    assert list(found) == list(whole)
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-14)


DPO = head.dpo


def test_waits_of_the_host_are_counted_where_they_are() -> None:
    x = torch.arange(4.0)
    with smoke.waits(CPU) as found:
        x.sum().item()
        x[x > 1].tolist()
        x[1:]
    assert found.total() == 3
    assert all(re.fullmatch(r"bench/test_gpu.py:\d+", place) for place in found)
    before = found.total()
    x.sum().item()
    assert found.total() == before


def test_other_bits_are_wrong_however_small_the_error() -> None:
    one = {"x": torch.ones(3)}
    other = {"x": torch.ones(3).nextafter(torch.tensor(2.0))}
    assert right.verdict(one, one, one, one) == {"status": "ok"}
    assert "other bits" in right.verdict(one, other, one, one)["why"]
    assert right.verdict(other, other, {"x": torch.zeros(3)}, one)["status"] == "ok"
    far = {"x": torch.full((3,), 30.0)}
    assert right.verdict(far, far, one, one)["status"] == "wrong"


def test_an_exception_is_the_last_case_of_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        yield "first", {"status": "ok"}
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(right, "chunks", lambda sizes: {"a": broken})
    found = dict(right.run_chunk("a", CPU))
    assert found == {
        "first": {"status": "ok"},
        "a: stopped": {"status": "failed", "why": "RuntimeError: no such"},
    }


def test_every_chunk_can_be_asked_for_by_name() -> None:
    names = list(right.chunks(right.FULL))
    # What runs over its own input goes first: an interpreter is one thread and sees no race.
    assert [name.split()[0] for name in names[::3][:4]] == ["in", "head", "products", "loss"]
    kinds = Counter(name.split()[0] for name in names)
    assert kinds["linear_stats"] == kinds["logits_epilogue"] == kinds["linear_coefficients"] == 3


def test_what_moves_in_place_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """`written` agrees with itself; a race would be bits that differ in one of ten runs."""
    calls = itertools.count()

    def racing(products: Any, labels: Any, dtype: Any, apart: bool = False) -> Any:
        late = next(calls) == 4
        log_p = products.log_softmax(1)
        c = -log_p.exp()
        c[torch.arange(len(c)), labels] += 1 + late
        logps = log_p.gather(1, labels[:, None]).squeeze(1)
        return {"logps": logps, "epilogue": c, "kept": c}

    monkeypatch.setattr(right, "written", racing)
    sizes = right.TOY._replace(slabs=(64, 65))
    (first, moved), (second, fine) = right.in_place("float32", CPU, sizes)
    assert first == "in place float32 5x64"
    assert moved["why"].endswith("epilogue 1 of 10 times, kept 1 of 10 times")
    assert second == "in place float32 5x65"
    assert fine == {"status": "ok"}


def test_late_and_kept_heads_of_right_are_what_they_are_called() -> None:
    for sizes, kinds in ((right.FULL, right.FULL.dtypes), (right.TOY, right.TOY.dtypes)):
        n, d = sizes.tokens[0], sizes.widths[0]
        for v, kind in itertools.product(sizes.vocabularies, kinds):
            work = Workload(n, v, d, getattr(torch, kind), needs_head=True)
            late, kept = (
                plan_head(work, HeadOptions("triton", mib), device="cuda")[1]
                for mib in (sizes.thin, right.kept_mib(n, v))
            )
            assert late.name == "recompute"
            assert late.late_tokens < n
            assert kept.name == "kept"


def test_junit_outcomes_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "gpu_tests.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='a.b' name='one'/>"
        "<testcase classname='a.b' name='two'><failure message='1 is 2&#10;more'/></testcase>"
        "<testcase classname='a.b' name='three'><skipped/></testcase></testsuite></testsuites>"
    )
    count, failed = smoke.counted(report)
    assert count == {"passed": 1, "failure": 1, "skipped": 1}
    assert failed == ["b::two: 1 is 2"]


def test_a_test_run_that_is_cut_short_leaves_its_report(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_hangs(): time.sleep(60)\n"
    )

    def arguments(device: torch.device, report: Path) -> list[str]:
        return ["-q", "--junitxml", str(report), "--rootdir", str(tmp_path), str(tmp_path)]

    monkeypatch.setattr(smoke, "suite", arguments)
    monkeypatch.setattr(smoke, "ROOT", tmp_path)
    assert smoke.tests(Book(tmp_path), Options(tmp_path, CPU, 8)) != 0
    said = Book(tmp_path).part("tests")
    assert said["results"]["count"]["passed"] >= 1
    assert "cut short" in said["digest"][0]


def wheel(path: Path, files: dict[str, bytes]) -> None:
    record = "".join(f"{name},,\n" for name in files) + "x-1.dist-info/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
        made.writestr("x-1.dist-info/RECORD", record)


def downloader(size: int) -> Any:
    def download(requirement: str, folder: Path) -> None:
        name = requirement.partition("==")[0]
        libraries = (f"bitsandbytes/libbitsandbytes_{k}.so" for k in ("cpu", "cuda118", "cuda130"))
        files = dict.fromkeys(libraries, b"x") if name == "bitsandbytes" else {}
        wheel(folder / f"{name}-1-py3-none-any.whl", {**files, "a.py": bytes(range(256)) * size})

    return download


def test_a_packed_folder_has_trimmed_wheels_and_a_script(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(pack, "download", downloader(1))
    folder = tmp_path / "pack"
    assert pack.pack(folder, tmp_path, cache=False) == 0
    assert len(list((folder / "wheels").glob("*.whl"))) == len(pack.WHEELS)
    with zipfile.ZipFile(folder / "wheels" / "bitsandbytes-1-py3-none-any.whl") as made:
        libraries = [name for name in made.namelist() if name.endswith(".so")]
        assert libraries == ["bitsandbytes/libbitsandbytes_cuda130.so"]
        record = made.read("x-1.dist-info/RECORD").decode()
    assert "cuda130" in record
    assert "cuda118" not in record
    script = (folder / "run.sh").read_text()
    assert len(script) < 2000
    assert "://" not in script
    subprocess.run(["bash", "-n", str(folder / "run.sh")], check=True)
    said = capfd.readouterr().out
    assert "MiB  together, of 64" in said
    assert f"OUT=results bash {folder}/run.sh --smoke" in said  # by the script itself


def test_a_folder_that_is_too_large_is_refused_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(pack, "download", downloader(1))
    monkeypatch.setattr(pack, "MOST_BYTES", 1000)
    assert pack.pack(tmp_path / "pack", tmp_path, cache=False) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_wheel_that_does_not_exist_is_refused_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    def absent(requirement: str, folder: Path) -> None:
        raise RuntimeError(f"{requirement}: no matching distribution")

    monkeypatch.setattr(pack, "download", absent)
    assert pack.pack(tmp_path / "pack", tmp_path, cache=False) == 1
    assert "transformers==" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "left", "why"),
    [
        ("mine", ("mine/notes.txt", "x"), "holds notes.txt, not of a pack"),
        ("mine", ("mine/.gitignore", "/build\n"), "holds .gitignore, not of a pack"),
        ("mine", ("mine/run.sh", "x"), "holds run.sh, not of a pack"),
        ("mine", ("mine", "x"), "mine: Not a directory"),
        ("mine/pack", ("mine", "x"), "Not a directory"),
    ],
)
def test_only_a_pack_is_packed_over(name, left, why, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(pack, "download", downloader(1))
    file = tmp_path / left[0]
    file.parent.mkdir(exist_ok=True)
    file.write_text(left[1])
    assert run.main(["--pack", str(tmp_path / name), "--no-cache"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert file.read_text() == left[1]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [file.name]


@pytest.mark.slow
def test_smoke_runs_to_its_last_line_on_a_cpu(tmp_path: Path) -> None:
    parts = ("env", "right", "tests")
    command = [sys.executable, "-m", "bench.gpu", "--smoke", "--device", "cpu"]
    command += ["--out", str(tmp_path), "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run.ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == dict.fromkeys(parts, "ok")
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu_tests.xml", "log.txt"}
    assert "nothing failed, 0 not reached" in done.stdout.splitlines()[-1]
    again = subprocess.run(command, capture_output=True, text=True, cwd=run.ROOT, check=True)
    assert again.stdout.count("done before") == len(parts)


@pytest.mark.slow
def test_waits_of_losses_and_of_a_step_are_counted(tmp_path: Path) -> None:
    """The fourth part, in this process, which has imported all that it needs."""
    book = Book(tmp_path)
    assert smoke.syncs(book, Options(tmp_path, CPU, 60)) == 0
    cases = book.part("syncs")["results"]
    assert [name.partition(",")[0] for name in cases][-1] == "trainer's second step"
    assert all(found["count"] > 0 for found in cases.values())


@pytest.mark.slow
def test_measure_runs_to_its_last_line_on_a_cpu(tmp_path: Path) -> None:
    """The parts that start fastest; step and the long contexts are their own benchmarks' tests."""
    parts = ("tune", "head_b", "losses")
    command = [sys.executable, "-m", "bench.gpu", "--measure", "--device", "cpu"]
    command += ["--out", str(tmp_path), "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run.ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == dict.fromkeys(parts, "ok")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"gpu.json", "head.json", "losses.json", "log.txt"}


def test_a_gpus_waits_are_the_drivers_own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with smoke.waits(torch.device("cuda")) as found:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert found.total() == 3
    assert len(found) == 1
    assert modes == ["warn", 0]


def test_a_chunk_alone_says_what_it_found_and_how_it_ended(monkeypatch) -> None:
    assert [found["status"] for _, found in smoke._chunk_alone("attention flex", CPU)] == [
        "skipped"
    ]
    monkeypatch.setattr(smoke.sys, "executable", "false")
    (case, found), *more = smoke._chunk_alone("attention flex", CPU)
    assert not more
    assert case == "attention flex: ended"
    assert found["status"] == "failed"


def test_the_tuners_record_lies_beside_the_others(tmp_path, monkeypatch) -> None:
    given: list[str] = []

    def tune(arguments: list[str]) -> None:
        given.extend(arguments)
        folder = tune_head.RESULTS / tune_head.device_slug(CPU)
        (folder / "tune_head.json").write_text('{"cases": [1, 2]}')

    monkeypatch.setattr(tune_head, "main", tune)
    book = Book(tmp_path)
    assert measure.tune(book, Options(tmp_path, torch.device("cuda"), 50)) == 0
    assert given == ["--dry-run", "--budget", "35"]
    assert book.part("tune")["digest"][0].startswith("2 rows")


@pytest.mark.parametrize("part", ["8b", "70b"])
def test_long_contexts_can_be_planned(part: str) -> None:
    for case in measure.long_cases(part, toy=False):
        assert 2**34 < long_context.planned(case).peak < 141e9


def test_every_case_of_the_head_has_whole_groups() -> None:
    for part in ("head_a", "head_b"):
        for case in gpu_head.head_cases(part, toy=False):
            tokens = case.shape[0] // gpu_head.NUM_PAIRS
            assert case.shape[0] == tokens * gpu_head.NUM_PAIRS
            # A group's logits in fp32 fit the smallest workspace.
            fits = tokens * case.shape[2] * 4 <= gpu_head.MIB[gpu_head.SMALLEST] << 20
            assert fits or case.task == "logps"


def test_a_prediction_stands_beside_every_time_of_the_head_on_its_card(monkeypatch) -> None:
    for case in gpu_head.head_cases("head_a", toy=False):
        n, d, v = case.shape
        count = {"forward": 1, "frozen": 2, "trained": 3}[case.mode] + (case.task == "dpo")
        bare = count * 2 * n * d * v / predict.FLOP_PER_SECOND
        for size in case.sizes:
            assert bare < gpu_head.predicted(case, gpu_head.MIB[size]) < 2 * bare
    assert not predict.holds_for(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert predict.holds_for(CUDA)
    made = {"seconds": {"median": 0.025}, "of_limit": 0.9, "predicted_seconds": 0.024}
    case = {
        "key": {"task": "logps", "mode": "frozen", "shape": [1, 2, 3]},
        "contenders": {"fastpo": made, "CCE": {"status": "skipped"}},
        "limit": {"seconds": {"median": 0.0225}},
    }
    (line,) = gpu_head.head_lines([case])
    said = "limit 22.5, fastpo 25 (predicted 24; 0.90 of bare), CCE skipped"
    assert line == f"logps frozen 1x2x3, ms: {said}"


def test_a_piece_that_is_wrong_is_recorded_and_said(tmp_path, monkeypatch) -> None:
    made = {"fused": {"status": "rejected", "reason": "value is off by 1, bound 0"}}
    monkeypatch.setattr(pieces, "recompute", lambda *_: made)
    book = Book(tmp_path)
    names = pieces.missing_pieces("head_a", book, toy=True)
    with pytest.raises(RuntimeError, match="fused or products: value is off by 1"):
        pieces.measure_piece(names[0], "head_a", book, Options(tmp_path, CPU, 50))
    assert pieces.missing_pieces("head_a", book, toy=True) == names
    assert pieces.piece_lines("head_a", book) == [
        "recompute 16x32x64: fused or products, ms: fused rejected: value is off by 1, bound 0"
    ]


def test_the_page_has_every_part_and_its_limit() -> None:
    page = (run.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for part in run.PARTS:
        (row,) = re.findall(rf"^\| `{part.name}` \| (\d+) \|", page, flags=re.M)
        assert int(row) == part.seconds
    assert all(name in page for name in run.FILES)


def test_a_packed_cache_is_put_where_its_keys_are_right(tmp_path, monkeypatch, capsys) -> None:
    start = subprocess.run

    def compile_into(command: list[str], env: dict[str, str] | None = None, **more: Any) -> Any:
        if env is None:  # the script, which says how it is used
            return start(command, **more)
        (Path(env["TRITON_CACHE_DIR"]) / "key").mkdir(parents=True)
        (Path(env["TRITON_CACHE_DIR"]) / "key" / "kernel.cubin").write_bytes(b"x" * 1000)
        return subprocess.CompletedProcess(command, 0, "1 compiled, 0 were there, 0 refused\n")

    monkeypatch.setattr(warm, "place", lambda: tmp_path / "cache")
    monkeypatch.setattr(warm.subprocess, "run", compile_into)
    monkeypatch.setattr(pack, "download", downloader(1))
    monkeypatch.setattr(pack, "repository_bytes", lambda *_: 0)
    monkeypatch.setattr(pack, "PYTHON", f"{sys.version_info.major}.{sys.version_info.minor}")
    folder = tmp_path / "pack"
    assert pack.pack(folder, tmp_path) == 0
    with tarfile.open(folder / pack.KERNELS) as made:
        assert "./key/kernel.cubin" in made.getnames()
    script = (folder / "run.sh").read_text()
    assert f"TRITON_CACHE_DIR={tmp_path}/cache" in script
    assert len(script) < 2000
    assert pack.KERNELS in capsys.readouterr().out
    monkeypatch.setattr(pack, "PYTHON", "2.7")
    assert pack.pack(folder, tmp_path) == 0
    assert "left out" in capsys.readouterr().out
    assert "TRITON_CACHE_DIR" not in (folder / "run.sh").read_text()


def test_a_cache_that_cannot_be_made_is_left_out(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(warm, "place", lambda: tmp_path / "cache")
    monkeypatch.setattr(warm.sys, "executable", "false")
    assert warm.warm(tmp_path / pack.KERNELS) is None
    assert "compiled there" in capsys.readouterr().out


def test_launches_to_compile_are_those_of_right_and_of_the_head() -> None:
    names, full = list(warm.launches()), right.FULL
    for n, d, v, dtype in itertools.product(
        full.tokens, full.widths, full.vocabularies, full.dtypes
    ):
        assert f"{n}x{d}x{v} {dtype}" in names
    for v, dtype in itertools.product(full.slabs, full.dtypes):
        assert f"in place 1000x{v} {dtype}" in names
    assert "logps trained 8192 4096 131072" in names
    assert {"recompute", "slab of 261 rows"} < set(names)


PACKED = """
import sys, torch
from triton.backends.compiler import GPUTarget
from bench.ahead import pretend
from bench.gpu import warm
pretend(GPUTarget("cuda", 90, 32))
hits = warm.watched()
names = ("slab of 261 rows", "kto float32")
with warm.without_products():
    every = warm.launches(warm.FULL._replace(dtypes=("float32",)))
    for name in names[:: int(sys.argv[1])]:
        every[name]()
print(len(hits), sum(hits))
"""


@pytest.mark.slow
def test_a_packed_kernel_is_found_whatever_is_launched_first(tmp_path, monkeypatch) -> None:
    """Of a slab in place and of a loss by groups, in either order, each in a process of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = []
    for order in ("1", "-1"):
        command = [sys.executable, "-c", PACKED, order]
        done = subprocess.run(command, capture_output=True, text=True, cwd=run.ROOT, check=True)
        found.append(list(map(int, done.stdout.split())))
    (count, first), (again, second) = found
    assert count == again == second > 4
    assert first < count
