"""`linear_stats`, split and merge, against float64 logits by the three-way rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastpo.kernels.linear_stats import blocks_per_split, linear_stats, linear_stats_reference
from fastpo.kernels.online import STATISTICS
from fastpo.kernels.tile import Config
from fastpo.testing.three_way import assert_three_way
from tests.kernels.cases import (
    DTYPES,
    FACTS,
    P_LABEL,
    Inputs,
    closed_form,
    confident,
    exact,
    linear_logits,
    make,
    plain_results,
    spread,
)

SMALL = Config(BN=32, BV=128, BD=64, group=2)
# What lse_rest holds is the rounding of lse itself: float64 has another, so it is tested with lse.
COMPARED = tuple(name for name in STATISTICS if name != "lse_rest")


def assert_statistics(ours: dict[str, Tensor], x: Inputs, **facts) -> None:
    def reference(y: Inputs) -> dict[str, Tensor]:
        return linear_stats_reference(*y, **facts, want=tuple(ours))

    wide = x.double()
    truth, plain = reference(wide), plain_results(reference, x)
    # The mean of logits of both signs is small beside them.
    terms = {"mean_logit": linear_logits(wide, **facts).abs().mean(1).max().item()}
    for name in set(ours) & set(COMPARED):
        same = [results[name] for results in plain]
        assert_three_way(ours[name], same, truth[name], name, terms=terms.get(name, 0.0))


# One row; a ragged end of every size; a second, ragged row block of 64. A width below a block of
# 128 and one that ends inside it. Dtypes differ in rounding, facts in code.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize(("n", "d", "v"), [(1, 31, 1000), (63, 123, 507), (127, 31, 507)])
def test_three_way(dtype, facts, n, d, v):
    x = make(n, d, v, dtype, bias=facts != "plain")
    ours = linear_stats(*x, **FACTS[facts], want=STATISTICS)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in ours.values()} == {acc}
    assert {t.shape for t in ours.values()} == {(n,)}
    assert_statistics(ours, x, **FACTS[facts])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 3, 8, 13])
def test_any_number_of_splits(dtype, blocks):
    """8, 3, 1 and 1 splits of 8 blocks; at 3 and 13 whole blocks lie past the vocabulary's end."""
    x = make(40, 31, 1000, dtype, bias=True)
    x.labels[:3] = torch.tensor([0, 999, 896])  # first, last, first of the last block
    ours = linear_stats(*x, softcap=5.0, want=STATISTICS, config=SMALL, blocks=blocks)
    assert_statistics(ours, x, softcap=5.0)


@pytest.mark.parametrize("name", STATISTICS)
def test_each_statistic_alone(name):
    """Members of the state that nobody wants are compiled away: none may be missed."""
    x = make(17, 31, 200, torch.float32, bias=True)
    config = {"config": SMALL, "blocks": 2}
    alone = linear_stats(*x, want=(name,), **config)
    assert list(alone) == [name]
    assert torch.equal(alone[name], linear_stats(*x, want=STATISTICS, **config)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_vocabulary(dtype):
    x = make(3, 16, 50257, dtype)
    wide = Config(BN=4, BV=8192, BD=16)
    assert_statistics(linear_stats(*x, want=STATISTICS, config=wide, blocks=2), x)


def test_one_column():
    x = make(5, 31, 1, torch.float32)
    ours = linear_stats(*x, want=STATISTICS)
    assert_statistics(ours, x)
    assert (ours["logps"] == 0).all()
    assert (ours["entropy"] == 0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    x = make(n, 31, 200, torch.float32)
    ours = linear_stats(*x, want=STATISTICS)
    assert {t.shape for t in ours.values()} == {(n,)}
    assert not any(t.isnan().any() for t in ours.values())


@pytest.mark.parametrize("how", ["rows", "columns", "expanded"])
def test_strided_inputs(how):
    """NaN lies between the rows and past their ends: a load that is not masked would meet it."""
    x = make(33, 123, 200, torch.float32)
    if how == "rows":
        hidden = torch.full((66, 150), math.nan)[::2, :123]
        weight = torch.full((200, 150), math.nan)[:, 3:126]
        labels = torch.full((66,), -1)[::2]
    elif how == "columns":
        hidden, weight = torch.full((123, 33), math.nan).T, torch.full((200, 246), math.nan)[:, ::2]
        labels = torch.full((33,), -1)
    else:
        x.hidden[:] = x.hidden[:1].clone()
        hidden, weight, labels = x.hidden[:1].expand(33, 123), x.weight, x.labels
    for given, value in zip((hidden, weight, labels), x, strict=False):
        if how != "expanded":
            given.copy_(value)
    ours = linear_stats(hidden, weight, labels, want=STATISTICS, config=SMALL)
    expected = linear_stats(*x, want=STATISTICS, config=SMALL)
    assert all(torch.equal(ours[name], expected[name]) for name in STATISTICS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype):
    x = make(63, 31, 507, dtype)
    first, second = (linear_stats(*x, want=STATISTICS, config=SMALL, blocks=2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in STATISTICS)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_rows_past_two_billion_elements(which, tmp_path):
    """Row bases are 64-bit. 32-bit ones would wrap and read other rows, or memory that is not."""
    x = make(36, 16, 36, torch.float16)
    far = x._replace(**{which: spread(getattr(x, which), tmp_path)})
    ours, expected = (
        linear_stats(*y, want=STATISTICS, config=Config(BN=16, BV=16, BD=16), blocks=1)
        for y in (far, x)
    )
    assert all(torch.equal(ours[name], expected[name]) for name in STATISTICS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_labels_keep_every_digit(dtype):
    """log p_y = -1e-9 is far below float32's resolution at lse, and so is the entropy beside it.

    Row by row, so that the rule's scale is the row's own. Its logits are rounded in proportion to
    themselves, and that much of log p may be lost.
    """
    x, logits = confident(dtype)
    ours = linear_stats(*x, want=("logps", "entropy"), config=SMALL, blocks=1)
    plain = closed_form(logits.to(ours["logps"].dtype), x.labels)
    truth = closed_form(logits.double(), x.labels)
    for name, row in itertools.product(ours, range(len(P_LABEL))):
        at = slice(row, row + 1)
        terms = (truth[name][at].abs() * logits[at].double().abs().max()).item()
        what = f"{name} at {P_LABEL[row]}"
        assert_three_way(ours[name][at], plain[name][at], truth[name][at], what, terms=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lse_with_its_rest_is_exact(dtype):
    """Whole-number logits around 1000 are exact, lse is not: what its rounding lost is in the rest.

    Subtracting the 1000 again leaves a number near 6, whose scale the rule then uses.
    """
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 4, (9, 200), generator=g).to(dtype)
    labels = torch.randint(200, (9,), generator=g)
    want = ("lse", "lse_rest", "logps", "entropy")
    ours = linear_stats(*exact(logits + 1000, labels), want=want, config=SMALL, blocks=1)
    truth = logits.double().logsumexp(1)
    together = (ours["lse"] - 1000).double() + ours["lse_rest"].double()
    assert_three_way(together.to(dtype), logits.logsumexp(1), truth, "lse + lse_rest")
    near_zero = linear_stats(*exact(logits, labels), want=want, config=SMALL, blocks=1)
    for name in ("logps", "entropy"):
        assert torch.equal(ours[name], near_zero[name]), "a shift of all logits changes nothing"


def test_columns_at_minus_infinity_are_as_good_as_absent():
    """A padded vocabulary: real columns first, then 43 that a bias of -inf rules out."""
    real = make(33, 31, 157, torch.float32, bias=True)
    pad = make(1, 31, 43, torch.float32).weight
    bias = torch.cat([real.bias, torch.full((43,), -math.inf)])
    x = Inputs(real.hidden, torch.cat([real.weight, pad]), real.labels, bias)
    want = tuple(n for n in STATISTICS if n != "mean_logit")
    for config in (SMALL, Config(BN=16, BV=16, BD=16)):  # whole blocks of -inf in the second
        ours = linear_stats(*x, want=STATISTICS, config=config, blocks=1)
        assert (ours.pop("mean_logit") == -math.inf).all()
        assert list(ours) == list(want)
        assert_statistics(ours, real)


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_rows_almost_all_at_minus_infinity(blocks):
    logits = torch.full((4, 100), -math.inf)
    labels = torch.tensor([70, 70, 0, 99])
    logits[0, 70] = 2.0  # only the label is finite
    logits[1, 3] = 2.0  # only another column is
    logits[2, [0, 64]] = 1.0  # half and half
    logits[3] = torch.linspace(-3, 3, 100)
    logits[3, 99] = -math.inf  # the label alone is not
    eye = torch.zeros(4, 100)
    x = Inputs(eye, torch.eye(100), labels, None)
    # 0 * -inf is NaN in a product, so the logits arrive as a bias, one row at a time.
    rows = [
        linear_stats(x.hidden[:1], x.weight, labels[i : i + 1], logits[i], want=STATISTICS,
                     config=Config(BN=16, BV=16, BD=16), blocks=blocks)
        for i in range(4)
    ]  # fmt: skip
    ours = {name: torch.cat([row[name] for row in rows]) for name in STATISTICS}
    assert ours["logps"][0] == 0
    assert ours["logps"][1] == -math.inf
    assert ours["logps"][3] == -math.inf
    for name in ("lse", "logps", "log_p2"):
        z = logits.double()
        truth = {
            "lse": z.logsumexp(1),
            "logps": z.log_softmax(1).gather(1, labels[:, None])[:, 0],
            "log_p2": (2 * z.log_softmax(1)).logsumexp(1),
        }[name]
        assert_three_way(ours[name], truth.float(), truth, name)
    p = logits.double().softmax(1)
    assert_three_way(
        ours["entropy"], torch.special.entr(p.float()).sum(1), torch.special.entr(p).sum(1)
    )
    assert ours["top1"].tolist() == [1, 0, 1, 0]


def test_nan_stays_in_its_row():
    x = make(20, 31, 200, torch.float32)
    expected = linear_stats(*x, want=COMPARED, config=SMALL)
    x.hidden[7, 3] = math.nan
    ours = linear_stats(*x, want=COMPARED, config=SMALL)
    others = torch.arange(20) != 7
    for name in COMPARED:
        assert torch.equal(ours[name][others], expected[name][others])
        if name != "top1":
            assert ours[name][7].isnan(), name


def test_top1_is_the_first_of_equal_logits():
    logits = torch.zeros(3, 100)
    logits[:, [20, 70]] = 1.0
    labels = torch.tensor([20, 70, 30])
    for blocks in (1, 2):
        ours = linear_stats(*exact(logits, labels), want=("top1",), config=SMALL, blocks=blocks)
        assert ours["top1"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("num_n", [1, 7, 1000])
@pytest.mark.parametrize("num_v", [1, 2, 501, 512, 1002])
def test_blocks_per_split(num_n, num_v):
    """The largest power of two up to num_v that leaves enough programs, or 1."""
    for programs in (1, 528):
        blocks = blocks_per_split(num_n, num_v, programs)
        assert blocks.bit_count() == 1
        assert blocks <= num_v
        enough = num_n * math.ceil(num_v / blocks) >= programs
        assert enough or blocks == 1
        larger = 2 * blocks
        assert larger > num_v or num_n * math.ceil(num_v / larger) < programs


def test_unknown_statistic_is_named():
    with pytest.raises(ValueError, match="unknown statistic 'logp'"):
        linear_stats(*make(2, 4, 5, torch.float32), want=("logp",))
