"""Sum token statistics to the scores of responses: nowhere else are tokens summed or weighted.

Shapes: N target tokens, R responses, G groups (one prompt each), K candidates per group.
Candidates are numbered best first: slot 0 is the chosen response, the last slot the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastpo.head.select import runs_kernels
from fastpo.head.spec import BackendName
from fastpo.head.statistics import TokenStats
from fastpo.objectives.vocabulary import MEANS, STATISTIC_OF
from fastpo.segments import Segments


def sum_by_response(values: Tensor, segments: Segments) -> Tensor:
    """Return [R, ...] sums of [N, ...] over the tokens of each response, 0 for an empty one."""
    # One after the other in float32 they would lose a digit or two of a long response.
    wide = torch.float64 if values.is_cpu else values.dtype
    sums = values.new_zeros(segments.num_responses, *values.shape[1:], dtype=wide)
    return sums.index_add(0, segments.response, values.to(wide)).to(values.dtype)


def _sums_of(segments: Segments, backend: BackendName) -> Callable[..., Tensor]:
    """Return a function of values [N] and weights [N] that returns their weighted sums [R].

    A kernel sums where kernels run: adding by index races on a GPU, and equal inputs would not
    give equal bits.
    """
    if not runs_kernels(backend, segments.response.device):

        def plain(values: Tensor, weights: Tensor | None = None) -> Tensor:
            return sum_by_response(values if weights is None else values * weights, segments)

        return plain
    from fastpo.kernels.segment_reduce import segment_reduce

    starts = segments.starts

    def fused(values: Tensor, weights: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(values.dtype, torch.float32)
        if weights is not None:
            dtype = torch.promote_types(dtype, weights.dtype)
            weights = weights.to(dtype)
        return segment_reduce(values.to(dtype), starts, weights)

    return fused


def score_responses(
    stats: TokenStats,
    segments: Segments,
    *,
    ref_logps: Tensor | None = None,
    ref2_logps: Tensor | None = None,
    old_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    token_rewards: Tensor | None = None,
    kl_weights: Tensor | None = None,
    per_token: bool = False,
    backend: BackendName = "auto",
) -> dict[str, Tensor]:
    """Return the scores that objectives are written in: `fastpo.objectives.vocabulary.SCORES`.

    Those of candidates are [G, K], zero where a group has no such candidate. An extra response
    named in `segments.extras` adds them with its role in front, [G]: `mismatched_ratio`. With
    `per_token` the tokens themselves come too, [G, K, T] in order, padded with zeros and not
    multiplied by their weights.

    Args:
        stats: token statistics; `logps` [N], and `kl_ref_policy`, `kl_policy_ref`, `log_p2`,
            `entropy` if present.
        segments: the token -> response -> group table.
        ref_logps: [N] reference log-probs of the same tokens, or None.
        ref2_logps: [N] those of a second reference, or None.
        old_logps: [N] log-probs under the policy that drew the responses, or None.
        token_weights: [N] weights, with or without gradient, or None for ones.
        token_rewards: [N] signed rewards of single tokens, or None.
        kl_weights: [N] weights of `kl` and `kl_reverse`, with or without gradient, or None for
            `token_weights`, as everything else has.
        per_token: whether to return the `token_` scores; costs a device sync without
            `segments.bounds`.
        backend: who sums; as for `fastpo.head.linear_stats`.

    Returns:
        name -> tensor; `ratio` and its relatives only with `ref_logps`, and so on.

    Raises:
        ValueError: a per-token tensor does not have the N of `segments.response`.
    """
    n = segments.response.numel()
    summed = {name: stats[stat] for name, stat in STATISTIC_OF.items() if stat in stats}
    for name, value in (
        ("ref_logps", ref_logps),
        ("ref2_logps", ref2_logps),
        ("old_logps", old_logps),
    ):
        if value is not None:
            summed[name] = value
    beside = {
        "token_weights": token_weights,
        "token_rewards": token_rewards,
        "token_kl_weights": token_weights if kl_weights is None else kl_weights,
    }
    for name, value in {**summed, **beside}.items():
        if value is not None and value.shape != (n,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but the segments describe {n} target "
                "tokens"
            )

    counted = torch.ones_like(summed["logps"])
    if token_weights is not None:
        counted = (token_weights != 0).to(summed["logps"].dtype)
    weights = dict.fromkeys(summed, token_weights)
    weights |= dict.fromkeys({"kl", "kl_reverse"} & summed.keys(), beside["token_kl_weights"])
    sums = _sums_of(segments, backend)
    per_response = {name: sums(value, weights[name]) for name, value in summed.items()}
    per_response["length"] = sums(counted)
    if ref_logps is not None:
        # Subtracted token by token: sums of hundreds of nats each would keep their rounding.
        difference = summed["logps"] - ref_logps
        per_response["ratio"] = sums(difference, token_weights)
        per_response["kl_estimate"] = sums(difference.detach().square() / 2, counted)
    if ref2_logps is not None:
        per_response["ratio2"] = sums(summed["logps"] - ref2_logps, token_weights)
    # An empty response has score 0 and length 0: dividing by 1 keeps its mean and gradient at 0.
    divisor = per_response["length"].clamp(min=1)
    for name in MEANS:
        if name in per_response:
            per_response[f"mean_{name}"] = per_response[name] / divisor

    mask = segments.mask
    slots = segments.grid.clamp(min=0)
    scores = {
        name: torch.where(mask, value[slots], value.new_zeros(()))
        for name, value in per_response.items()
    }
    for role, index in segments.extras.items():
        for name, value in per_response.items():
            scores[f"{role}_{name}"] = value[index]
    scores["mask"] = mask
    scores["label"] = segments.label & mask
    for name in ("score", "rank", "margin", "population"):
        value = getattr(segments, name)
        if value is not None:
            scores[name] = value
    if per_token:
        tokens = {f"token_{name}": value for name, value in summed.items()}
        tokens |= {name: value for name, value in beside.items() if value is not None}
        tokens.setdefault("token_weights", counted)
        tokens.setdefault("token_kl_weights", counted)
        tokens["token_mask"] = (tokens["token_weights"] != 0) | (tokens["token_kl_weights"] != 0)
        scores |= _pad_tokens(tokens, segments)
    return scores


def _pad_tokens(tokens: Mapping[str, Tensor], segments: Segments) -> dict[str, Tensor]:
    """Return [N] tensors as [G, K, T], zero (False) where there is no token."""
    n, slots, starts = segments.response.numel(), segments.grid.clamp(min=0), segments.starts
    lengths = starts.diff()  # [R]
    column = torch.arange(max(1, segments.longest), device=starts.device)
    inside = segments.mask[..., None] & (column < lengths[slots][..., None])  # [G, K, T]
    index = (starts[slots][..., None] + column).clamp(max=max(0, n - 1))
    return {
        name: torch.where(inside, value[index], value.new_zeros(()))
        if n
        else value.new_zeros(inside.shape)
        for name, value in tokens.items()
    }
