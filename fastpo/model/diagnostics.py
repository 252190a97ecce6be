r"""Predict from hidden states what training on a pair does to each of its responses.

Every value is per group [G] and compares slot 0, the chosen response w, with slot 1, the rejected
response l. With $h_t$ the hidden state that predicts token t and $r_t = \partial \log\pi(y_t) /
\partial h_t$, both [N, D]:

| name | definition |
|---|---|
| `ches` | $\langle H_w, H_l \rangle - \|H_w\|^2$, $H = \sum_t h_t$ |
| `mean_ches` | the same of $H / L$ |
| `inner` | $\langle g_w, g_l \rangle$, $g = \sum_t r_t$ |
| `cosine`, `chosen_norm`, `rejected_norm` | of the same $g$ |
| `chosen_rises` | $\langle g_w, g_l \rangle \le \|g_w\|^2$ |
| `rejected_falls` | $\langle g_w, g_l \rangle \le \|g_l\|^2$ |

A high CHES score marks pairs whose training pushes the chosen response down too (Razin et al.,
arXiv 2410.08847): drop the highest. The last two rows are the conditions under which a step of DPO
raises the chosen and lowers the rejected log-prob (Yuan et al., arXiv 2410.13828). They take the
gradient to a shift of the last hidden states in place of the gradient to all weights: a proxy that
costs one pass of a frozen head, two matmuls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.head.functional import linear_logps
from fastpo.head.head import Head
from fastpo.head.spec import BackendName, Workspace
from fastpo.segments import Segments


def _sums_of_pairs(rows: Tensor, segments: Segments) -> Tensor:
    """Sum [N, D] over the tokens of slots 0 and 1; return [G, 2, D] in float32."""
    # In the order of the tokens: adding by index races on a GPU. Unsafe: lengths are not looked at.
    lengths = segments.starts.diff()
    sums = torch.segment_reduce(rows.float(), "sum", lengths=lengths, unsafe=True, initial=0)
    return sums[segments.grid[:, :2].clamp(min=0)]


def ches(hidden: Tensor, segments: Segments) -> dict[str, Tensor]:
    """Return `ches` and `mean_ches` [G] of pairs; the table is in the module's docstring.

    Args:
        hidden: [N, D] states of the target tokens.
        segments: their segment table; groups of at least two candidates.

    Raises:
        ValueError: a group with a single candidate.
    """
    _require_pairs(segments)
    sums = _sums_of_pairs(hidden, segments)
    ones = hidden.new_ones(len(hidden), 1)
    means = sums / _sums_of_pairs(ones, segments).clamp(min=1)

    def score(states: Tensor) -> Tensor:
        chosen, rejected = states.unbind(1)
        return (chosen * rejected).sum(-1) - chosen.square().sum(-1)

    return {"ches": score(sums), "mean_ches": score(means)}


def entanglement(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    segments: Segments,
    *,
    backend: BackendName = "auto",
    workspace_mib: Workspace = "auto",
) -> dict[str, Tensor]:
    """Return inner product, norms and both conditions [G]; the table is in the module's docstring.

    Args:
        hidden: [N, D] states of the target tokens; no gradient reaches them.
        head: the language model's head.
        labels: [N] target tokens.
        segments: their segment table; groups of at least two candidates.
        backend, workspace_mib: as in `fastpo.linear_logps`.

    Raises:
        ValueError: a group with a single candidate.
    """
    _require_pairs(segments)
    states = hidden.detach().to(head.weight.dtype).requires_grad_()
    with torch.enable_grad():
        bias = None if head.bias is None else head.bias.detach()
        logps = linear_logps(
            states,
            head.weight.detach(),
            labels,
            bias=bias,
            lora=head.lora,
            backend=backend,
            workspace_mib=workspace_mib,
            **head.facts(),
        )
        (gradient,) = torch.autograd.grad(logps.sum(), states)
    chosen, rejected = _sums_of_pairs(gradient, segments).unbind(1)
    inner = (chosen * rejected).sum(-1)
    square, other = chosen.square().sum(-1), rejected.square().sum(-1)
    norms = (square * other).sqrt()
    return {
        "inner": inner,
        "cosine": torch.where(norms > 0, inner / norms.clamp(min=1e-30), 0),
        "chosen_norm": square.sqrt(),
        "rejected_norm": other.sqrt(),
        "chosen_rises": inner <= square,
        "rejected_falls": inner <= other,
    }


def _require_pairs(segments: Segments) -> None:
    sizes = segments.mask.sum(dim=1)
    if segments.grid.shape[1] < 2 or bool((sizes < 2).any()):
        raise ValueError(
            "diagnostics of pairs need two candidates of every group, but group "
            f"{int(sizes.argmin())} has {int(sizes.min())}"
        )
