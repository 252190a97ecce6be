"""Head, scores and objective as one `nn.Module`: hidden states in, preference loss out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpo.distributed import gather_rows
from fastpo.head.functional import TokenStats, linear_stats
from fastpo.head.head import Head
from fastpo.head.lora import Lora
from fastpo.head.select import most_kept_tokens, runs_kernels
from fastpo.head.spec import BackendName as Backend
from fastpo.head.spec import Workspace
from fastpo.head.vocab_parallel import is_cut
from fastpo.loss.group_chunks import Tensors, by_groups, cut_groups
from fastpo.loss.metrics import at_least_one, batch_counts, reward_metrics, weight_metrics
from fastpo.loss.mixture import Component, resolve
from fastpo.loss.scores import STATISTIC_OF, score_responses
from fastpo.objectives.base import DIVERGENCES, Objective, Outcome, Statistic
from fastpo.objectives.domain import Domain
from fastpo.objectives.lipo import tie_keys
from fastpo.objectives.regularisers import REGULARISERS
from fastpo.segments import Segments

# How to obtain a score that an objective needs and the caller did not supply.
_REMEDY = {
    "ratio": "pass ref_logps (per label token) or ref_hidden",
    "mean_ratio": "pass ref_logps (per label token) or ref_hidden",
    "ref_logps": "pass ref_logps (per label token) or ref_hidden",
    "kl": "pass ref_hidden: the divergence needs the reference's whole distribution",
    "kl_reverse": "pass ref_hidden: the divergence needs the reference's whole distribution",
    "score": "give every response a grade: a `scores` column, or Segments(score=...)",
    "rank": "rank the responses: a `ranks` or `scores` column, or Segments(rank=...)",
    "margin": "say how much better the chosen response is: a `margin` column, or Segments(margin=)",
    "cohort": "name each row's population: a `group` column, or Segments(cohort=...)",
    "ratio2": "pass ref2_logps (per label token), of the second reference",
    "old_logps": "pass old_logps (per label token), of the policy that drew the responses",
    "token_rewards": "pass token_rewards (per label token): a `token_rewards` column",
    "error": "denoising errors are no scores of a language model: call the objective's function",
}


class LossOutput(NamedTuple):
    """What a preference loss returns for G groups of at most K candidates."""

    loss: Tensor  # scalar, to call backward on
    losses: Tensor  # [G], detached; their mean is `loss` unless global totals were given
    rewards: Tensor  # [G, K], detached implicit rewards
    metrics: dict[str, Tensor]  # name -> mean, NaN where there was nothing to average
    counts: dict[str, Tensor]  # name -> number of observations behind that mean


def _head_of(given: Head | nn.Module) -> Head:
    if isinstance(given, Head):
        return given
    name, weight = type(given).__name__, getattr(given, "weight", None)
    if not isinstance(given, nn.Module) or (isinstance(weight, Tensor) and weight.dim() != 2):
        raise ValueError(f"head={name}: give the causal language model, its head, or a fastpo.Head")
    if not isinstance(weight, Tensor):
        from fastpo import read_head  # only models need transformers

        try:
            return read_head(given)
        except TypeError as error:
            raise ValueError(f"head={name} is neither a linear layer nor a causal LM") from error
    if type(given).__module__.startswith("peft.") or not weight.is_floating_point():
        raise ValueError(
            f"head={name} is more than its weight (an adapter, or quantised): give the model itself"
        )
    return Head(given)


class PreferenceLoss(nn.Module):
    r"""Preference loss on hidden states; the logits are never built.

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

    The padded layout, two pairs (rows 0-1 chosen, 2-3 rejected), as TRL and Liger users have it:

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
        super().__init__()
        self.components = resolve(objective, hyper)
        self.seed = 0
        self.step: int | None = None
        self.progress = 0.0
        # In a tuple, so that nn.Module does not adopt the model's head as its own child.
        self._head = (None if head is None else _head_of(head),)
        self._observing: dict[str, list[Tensor]] | None = None
        self._whole_step: dict[str, Tensor] = {}
        self._step_of: dict[str, int | None] = {}
        self._before_step: dict[str, Tensor] = {}
        self._observed: dict[str, Tensor] = {}
        for name, statistic in self._remembered.items():
            size = statistic.size if statistic.memory == "ema" else 1
            # The value, then how many observations ("mean") or steps ("ema") are behind it.
            self.register_buffer(name, torch.zeros(size + 1, dtype=torch.float64))

    @property
    def head(self) -> Head | None:
        """The head given at construction."""
        return self._head[0]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the scores that the components take, statistics excluded."""
        return frozenset(
            name
            for c in self.components
            for name in c.objective.needs
            if name not in c.objective.statistics
        )

    @property
    def grade_domains(self) -> list[tuple[str, Domain]]:
        """Of every component that takes grades its name, and what they must be."""
        return [
            (c.objective.name, c.objective.grades(c.hyper))
            for c in self.components
            if "score" in c.objective.needs
        ]

    @property
    def needs_kl(self) -> bool:
        """Whether the reference's whole distribution is needed."""
        return any(c.objective.needs_kl for c in self.components)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model, or its log-probs, are needed."""
        return any(c.objective.needs_reference for c in self.components)

    @property
    def needs_second_reference(self) -> bool:
        """Whether log-probs of a second reference are needed too."""
        return any(c.objective.needs_second_reference for c in self.components)

    @property
    def _bare_needs(self) -> frozenset[str]:
        return frozenset().union(*(c.objective.bare_needs for c in self.components))

    @property
    def extras(self) -> tuple[str, ...]:
        """Roles of the extra responses that are needed, such as `mismatched` for KTO."""
        roles = {role for c in self.components for role in c.objective.extras}
        return tuple(sorted(roles))

    @property
    def has_statistics(self) -> bool:
        """Whether a component takes numbers of the whole batch."""
        return any(c.objective.statistics for c in self.components)

    @property
    def _remembered(self) -> dict[str, Statistic]:
        """Buffer name -> statistic that remembers earlier steps."""
        return {
            f"{c.objective.name}_{name}": statistic
            for c in self.components
            for name, statistic in c.objective.statistics.items()
            if statistic.memory != "none"
        }

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
        backend: Backend = "auto",
        workspace_mib: Workspace = "auto",
    ) -> LossOutput:
        """Loss, per-group losses, implicit rewards and metrics of one batch.

        Args:
            hidden: [N, D] states of the label tokens, or [2B, T, D], B chosen rows then the B
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
            if hidden.dim() != 3 or hidden.shape[0] % 2 or labels.shape != hidden.shape[:2]:
                raise ValueError(
                    "without segments hidden must be [2B, T, D], chosen rows then rejected rows, "
                    f"and labels [2B, T]: got {tuple(hidden.shape)} and {tuple(labels.shape)}"
                )
            pairs, length = hidden.shape[0] // 2, hidden.shape[1]
            segments = Segments.pairs(pairs, length, device=labels.device)
        lora = None
        if weight is None:
            if self.head is None:
                raise ValueError("no head: pass weight=, or head= to PreferenceLoss")
            weight, bias, lora = self.head.weight, self.head.bias, self.head.lora

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
        segments = replace(segments, response=segments.response[scored])
        hidden, labels = hidden.flatten(0, -2)[scored], labels.flatten()[scored]
        if ref_hidden is not None:
            ref_hidden = ref_hidden.flatten(0, -2)[scored]
        per_token = {k: None if v is None else v.flatten()[scored] for k, v in per_token.items()}
        self._check_groups(segments)

        tokens = {"hidden": hidden, "labels": labels, "ref_hidden": ref_hidden, **per_token}
        head = {"weight": weight, "bias": bias}
        head |= {} if lora is None else {"lora_a": lora.a, "lora_b": lora.b}
        cuts = self._cuts(head, tokens, segments, backend, workspace_mib)
        own = self._counts(tokens, segments) if len(cuts) > 1 else None
        options: dict[str, Any] = {"backend": backend, "workspace_mib": workspace_mib}
        options |= self.head.facts() if self.head is not None else {}

        def loss_of(
            head: Tensors, tokens: Tensors, segments: Segments, into: Tensor | None = None
        ) -> LossOutput:
            low = None if lora is None else lora._replace(a=head["lora_a"], b=head["lora_b"])
            reference = ref_weight, ref_bias
            stats = self._token_stats(head, tokens, low, reference, into, options)
            of_reference = stats.pop("ref_logps", tokens["ref_logps"])
            mine = {name: tokens[name] for name in per_token} | {"ref_logps": of_reference}
            scores = score_responses(
                stats,
                segments,
                **mine,
                per_token=any(name.startswith("token_") for name in self.needs),
                backend=backend,
            )
            if "tie_key" in self.needs:
                scores["tie_key"] = self._tie_keys(segments)
            return self._reduce(scores, segments, own or batch_counts(scores), totals, backend)

        if len(cuts) == 1:
            out = loss_of(head, tokens, segments)
        else:
            out = _together(by_groups(loss_of, head, tokens, segments, cuts))
        for name in ("token_weights", "kl_weights"):
            for metric, (total, count) in weight_metrics(name, per_token[name]).items():
                out.metrics[metric], out.counts[metric] = total / count, count
        return out

    def _counts(self, tokens: Tensors, segments: Segments) -> dict[str, Tensor]:
        """What the whole batch's sums are divided by."""
        labels = tokens["labels"]
        assert labels is not None
        nothing = {"logps": torch.zeros(labels.shape, device=labels.device)}
        return batch_counts(
            score_responses(nothing, segments, token_weights=tokens["token_weights"])
        )

    def _cuts(
        self,
        head: Tensors,
        tokens: Tensors,
        segments: Segments,
        backend: Backend,
        workspace_mib: Workspace,
    ) -> list[tuple[int, int]]:
        """Intervals of groups: several where that saves a trained head's second pass."""
        whole = [(0, len(segments.grid))]
        weight, labels = head["weight"], tokens["labels"]
        assert weight is not None and labels is not None  # noqa: PT018
        trained = any(t is not None and t.requires_grad for t in head.values())
        if not trained or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return whole
        # Those need all scores first; ranks that share a head have to meet equally often.
        if self.has_statistics or is_cut(weight):
            return whole
        with_reference = self.needs_kl and tokens["ref_hidden"] is not None
        most = most_kept_tokens(
            *weight.shape,
            device=weight.device,
            dtype=weight.dtype,
            want=self._statistics_wanted(with_reference),
            with_reference=with_reference,
            backend=backend,
            workspace_mib=workspace_mib,
        )
        return whole if len(labels) <= most else cut_groups(segments, most)

    def _tie_keys(self, segments: Segments) -> Tensor:
        number = segments.index
        if number is None:
            number = torch.arange(segments.grid.shape[0], device=segments.grid.device)
        candidates = segments.grid.shape[1]
        return tie_keys(number, candidates, seed=self.seed, step=self.step or 0)

    def _statistics_wanted(self, with_reference: bool) -> tuple[str, ...]:
        """Of the policy's head; with a reference's states in the same pass the divergences too."""
        wanted = {s: name for name, s in STATISTIC_OF.items() if name in self._bare_needs}
        if with_reference:
            return tuple(dict.fromkeys(("logps", *wanted, "ref_logps")))
        names = (name for name, score in wanted.items() if score not in DIVERGENCES)
        return tuple(dict.fromkeys(("logps", *names)))

    def _token_stats(
        self,
        head: Tensors,
        tokens: Tensors,
        lora: Lora | None,
        reference: tuple[Tensor | None, Tensor | None],
        into: Tensor | None,
        options: dict[str, Any],
    ) -> TokenStats:
        """The statistics that the objectives need; `ref_logps` too if hidden states are given."""
        hidden, labels, weight = tokens["hidden"], tokens["labels"], head["weight"]
        assert hidden is not None and labels is not None and weight is not None  # noqa: PT018
        ref_hidden, (ref_weight, ref_bias) = tokens["ref_hidden"], reference
        if ref_hidden is not None and ref_weight is None:
            if weight.requires_grad:
                raise ValueError(
                    "the policy's head is trained, so it is not the reference's: pass ref_weight"
                )
            ref_weight, ref_bias = weight, head["bias"]
        both = self.needs_kl and ref_hidden is not None
        of_reference: dict[str, Any] = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
        stats = linear_stats(
            hidden,
            weight,
            labels,
            stats=self._statistics_wanted(both),
            bias=head["bias"],
            lora=lora,
            accumulate_grad=False if into is None else into,
            **({**of_reference, "ref_bias": ref_bias} if both else {}),
            **options,
        )
        if not both and ref_hidden is not None and ref_weight is not None:
            with torch.no_grad():
                found = linear_stats(ref_hidden, ref_weight, labels, bias=ref_bias, **options)
            stats["ref_logps"] = found["logps"]
        return stats

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
                        f"{_REMEDY['score']}"
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
        own: Mapping[str, Tensor],
        totals: Mapping[str, float] | None,
        backend: Backend,
    ) -> LossOutput:
        """Objectives on scores, summed and divided; the only place where either happens.

        Args:
            own: counts of the batch, of which these groups may be a part.
        """
        divisors: Mapping[str, Any] = own if totals is None else totals
        losses = scores["logps"].new_zeros(segments.grid.shape[0])
        loss = losses.sum()
        rewards: dict[str, Tensor] = {}
        metrics, counts = {}, {}
        for given in self.components:
            component = self._now(given)
            name = component.objective.name
            self._check_scores(component.objective, scores)
            statistics = self._statistics(component, scores)
            # A kernel is compiled for its constants: one that moves would do so at every step.
            by = backend if component is given else "torch"
            outcome = self._evaluate(component, {**scores, **statistics}, by)
            rewards[name] = outcome.rewards
            for term in outcome.terms:
                scale = component.weight * term.weight
                values = term.values if segments.weight is None else term.values * segments.weight
                loss = loss + scale * values.sum() / at_least_one(divisors[term.per])
                losses += scale * values.detach() * (len(losses) / at_least_one(own[term.per]))
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
        for name in objective.needs:
            if name not in scores and name not in objective.statistics:
                base = next((n for n in _REMEDY if f"_{name}".endswith(f"_{n}")), None)
                remedy = _REMEDY[base] if base else "see the objective's documentation"
                raise ValueError(f"{objective.name} needs {name!r}: {remedy}")

    def _now(self, component: Component) -> Component:
        """The component with the hyper-parameters of this step."""
        moved = {
            name: value[0] + (value[1] - value[0]) * self.progress
            for name, value in component.hyper.items()
            if isinstance(value, tuple)
        }
        return component._replace(hyper=component.hyper | moved) if moved else component

    @staticmethod
    def _evaluate(component: Component, named: Mapping[str, Tensor], backend: Backend) -> Outcome:
        """By the objective's kernel where kernels run and it has one, else by its function."""
        objective = component.objective
        if runs_kernels(backend, named["logps"].device):
            from fastpo.loss import fused

            outcome = fused.evaluate(objective, component.hyper, named)
            if outcome is not None:
                return outcome
        return objective.fn(*(named[name] for name in objective.needs), **component.hyper)

    def _statistics(self, component: Component, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Batch statistics of one component, over all ranks, without gradient."""
        found = {}
        hyper = {**component.objective.hyper, **component.hyper}
        for name, statistic in component.objective.statistics.items():
            key = f"{component.objective.name}_{name}"
            values, mask = statistic.of(scores, hyper)
            observed = values.detach()[mask].double()
            if self._observing is not None:
                self._observing.setdefault(key, []).append(observed)
            elif self.training and key in self._whole_step:
                observed = self._whole_step[key]
            else:
                observed = gather_rows(observed)
            if statistic.memory == "none":
                value = statistic.reduce(observed, hyper)
            else:
                value = self._remember(key, statistic, observed, hyper)
            found[name] = value.to(values.dtype)
        return found

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Calls inside supply the observations that every training call afterwards uses as a whole.

        For statistics over all micro-batches of a step: call the module on each of them without
        gradient inside, then train on each. They cost one more forward pass of the model.
        """
        self._observing = {}
        try:
            yield
            self._whole_step = {k: gather_rows(torch.cat(v)) for k, v in self._observing.items()}
        finally:
            self._observing = None

    def _remember(
        self, key: str, statistic: Statistic, observed: Tensor, hyper: Mapping[str, Any]
    ) -> Tensor:
        """The statistic after this step's observations so far; evaluation adds none.

        The state moves once a step, however many micro-batches it has: what was before the step is
        kept, and every micro-batch merges all observations of the step into that.
        """
        state = self.get_buffer(key)
        if self.training and torch.is_grad_enabled():
            if key not in self._observed or self.step is None or self._step_of[key] != self.step:
                self._before_step[key] = state.clone()
            elif key not in self._whole_step:
                observed = torch.cat([self._observed[key], observed])
            self._observed[key], self._step_of[key] = observed, self.step
            before, count = self._before_step[key][:-1], self._before_step[key][-1]
            new = 1 if statistic.memory == "ema" else len(observed)
            decay = statistic.decay
            past = hyper[decay] if isinstance(decay, str) else decay
            share = 1 - past if statistic.memory == "ema" and count else 1.0
            if statistic.memory == "mean":
                share = new / (count + new).clamp(min=1)
            state[:-1] = before + (statistic.reduce(observed, hyper) - before) * share
            state[-1] = count + new
        elif statistic.memory == "ema" and not state[-1]:
            return statistic.reduce(observed, hyper)  # evaluated before the first step
        value = state[:-1].clone()
        return value if statistic.memory == "ema" else value[0]


def _together(outputs: list[LossOutput]) -> LossOutput:
    """Of several parts of a batch one output; the first one's loss is that of all of them."""
    groups = sum(len(out.losses) for out in outputs)
    counts = {n: sum((o.counts[n] for o in outputs), torch.zeros(())) for n in outputs[0].counts}
    metrics = {
        # A mean of nothing is NaN.
        name: sum((o.metrics[name] * o.counts[name]).nan_to_num() for o in outputs) / count
        for name, count in counts.items()
    }
    return LossOutput(
        outputs[0].loss,
        torch.cat([out.losses * (groups / len(out.losses)) for out in outputs]),
        torch.cat([out.rewards for out in outputs]),
        metrics,
        counts,
    )


def _check_shapes(
    hidden: Tensor,
    labels: Tensor,
    segments: Segments,
    ref_hidden: Tensor | None,
    per_token: Mapping[str, Tensor | None],
) -> None:
    """ValueError for tensors that do not line up: flattened, they would be misread in silence."""
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
