"""Compute preference losses from hidden states; the logits are never built.

Two padded pairs, chosen rows before rejected ones, give a loss, rewards and gradients:

>>> import torch
>>> head = torch.nn.Linear(8, 16, bias=False)
>>> loss = PreferenceLoss("dpo", head, beta=0.1)
>>> hidden, labels = torch.randn(4, 5, 8), torch.randint(0, 16, (4, 5))
>>> labels[:, :2] = -100  # the prompt is not scored
>>> out = loss(hidden, labels, ref_logps=torch.zeros(4, 5))
>>> out.loss.backward()
>>> head.weight.grad.shape, out.rewards.shape
(torch.Size([16, 8]), torch.Size([2, 2]))
>>> {"rewards/margins", "rewards/accuracies"} <= out.metrics.keys()
True

Files, in the order of a call:

- `mixture` resolves names, weights and hyper-parameters of objectives.
- `preference_loss` is the module that joins everything below.
- `group_chunks` runs a trained head a few groups at a time.
- `scores` sums token statistics to the scores of responses.
- `batch_statistics` takes numbers of the whole batch, and remembers them.
- `fused` runs an objective's kernel where it has one.
- `metrics` counts a batch and averages what is logged.
"""

from fastpo.loss.metrics import LossOutput
from fastpo.loss.mixture import Component, resolve
from fastpo.loss.preference_loss import PreferenceLoss

__all__ = ["Component", "LossOutput", "PreferenceLoss", "resolve"]
