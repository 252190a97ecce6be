"""What papers and other tools call our objectives; only named in error messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

NOTHING = "nothing: "
UNSET = "It is unset: leave it out."
OFF = "It is off, as it is here: leave it out."

OBJECTIVES_ELSEWHERE: dict[str, str] = {
    # TRL 1.16: loss_type of its DPO, CPO, KTO and TPO trainers.
    "sigmoid": "dpo",
    "sigmoid_norm": "ln_dpo",
    "sppo_hard": "sppo",
    "alphapo": "alpha_po",
    "tpo_l": "tpo with loss_type: tpo_l",
    # TRL before 0.29.
    "aot_pair": "aot",
    "sppo_soft_pair": "sppo_soft",
    "rpo": "{dpo: 1, sft: 1}",
    "generalized_sigmoid": "robust",
    # LLaMA-Factory 0.9.5 and axolotl 0.19: pref_loss, stage, rl.
    "gdpo": "nothing: fastpo has GRPO's relatives grpo, dr_grpo, dapo, but not this one",
    "ebft": "nothing: it generates while it trains, which fastpo leaves to another tool",
    "ppo": "nothing: it generates while it trains; on graded samples, p3o, rloo and grpo are near",
    "rm": "nothing: fastpo trains no reward models, and needs none",
    "reward": "nothing: fastpo trains no reward models, and needs none",
    "pt": "nothing: fastpo trains on preferences, or on the answers to prompts (sft)",
    # open-instruct, HALOs, NeMo-Aligner, OpenRLHF.
    "dpo_norm": "ln_dpo",
    "simpo_sft": "{simpo: 1, sft: 0.1}",
    "rpo_bwd_kl": "reward_aware",
    "rpo_fwd_kl": "reward_aware with distance: fwd",
    "rpo_sq": "reward_aware with distance: sq",
    "reinforce": "rloo",
    # Papers.
    "cdpo": "dpo with label_smoothing: 0.1; the method of critical tokens is critical_dpo",
    "conservative_dpo": "dpo with label_smoothing: 0.1",
    "robust_dpo": "robust",
    "rso": "hinge",
    "slic_hf": "slic",
    "exo": "exo_pair",
    "smaug": "dpop",
    "dpo_positive": "dpop",
    "dpop_smaug": "dpop",
    "r_dpo": "rdpo",
    "tdpo": "tdpo2",
    "mpo": "{dpo: 0.8, bco_pair: 0.2, sft: 1}",
    "iterative_rpo": "{dpo: 1, sft: 1} with sft.reduction: sequence_mean",
    "ld_dpo": "dpo with token_weights: {ld: 0.5}",
    "d2po": "dpo with token_weights: {decay: 0.98}",
    "sampo": "dpo with token_weights: {sampo: true}",
    "tr_dpo": "dpo with reference_update: {every: 512, mixup: 0.6}",
    "f_dpo": "dpo with f_divergence: forward_kl (or js, alpha)",
    "spin": "dpo",
    "step_dpo": "dpo",
    "online_dpo": "dpo",
    "mask_dpo": "dpo with a `token_weights` column",
    "longpo": "dpo with reference_prompt: short_prompt",
    "cpo_simpo": "{simpo: 1, sft: 1}",
    "list_net": "listnet",
    "softmax": "listnet",
    "listmle": "list_mle",
    "lambdarank": "lipo",
    "lipo_lambda": "lipo",
    "dpo_pl": "plackett_luce",
    "gradient_ascent": "ga",
    "grad_diff": "{ga: 1, sft: 1}",
    "nll": "sft",
    "kl": "kl_penalty",
    "nash": "nash_md",
}
"""A name, plain (lower case, underscores) -> what it is called here."""

HYPERS: dict[str, tuple[str, str]] = {
    # TRL 1.16 and before 0.29.
    "discopop_tau": ("tau", "discopop"),
    "disco_pop_tau": ("tau", "discopop"),
    "f_divergence_type": ("f_divergence", "dpo"),
    "f_alpha_divergence_coef": ("alpha_divergence", "dpo"),
    "tpo_l_gamma": ("gamma", "tpo"),
    "desirable_weight": ("desirable_weight", "kto"),
    "undesirable_weight": ("undesirable_weight", "kto"),
    # LLaMA-Factory 0.9.5.
    "pref_beta": ("beta", "dpo"),
    "dpo_label_smoothing": ("label_smoothing", "dpo"),
    "kto_chosen_weight": ("desirable_weight", "kto"),
    "kto_rejected_weight": ("undesirable_weight", "kto"),
    # axolotl 0.19.
    "rl_beta": ("beta", "dpo"),
    "dpo_beta": ("beta", "dpo"),
    "orpo_alpha": ("beta", "orpo"),
    "kto_desirable_weight": ("desirable_weight", "kto"),
    "kto_undesirable_weight": ("undesirable_weight", "kto"),
    # NeMo-Aligner, OpenRLHF, open-instruct.
    "ref_policy_kl_penalty": ("beta", "dpo"),
    "gt_reward_scale": ("eta", "reward_aware"),
    "dpo_label_smoothing_factor": ("label_smoothing", "dpo"),
}
"""A key -> the hyper-parameter here, and an objective that has it."""

ADDED: dict[str, str] = {
    # TRL 1.16 and before 0.29.
    "rpo_alpha": "sft",
    "cpo_alpha": "sft",
    # LLaMA-Factory 0.9.5 and before, axolotl 0.19.
    "pref_ftx": "sft",
    "dpo_ftx": "sft",
    "sft_weight": "sft",
    "pref_bco_weight": "bco_pair",
}
"""A weight of another loss -> the objective that is mixed in with it."""

LOSS_NAMES: dict[str, str] = {
    # TRL 1.16 and before 0.29; {value} is what was given.
    "ld_alpha": "token_weights: {{ld: {value}}}",
    "use_weighting": "objective: wpo",
    "simpo_gamma": "gamma_beta_ratio of objective: simpo, which is simpo_gamma / beta",
    "gamma": "gamma_beta_ratio of objective: simpo, which is gamma / beta",
    "reference_free": "objective: cpo, with cpo_alpha: 0 for DPO without a reference",
    "loss_weights": "objective, a mapping of names to weights such as {{dpo: 0.8, sft: 1}}",
    # LLaMA-Factory 0.9.5 and axolotl 0.19.
    "dpo_loss_weights": "objective, a mapping of names to weights such as {{dpo: 0.8, sft: 1}}",
    "dpo_use_weighting": "objective: wpo",
    "dpo_norm_loss": "objective: ln_dpo",
}
"""A key -> how the same is said here."""

LOSS_KEYS = (
    "loss_type",
    "dpo_loss_type",
    "pref_loss",
    "rl",
    "stage",
    "rlhf_type",
    "preference_loss",
)
"""Keys whose values name an objective."""


def plain(name: object) -> str:
    """Return a name as the tables have it."""
    return str(name).lower().replace("-", "_").replace(" ", "_").replace(".", "_")


def called_here(name: object) -> str:
    """Return the name here: `sigmoid` -> `dpo`; one that is called the same, or unknown, stays."""
    return OBJECTIVES_ELSEWHERE.get(plain(name), str(name))


def answer(key: str, value: object, chosen: Sequence[str], hyper: Iterable[str]) -> str | None:
    """Return a sentence for a key of a loss that goes by another name here; None if unknown.

    Args:
        key: another tool's name.
        value: what was given for it.
        chosen: the chosen objectives.
        hyper: their hyper-parameters, which are suggested as they are.
    """
    if value is None and (key in LOSS_KEYS or key in HYPERS or key in ADDED or key in LOSS_NAMES):
        return UNSET
    if key in LOSS_KEYS:
        return _loss(value)
    if key in HYPERS:
        name, owner = HYPERS[key]
        # `beta` is nearly everybody's; `orpo_alpha` is orpo's alone.
        here = name in hyper and (owner in chosen or name != "beta" or owner == "dpo")
        return f"Here it is {name}." if here else f"Here it is {name}, of {owner}."
    if key in ADDED:
        name = ADDED[key]
        if not value:
            return f"Without {name} it is the same: leave it out."
        if len(chosen) > 1 or name in chosen:
            return f"Here it is the share of {name} in objective: objective.{name}: {value}."
        return f"Here it is objective: {{{chosen[0]}: 1, {name}: {value}}}."
    if key in LOSS_NAMES:
        if value is False:
            return OFF
        return f"Here it is {LOSS_NAMES[key].format(value=value)}."
    return None


def _loss(value: object) -> str:
    """Return a sentence for another tool's name of a loss, or for several."""
    from . import OBJECTIVES, unknown_objective

    names = list(value) if isinstance(value, list | tuple | Mapping) else [value]
    here = [plain(n) if plain(n) in OBJECTIVES else called_here(n) for n in names]
    for name, called in zip(names, here, strict=True):
        if called.startswith(NOTHING):
            return f"There is none: {called.removeprefix(NOTHING)}."
        if called == str(name) and called not in OBJECTIVES:
            return f"Here it is objective; {unknown_objective(name)}."
    if not here:
        return UNSET
    if len(here) == 1:
        return f"Here it is objective: {here[0]}."
    if all(name in OBJECTIVES for name in here):
        mixture = ", ".join(f"{name}: 1" for name in dict.fromkeys(here))
        return f"Here it is objective: {{{mixture}}}."
    known = "; ".join(f"{name} is {called}" for name, called in zip(names, here, strict=True))
    return f"Here it is objective, a mapping of names to weights: {known}."
