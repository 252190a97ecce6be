"""`python -m bench.head` end to end, and the truth that it judges by."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")

from bench import contenders, head, plot
from fastpo.testing.three_way import assert_three_way, error

CPU = torch.device("cpu")
SHAPE = (64, 32, 512)


@pytest.mark.parametrize(("task", "mode"), head.CASES)
def test_truth_is_what_autograd_finds_in_float64(task, mode):
    inputs = head.make_inputs(SHAPE, torch.float64, CPU)
    truth, _ = head.by_hand(inputs, task, mode, torch.float64)
    builders = contenders.TOKEN_OPS if task == "logps" else contenders.STEPS
    assert "eager" in builders
    # `eager` casts to float32 by name; the truth is compared with autograd on float64 logits.
    hidden = inputs.hidden.clone().requires_grad_(mode != "forward")
    weight = inputs.weight.clone().requires_grad_(mode == "trained")

    def logps(h):
        return (h @ weight.T).log_softmax(1).gather(1, inputs.labels[:, None]).squeeze(1)

    value = logps(hidden)
    if task == "dpo":
        with torch.no_grad():
            ref = logps(inputs.ref_hidden)
        value = head.dpo(value, ref)
    if mode != "forward":
        value.backward(inputs.cotangents.double() if task == "logps" else None)
    found = {"value": value, "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    assert set(truth) == {name for name, tensor in found.items() if tensor is not None}
    for name, true in truth.items():
        # Two float64 roundings of sums over at most V terms of size `scale`.
        scale = true.abs().max().item()
        assert error(found[name], true) <= SHAPE[2] * torch.finfo(torch.float64).eps * scale


def test_label_probabilities_are_those_of_a_language_model():
    # 4096 tokens: the median's own standard error is 0.03 of its logit's deviation, 3.
    inputs = head.make_inputs((4096, 128, 2048), torch.float32, CPU)
    _, p_label = head.by_hand(inputs, "logps", "forward", torch.float64)
    low, middle, high = p_label.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    assert 0.4 < middle < 0.6
    assert low < 0.05
    assert high > 0.95


def test_a_wrong_contender_gets_no_speed(monkeypatch, tmp_path):
    monkeypatch.setitem(contenders.TOKEN_OPS, "eager", lambda device: lambda h, w, y: _off(h, w, y))
    out = tmp_path / "head.json"
    others = [name for name in contenders.TOKEN_OPS if name not in (head.OURS, "eager")]
    monkeypatch.setattr(head, "CASES", (("logps", "forward"),))
    head.main(["--quick", "--out", str(out), "--device", "cpu", "--without", *others])
    found = json.loads(out.read_text())["cases"][0]["contenders"]
    assert found["eager"]["status"] == "rejected"
    assert "seconds" not in found["eager"]
    assert found[head.OURS]["status"] == "ok"


def _off(h, w, y):
    return contenders.eager(h, w, y) * (1 + 1e-4)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "head.json"
    threads = torch.get_num_threads()
    # One thread: barriers of two threads on tiny tensors cost more than the tensors.
    head.main(["--quick", "--threads", "1", "--device", "cpu", "--out", str(out)])
    torch.set_num_threads(threads)
    return out


def test_quick_run_records_every_case_with_the_whole_schema(quick):
    data = json.loads(quick.read_text())
    assert set(data) == {"environment", "method", "cases"}
    assert [(c["key"]["task"], c["key"]["mode"]) for c in data["cases"]] == list(head.CASES)
    for case in data["cases"]:
        assert set(case) == {"key", "date", "load_average", "p_label", "limit", "contenders"}
        mode = case["key"]["mode"]
        outputs = {"forward": 1, "frozen": 2, "trained": 3}[mode]
        for name in (head.OURS, "eager"):
            ours = case["contenders"][name]
            assert ours["status"] == "ok"
            assert len(ours["errors"]) == outputs
            assert ours["seconds"]["q25"] <= ours["seconds"]["median"] <= ours["seconds"]["q75"]
            assert len(ours["rounds"]) == data["method"]["rounds"]
        for contender in case["contenders"].values():
            assert contender["status"] == "ok" or contender["reason"]


def test_counted_products_are_the_ones_the_plan_promises(quick):
    inputs = head.make_inputs(SHAPE, torch.float32, CPU)
    for case in json.loads(quick.read_text())["cases"]:
        task, mode = case["key"]["task"], case["key"]["mode"]
        counted = case["contenders"][head.OURS]["products"]
        assert counted == head.planned_products(inputs, task, mode)
        assert counted >= case["limit"]["products"]


def test_table_and_figure_come_from_the_record(quick, tmp_path):
    cases = json.loads(quick.read_text())["cases"]
    text = head.table(cases)
    assert text.count("**fastpo**") == len(cases)
    assert text.count("(strongest)") == len(cases)
    figure = tmp_path / "head.svg"
    plot.main([str(quick), "--out", str(figure)])
    assert "fastpo" in figure.read_text()


def test_memory_of_one_contender_is_measured_in_its_own_process():
    key = {"task": "logps", "mode": "frozen", "shape": [256, 64, 8192], "dtype": "float32"}
    # Eager holds at least logits and their log-softmax: 2 * 8 MiB.
    assert head.memory_in_fresh_process("bench.head", "eager", key, 1) >= 16 << 20


def test_fastpo_and_eager_agree_by_the_three_way_rule():
    inputs = head.make_inputs(SHAPE, torch.float32, CPU)
    truth, _ = head.by_hand(inputs, "logps", "frozen", torch.float64)
    ours = head.bind(head.OURS, "logps", "frozen", inputs)()
    plain = head.bind("eager", "logps", "frozen", inputs)()
    for name in truth:
        assert_three_way(ours[name], plain[name], truth[name], name)
