r"""Hidden states to token statistics without ever building the logits.

The head is $z_v = softcap(s (W_v \cdot h + b_v)) / T$ with $softcap(x) = cap \tanh(x / cap)$, and
p = softmax(z). A preference objective needs one number for each target token:

| name | definition | gradient |
|---|---|---|
| `logps` | $\log p_y$ | yes |
| `lse` | $\log \sum_v e^{z_v}$ | yes |
| `entropy` | $-\sum_v p_v \log p_v$ | yes |
| `mean_logit` | $\frac1V \sum_v z_v$ | yes |
| `kl_ref_policy` | $\sum_v q_v (\log q_v - \log p_v)$, q of the reference | to the policy |
| `kl_policy_ref` | $\sum_v p_v (\log p_v - \log q_v)$ | to the policy |
| `jsd` | $\beta KL(q, m) + (1-\beta) KL(p, m)$, $m = \beta q + (1-\beta) p$ | to the policy |
| `ref_logps` | $\log q_y$ | no |
| `log_p2` | $\log \sum_v p_v^2$ | no |
| `top1` | 1 where the first largest logit is the target's | no |

Shapes: N tokens, D width, V vocabulary. Memory: a fixed workspace, never a function of N times V.
`fastpo.head.schedule` says which matmuls run when, `fastpo.head.statistics` computes.
"""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from fastpo.head.lora import Lora
from fastpo.head.scored import scored_tokens
from fastpo.head.spec import BackendName, HeadOptions, HeadSpec, Workspace
from fastpo.head.statistics import TokenStats, token_statistics
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.head.types import accumulator


def linear_stats(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    *,
    stats: tuple[str, ...] = ("logps",),
    grad: tuple[str, ...] | None = None,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    jsd_beta: float = 0.5,
    group: dist.ProcessGroup | None = None,
    same_tokens: bool | None = None,
    skip_below: float = 0.0,
    accumulate_grad: bool | Tensor = False,
    backend: BackendName = "auto",
    workspace_mib: Workspace = "auto",
) -> TokenStats:
    r"""Return token statistics of a head; the table is in the docstring of this module.

    Args:
        hidden: [N, D] float64, float32, bfloat16 or float16; `hidden[t]` predicts `labels[t]`.
        weight: [V, D], same dtype; under autocast both are cast to the autocast dtype.
        labels: [N] integers in [0, V), or `ignore_index`: such a token costs nothing and gets 0.
        stats: names of the statistics to return.
        grad: those of them that gradient flows through; all differentiable ones by default. Each
            costs one more matmul and one more [N, D] buffer on a frozen head.
        bias: [V] or None.
        ref_hidden: [N, D'] the reference's hidden states, for its statistics; no gradient.
        ref_weight: [V, D'] the reference's head, by default `weight` without `lora`; `ref_bias`
            likewise.
        softcap, logit_scale, temperature: see `HeadSpec`; both heads share them. A temperature
            may be a tensor [N], one for each token, and gets no gradient.
        vocab_size: vocabulary rows that stand for tokens; the padding after them has probability 0
            and no part in any statistic. None for all of them.
        lora: a low-rank delta of `weight`, never merged into it; its gradients are exact.
        jsd_beta: the reference's share of the mixture of `jsd`, as in GKD (arXiv 2306.13649). In
            (0, 1): its limits 0 and 1 are `kl_ref_policy` and `kl_policy_ref`.
        group: ranks that each hold vocabulary rows of the head, in the order of ranks. `weight`,
            `bias`, `lora.b` and the reference's are then this rank's, labels and `vocab_size` the
            whole head's. Every rank calls, and no weight travels. A DTensor cut by rows, as FSDP2
            makes them, brings its group with it.
        same_tokens: with a head on several ranks, whether all of them have the same tokens (tensor
            parallel, usual for `group`) or each its own (FSDP2, usual for a DTensor). In the latter
            case the gradient of a DTensor is the mean of the ranks' losses, as FSDP2 reduces it.
        skip_below: leave a chunk of the vocabulary out of a token's gradient where the policy gives
            it a smaller probability, and its matmuls with it; 0 leaves nothing out. The statistic
            `skipped` is all that was left out of a token, so that the error of token t's gradient
            is at most $|g_t| skipped_t \max_v \lVert c_v W_v \rVert$. For `logps` alone.
        accumulate_grad: add the gradient of `weight`, a leaf, straight to its `grad` if there is
            one, or to this [V, D] tensor of any dtype: [V, D] less memory. Hooks on the weight,
            such as DDP's, do not see it. Without effect under `torch.compile`.
        backend: `auto`, `torch` (plain PyTorch) or `triton`; a named one never falls back.
        workspace_mib: budget of the chunks of logits that are alive at once, in MiB. `auto` is 256,
            and on a GPU the smaller of 1024 and 2 % of its memory.

    Returns:
        name -> [N] float32 (float64 for float64 inputs), 0 at ignored positions.

    Raises:
        ValueError: shapes or dtypes that do not match, an unknown statistic or backend, a label
            outside [0, V), a statistic of the reference without `ref_hidden`.

    Under `torch.compile` ignored tokens are computed and dropped, since a graph's shapes cannot
    depend on labels. A label outside the vocabulary fails an assertion on the device.

    >>> h, w = torch.randn(4, 8), torch.randn(16, 8)
    >>> out = linear_stats(h, w, torch.tensor([3, -100, 0, 15]), stats=("logps", "entropy"))
    >>> out["logps"].shape, out["entropy"][1].item()
    (torch.Size([4]), 0.0)
    """
    reference = None
    if ref_hidden is not None:
        other = None if ref_weight is None else HeadTensors(ref_weight, ref_bias)
        reference = ReferenceStates(ref_hidden, other)
    per_token = isinstance(temperature, Tensor)
    return token_statistics(
        hidden,
        HeadTensors(weight, bias, lora),
        labels,
        want=stats,
        grad=grad,
        reference=reference,
        spec=HeadSpec(softcap, logit_scale, 1.0 if per_token else temperature, vocab_size),
        options=HeadOptions(backend, workspace_mib, skip_below, jsd_beta),
        accumulate_grad=accumulate_grad,
        ignore_index=ignore_index,
        group=group,
        same_tokens=same_tokens,
        temperatures=temperature if per_token else None,
    )


def linear_logps(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    group: dist.ProcessGroup | None = None,
    same_tokens: bool | None = None,
    skip_below: float = 0.0,
    accumulate_grad: bool | Tensor = False,
    backend: BackendName = "auto",
    workspace_mib: Workspace = "auto",
) -> Tensor:
    r"""Return log-probabilities of the labels, $\log softmax(z_t)_{y_t}$, without the logits.

    Args and errors as `linear_stats`. Gradients are exact for hidden, weight and bias.

    Returns:
        [N] float32 (float64 for float64 inputs), 0 at ignored positions.

    >>> h, w, y = torch.randn(4, 8), torch.randn(16, 8), torch.tensor([3, 1, 0, 15])
    >>> expected = (h @ w.T).log_softmax(-1)[torch.arange(4), y]
    >>> torch.allclose(linear_logps(h, w, y), expected, atol=1e-5)
    True
    """
    return linear_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_size=vocab_size,
        lora=lora,
        group=group,
        same_tokens=same_tokens,
        skip_below=skip_below,
        accumulate_grad=accumulate_grad,
        backend=backend,
        workspace_mib=workspace_mib,
    )["logps"]


def linear_cross_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    *,
    bias: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    group: dist.ProcessGroup | None = None,
    same_tokens: bool | None = None,
    accumulate_grad: bool | Tensor = False,
    backend: BackendName = "auto",
    workspace_mib: Workspace = "auto",
) -> Tensor:
    r"""Return the cross-entropy of a linear head without the logits.

    $\ell_t = -(1-\epsilon) \log p_y - \epsilon (\frac1V\sum_v z_v - lse) + \zeta \, lse^2$, with
    $\epsilon$ `label_smoothing` (as `torch.nn.functional.cross_entropy`) and $\zeta$ `z_loss`
    (PaLM, arXiv 2204.02311). `mean` divides by the number of labels that are not ignored and gives
    0, with zero gradients, where there is none. Other args and errors as `linear_stats`.

    Returns:
        a scalar, or [N] for `none`.

    Raises:
        ValueError: also for a `reduction` of another name or `label_smoothing` outside [0, 1].

    >>> h, w, y = torch.randn(4, 8), torch.randn(16, 8), torch.tensor([3, 1, 0, 15])
    >>> expected = torch.nn.functional.cross_entropy(h @ w.T, y, label_smoothing=0.1)
    >>> torch.allclose(linear_cross_entropy(h, w, y, label_smoothing=0.1), expected, atol=1e-5)
    True
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: choose 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1]: got {label_smoothing}")
    wanted = {
        "logps": True,
        "lse": bool(label_smoothing or z_loss),
        "mean_logit": bool(label_smoothing),
    }
    stats = linear_stats(
        hidden,
        weight,
        labels,
        stats=tuple(name for name, needed in wanted.items() if needed),
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_size=vocab_size,
        lora=lora,
        group=group,
        same_tokens=same_tokens,
        accumulate_grad=accumulate_grad,
        backend=backend,
        workspace_mib=workspace_mib,
    )
    losses = -stats["logps"]
    if label_smoothing:
        smooth = stats["lse"] - stats["mean_logit"]
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    if z_loss:
        losses = losses + z_loss * stats["lse"].square()
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (labels != ignore_index).sum().clamp(min=1)


def logps_from_logits(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    r"""Return log-probabilities of the labels from logits that exist already.

    Args:
        logits: [..., V], any float dtype; the log-sum-exp is taken in float32 (float64 stays).
        labels: [...] integers in [0, V), or `ignore_index`.
        temperature: divisor of the logits.

    Returns:
        [...] float32 (float64 for float64 logits), 0 at ignored positions.

    Raises:
        ValueError: shapes that do not match, a label outside the vocabulary.

    >>> logps_from_logits(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)).exp()[0, 0]
    tensor(0.2500)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, so labels must be {tuple(logits.shape[:-1])}: got "
            f"{tuple(labels.shape)}"
        )
    scored_tokens(labels.flatten(), ignore_index, logits.shape[-1])  # refuses what is outside
    ignored = labels == ignore_index
    z = logits.to(accumulator(logits.dtype)) / temperature
    index = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    logps = z.gather(-1, index).squeeze(-1) - z.logsumexp(dim=-1)
    return logps.masked_fill(ignored, 0)
