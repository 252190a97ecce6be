"""Inputs, float64 truths and same-dtype plain results that every kernel test shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels.tile import transform_reference

Results: TypeAlias = dict[str, Tensor]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

FACTS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
}
"""The head's facts by the name of their case; all but the plain one go with a bias."""


class Inputs(NamedTuple):
    """The arguments of `linear_stats`, in its order."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    bias: Tensor | None  # [V]

    def double(self) -> Inputs:
        bias = None if self.bias is None else self.bias.double()
        return Inputs(self.hidden.double(), self.weight.double(), self.labels, bias)

    def in_order(self, v: Tensor, d: Tensor) -> Inputs:
        """The same numbers with the vocabulary and the width permuted."""
        bias = None if self.bias is None else self.bias[v]
        labels = v.argsort()[self.labels]
        return Inputs(self.hidden[:, d], self.weight[v][:, d], labels, bias)


def make(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Logits of deviation 3: a softmax with a few large entries, as a language model's is."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    hidden, weight = normal(n, d), normal(v, d) * (3 * d**-0.5)
    labels = torch.randint(v, (n,), generator=g, device=device)
    b = normal(v).to(dtype) if bias else None
    return Inputs(hidden.to(dtype), weight.to(dtype), labels, b)


def exact(logits: Tensor, labels: Tensor) -> Inputs:
    """Inputs whose raw logits are `logits` [N, V] to the last bit: one width per row."""
    n = logits.shape[0]
    eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
    return Inputs(eye, logits.T.contiguous(), labels, None)


def spread(rows: Tensor, folder: Path) -> Tensor:
    """`rows` [N, D] 2^26 elements apart, in a sparse file of which only they take up space.

    36 rows reach past 2^31 elements, while a block of 16 stays below.
    """
    (n, d), stride = rows.shape, 1 << 26
    file = folder / "sparse"
    flat = torch.from_file(str(file), shared=True, size=n * stride, dtype=rows.dtype)
    file.unlink()  # the mapping lives on
    return flat.as_strided((n, d), (stride, 1)).copy_(rows)


def linear_logits(
    x: Inputs,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """z [N, V] in the inputs' dtype."""
    return transform_reference(x.hidden @ x.weight.T, x.bias, softcap, logit_scale, temperature)


def entropy_terms(
    x: Inputs,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> float:
    """Largest of the terms p (|log p| + H) that an entropy's gradient is the difference of.

    A near-uniform softmax has log p + H near 0 everywhere, from two terms near log V.
    """
    log_p = linear_logits(x, softcap, logit_scale, temperature).log_softmax(1)
    entropy = torch.special.entr(log_p.exp()).sum(1, keepdim=True)
    terms = log_p.exp() * (log_p.abs() + entropy) * (logit_scale / temperature)
    return terms.max().item()


def orders(x: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Permutations (vocabulary, width) that plain PyTorch's rounding is seen through.

    float64 inputs have a truth that is rounded like everybody; other orders show how far.
    """
    (v, d), device = x.weight.shape, x.weight.device
    found = [(torch.arange(v, device=device), torch.arange(d, device=device))]
    if x.hidden.dtype == torch.float64:
        found = []
        for seed in range(4):
            g = torch.Generator(device).manual_seed(seed)
            found.append(tuple(torch.randperm(size, generator=g, device=device) for size in (v, d)))
    return found


def plain_results(reference: Callable[[Inputs], Results], x: Inputs) -> list[Results]:
    """`reference` in plain PyTorch and the inputs' dtype, once per order of its sums.

    Results [N, V] come back with their columns where they were.
    """

    def put_back(value: Tensor, v: Tensor) -> Tensor:
        return value[:, v.argsort()] if value.dim() == 2 else value

    return [
        {name: put_back(value, v) for name, value in reference(x.in_order(v, d)).items()}
        for v, d in orders(x)
    ]


def closed_form(logits: Tensor, labels: Tensor) -> Results:
    """logps, entropy and d logps / d logits that lose no digit when the label is nearly certain.

    With d the others' log-sum-exp less the label's logit: log p = logsigmoid(-d) and
    log(1 - p) = logsigmoid(d). Plain PyTorch in the logits' dtype.
    """
    label = labels[:, None]
    others = logits.scatter(1, label, -math.inf).logsumexp(1, keepdim=True)
    d = others - logits.gather(1, label)
    log_p, log_q = F.logsigmoid(-d), F.logsigmoid(d)
    every = ((logits - others) + log_q).scatter(1, label, log_p)
    return {
        "logps": log_p[:, 0],
        "entropy": -(every.exp() * every).sum(1),
        "coefficients": (-every.exp()).scatter(1, label, log_q.exp()),
    }


P_LABEL = (0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9)


def confident(dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """(inputs, their logits [N, V]): a row for each of P_LABEL, its label raised to that p_y.

    The truth is that of the logits as `dtype` rounds them.
    """
    g = torch.Generator().manual_seed(0)
    n, v = len(P_LABEL), 200
    logits = torch.randn(n, v, generator=g, dtype=torch.float64)
    labels = torch.randint(v, (n,), generator=g)
    rest = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    wanted = torch.logit(torch.tensor(P_LABEL, dtype=torch.float64)) + rest
    logits = logits.scatter(1, labels[:, None], wanted[:, None]).to(dtype)
    return exact(logits, labels), logits
