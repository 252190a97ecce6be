"""The plain path: whole logits, log_softmax, nothing fused. Only tests use it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.head.tensors import HeadTensors, ReferenceStates


def dense_stats(
    hidden: Tensor,
    head: HeadTensors,
    targets: Tensor,
    *,
    want: tuple[str, ...],
    reference: ReferenceStates | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Compute `fastpo.head.token_statistics` as anybody would write it."""
    logp = F.linear(hidden, head.weight, head.bias).log_softmax(-1)
    at = targets[:, None]
    found = {
        "logps": logp.gather(1, at).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_p2": (2 * logp).logsumexp(-1),
    }
    if reference is not None:
        own = reference.head or head
        with torch.no_grad():
            ref = F.linear(reference.hidden, own.weight, own.bias).log_softmax(-1)
        found["ref_logps"] = ref.gather(1, at).squeeze(1)
        found["kl_ref_policy"] = (ref.exp() * (ref - logp)).sum(-1)
        found["kl_policy_ref"] = (logp.exp() * (logp - ref)).sum(-1)
    return {name: found[name] for name in want}
