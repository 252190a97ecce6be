"""`python -m bench.step` end to end on a tiny model: its truth, gate, peers, table and figure."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("matplotlib")

from bench import plot, step
from bench.harness import count_flop, write_opening, write_section
from fastpo.optional import OLDEST_TRANSFORMERS
from fastpo.testing.three_way import assert_three_way, error

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


@pytest.mark.parametrize("scores", [step._TRUTH_SCORES, 1000])
def test_truth_is_one_graph_over_all_sequences(scores, monkeypatch):
    pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)
    monkeypatch.setattr(step, "_TRUTH_SCORES", scores)
    blocks, checkpoint = [], step.checkpoint

    def counted(run, query, *rest, **how):
        blocks.append(query)
        return checkpoint(run, query, *rest, **how)

    monkeypatch.setattr(step, "checkpoint", counted)
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
    assert blocks
    assert {q.shape[2] for q in blocks} == ({56} if scores > 1000 else {4})  # 4 heads, 56 keys
    gradient = step._gradient(model)
    # The same products in one graph or two: sums of gradients in another order.
    eps = torch.finfo(torch.float64).eps
    assert error(truth["loss"], loss) <= 8 * eps * loss.item()
    assert error(truth["gradient"], gradient) <= 64 * eps * gradient.abs().max().item()


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("blocks", [1, 7, 200])
def test_attention_of_the_truth_is_plain_and_no_block_exceeds_its_bound(blocks, monkeypatch):
    heads, kv_heads, length, width = 4, 2, 200, 6  # 4800 elements at most without scores
    bound = heads * length * -(-length // blocks)
    monkeypatch.setattr(step, "_TRUTH_SCORES", max(bound, 4800))
    g = torch.Generator().manual_seed(0)
    shapes = [(1, h, length, width) for h in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    cotangent = torch.randn(1, length, heads, width, generator=g)

    def blocked(q, k, v):
        return step.causal_in_blocks(None, q, k, v, None, scaling=0.3)[0]

    def plain(q, k, v):
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        return out.transpose(1, 2)

    def results(attend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    with Largest() as largest:
        ours = results(blocked, torch.float32)
    assert largest.elements <= step._TRUTH_SCORES
    if blocks == 1:
        assert largest.elements == heads * length * length, "the mode sees scores"
    truth = results(plain, torch.float64)
    terms = truth[0].square().sum(-1).max().item()
    for name, *three in zip(
        ("out", "dq", "dk", "dv"), ours, results(plain, torch.float32), truth, strict=True
    ):
        assert_three_way(*three, what=name, terms=terms if name in ("dq", "dk") else 0.0)


def test_a_block_of_the_longest_prompt_fits():
    model, _, shapes = step.GRIDS["gpu"]
    longest = max(p + r for p, r, _ in shapes)
    heads = model["num_attention_heads"]
    size = step._TRUTH_SCORES // (heads * longest)
    assert size == 126
    assert 8 * heads * longest * longest > 280e9  # what one score matrix would take
    assert 8 * heads * size * longest <= 2**30


def test_what_has_no_truth_is_recorded_and_the_next_case_runs(monkeypatch, tmp_path):
    by_hand = step.by_hand

    def first_fails(key, dtype, device):
        if key["candidates"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return by_hand(key, dtype, device)

    def broken(key, device):
        raise TypeError("varlen_attn() got an unexpected keyword argument\nand more")

    monkeypatch.setattr(step, "by_hand", first_fails)
    monkeypatch.setattr(step, "CONTENDERS", {step.OURS: step.fastpo_step, "TRL": broken})
    out = tmp_path / "step.json"
    step.main(["--quick", "--out", str(out), "--device", "cpu", "--threads", "1"])
    first, second = (case["contenders"] for case in json.loads(out.read_text())["cases"])
    no_truth = {"status": "failed", "reason": "no truth: does not fit"}
    assert first == {step.OURS: no_truth, "TRL": no_truth}
    assert second[step.OURS]["status"] == "ok"
    reason = "TypeError: varlen_attn() got an unexpected keyword argument"
    assert second["TRL"] == {"status": "failed", "reason": reason}


def test_an_interrupted_truth_ends_the_run(monkeypatch, tmp_path):
    def interrupted(key, dtype, device):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "by_hand", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.main(["--quick", "--out", str(tmp_path / "step.json"), "--device", "cpu"])


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
