r"""Hidden states to token statistics without ever building the logits.

>>> hidden, weight = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)  # [N, D], [V, D]
>>> labels = torch.tensor([3, -100, 0, 15])  # hidden[t] predicts labels[t]; -100 is ignored
>>> logps = linear_logps(hidden, weight, labels)
>>> torch.allclose(logps[0], (hidden @ weight.T).log_softmax(-1)[0, 3], atol=1e-5)
True
>>> logps.sum().backward()  # exact; no tensor of N times V elements on the way
>>> stats = linear_stats(hidden, weight, labels, stats=("logps", "entropy"), softcap=30.0)
>>> {name: tuple(value.shape) for name, value in stats.items()}
{'logps': (4,), 'entropy': (4,)}

`HeadSpec` and `HeadOptions` say the same to code that calls many times, `HeadTensors` is the head:

>>> head, spec = HeadTensors(weight), HeadSpec(softcap=30.0)
>>> same = token_statistics(hidden, head, labels, want=("logps", "entropy"), spec=spec)
>>> torch.equal(same["entropy"], stats["entropy"])
True

A call descends functional -> statistics -> op -> a backend -> `fastpo.kernels`. `functional` has
the table of statistics, `types` the formula of the gradient, `schedule` the order of matmuls.
"""

from fastpo.head.functional import (
    linear_cross_entropy,
    linear_logps,
    linear_stats,
    logps_from_logits,
)
from fastpo.head.head import Head
from fastpo.head.lora import Lora
from fastpo.head.select import choose_backend, most_kept_tokens, plan_head, workspace_in_mib
from fastpo.head.spec import BackendName, HeadOptions, HeadSpec, Workspace, check_workspace
from fastpo.head.statistics import TokenStats, token_statistics
from fastpo.head.tensors import HeadTensors, ReferenceStates

Backend = BackendName

__all__ = [
    "Backend",
    "BackendName",
    "Head",
    "HeadOptions",
    "HeadSpec",
    "HeadTensors",
    "Lora",
    "ReferenceStates",
    "TokenStats",
    "Workspace",
    "check_workspace",
    "choose_backend",
    "linear_cross_entropy",
    "linear_logps",
    "linear_stats",
    "logps_from_logits",
    "most_kept_tokens",
    "plan_head",
    "token_statistics",
    "workspace_in_mib",
]
