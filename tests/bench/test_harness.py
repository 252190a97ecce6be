"""The harness: what it lets through, what it counts, what it writes."""

import json
import os
import re

import pytest
import torch

from bench import harness
from fastpo.testing.three_way import error

CPU = torch.device("cpu")


def _outputs(shift: float = 0.0) -> harness.Outputs:
    value = torch.linspace(-3, 3, 7, dtype=torch.float64)
    return {"value": value + shift, "grad_hidden": value.square()}


def _rounded(outputs: harness.Outputs) -> harness.Outputs:
    return {name: value.float() for name, value in outputs.items()}


def test_gate_passes_what_is_as_exact_as_plain_pytorch():
    truth = _outputs()
    errors, rejected = harness.check(_rounded(truth), truth, _rounded(truth))
    assert rejected is None
    assert errors["value"]["max_error"] == error(truth["value"].float(), truth["value"])


def test_gate_rejects_a_small_shift_and_names_the_output():
    # eps * scale is 3.6e-7, ten of them 3.6e-6: a shift of 1e-5 is outside, of 1e-6 within.
    truth = _outputs()
    wrong = _rounded(_outputs(shift=1e-5))
    assert "value is off by" in harness.check(wrong, truth, _rounded(truth))[1]
    assert harness.check(_rounded(_outputs(shift=1e-6)), truth, _rounded(truth))[1] is None


def test_gate_rejects_nan_and_a_missing_output():
    truth = _outputs()
    wrong = _rounded(truth)
    wrong["grad_hidden"][3] = float("nan")
    assert "grad_hidden" in harness.check(wrong, truth, _rounded(truth))[1]
    with pytest.raises(KeyError):
        harness.check({"value": wrong["value"]}, truth, _rounded(truth))


def test_every_round_runs_everyone_once_in_rotating_order():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = harness.interleaved(runs, 3, CPU, cold=False, warmup=1)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]


def test_summary_is_the_median_and_quantiles():
    assert harness.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "min": 1.0,
        "q25": 2.0,
        "median": 3.0,
        "q75": 4.0,
        "max": 5.0,
    }


def test_products_are_counted_inside_custom_functions_and_in_backward():
    n, d, v = 5, 3, 7
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    out, added = torch.empty(n, v), torch.zeros(n, d)

    def three() -> harness.Outputs:
        torch.nn.functional.linear(hidden, weight).sum().backward()
        return {"value": hidden}

    def two() -> harness.Outputs:
        with torch.no_grad():
            torch.mm(hidden, weight.T, out=out)
            added.addmm_(out, weight)
        return {"value": added}

    assert harness.count_flop(three)[1] == 3 * 2 * n * d * v
    assert harness.count_flop(two)[1] == 2 * 2 * n * d * v


TWO_ALIVE = """
import torch
from bench.harness import peak_extra_bytes

def run():
    first = torch.ones(4 << 20)
    del first
    a, b = torch.ones(4 << 20), torch.ones(4 << 20)
    a.add_(b)

print(peak_extra_bytes(run, torch.device("cpu")))
"""


def test_peak_memory_counts_what_lives_and_dies_within_the_call(tmp_path, monkeypatch):
    # A process of its own, as benchmarks measure: in one with a past, the allocator's free pages
    # hide what is taken from them. 16 MiB of float32, twice alive at once; code and stack of the
    # call take far less than 2 MiB.
    (tmp_path / "two_alive.py").write_text(TWO_ALIVE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    peak = harness.memory_in_fresh_process("two_alive", "torch", {}, 1) / 2**20
    assert 31 <= peak < 34


def test_environment_names_hardware_and_versions_but_no_host():
    import platform

    stamp = harness.environment(CPU)
    assert re.fullmatch(r"cpu-\d+-cores", stamp["slug"])
    assert stamp["torch"] == torch.__version__
    assert platform.node() not in json.dumps(stamp)


def test_record_resumes_and_refuses_other_settings(tmp_path):
    path, keys = tmp_path / "results" / "x.json", [{"case": 1}, {"case": 2}]
    record = harness.Record(path, CPU, {"rounds": 3})
    assert record.missing(keys) == keys
    record.add(keys[0], value=1.5)
    again = harness.Record(path, CPU, {"rounds": 3})
    assert again.missing(keys) == keys[1:]
    assert again.data["cases"][0]["value"] == 1.5
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    with pytest.raises(ValueError, match="another method: pass --fresh"):
        harness.Record(path, CPU, {"rounds": 4})
    assert harness.Record(path, CPU, {"rounds": 4}, fresh=True).missing(keys) == keys
