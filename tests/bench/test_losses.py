"""`python -m bench.losses` end to end, and its gate."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")

from bench import losses, plot
from fastpo.loss import fused
from fastpo.objectives import OBJECTIVES
from fastpo.testing.three_way import assert_three_way

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "losses.json"
    threads = torch.get_num_threads()
    losses.main(["--quick", "--threads", "1", "--device", "cpu", "--out", str(out)])
    torch.set_num_threads(threads)
    return out


def test_every_objective_of_the_grids_has_a_kernel():
    for grid in losses.GRIDS.values():
        for names, shapes in grid:
            for name in names:
                objective = OBJECTIVES[name]
                call = fused.FUSED[objective.fn](SimpleNamespace(**objective.hyper))
                assert call.score == losses.SCORE_OF.get(name, "ratio")
                assert all(objective.takes(k) for _, k in shapes)


def test_scores_are_all_that_the_objectives_need():
    scores = losses.make_scores((64, 8), CPU)
    sizes = scores["mask"].sum(-1)
    assert set(sizes.tolist()) == {*range(2, 9)}
    for names, _ in losses.GRIDS["cpu"]:
        for name in names:
            loss = losses.contenders(name, CPU)[losses.EAGER]
            pairs = losses.make_scores((64, 2 if name in losses.PAIRS else 8), CPU)
            found = losses.bind(name, loss, pairs)()
            assert found["losses"].shape == (64,)
            assert found["gradient"].abs().sum() > 0


def test_compiled_is_as_exact_as_eager():
    scores = losses.make_scores((16, 2), CPU)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in scores.items()}
    every = losses.contenders("dpo", CPU)
    truth, plain = (losses.bind("dpo", every[losses.EAGER], s)() for s in (wide, scores))
    ours = losses.bind("dpo", every[losses.COMPILED], scores)()
    for name in truth:
        assert_three_way(ours[name], plain[name], truth[name], name)


def test_a_wrong_contender_gets_no_speed(monkeypatch, tmp_path):
    right = losses.contenders("dpo", CPU)[losses.EAGER]
    wrong = {losses.EAGER: right, losses.OURS: lambda scores: right(scores) * (1 + 1e-4)}
    monkeypatch.setattr(losses, "contenders", lambda name, device: wrong)
    monkeypatch.setitem(losses.GRIDS, "quick", [(("dpo",), [(8, 2)])])
    out = tmp_path / "losses.json"
    losses.main(["--quick", "--out", str(out), "--device", "cpu"])
    found = json.loads(out.read_text())["cases"][0]["contenders"]
    assert found[losses.OURS]["status"] == "rejected"
    assert "seconds" not in found[losses.OURS]
    assert found[losses.EAGER]["status"] == "ok"


def test_page_keeps_the_rest(quick, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\nfirst\n", encoding="utf-8")
    data = json.loads(quick.read_text())
    for _ in range(2):
        losses.write_section(page, "losses", losses.section(data, data["cases"]))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks\n\nfirst\n\n<!-- losses -->\n## Losses")
    assert text.count("## Losses") == 1
    assert "| dpo | 8 | 2 | eager |" in text


def test_figure_comes_from_the_record(quick, tmp_path):
    figure = tmp_path / "losses.svg"
    plot.main([str(quick), "--out", str(figure)])
    assert "lipo, K = 4" in figure.read_text()
