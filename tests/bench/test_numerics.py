"""`python -m bench.numerics` end to end, and the inputs it judges on."""

from __future__ import annotations

import json

import pytest
import torch

from bench import contenders, numerics
from bench.harness import RESULTS
from bench.head import OURS, by_hand

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", numerics.P_LABEL)
def test_every_label_has_the_probability_that_was_asked_for(p):
    """Before rounding moves it: four steps leave under 1e-3 of a logit at D 512."""
    inputs = numerics.peaked((16, 512, 2048), p, torch.float64, CPU)
    _, p_label = by_hand(inputs, "logps", "forward", torch.float64)
    logit = torch.logit(p_label)
    assert (logit - torch.tensor(p, dtype=torch.float64).logit()).abs().max() < 1e-3


def test_relative_error_is_of_the_truths_largest_magnitude():
    truth = {"value": torch.tensor([4.0, 1.0], dtype=torch.float64)}
    assert numerics.relative({"value": torch.tensor([4.0, 1.5])}, truth) == {"value": 0.125}
    assert numerics.relative({"value": torch.tensor([4.0, torch.nan])}, truth)["value"] > 1e300


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numerics")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "P_LABEL", (0.5, 0.9999))
        patch.setitem(contenders.TOKEN_OPS, "broken", _unable)
        out, page = folder / "numerics.json", folder / "head.md"
        page.write_text("# The head\n\nprose\n")
        for _ in range(2):  # the second run replaces its section
            arguments = ["--quick", "--device", "cpu", "--threads", "1"]
            numerics.main([*arguments, "--out", str(out), "--page", str(page)])
    torch.set_num_threads(threads)
    return json.loads(out.read_text()), page.read_text()


def _unable(device):
    raise contenders.Unavailable("no such library")


def test_quick_run_has_everyone_and_says_who_cannot(quick):
    data, _ = quick
    assert len(data["cases"]) == 8
    for case in data["cases"]:
        errors = case["errors"]
        assert set(errors[OURS]) == {"value", "grad_hidden", "grad_weight"}
        assert errors["CCE"] == "skipped: --without"
        if case["key"]["task"] == "logps":
            assert errors["broken"] == "failed: no such library"


def test_ours_keeps_the_digits_of_a_sure_answer(quick):
    """The claim of the page: at p .9999 the error stays at the dtype's own rounding."""
    for case in quick[0]["cases"]:
        errors, dtype = case["errors"], getattr(torch, case["key"]["dtype"])
        for name, least in errors[numerics.ROUNDED].items():
            if name != "value" and dtype == torch.bfloat16:
                assert errors[OURS][name] <= 2 * (least + torch.finfo(dtype).eps)


def test_page_has_the_tables_and_keeps_the_prose(quick):
    data, text = quick
    assert text.startswith("# The head\n\nprose\n")
    assert text.count("## How exact it is") == 1
    assert numerics.tables(data["cases"]) in text


def test_the_docs_have_the_records_table():
    record = json.loads((RESULTS / "cpu-2-cores" / "numerics.json").read_text())
    page = RESULTS.parents[1] / "docs" / "head.md"
    assert numerics.section(record, record["cases"]).strip() in page.read_text(encoding="utf-8")
