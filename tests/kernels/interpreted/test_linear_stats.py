"""`linear_stats`, split and merge, against float64 logits by the three-way rule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels.linear_stats import blocks_per_split, linear_stats, linear_stats_reference
from fastpo.kernels.online import STATISTICS
from fastpo.kernels.tile import Config
from tests.kernels.cases import DTYPES, FACTS, Inputs, exact, linear_logits, make, plain_rows
from tests.numerics import assert_three_way

SMALL = Config(BN=16, BV=64, BD=16, group=2)
# What lse_rest holds is the rounding of lse itself: float64 has another, so it is tested with lse.
COMPARED = tuple(name for name in STATISTICS if name != "lse_rest")


def assert_statistics(ours: dict[str, Tensor], x: Inputs, **facts) -> None:
    wide = x.double()
    truth = linear_stats_reference(*wide, **facts, want=tuple(ours))
    # The mean of logits of both signs is small beside them.
    terms = {"mean_logit": linear_logits(wide, **facts).abs().mean(1).max().item()}
    for name in set(ours) & set(COMPARED):
        plain = plain_rows(lambda y, n=name: linear_stats_reference(*y, **facts, want=(n,))[n], x)
        assert_three_way(ours[name], plain, truth[name], name, terms=terms.get(name, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 31, 1000), (63, 123, 507), (127, 31, 507)])
def test_three_way(dtype, facts, bias, n, d, v):
    x = make(n, d, v, dtype, bias=bias)
    ours = linear_stats(*x, **FACTS[facts], want=STATISTICS)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in ours.values()} == {acc}
    assert {t.shape for t in ours.values()} == {(n,)}
    assert_statistics(ours, x, **FACTS[facts])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 64])
def test_any_number_of_splits(dtype, blocks):
    """16, 8, 6, 2 and 1 splits of 8 blocks: the last overhang V, wholly past its end at 3 and 64."""
    x = make(21, 31, 507, dtype, bias=True)
    x.labels[:3] = torch.tensor([0, 506, 448])  # first, last, first of the last block
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    x = make(33, 31, 200, torch.float32)
    if how == "rows":  # every other row of a wider matrix
        hidden = torch.full((66, 47), math.nan)[::2, :31]
        weight = torch.full((200, 40), math.nan)[:, 3:34]
        labels = torch.full((66,), -1)[::2]
    elif how == "columns":
        hidden, weight = torch.full((31, 33), math.nan).T, torch.full((200, 62), math.nan)[:, ::2]
        labels = torch.full((33,), -1)
    else:
        x.hidden[:] = x.hidden[:1].clone()
        hidden, weight, labels = x.hidden[:1].expand(33, 31), x.weight, x.labels
    for given, value in zip((hidden, weight, labels), x, strict=False):
        if given is not value and how != "expanded":
            given.copy_(value)
    ours = linear_stats(hidden, weight, labels, want=STATISTICS, config=SMALL)
    expected = linear_stats(*x, want=STATISTICS, config=SMALL)
    assert all(torch.equal(ours[name], expected[name]) for name in STATISTICS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(dtype):
    x = make(63, 31, 507, dtype)
    first, second = (linear_stats(*x, want=STATISTICS, config=SMALL, blocks=2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in STATISTICS)


def test_rows_past_two_billion_elements(tmp_path):
    """Row bases are 64-bit: N * stride is 2.7e9 here, in a file that holds nothing but 40 rows."""
    x = make(40, 16, 100, torch.float16)
    stride = 1 << 26
    file = str(tmp_path / "hidden")
    sparse = torch.from_file(file, shared=True, size=40 * stride, dtype=torch.float16)
    hidden = sparse.as_strided((40, 16), (stride, 1)).copy_(x.hidden)
    ours = linear_stats(hidden, *x[1:], want=STATISTICS, config=SMALL)
    expected = linear_stats(*x, want=STATISTICS, config=SMALL)
    assert all(torch.equal(ours[name], expected[name]) for name in STATISTICS)


def test_weights_past_two_billion_elements(tmp_path):
    x = make(20, 16, 40, torch.float16)
    stride = 1 << 26
    file = str(tmp_path / "weight")
    sparse = torch.from_file(file, shared=True, size=40 * stride, dtype=torch.float16)
    weight = sparse.as_strided((40, 16), (stride, 1)).copy_(x.weight)
    config = Config(BN=16, BV=16, BD=16)
    ours = linear_stats(x.hidden, weight, x.labels, want=STATISTICS, config=config, blocks=1)
    expected = linear_stats(*x, want=STATISTICS, config=config, blocks=1)
    assert all(torch.equal(ours[name], expected[name]) for name in STATISTICS)


P_LABEL = (0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9)


def confident(dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """(inputs, their float64 logits): one row for each of P_LABEL, label raised until p_y is it."""
    g = torch.Generator().manual_seed(0)
    n, v = len(P_LABEL), 200
    logits = torch.randn(n, v, generator=g, dtype=torch.float64).to(dtype).double()
    labels = torch.randint(v, (n,), generator=g)
    rest = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    wanted = torch.logit(torch.tensor(P_LABEL, dtype=torch.float64)) + rest
    logits.scatter_(1, labels[:, None], wanted[:, None])
    logits = logits.to(dtype)
    return exact(logits, labels), logits.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_labels_keep_every_digit(dtype):
    """log p_y = -1e-9 is far below float32's resolution at lse, and so is the entropy beside it.

    Row by row: the scale of the rule is then the row's own log p, and plain PyTorch is the formula
    that loses nothing, -softplus of the others' log-sum-exp less the label's logit.
    """
    x, logits = confident(dtype)
    ours = linear_stats(*x, want=("logps", "entropy"), config=SMALL, blocks=1)
    acc = ours["logps"].dtype

    def others(z: Tensor) -> Tensor:
        rest = z.scatter(1, x.labels[:, None], -math.inf).logsumexp(1)
        return rest - z.gather(1, x.labels[:, None])[:, 0]

    truth = -torch.log1p(others(logits).exp())
    plain = -F.softplus(others(logits.to(acc)))
    for row in range(len(P_LABEL)):
        at = slice(row, row + 1)
        assert_three_way(ours["logps"][at], plain[at], truth[at], f"log p at {P_LABEL[row]}")
    log_p = logits.log_softmax(1)
    log_p.scatter_(1, x.labels[:, None], truth[:, None])
    entropy = -(log_p.exp() * log_p).sum(1)
    for row in range(len(P_LABEL)):
        mine, true = ours["entropy"][row].double(), entropy[row]
        # d H / d log(1 - p_y) is (1 - p_y) log p_y / H times H < H: relative error passes through.
        theirs = (plain[row].double() - truth[row]).abs() / truth[row].abs()
        assert (mine - true).abs() / true <= 2 * (theirs + torch.finfo(acc).eps) * 8, P_LABEL[row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
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
    assert_three_way(ours["entropy"], torch.special.entr(p.float()).sum(1), torch.special.entr(p).sum(1))
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
