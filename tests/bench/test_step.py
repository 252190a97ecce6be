"""`python -m bench.step` end to end on a tiny model: its truth, gate, peers, table and figure."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

from bench import plot, step
from bench.harness import count_flop, write_opening, write_section
from fastpo.optional import OLDEST_TRANSFORMERS
from tests.numerics import error

CPU = torch.device("cpu")
KEY = {"model": step._TINY, "dtype": "float32", "prompt": 48, "response": 8, "candidates": 3}


@pytest.fixture(scope="module")
def peer():
    """TRL, which reads its data with `datasets`."""
    for package in ("datasets", "trl"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, peer):
    out = tmp_path_factory.mktemp("bench") / "step.json"
    threads = torch.get_num_threads()
    options = ["--quick", "--case", "48,8,3", "--threads", "1", "--device", "cpu"]
    step.main([*options, "--out", str(out)])
    torch.set_num_threads(threads)
    return json.loads(out.read_text()), out


def test_truth_is_one_graph_over_all_sequences():
    pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)
    model = step.make_model(step._TINY, torch.float32, CPU).double()
    group, ref = step.make_group(KEY, 512)
    sums = []
    for response in group.responses:
        ids = torch.tensor([*group.prompt_ids, *response.input_ids])
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
        sums.append(logps[len(group.prompt_ids) - 1 :].sum())
    ratio = torch.stack(sums) - torch.from_numpy(ref).double().view(3, 8).sum(1)
    loss = sum(-F.logsigmoid(0.1 * (ratio[0] - ratio[j])) for j in (1, 2)) / 2
    loss.backward()
    truth, _ = step.by_hand(KEY, torch.float64, CPU)
    gradient = step._gradient(model)
    # The same products in one graph or two: sums of gradients in another order.
    eps = torch.finfo(torch.float64).eps
    assert error(truth["loss"], loss) <= 8 * eps * loss.item()
    assert error(truth["gradient"], gradient) <= 64 * eps * gradient.abs().max().item()


def test_everyone_passes_the_gate_and_is_timed(quick):
    data, _ = quick
    (case,) = data["cases"]
    assert set(case["contenders"]) == set(step.CONTENDERS)
    for name, contender in case["contenders"].items():
        assert contender["status"] == "ok", (name, contender)
        assert set(contender["errors"]) == {"loss", "gradient"}
        # Every distinct token once, whatever is run.
        tokens = contender["tokens_per_second"] * contender["seconds"]["median"]
        assert tokens == pytest.approx(48 + 3 * 8, rel=1e-2)


def test_a_wrong_contender_gets_no_speed(monkeypatch, tmp_path):
    pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)

    def wrong(key, device):
        made = step.fastpo_step(key, device)
        made.pairs *= 1.0001
        return made

    monkeypatch.setattr(step, "CONTENDERS", {step.OURS: step.fastpo_step, "TRL": wrong})
    out = tmp_path / "step.json"
    step.main(["--quick", "--case", "48,8,2", "--out", str(out), "--device", "cpu"])
    found = json.loads(out.read_text())["cases"][0]["contenders"]
    assert found["TRL"]["status"] == "rejected"
    assert "seconds" not in found["TRL"]
    assert found[step.OURS]["status"] == "ok"


@pytest.mark.usefixtures("peer")
def test_the_peer_runs_pairs_and_a_compacted_head_the_responses_alone():
    whole, compacted = step.trl_step(KEY, CPU), step.trl_step(KEY, CPU, compacted=True)
    assert whole.inputs["input_ids"].shape == (2 * 2, 48 + 8)
    more, less = count_flop(whole.outputs)[1], count_flop(compacted.outputs)[1]
    # One product of the head in forward and three in backward, over 47 more rows a sequence.
    assert more - less == 4 * 2 * (4 * 47) * 512 * 64


def test_page_and_figure_come_from_the_record(quick, tmp_path):
    data, path = quick
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\n<!-- losses -->\nkept\n<!-- /losses -->\n", encoding="utf-8")
    for _ in range(2):
        write_section(page, "step", step.section(data, data["cases"]))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks\n\n<!-- losses -->\nkept\n<!-- /losses -->\n\n<!-- step")
    assert text.count("## The training step") == 1
    write_section(page, "losses", "new")
    write_opening(page, "# Opening")
    assert page.read_text(encoding="utf-8").startswith(
        "# Opening\n\n<!-- losses -->\nnew\n<!-- /losses -->\n\n<!-- step -->"
    )
    assert "| 48 | 8 | 3 | TRL, compacted, 2 pairs |" in text
    figure = tmp_path / "step.svg"
    plot.main([str(path), "--out", str(figure)])
    assert "TRL, compacted" in figure.read_text()


@pytest.mark.usefixtures("peer")
def test_memory_is_of_a_step_of_the_one_that_is_named(capsys, monkeypatch):
    def measured(run, device):
        run()
        return len(run.inputs["input_ids"])  # a row for each response of each pair

    monkeypatch.setattr(step, "peak_extra_bytes", measured)
    asked = json.dumps({**KEY, "name": "TRL"})
    step.main(["--memory-of", asked, "--threads", "1", "--device", "cpu"])
    assert capsys.readouterr().out.split()[-1] == "4"
