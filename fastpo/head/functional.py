r"""Hidden states to token statistics without ever building the logits.

The head is $z_v = softcap(s (W_v \cdot h + b_v)) / T$ with $softcap(x) = cap \tanh(x / cap)$, and
p = softmax(z). Everything a preference objective wants of it is a number per label token:

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
| `top1` | 1 where the first largest logit is the label's | no |

Shapes: N tokens, D width, V vocabulary. Memory: a fixed workspace, never a function of N times V.
`fastpo.head.schedule` says which matrix products run when.
"""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.head.lora import Lora, check_lora
from fastpo.head.op import LinearStats, Plan
from fastpo.head.select import plan_head
from fastpo.head.spec import Backend, Workspace, check_workspace
from fastpo.head.triton_backend import TritonTiles
from fastpo.head.types import DIFFERENTIABLE, OF_REFERENCE, STATISTICS, Heads, Link, accumulator
from fastpo.head.vocab_parallel import Shard, cut, is_cut, whole

logger = logging.getLogger(__name__)


TokenStats: TypeAlias = dict[str, Tensor]


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)


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
    backend: Backend = "auto",
    workspace_mib: Workspace = "auto",
) -> TokenStats:
    r"""Token statistics of the head for the label tokens; the table is in the module's docstring.

    Args:
        hidden: [N, D] float64, float32, bfloat16 or float16; row t predicts `labels[t]`.
        weight: [V, D], same dtype; under autocast both are cast to the autocast dtype.
        labels: [N] integers in [0, V), or `ignore_index`: such a row costs nothing and gets zeros.
        stats: names of the statistics to return.
        grad: those of them that gradient flows through; all differentiable ones by default. Each
            costs one more product and one more [N, D] buffer on a frozen head.
        bias: [V] or None.
        ref_hidden: [N, D'] the reference's hidden states, for its statistics; no gradient.
        ref_weight: [V, D'] the reference's head, by default `weight` without `lora`; `ref_bias`
            likewise.
        softcap, logit_scale, temperature: the head's facts; both heads share them. A temperature
            may be a tensor [N], one for each token, and gets no gradient.
        vocab_size: rows of the weight that stand for tokens; the padding after them has probability
            0 and no part in any statistic. None for all of them.
        lora: a low-rank delta of `weight`, never merged into it; its gradients are exact.
        jsd_beta: the reference's share of the mixture of `jsd`, as in GKD (arXiv 2306.13649). In
            (0, 1): its limits 0 and 1 are `kl_ref_policy` and `kl_policy_ref`.
        group: ranks that each hold some rows of the head, in the order of ranks: `weight`, `bias`,
            `lora.b` and the reference's are then this rank's, labels and `vocab_size` the whole
            head's. Every rank calls, and no weight travels. A DTensor cut by rows, as FSDP2 makes
            them, brings its group with it.
        same_tokens: with rows on several ranks, whether all of them have the same tokens (tensor
            parallel, usual for `group`) or each its own (FSDP2, usual for a DTensor). In the latter
            case the gradient of a DTensor is the mean of the ranks' losses, as FSDP2 reduces it.
        skip_below: leave a slice of the vocabulary out of a token's gradient where the policy gives
            it a smaller probability, and its products with it; 0 leaves nothing out. The
            statistic `skipped` is all that was left out of a row, so that the error of row t of the
            gradient is at most $|g_t| skipped_t \max_v \lVert c_v W_v \rVert$. For `logps` alone.
        accumulate_grad: add the gradient of `weight`, a leaf, straight to its `grad` if there is
            one, or to a [V, D] tensor, of any dtype, that is given: [V, D] less memory. Hooks on
            the weight, such as DDP's, do not see it. Without effect under `torch.compile`.
        backend: `auto`, `torch` (plain PyTorch tiles) or `triton`; a named one never falls back.
        workspace_mib: budget of the slabs of logits that are alive at once. `auto` is 256, and on a
            GPU the smaller of 1024 and 2 % of its memory.

    Returns:
        name -> [N] float32 (float64 for float64 inputs), 0 at ignored positions.

    Raises:
        ValueError: shapes or dtypes that do not match, an unknown statistic or backend, a label
            outside [0, V), a statistic of the reference without `ref_hidden`.

    Under `torch.compile` ignored rows are computed and dropped, since a graph's shapes cannot
    depend on labels, and a label outside the vocabulary fails an assertion on the device.

    >>> h, w = torch.randn(4, 8), torch.randn(16, 8)
    >>> out = linear_stats(h, w, torch.tensor([3, -100, 0, 15]), stats=("logps", "entropy"))
    >>> out["logps"].shape, out["entropy"][1].item()
    (torch.Size([4]), 0.0)
    """
    stats = tuple(stats)
    grad = tuple(n for n in stats if n in DIFFERENTIABLE) if grad is None else tuple(grad)
    link = Link(softcap, logit_scale, temperature, jsd_beta)
    with_reference = any(name in OF_REFERENCE for name in stats)
    _check(hidden, weight, labels, stats, grad, link, bias, workspace_mib)
    if not 0 <= skip_below < 1:
        raise ValueError(f"skip_below must lie in [0, 1): got {skip_below}")
    if skip_below and (grad != ("logps",) or with_reference):
        raise ValueError(
            f"skip_below is for the gradient of logps alone: got grad={grad} of stats={stats}"
        )
    if "skipped" in stats and not skip_below:
        raise ValueError("nothing is skipped without skip_below")
    if lora is not None:
        check_lora(lora, weight)
    leaf = into = None
    if isinstance(accumulate_grad, Tensor):
        into = accumulate_grad
        fits = is_cut(weight) or into.shape == weight.shape
        if not (fits and into.is_floating_point()):
            raise ValueError(
                f"accumulate_grad must be {list(weight.shape)} of floating point: got "
                f"{list(into.shape)} of {into.dtype}"
            )
    elif accumulate_grad and not torch.compiler.is_compiling():
        leaf = weight
    rows: dict[str, Tensor | None] = {"weight": weight, "bias": bias}
    rows |= {"ref_weight": ref_weight, "ref_bias": ref_bias} if with_reference else {}
    rows |= {} if lora is None else {"lora_b": lora.b}
    shard = Shard(None, 0, (len(weight),))
    if group is not None or is_cut(weight):
        rows, shard, same_tokens = cut(rows, group, same_tokens)
    if leaf is not None and (shard.group is not None or not leaf.is_leaf):
        raise ValueError("accumulate_grad needs a weight that is whole and a leaf")
    if vocab_size is not None:
        if not 0 < vocab_size <= shard.vocab_size:
            raise ValueError(f"vocab_size {vocab_size} for a weight of {shard.vocab_size} rows")
        shard = shard.trimmed(vocab_size)
        real = slice(shard.rows[shard.rank])
        rows = {name: None if t is None else t[real] for name, t in rows.items()}
    if not min(shard.rows):
        raise ValueError(f"a rank holds no rows of the head: they hold {shard.rows}")
    lora_b, weight = rows.pop("lora_b", None), cast(Tensor, rows["weight"])
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or call under "
            "torch.autocast"
        )
    bias = rows["bias"]
    ref_weight = ref_bias = None
    if with_reference:
        if ref_hidden is None:
            raise ValueError(f"{stats} needs the reference's hidden states: pass ref_hidden")
        ref_weight, ref_bias = rows["ref_weight"], rows["ref_bias"]
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias
        if ref_hidden.shape[0] != hidden.shape[0] or ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"the reference has {ref_hidden.shape[0]} tokens and {ref_weight.shape[0]} "
                f"vocabulary rows, the policy {hidden.shape[0]} and {weight.shape[0]}"
            )
        ref_hidden = ref_hidden.detach().to(hidden.dtype)
        ref_weight = ref_weight.detach().to(hidden.dtype)
        ref_bias = None if ref_bias is None else ref_bias.detach()
    temperatures = None
    if isinstance(temperature, Tensor):
        temperatures = temperature.detach().to(accumulator(hidden.dtype))
        temperature = 1.0

    heads = Heads(
        hidden,
        weight,
        bias,
        labels.long(),
        ref_hidden if with_reference else None,
        ref_weight,
        ref_bias,
        temperatures,
    )
    total = labels.numel()
    ignored = valid = None
    if torch.compiler.is_compiling():
        # A graph's shapes cannot depend on labels: ignored rows are computed and dropped.
        ignored, outside = _unscored(labels, ignore_index, shard.vocab_size)
        torch._assert_async(~outside.any(), f"a label is outside [0, {shard.vocab_size})")
        heads = heads._replace(labels=heads.labels.masked_fill(ignored, 0))
    else:
        valid = _valid_positions(labels, ignore_index, shard.vocab_size)
        heads = heads if valid is None else heads.pick(valid)
    if lora is not None and lora_b is not None:
        # The delta's factor rides beside the states, so that one backward serves both.
        low = (heads.hidden @ whole(lora.a).to(hidden.dtype).T) * lora.scaling
        heads = heads._replace(
            hidden=torch.cat([heads.hidden, low], dim=1), lora_b=lora_b.to(hidden.dtype)
        )
    if shard.group is not None and not same_tokens:
        shard = shard.of_tokens(len(heads.labels), hidden.device)
    num_tokens = sum(shard.tokens) or len(heads.labels)
    if num_tokens == 0:
        # No row is left, but the graph is: leaves get zero gradients, not None.
        leaves = (heads.hidden, weight, bias, heads.lora_b)
        anchor = torch.stack([t[:0].sum() for t in leaves if t is not None]).sum()
        zeros = hidden.new_zeros(total, dtype=accumulator(hidden.dtype))
        return {n: zeros + anchor if n in grad else zeros.clone() for n in stats}

    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (heads.hidden, weight, bias, heads.lora_b)
    ]
    tiles, schedule, why = plan_head(
        num_tokens,
        max(shard.rows),
        hidden.shape[1],
        device=hidden.device,
        dtype=hidden.dtype,
        stats=stats,
        num_grad_stats=len(grad),
        needs_hidden=needs[0],
        needs_head=any(needs[1:]),
        needs_weight=needs[1],
        with_reference=with_reference,
        backend=backend,
        workspace_mib=workspace_mib,
        link=link,
        plain_only="head cut over ranks" if shard.group else "skip_below" if skip_below else "",
    )
    if backend == "auto" and not torch.compiler.is_compiling():
        _say_once(f"head backend {why}")
    plan = Plan(
        want=stats,
        grads=grad,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        jsd_beta=jsd_beta,
        skip_below=skip_below,
        backend="triton" if isinstance(tiles, TritonTiles) else "torch",
        schedule=schedule.name,
        row_block=schedule.row_block,
        vocab_block=schedule.vocab_block,
        late_rows=schedule.late_rows,
        kept=schedule.kept,
        **shard._asdict(),
    )
    values = LinearStats.apply(plan, leaf, into, *heads)
    if ignored is not None:
        values = [v.masked_fill(ignored, 0) for v in values]
    elif valid is not None:
        values = [v.new_zeros(total).index_copy(0, valid, v) for v in values]
    return dict(zip(stats, values, strict=True))


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    stats: tuple[str, ...],
    grad: tuple[str, ...],
    link: Link,
    bias: Tensor | None,
    workspace_mib: Workspace,
) -> None:
    """ValueError for arguments that cannot be meant; costs no device sync."""
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"weight must be a tensor [V, D], not a {type(weight).__name__}: for a model, "
            "head = fastpo.read_head(model), then head.weight and **head.facts()"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D]: got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [{hidden.shape[0]}]: got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers: got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}]: got {tuple(bias.shape)}")
    for name in (*stats, *grad):
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}: choose from {', '.join(STATISTICS)}")
    for name in grad:
        if name not in stats or name not in DIFFERENTIABLE:
            raise ValueError(f"grad names {name!r}, which is not a differentiable one of {stats}")
    if link.softcap is not None and not link.softcap > 0:
        raise ValueError(f"softcap must be positive or None: got {link.softcap}")
    if isinstance(link.temperature, Tensor):
        if link.temperature.shape != labels.shape:
            raise ValueError(
                f"temperature must be a number or [{labels.numel()}]: got "
                f"{tuple(link.temperature.shape)}"
            )
    elif not link.temperature > 0:
        raise ValueError(f"temperature must be positive: got {link.temperature}")
    if not 0 < link.jsd_beta < 1:
        raise ValueError(
            f"jsd_beta must lie between 0 and 1: got {link.jsd_beta}; towards 0 use kl_ref_policy, "
            "towards 1 kl_policy_ref"
        )
    check_workspace(workspace_mib)


def _unscored(labels: Tensor, ignore_index: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Masks of the labels that are ignored, and of those that cannot be meant."""
    ignored = labels == ignore_index
    return ignored, ((labels < 0) | (labels >= vocab_size)) & ~ignored


def _valid_positions(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor | None:
    """Positions whose label is not ignored, or None when that is all of them."""
    ignored, outside = _unscored(labels, ignore_index, vocab_size)
    any_ignored, any_outside = torch.stack([ignored.any(), outside.any()]).tolist()
    if any_outside:
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"label {int(labels[position])} at position {position} is outside the vocabulary "
            f"[0, {vocab_size}) and is not ignore_index={ignore_index}"
        )
    return (~ignored).nonzero().squeeze(1) if any_ignored else None


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
    backend: Backend = "auto",
    workspace_mib: Workspace = "auto",
) -> Tensor:
    r"""Log-probabilities of the labels, $\log softmax(z_t)_{y_t}$, without the logits.

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
    backend: Backend = "auto",
    workspace_mib: Workspace = "auto",
) -> Tensor:
    r"""Cross-entropy of a linear head without the logits.

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
    r"""Log-probabilities of the labels for people who already hold logits.

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
    _valid_positions(labels.flatten(), ignore_index, logits.shape[-1])
    ignored = labels == ignore_index
    z = logits.to(accumulator(logits.dtype)) / temperature
    index = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    logps = z.gather(-1, index).squeeze(-1) - z.logsumexp(dim=-1)
    return logps.masked_fill(ignored, 0)
