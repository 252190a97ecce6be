"""Other tools' names, in recipes and in Python."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from fastpo.data.rows import load_rows
from fastpo.objectives import OBJECTIVES
from fastpo.objectives.elsewhere import ADDED, HYPERS, LOSS_NAMES
from fastpo.recipe.keys import fields_of_recipe
from fastpo.recipe.recipe import RecipeError, load_recipe
from fastpo.train.config import PreferenceConfig
from fastpo.train.elsewhere import BY_VALUE, NAMES, NOTES, TRAINER, answer
from fastpo.train.trainer import PreferenceTrainer
from tests.train import tiny


def told(key: str, value: Any = 1, objective: str = "dpo") -> str | None:
    return answer(key, value, [objective], OBJECTIVES[objective].hyper)


def configurations() -> dict[str, type]:
    """TRL's, wherever the installed version keeps them."""
    import importlib

    pytest.importorskip("trl")
    found = {}
    for name in ("DPO", "KTO", "CPO", "ORPO", "TPO", "Reward"):
        for module in ("trl", f"trl.experimental.{name.lower()}"):
            try:
                found[name] = getattr(importlib.import_module(module), f"{name}Config")
                break
            except (ImportError, AttributeError):
                continue
    return found


def test_every_setting_of_trl_is_one_here_or_answered() -> None:
    keys = fields_of_recipe()
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    hyper = {key for o in OBJECTIVES.values() for key in o.hyper}
    found = configurations()
    assert {"DPO", "Reward"} <= set(found)
    missing = {
        f"{name}Config.{f.name}"
        for name, config in found.items()
        for f in dataclasses.fields(config)
        if f.name not in theirs | set(keys) | hyper and told(f.name) is None
    }
    assert not missing


# One representative of every kind of preference key of axolotl 0.19 and LLaMA-Factory 0.9.5.
AXOLOTL = [
    "rl",
    "rl_beta",
    "dpo_beta",
    "dpo_label_smoothing",
    "dpo_use_weighting",
    "dpo_loss_type",
    "dpo_loss_weights",
    "dpo_norm_loss",
    "dpo_padding_free",
    "dpo_use_liger_kernel",
    "rpo_alpha",
    "orpo_alpha",
    "simpo_gamma",
    "cpo_alpha",
    "kto_desirable_weight",
    "kto_undesirable_weight",
    "precompute_ref_log_probs",
    "base_model",
    "base_model_config",
    "model_type",
    "tokenizer_type",
    "tokenizer_config",
    "load_in_8bit",
    "load_in_4bit",
    "adapter",
    "lora_model_dir",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_linear",
    "lora_fan_in_fan_out",
    "lora_modules_to_save",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_init_lora_weights",
    "datasets",
    "test_datasets",
    "dataset_prepared_path",
    "val_set_size",
    "sequence_len",
    "sample_packing",
    "pad_to_sequence_len",
    "micro_batch_size",
    "num_epochs",
    "optimizer",
    "lr_scheduler",
    "train_on_inputs",
    "group_by_length",
    "flash_attention",
    "sdp_attention",
    "warmup_ratio",
    "evals_per_epoch",
    "saves_per_epoch",
    "wandb_project",
    "special_tokens",
    "batch_size",
    "plugins",
    "trl",
    "sequence_parallel_degree",
    "context_parallel_size",
    "unfrozen_parameters",
    "fsdp_version",
    "fsdp_final_state_dict_type",
    "ring_attn_func",
    "heads_k_stride",
    "use_ray",
    "gc_collect_steps",
    "max_packed_sequence_len",
    "overrides_of_model_kwargs",
    "model_quantization_config_kwargs",
    "cut_cross_entropy",
    "lm_eval_tasks",
    "trackio_project_name",
    "hf_mlflow_log_artifacts",
    "lisa_n_layers",
    "torch_compile_options",
    "deepcompile",
    "curriculum_sampling",
    "dynamic_checkpoint",
    "field_messages",
    "roles_to_train",
    "train_on_eos",
    "tokenizer_save_jinja_files",
    "processor_kwargs",
    "use_otel_metrics",
    "gradio_title",
    "bench_dataset",
]
LLAMA_FACTORY = [
    "stage",
    "finetuning_type",
    "pref_beta",
    "pref_ftx",
    "pref_bco_weight",
    "pref_loss",
    "dpo_label_smoothing",
    "kto_chosen_weight",
    "kto_rejected_weight",
    "simpo_gamma",
    "ref_model_adapters",
    "ld_alpha",
    "model_name_or_path",
    "adapter_name_or_path",
    "template",
    "dataset_dir",
    "cutoff_len",
    "train_on_prompt",
    "mask_history",
    "mix_strategy",
    "overwrite_cache",
    "preprocessing_num_workers",
    "max_samples",
    "val_size",
    "packing",
    "neat_packing",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "additional_target",
    "use_rslora",
    "use_dora",
    "pissa_init",
    "quantization_bit",
    "quantization_method",
    "double_quantization",
    "flash_attn",
    "shift_attn",
    "rope_scaling",
    "use_unsloth",
    "enable_liger_kernel",
    "pure_bf16",
    "plot_loss",
    "compute_dtype",
    "create_new_adapter",
    "freeze_trainable_layers",
    "use_galore",
    "galore_rank",
    "hf_hub_token",
    "resize_vocab",
    "early_stopping_steps",
    "overwrite_output_dir",
    "module_dropout",
    "use_kt",
    "use_v1_kernels",
    "block_diag_attn",
    "infer_backend",
    "audio_sampling_rate",
]


@pytest.mark.parametrize("key", sorted({*AXOLOTL, *LLAMA_FACTORY}))
def test_keys_of_other_tools_are_answered(key: str) -> None:
    assert told(key) is not None


def snippet(text: str) -> tuple[str, str | None]:
    """The key of a suggestion, and the YAML that it is, if it has a value."""
    text = text.split(" of objective")[0].split(", ")[0] if "{" not in text else text
    head = re.match(r"[\w.]+", text)
    assert head, text
    whole = text.format(value="0.5", listed="[a]", first="a")
    return head[0], whole if re.match(r"[\w.]+: ", whole) else None


@pytest.mark.parametrize("name", sorted({*NAMES, *LOSS_NAMES}))
def test_suggestions_are_keys_that_load(name: str, tmp_path: Path) -> None:
    """What is suggested is taken by a recipe, with its value where it has one."""
    head, text = snippet({**NAMES, **LOSS_NAMES}[name])
    keys = fields_of_recipe()
    hyper = {key for o in OBJECTIVES.values() for key in o.hyper}
    known = head.partition(".")[0]
    assert known in keys or known in hyper
    if head.startswith("lora."):
        assert head[5:] in {f.name for f in dataclasses.fields(LoraConfig)}
    if text is None or name == "loss_weights" or "such as" in text:
        return
    base = {"model": "m", "dataset": "d", "eval_fraction": 0.1, "quantization": None}
    values = yaml.safe_load(re.sub(r",? (with|of) .*", "", text))
    given = base | values
    if given["quantization"] is not None:
        given["lora"] = True
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(given))
    load_recipe(path)


VALUED = [
    *((key, value) for key, table in BY_VALUE.items() for value in table if value != ""),
    *((key, 0.5) for key in ADDED),
    ("lora_target", "q_proj,v_proj"),
    ("additional_target", "embed_tokens, lm_head"),
    ("flash_attn", "sdpa"),
    ("loss_type", ["sigmoid", "bco_pair", "sft"]),
    ("warmup_ratio", 0.1),
]


@pytest.mark.parametrize(("key", "value"), VALUED)
def test_suggestions_for_a_value_load(tmp_path: Path, key: str, value: Any) -> None:
    said = told(key, value)
    assert said is not None
    if not said.startswith("Here it is "):
        return
    text = said.removeprefix("Here it is ").removesuffix(".").replace(" with ", "\n")
    given = {"model": "m", "dataset": "d", "lora": {"r": 8}}
    for name, setting in yaml.safe_load(text).items():
        head, dot, rest = name.partition(".")
        given[head] = {"r": 8, rest: setting} if dot else setting
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(given))
    load_recipe(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *((key, None, "It is unset: leave it out.") for key in ("adapter", "rpo_alpha", "rl")),
        ("loss_type", [], "It is unset: leave it out."),
        ("wandb_project", "", "It is unset: leave it out."),
        *(
            (key, False, "It is off, as it is here: leave it out.")
            for key in ("load_in_4bit", "use_peft", "use_weighting", "reference_free", "use_wandb")
        ),
        ("rpo_alpha", 0, "Without sft it is the same: leave it out."),
        ("use_dora", False, "Here it is lora.use_dora."),
        ("enable_thinking", False, "Here it is chat_template_kwargs: {enable_thinking: false}."),
        ("orpo_alpha", 0.1, "Here it is beta, of orpo."),
        ("finetuning_type", "full", "All weights are trained where there is no lora: "),
        ("quantization_bit", 8, "Here it is quantization: {load_in_8bit: true}."),
        ("lora_target", "all", "Here it is lora.target_modules: all-linear."),
        ("lora_target", "q_proj,v_proj", "Here it is lora.target_modules: [q_proj, v_proj]."),
        ("loss_type", ["tpo_l", "sigmoid"], "tpo_l is tpo with loss_type: tpo_l; sigmoid is dpo"),
    ],
)
def test_answers_follow_the_value(key: str, value: Any, words: str) -> None:
    assert words in (told(key, value) or "")


def test_a_mixture_gets_its_share() -> None:
    hyper = OBJECTIVES["dpo"].hyper
    said = answer("rpo_alpha", 0.2, ["sft", "dpo"], hyper)
    assert said == "Here it is the share of sft in objective: objective.sft: 0.2."


def test_tables_do_not_contradict_each_other() -> None:
    keys = set(fields_of_recipe())
    tables = (NAMES, NOTES, BY_VALUE, LOSS_NAMES, ADDED)
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert not set().union(*tables) & keys
    for hyper, owner in HYPERS.values():
        assert hyper in OBJECTIVES[owner].hyper


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rpo_alpha": 1.0}, "unknown key 'rpo_alpha'. Here it is objective: {dpo: 1, sft: 1.0}."),
        ({"ld_alpha": 0.5}, "Here it is token_weights: {ld: 0.5}."),
        ({"loss_type": "sigmoid_norm"}, "Here it is objective: ln_dpo."),
        ({"loss_type": ["sigmoid", "sft"]}, "Here it is objective: {dpo: 1, sft: 1}."),
        ({"loss_type": "sigmiod"}, "unknown objective 'sigmiod'"),
        ({"evaluation_strategy": "no"}, "Here it is eval_strategy."),
        ({"warmup_ratio": 0.1}, "Here it is warmup_steps: 0.1."),
        ({"lora_r": 8}, "That is a key of recipes"),
        ({"model": "m"}, "It is a key of recipes"),
        ({"objective": "simpo", "gamma_beta_ratio": 0.5}, "objective_args={'gamma_beta_ratio': 0."),
        ({"gamma_beta_ratio": 0.5}, "It is a hyper-parameter of simpo"),
        ({"learning_rte": 1.0}, "Did you mean 'learning_rate'?"),
        ({"auto_find_batches": 1, "rpo_alpha": 1}, "'rpo_alpha'"),
        ({"center_rewards_coefficient": 0.1}, "trains no reward models"),
    ],
)  # fmt: skip
def test_python_is_answered_like_a_recipe(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        PreferenceConfig(**options)
    assert len(str(error.value).splitlines()) == len(options) - ("objective" in options)


def test_configurations_are_still_copied_and_subclassed(config: Any) -> None:
    made = config(beta=0.2)
    for other in (
        copy.copy(made),
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        dataclasses.replace(made),
    ):
        assert other.beta == 0.2

    class Mine(PreferenceConfig):
        def __init__(self, *args: Any, note: str = "", **more: Any) -> None:
            super().__init__(*args, **more)
            self.note = note

    assert Mine(made.output_dir, note="x", use_cpu=True).note == "x"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, text) for name, text in TRAINER.items()),
        ("beta", "args=PreferenceConfig(beta=...)"),
        ("gamma_beta_ratio", "args=PreferenceConfig(objective_args={'gamma_beta_ratio': ...})"),
        ("rpo_alpha", "Here it is objective: {dpo: 1, sft: 7}."),
    ],
)
def test_keywords_of_other_trainers(config: Any, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r}") as error:
        PreferenceTrainer(tiny.model(), config(), processing_class=tiny.tokenizer(), **{name: 7})
    assert words in str(error.value)


def test_a_stream_is_checked_as_its_rows_come(trainer: Any) -> None:
    rows = [
        {"prompt": f"w4 w{i}", "responses": ["w5 w6", "w7"], "scores": [1.0, 0.5]}
        for i in range(4, 24)
    ]
    rows[13]["scores"] = [1.5, 0.5]
    made = trainer(
        train_dataset=load_rows(rows, streaming=True),
        objective="point_sigmoid",
        max_steps=20,
        per_device_train_batch_size=2,
    )
    with pytest.raises(
        ValueError, match=r"row 13: point_sigmoid takes grades that are in \[0, 1\]"
    ):
        made.train()


def test_the_beginning_of_a_stream_is_judged(
    trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": f"w4 w{i}", "responses": ["w5 w6", "w7"], "scores": [1.0, 1.0]}
        for i in range(4, 104)
    ]
    with caplog.at_level(logging.WARNING, "fastpo.train.preflight"):
        trainer(train_dataset=load_rows(rows, streaming=True), objective="listnet", max_steps=1)
    assert "64 of the first 64 rows grade all their responses alike" in caplog.text


def test_doubts_and_idle_dropout_are_said_once(
    trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.model(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])
    )
    with caplog.at_level(logging.WARNING, "fastpo.train.preflight"):
        trainer(model=model, objective="aot", per_device_train_batch_size=1)
    texts = [r.getMessage() for r in caplog.records]
    assert sum("aot takes sorted_margin" in t for t in texts) == 1
    assert sum("lora_dropout=0.1 does nothing" in t for t in texts) == 1


def test_numbers_are_checked_in_python(config: Any) -> None:
    nan = float("nan")
    for options, words in (
        ({"learning_rate": nan}, "learning_rate=nan must be at least 0"),
        ({"learning_rate": -1e-6}, "learning_rate=-1e-06 must be at least 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"gradient_accumulation_steps": 0}, "must be at least 1"),
        ({"max_grad_norm": nan}, "max_grad_norm=nan must be at least 0"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be in [0, 1)"),
        ({"seed": -1}, "seed=-1 must be in [0, 4294967295]"),
        ({"max_tokens_per_row": True}, "max_tokens_per_row=True must be an integer at least 1"),
        ({"kl_budget": "20"}, "kl_budget='20' must be a number above 0"),
        ({"beta": nan}, "beta=nan must be above 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            config(**options)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("beta: -0.1", "beta = -0.1 must be above 0"),
        ("beta: .nan", "beta = nan must be above 0"),
        ("objective_args:\n  label_smoothing: 0.6", "4: label_smoothing = 0.6 must be in [0, 0.5)"),
        ("objective: {dpo: 1, sft: -1}", "objective.sft = -1 must be above 0"),
        ("lora: {r: 0}", "lora.r = 0 must be at least 1"),
        ("lora: {init_lora_weights: eva}", "'eva' is drawn from data by a function of peft"),
        ("lora:\n  r: 8\n  lora_alpha: -1", "5: lora.lora_alpha = -1 must be above 0"),
        ("beta: .inf", "beta = inf must be finite and above 0"),
        ("beta: 1:30", "beta = '1:30' must be a number above 0"),
        ("objective_args: {sft.beta: 1}", "'sft.beta' is no hyper-parameter of dpo: "),
        ("dpo: {beta: 0.3}", "one of a mixture's is written as dpo.beta: 0.1"),
        ("lora: {rank_pattern: {q: 0}}", "lora.rank_pattern['q'] = 0 must be at least 1"),
        ("lora: {alpha_pattern: {q: -1}}", "lora.alpha_pattern['q'] = -1 must be above 0"),
        ("lora: {target_modules: (}", "lora.target_modules = '(' is no regular expression"),
        ("lora: {target_modules: 'q, v'}", "is one regular expression: give a list of names: [q,"),
        ("lora: {target_modules: all}", "did you mean 'all-linear'?"),
        ("lora: {rank_pattern: {'(': 4}}", "lora.rank_pattern = '(' is no regular expression"),
        ("lora: {lora_dropout: 1.5}", "lora.lora_dropout = 1.5 must be in [0, 1)"),
        ("lora: {use_dora: 1}", "lora.use_dora = 1 (int), expected true or false"),
        ("lora:\n  r: 8\n  r: 4", "5: 'lora.r' was already set in line 4"),
        ("learning_rate: .nan", "learning_rate = nan must be at least 0"),
        ("max_steps: 0", "max_steps = 0 must be at least 1, or -1"),
        ("logging_steps: 0", "logging_steps = 0 must be above 0"),
        ("eval_fraction: 1", "eval_fraction = 1 must be in [0, 1)"),
        ("max_rows: 0", "max_rows = 0 must be at least 1"),
        ("sample_tokens: 0", "sample_tokens = 0 must be at least 1"),
        ("objective: sigmoid", "unknown objective 'sigmoid': here it is dpo"),
        ("objective: dppo", "did you mean 'dpo', "),
    ],
)
def test_a_recipe_names_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\ndataset: d\n{line}\n")
    with pytest.raises(RecipeError, match=re.escape(words)) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}:")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("field_messages", "talk", "Here it is columns: {messages: talk}."),
        ("chosen_key", "good", "Here it is columns: {chosen: good}."),
        ("field_instruction", "q", "Columns are recognised by their names (docs/data.md), and"),
        ("formatting", "sharegpt", "Here it is dialect: sharegpt."),
        ("formatting", "openai", "dialect: auto recognises rows"),
        ("train_on_eos", "none", "Here it is append_eos: false."),
        ("train_on_eos", "turn", "The end of a response is scored, always; append_eos: false adds"),
        ("add_eos_token", False, "Here it is append_eos: false."),
        ("add_bos_token", True, "Here it is bos: true."),
        ("add_bos_token", False, "The tokenizer decides, and bos: true adds one"),
        ("resize_vocab", True, "Here it is resize_embeddings: true."),
        ("resize_token_embeddings_to_32x", True, "There are no multiples of 32"),
        ("shrink_embeddings", True, "Embeddings never shrink"),
        ("add_tokens", "<a>,<b>", "Save a tokenizer that has them to a folder"),
        ("dataset_text_field", "text", "Columns are recognised by their names"),
        ("template", "chatml", "The checkpoint's own chat template is used, on rows of text where"),
    ],
)
def test_how_rows_and_tokens_are_asked_for_here(key: str, value: object, said: str) -> None:
    found = told(key, value)
    assert found is not None
    assert found.startswith(said)
    named = re.findall(
        r"\b(columns|dialect|append_eos|bos|resize_embeddings|text_as_messages):", said
    )
    assert set(named) <= set(fields_of_recipe())
