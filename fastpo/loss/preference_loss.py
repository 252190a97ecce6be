"""Join head, scores and objective in one `nn.Module` from hidden states to a preference loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.batch import TargetTokens
from fastpo.domain import Domain
from fastpo.head.head import Head
from fastpo.head.select import most_kept_tokens, runs_kernels
from fastpo.head.spec import BackendName, HeadOptions, HeadSpec, Workspace
from fastpo.head.statistics import TokenStats, token_statistics
from fastpo.head.tensors import HeadTensors, ReferenceStates
from fastpo.head.vocab_parallel import is_cut
from fastpo.loss.batch_statistics import BatchStatistics
from fastpo.loss.group_chunks import LossInputs, by_groups, cut_groups
from fastpo.loss.metrics import (
    LossOutput,
    at_least_one,
    batch_counts,
    merged,
    reward_metrics,
    weight_metrics,
)
from fastpo.loss.mixture import Component, resolve
from fastpo.loss.scores import score_responses
from fastpo.objectives.base import Objective, Outcome
from fastpo.objectives.lipo import tie_keys
from fastpo.objectives.regularisers import REGULARISERS
from fastpo.objectives.vocabulary import STATISTIC_OF, Score
from fastpo.segments import Segments


def _head_of(model: Head | nn.Module) -> Head:
    if isinstance(model, Head):
        return model
    name, weight = type(model).__name__, getattr(model, "weight", None)
    if not isinstance(model, nn.Module) or (isinstance(weight, Tensor) and weight.dim() != 2):
        raise ValueError(f"head={name}: give the causal language model, its head, or a fastpo.Head")
    if not isinstance(weight, Tensor):
        from fastpo import read_head  # only models need transformers

        try:
            return read_head(model)
        except TypeError as error:
            raise ValueError(f"head={name} is neither a linear layer nor a causal LM") from error
    if type(model).__module__.startswith("peft.") or not weight.is_floating_point():
        raise ValueError(
            f"head={name} is more than its weight (an adapter, or quantised): give the model itself"
        )
    return Head(model)


class PreferenceLoss(BatchStatistics):
    r"""Compute a preference loss from hidden states; the logits are never built.

    Args:
        objective: a name of `fastpo.OBJECTIVES`, or a mixture `{"dpo": 0.8, "sft": 1.0}`.
        head: the causal language model itself, perhaps wrapped (peft, DDP, torch.compile), whose
            head and its facts `fastpo.read_head` reads; or a `Head`; or a plain `nn.Linear`, for a
            head without facts. A bare `lm_head` does not know that its model caps or scales the
            logits (Gemma 2, Cohere, Granite): give the model. None if every call passes `weight`.
            It is not registered: its parameters stay the model's.
        **hyper: hyper-parameters of the objective; see `fastpo objectives NAME`. One that is two
            numbers, [first, last], moves linearly with `progress` (DPO-Shift's lambda).

    Attributes:
        progress: the share of training that is done, in [0, 1]; a training loop sets it.
        seed, step: keys of the random order of tied candidates (LiPO); a training loop that wants
            a new draw each step sets `step`. Calls of one step also count as one for statistics
            with a memory (BCO's shift); while it is None every training call is a step.

    Raises:
        ValueError: an unknown objective or hyper-parameter, with the nearest name; a `head` that is
            neither a head nor a model with one.

    TRL and Liger users have the padded layout, here of two pairs: rows 0-1 chosen, 2-3 rejected.

    >>> head = nn.Linear(8, 16, bias=False)
    >>> loss = PreferenceLoss("simpo", head, beta=2.0)
    >>> hidden, labels = torch.randn(4, 5, 8), torch.randint(0, 16, (4, 5))
    >>> labels[:, 0] = -100  # prompt positions
    >>> out = loss(hidden, labels)
    >>> out.loss.backward()
    >>> out.rewards.shape, sorted(out.metrics)[-1]
    (torch.Size([2, 2]), 'rewards/rejected')
    """

    def __init__(
        self,
        objective: str | Mapping[str, float],
        head: Head | nn.Module | None = None,
        **hyper: Any,
    ) -> None:
        components = resolve(objective, hyper)
        super().__init__(components)
        self.components = components
        self.seed = 0
        self.progress = 0.0
        # In a tuple, so that nn.Module does not adopt the model's head as its own child.
        self._head = (None if head is None else _head_of(head),)

    @property
    def head(self) -> Head | None:
        """Return the head of the constructor."""
        return self._head[0]

    @property
    def scores(self) -> dict[str, Score]:
        """Return the scores that the components take, by name; statistics are none."""
        return {n: score for c in self.components for n, score in c.objective.scores.items()}

    @property
    def needs(self) -> frozenset[str]:
        """Return the names of the scores that the components take, without statistics."""
        return frozenset(self.scores)

    @property
    def grade_domains(self) -> list[tuple[str, Domain]]:
        """Return the name of every component that takes grades, and what they must be."""
        return [
            (c.objective.name, c.objective.grades(c.hyper))
            for c in self.components
            if "score" in c.objective.needs
        ]

    @property
    def needs_kl(self) -> bool:
        """Return whether the reference's whole distribution is needed."""
        return any(c.objective.needs_kl for c in self.components)

    @property
    def needs_reference(self) -> bool:
        """Return whether a reference model, or its log-probs, are needed."""
        return any(c.objective.needs_reference for c in self.components)

    @property
    def needs_second_reference(self) -> bool:
        """Return whether log-probs of a second reference are needed too."""
        return any(c.objective.needs_second_reference for c in self.components)

    @property
    def extras(self) -> tuple[str, ...]:
        """Return the roles of the extra responses that are needed, such as `mismatched` for KTO."""
        roles = {role for c in self.components for role in c.objective.extras}
        return tuple(sorted(roles))

    @property
    def has_statistics(self) -> bool:
        """Return whether a component takes numbers of the whole batch."""
        return any(c.objective.statistics for c in self.components)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        segments: Segments | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref2_logps: Tensor | None = None,
        old_logps: Tensor | None = None,
        token_weights: Tensor | None = None,
        token_rewards: Tensor | None = None,
        kl_weights: Tensor | None = None,
        totals: Mapping[str, float] | None = None,
        ignore_index: int = -100,
        backend: BackendName = "auto",
        workspace_mib: Workspace = "auto",
    ) -> LossOutput:
        """Return loss, per-group losses, implicit rewards and metrics of one batch.

        Args:
            hidden: [N, D] states of the target tokens, or [2B, T, D], B chosen rows then the B
                rejected ones. `hidden[i]` predicts `labels[i]`: labels are already shifted.
            labels: [N] or [2B, T]; `ignore_index` marks prompt and padding.
            segments: token -> response -> group table of the [N] form; None for the padded form.
            weight, bias: the head's tensors, by default the head's own.
            ref_hidden: the reference's hidden states, same shape as `hidden`; with `ref_weight`
                (and `ref_bias`) where the policy's head is trained.
            ref_logps: per-token reference log-probs, same shape as `labels`.
            ref2_logps: those of a second reference, likewise.
            old_logps: per-token log-probs of the policy that drew the responses, likewise.
            token_weights: per-token weights, same shape as `labels`.
            token_rewards: signed rewards of single tokens, same shape as `labels`.
            kl_weights: per-token weights of the divergences, by default `token_weights`.
            totals: counts of the whole optimiser step over all ranks (`groups`, `responses`,
                `desirable`, `undesirable`, `chosen_tokens`, `response_tokens`, `gold_tokens`) that
                sums are divided by; None for this batch's own.

        Raises:
            ValueError: a score that an objective needs is missing (says how to get it), or the
                groups do not have the number of candidates that it compares.
        """
        if segments is None:
            segments = _pairs(hidden, labels)
        head = self.head_tensors if weight is None else HeadTensors(weight, bias)
        per_token = {
            "ref_logps": ref_logps,
            "ref2_logps": ref2_logps,
            "old_logps": old_logps,
            "token_weights": token_weights,
            "token_rewards": token_rewards,
            "kl_weights": kl_weights,
        }
        _check_shapes(hidden, labels, segments, ref_hidden, per_token)
        # Everything per token is cut down to the scored tokens once, here.
        scored = (labels.flatten() != ignore_index).nonzero().squeeze(1)
        segments = replace(segments, response=segments.response[scored], bounds=None)
        self._check_groups(segments)
        reference = None
        if ref_hidden is not None:
            if ref_weight is None and head.weight.requires_grad:
                raise ValueError(
                    "the policy's head is trained, so it is not the reference's: pass ref_weight"
                )
            ref_head = None if ref_weight is None else HeadTensors(ref_weight, ref_bias)
            reference = ReferenceStates(ref_hidden.flatten(0, -2)[scored], ref_head)
        return self.of_tokens(
            hidden.flatten(0, -2)[scored],
            TargetTokens(
                labels.flatten()[scored],
                segments,
                **{k: None if v is None else v.flatten()[scored] for k, v in per_token.items()},
            ),
            head=head,
            reference=reference,
            totals=totals,
            options=HeadOptions(backend, workspace_mib),
            in_vocabulary=False,
        )

    def of_tokens(
        self,
        hidden: Tensor,
        tokens: TargetTokens,
        *,
        head: HeadTensors | None = None,
        reference: ReferenceStates | None = None,
        totals: Mapping[str, float] | None = None,
        options: HeadOptions = HeadOptions(),
        in_vocabulary: bool = True,
    ) -> LossOutput:
        """Return what `forward` does, of packed tokens: these are trusted, and not copied.

        On a GPU nothing waits for the device, but statistics over several ranks, which tell one
        another how many observations they have.

        Args:
            hidden: [M, D] states of the head's positions.
            tokens: what they predict, and what is known beside it.
            head: the policy's, by default that of the constructor.
            reference: states of the reference's positions, numbered as the policy's, and its head.
            totals: see `forward`.
            options: who computes, in how much memory.
            in_vocabulary: whether all targets are known to lie inside the vocabulary.

        Raises:
            ValueError: a score that an objective needs is missing; says how to get it.
        """
        inputs = LossInputs(hidden, head or self.head_tensors, tokens, reference)
        cuts = self._cuts(inputs, options)
        batch_totals = _counts_of(tokens) if len(cuts) > 1 else None

        def loss_of(part: LossInputs, into: Tensor | None = None) -> LossOutput:
            stats = self._token_statistics(part, into, options, in_vocabulary)
            scores = self._score(stats, part.tokens, options.backend)
            counts = batch_totals or batch_counts(scores)
            return self._reduce(scores, part.tokens.segments, counts, totals, options.backend)

        output = loss_of(inputs) if len(cuts) == 1 else merged(by_groups(loss_of, inputs, cuts))
        for name, weights in (
            ("token_weights", tokens.token_weights),
            ("kl_weights", tokens.kl_weights),
        ):
            for metric, (total, count) in weight_metrics(name, weights).items():
                output.metrics[metric], output.counts[metric] = total / count, count
        return output

    @property
    def head_tensors(self) -> HeadTensors:
        """Return the tensors of the head as they are now.

        Raises:
            ValueError: there is no head.
        """
        if self.head is None:
            raise ValueError("no head: pass weight=, or head= to PreferenceLoss")
        return self.head.tensors

    def _cuts(self, inputs: LossInputs, options: HeadOptions) -> list[tuple[int, int]]:
        """Return intervals of groups: several where that saves a trained head's second pass."""
        head, tokens = inputs.head, inputs.tokens
        whole = [(0, len(tokens.segments.grid))]
        trained = any(tensor.requires_grad for tensor in head.leaves().values())
        if not trained or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return whole
        # Those need all scores first; ranks that share a head have to meet equally often. Shared
        # positions are of several groups.
        if self.has_statistics or is_cut(head.weight) or tokens.index is not None:
            return whole
        with_reference = self.needs_kl and inputs.reference is not None
        most = most_kept_tokens(
            *head.weight.shape,
            device=head.weight.device,
            dtype=head.weight.dtype,
            want=self._statistics_wanted(with_reference),
            with_reference=with_reference,
            backend=options.backend,
            workspace_mib=options.workspace_mib,
        )
        return whole if len(tokens.targets) <= most else cut_groups(tokens.segments, most)

    def _statistics_wanted(self, with_reference: bool) -> tuple[str, ...]:
        """Return statistics to ask of the head; divergences need the reference in the same pass."""
        needed = {s.statistic for s in self.scores.values() if with_reference or not s.distribution}
        wanted = [statistic for statistic in STATISTIC_OF.values() if statistic in needed]
        return tuple(dict.fromkeys(("logps", *wanted, *(["ref_logps"] if with_reference else []))))

    def _token_statistics(
        self, inputs: LossInputs, into: Tensor | None, options: HeadOptions, in_vocabulary: bool
    ) -> TokenStats:
        """Return [M] statistics; `ref_logps` too where there are states of the reference."""
        spec = HeadSpec() if self.head is None else self.head.spec
        reference, targets = inputs.reference, inputs.tokens.targets
        both = self.needs_kl and reference is not None
        compute = partial(token_statistics, spec=spec, options=options, all_scored=in_vocabulary)
        stats = compute(
            inputs.hidden,
            inputs.head,
            targets,
            want=self._statistics_wanted(both),
            reference=reference if both else None,
            accumulate_grad=False if into is None else into,
        )
        if reference is not None and not both:
            ref_head = reference.head or inputs.head._replace(lora=None)
            with torch.no_grad():
                ref_stats = compute(reference.hidden, ref_head, targets, want=("logps",))
            stats["ref_logps"] = ref_stats["logps"]
        return stats

    def _score(
        self, stats: TokenStats, tokens: TargetTokens, backend: BackendName
    ) -> dict[str, Tensor]:
        """Return the scores of all responses, from [M] statistics."""
        stats = {name: tokens.read(values) for name, values in stats.items()}
        segments = tokens.segments
        scores = score_responses(
            stats,
            segments,
            ref_logps=stats.pop("ref_logps", tokens.ref_logps),
            ref2_logps=tokens.ref2_logps,
            old_logps=tokens.old_logps,
            token_weights=tokens.token_weights,
            token_rewards=tokens.token_rewards,
            kl_weights=tokens.kl_weights,
            per_token=any(score.shape == "[G, K, T]" for score in self.scores.values()),
            backend=backend,
        )
        if "tie_key" in self.needs:
            number = segments.index
            if number is None:
                number = torch.arange(segments.grid.shape[0], device=segments.grid.device)
            candidates = segments.grid.shape[1]
            scores["tie_key"] = tie_keys(number, candidates, seed=self.seed, step=self.step or 0)
        return scores

    def _check_groups(self, segments: Segments) -> None:
        sizes = segments.mask.sum(dim=1)
        for c in self.components:
            taken = c.objective.takes(sizes)
            if not bool(taken.all()):
                wrong = int((~taken).nonzero()[0])
                raise ValueError(c.objective.size_error(int(sizes[wrong]), f"group {wrong}"))
        grades = segments.score
        for name, domain in self.grade_domains:
            if grades is None:  # its own remedy comes with the scores
                break
            wrong = ~domain.holds(grades) & segments.mask
            if bool(wrong.any()):
                group, slot = wrong.nonzero()[0].tolist()
                grade, who = float(grades[group, slot]), f"response {slot} of group {group}"
                if grade != grade:
                    raise ValueError(
                        f"{name} needs every response's grade, but {who} has none: "
                        f"{self.scores['score'].remedy}"
                    )
                raise ValueError(
                    f"{name} takes grades that are {domain}, but {who} has {grade:g}: rescale them"
                )
        missing = [role for role in self.extras if role not in segments.extras]
        if missing:
            raise ValueError(
                f"{self._named()} needs a response in the role {missing[0]!r} for every group: "
                f"put its index into Segments(extras={{{missing[0]!r}: ...}})"
            )

    def _named(self) -> str:
        return " + ".join(c.objective.name for c in self.components)

    def _reduce(
        self,
        scores: dict[str, Tensor],
        segments: Segments,
        batch_totals: Mapping[str, Tensor],
        totals: Mapping[str, float] | None,
        backend: BackendName,
    ) -> LossOutput:
        """Evaluate objectives, sum and divide them; nowhere else does either happen.

        Args:
            batch_totals: counts of the batch, of which these groups may be a part.
        """
        divisors: Mapping[str, Any] = batch_totals if totals is None else totals
        losses = scores["logps"].new_zeros(segments.grid.shape[0])
        loss = losses.sum()
        rewards: dict[str, Tensor] = {}
        metrics, counts = {}, {}
        for configured in self.components:
            component = self._now(configured)
            name = component.objective.name
            self._check_scores(component.objective, scores)
            statistics = self.statistics(component, scores, segments)
            # A kernel is compiled for its constants: one that moves would do so at every step.
            by = backend if component is configured else "torch"
            outcome = self._evaluate(component, {**scores, **statistics}, by)
            rewards[name] = outcome.rewards
            for term in outcome.terms:
                scale = component.weight * term.weight
                values = term.values if segments.weight is None else term.values * segments.weight
                loss = loss + scale * values.sum() / at_least_one(divisors[term.per])
                share = len(losses) / at_least_one(batch_totals[term.per])
                losses += scale * values.detach() * share
            for statistic, value in statistics.items():
                if value.numel() == 1:
                    metrics[f"{name}/{statistic}"] = value.reshape(())
                    counts[f"{name}/{statistic}"] = value.new_ones(())
        # The logged rewards are the first objective's; regularisers have none of their own.
        logged = rewards[next((n for n in rewards if n not in REGULARISERS), next(iter(rewards)))]
        for name, (total, count) in reward_metrics(logged, scores).items():
            metrics[name], counts[name] = total / count, count
        return LossOutput(loss, losses, logged, metrics, counts)

    @staticmethod
    def _check_scores(objective: Objective, scores: Mapping[str, Tensor]) -> None:
        for name, score in objective.scores.items():
            if name not in scores:
                raise ValueError(f"{objective.name} needs {name!r}: {score.remedy}")

    def _now(self, component: Component) -> Component:
        """Return the component with the hyper-parameters of this step."""
        moved = {
            name: value[0] + (value[1] - value[0]) * self.progress
            for name, value in component.hyper.items()
            if isinstance(value, tuple)
        }
        return component._replace(hyper=component.hyper | moved) if moved else component

    @staticmethod
    def _evaluate(
        component: Component, named: Mapping[str, Tensor], backend: BackendName
    ) -> Outcome:
        """Run the objective's kernel where kernels run and it has one, else its function."""
        objective = component.objective
        if runs_kernels(backend, named["logps"].device):
            from fastpo.loss import fused

            outcome = fused.evaluate(objective, component.hyper, named)
            if outcome is not None:
                return outcome
        return objective(named, **component.hyper)


def _counts_of(tokens: TargetTokens) -> dict[str, Tensor]:
    """Return what the whole batch's sums are divided by."""
    nothing = {"logps": torch.zeros(tokens.segments.response.shape, device=tokens.targets.device)}
    return batch_counts(
        score_responses(nothing, tokens.segments, token_weights=tokens.token_weights)
    )


def _pairs(hidden: Tensor, labels: Tensor) -> Segments:
    """Return the table of the padded layout.

    Raises:
        ValueError: other shapes than [2B, T, D] and [2B, T].
    """
    if hidden.dim() != 3 or hidden.shape[0] % 2 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            "without segments hidden must be [2B, T, D], chosen rows then rejected rows, "
            f"and labels [2B, T]: got {tuple(hidden.shape)} and {tuple(labels.shape)}"
        )
    pairs, length = hidden.shape[0] // 2, hidden.shape[1]
    return Segments.pairs(pairs, length, device=labels.device)


def _check_shapes(
    hidden: Tensor,
    labels: Tensor,
    segments: Segments,
    ref_hidden: Tensor | None,
    per_token: Mapping[str, Tensor | None],
) -> None:
    """Raise ValueError for tensors that do not line up: flattened, they would be misread."""
    shape = tuple(labels.shape)
    for name, states in (("hidden", hidden), ("ref_hidden", ref_hidden)):
        if states is not None and tuple(states.shape[:-1]) != shape:
            raise ValueError(
                f"{name} is {tuple(states.shape)} for labels of {shape}: it needs one state a "
                "label, the one that predicts it (drop the last position of unshifted states)"
            )
    for name, values in per_token.items():
        if values is not None and tuple(values.shape) != shape:
            raise ValueError(
                f"{name} is {tuple(values.shape)} for labels of {shape}: it needs one value a "
                "label, shifted like the labels; sums over a response will not do"
            )
    if segments.response.shape != (labels.numel(),):
        raise ValueError(
            f"segments.response is {tuple(segments.response.shape)} for labels of {shape}: it "
            "names the response of every label"
        )
