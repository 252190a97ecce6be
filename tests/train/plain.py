"""The plain path: whole logits, log_softmax, nothing fused. Only tests use it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    stats: tuple[str, ...] = ("logps",),
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """`fastpo.head.linear_stats` as anybody would write it."""
    logp = F.linear(hidden, weight, bias).log_softmax(-1)
    at = labels[:, None]
    found = {
        "logps": logp.gather(1, at).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_p2": (2 * logp).logsumexp(-1),
    }
    if ref_hidden is not None:
        with torch.no_grad():
            ref = F.linear(
                ref_hidden, weight if ref_weight is None else ref_weight, ref_bias
            ).log_softmax(-1)
        found["ref_logps"] = ref.gather(1, at).squeeze(1)
        found["kl_ref_policy"] = (ref.exp() * (ref - logp)).sum(-1)
        found["kl_policy_ref"] = (logp.exp() * (logp - ref)).sum(-1)
    return {name: found[name] for name in stats}
