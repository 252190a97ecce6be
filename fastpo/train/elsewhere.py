"""Names that other tools have for our keys; only error messages say them.

The keys of losses are in `fastpo.objectives.elsewhere`. `{value}` stands for the key's value.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastpo.errors import nearest
from fastpo.objectives import OBJECTIVES
from fastpo.objectives import elsewhere as losses
from fastpo.objectives.base import Objective

NAMES: dict[str, str] = {
    # TRL 1.16: DPOConfig, KTOConfig, CPOConfig, ORPOConfig, TPOConfig, RewardConfig.
    "truncation_mode": "truncation",
    "activation_offloading": "offload_activations",
    "sync_ref_model": "reference_update: {{every: 512, mixup: 0.6}}",
    "ref_model_mixup_alpha": "reference_update.mixup",
    "ref_model_sync_steps": "reference_update.every",
    "chat_template_path": "chat_template",
    "max_completion_length": "max_response_length",
    "generate_during_eval": "num_samples: 3",
    # TRL 1.16: ModelConfig, ScriptArguments and keywords of its trainers.
    "model_name_or_path": "model",
    "model_revision": "revision",
    "ref_model_name_or_path": "ref_model",
    "use_peft": "lora: true",
    "peft_config": "lora",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_parameters": "lora.target_parameters",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "load_in_4bit": "quantization: nf4",
    "load_in_8bit": "quantization: {{load_in_8bit: true}}",
    "quantization_config": "quantization",
    "dataset_config": "dataset_name",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "dataset_streaming": "streaming",
    "train_dataset": "dataset",
    "processing_class": "tokenizer",
    # transformers before 5.
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "warmup_ratio": "warmup_steps: {value}",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "adafactor": "optim: adafactor",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "lr_scheduler": "lr_scheduler_type",
    "tokenizer_name": "tokenizer",
    "tokenizer_name_or_path": "tokenizer",
    "dispatch_batches": "accelerator_config: {{dispatch_batches: {value}}}",
    "split_batches": "accelerator_config: {{split_batches: {value}}}",
    # The alignment handbook.
    "dataset_configs": "dataset_name",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "truncation_side": "truncation",
    "hub_model_revision": "hub_revision",
    "max_train_samples": "max_rows",
    # axolotl 0.19.
    "base_model": "model",
    "revision_of_model": "revision",
    "tokenizer_config": "tokenizer",
    "lora_model_dir": "model",
    "peft": "lora",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lora_fan_in_fan_out": "lora.fan_in_fan_out",
    "lora_rank_pattern": "lora.rank_pattern",
    "lora_alpha_pattern": "lora.alpha_pattern",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "peft_init_lora_weights": "lora.init_lora_weights",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "peft_layers_pattern": "lora.layers_pattern",
    "peft_layer_replication": "lora.layer_replication",
    "peft_trainable_token_indices": "lora.trainable_token_indices",
    "peft_ensure_weight_tying": "lora.ensure_weight_tying",
    "loftq_config": "lora.loftq_config",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "sequence_len": "max_length",
    "max_prompt_len": "max_prompt_length",
    "test_datasets": "eval_dataset",
    "chat_template_jinja": "chat_template",
    "flash_attention": "attn_implementation: flash_attention_2",
    "sdp_attention": "attn_implementation: sdpa",
    "eager_attention": "attn_implementation: eager",
    "flex_attention": "attn_implementation: flex_attention",
    "bfloat16": "dtype: bfloat16",
    "float16": "dtype: float16",
    "float32": "dtype: float32",
    "gc_steps": "torch_empty_cache_steps",
    "tiled_mlp": "mlp_tile: auto",
    "tiled_mlp_num_shards": "mlp_tile",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "generate_samples": "num_samples: 3",
    "num_generation_samples": "num_samples",
    "generation_max_new_tokens": "sample_tokens",
    "eval_table_size": "num_samples",
    "eval_max_new_tokens": "sample_tokens",
    "model_quantization_config": "quantization",
    "bnb_config_kwargs": "quantization",
    "reinit_weights": "random_init",
    "layer_offloading": "offload_activations",
    # LLaMA-Factory 0.9.5.
    "adapter_name_or_path": "model",
    "cutoff_len": "max_length",
    "max_samples": "max_rows",
    "lora_rank": "lora.r",
    "additional_target": "lora.modules_to_save: {listed}",
    "pissa_init": "lora.init_lora_weights: pissa",
    "ref_model_adapters": "ref_model",
    "enable_liger_kernel": "layer_kernels: liger",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "train_from_scratch": "random_init",
    "pure_bf16": "dtype: bfloat16",
    "compute_dtype": "bf16: true",
    "early_stopping_steps": "early_stopping_patience",
    "hf_hub_token": "hub_token",
    "model_max_length": "max_length",
    "max_target_length": "max_response_length",
    "max_source_length": "max_prompt_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_packed_sequence_len": "max_length",
    "model_quantization_config_kwargs": "quantization",
    "gc_collect_steps": "torch_empty_cache_steps",
    "enable_thinking": "chat_template_kwargs: {{enable_thinking: {value}}}",
    # OpenRLHF, and the columns of axolotl's data sets.
    "prompt_key": "columns: {{prompt: {value}}}",
    "chosen_key": "columns: {{chosen: {value}}}",
    "rejected_key": "columns: {{rejected: {value}}}",
    "label_key": "columns: {{label: {value}}}",
    "field_prompt": "columns: {{prompt: {value}}}",
    "field_chosen": "columns: {{chosen: {value}}}",
    "field_rejected": "columns: {{rejected: {value}}}",
    "field_messages": "columns: {{messages: {value}}}",
    "field_system": "columns: {{system: {value}}}",
    "field_tools": "columns: {{tools: {value}}}",
}
"""A key -> the key here, or the key with its value."""

_HELD_OUT = "Here it is eval_fraction, a share of the rows below 1."
_FULL = "All weights are trained where there is no lora: leave it out."
_ADAPTERS = "There is none: adapters are lora."
_PACKED = "Batches are packed without padding, always: leave it out."
_NO_LOGITS = "Logits are never built: leave it out."
_ONE_PROCESS = "Rows are tokenised once, in one process: leave it out."
_READ = "It is read from the checkpoint: leave it out."
_TOKENIZER = (
    "The tokenizer keeps its own: save a changed one to a folder and name that as tokenizer."
)
_DRAWN = "Responses are drawn beforehand, with `fastpo sample`: leave it out."
_NO_REWARD = "fastpo trains no reward models, and needs none: leave it out."
_ADAPTER = (
    "There is none: an adapter that model names is trained on, and its start is the reference."
)
_MIXTURE = "There is none: one data set a run, so write what is to be mixed into one file first."
_COLUMNS = (
    "Columns are recognised by their names (docs/data.md), and columns names others, "
    "{{prompt: question}}: leave it out."
)
_MESSAGES = "Messages are recognised by their keys and roles (docs/data.md): leave it out."
_NEW_TOKENS = (
    "Save a tokenizer that has them to a folder, name that as tokenizer, and set "
    "resize_embeddings: true."
)
_MERGE = "There is none: `fastpo merge` writes the merged model afterwards."
_OPTIMISER = "There is none: optim names an optimiser of transformers, optim_args its arguments."
_LAUNCH = "There is none: start ranks with `torchrun` or `accelerate launch`, sharding with fsdp."
_KERNELS = "There is none: layer_kernels chooses kernels of norms and activations."
_FREEZE = "There is none: train an adapter (lora), whose target_modules name what is trained."
_ENDS = "The end of a response is scored, always; append_eos: false adds none: leave it out."
_RESPONSES = "Only responses are scored, always: leave it out."
_LOSSES = "`fastpo objectives` lists the losses that there are: leave it out."
_ALWAYS = "That is always so: leave it out."
_UNSUPPORTED = "There is no such thing here: leave it out."

_BITS_4 = "Here it is quantization: nf4."
_BITS_8 = "Here it is quantization: {{load_in_8bit: true}}."
_FP4 = "Here it is quantization: {{load_in_4bit: true, bnb_4bit_quant_type: fp4}}."
_ONCE = "Here it is quantization: {{load_in_4bit: true, bnb_4bit_quant_type: nf4}}."

BY_VALUE: dict[str, dict[object, str]] = {
    # TRL 1.16.
    "bnb_4bit_quant_type": {"nf4": _BITS_4, "fp4": _FP4},
    "precompute_ref_log_probs": {
        True: "Here it is reference: store.",
        False: "There is no switch: leave it out, or set reference: copy for a second model.",
    },
    "use_bnb_nested_quant": {True: _BITS_4, False: _ONCE},
    "bnb_4bit_use_double_quant": {True: _BITS_4, False: _ONCE},
    # axolotl 0.19.
    "adapter": {
        "lora": "Here it is lora: true.",
        "qlora": "Here it is lora: true with quantization: nf4.",
        "": _ADAPTERS,
    },
    "excess_length_strategy": {
        "truncate": "Too long prompts are cut, always: leave it out.",
        "drop": "Here it is truncation: error with on_bad_row: skip.",
        "": "Here it is truncation: error.",
    },
    "train_on_eos": {"none": "Here it is append_eos: false.", "": _ENDS},
    "train_on_eot": {"none": "Here it is append_eos: false.", "": _ENDS},
    "resize_token_embeddings_to_32x": {
        False: "Here it is resize_embeddings: true.",
        True: "There are no multiples of 32: resize_embeddings: true grows it to the tokenizer's "
        "length.",
    },
    "mean_resizing_embeddings": {
        True: _ALWAYS,
        False: "Rows of new tokens are drawn around the mean of the others: leave it out.",
    },
    "shrink_embeddings": {
        False: _ALWAYS,
        True: "Embeddings never shrink, rows of no token do no harm: leave it out.",
    },
    # Settings of tokenizers.
    "add_eos_token": {True: "Here it is append_eos: true.", False: "Here it is append_eos: false."},
    "add_bos_token": {
        True: "Here it is bos: true.",
        False: "The tokenizer decides, and bos: true adds one: leave it out.",
    },
    # LLaMA-Factory 0.9.5.
    "resize_vocab": {
        True: "Here it is resize_embeddings: true.",
        False: "Nothing is resized without resize_embeddings: leave it out.",
    },
    "formatting": {
        "alpaca": "Here it is dialect: alpaca.",
        "sharegpt": "Here it is dialect: sharegpt.",
        "": "dialect: auto recognises rows by their columns (docs/data.md): leave it out.",
    },
    "finetuning_type": {
        "lora": "Here it is lora: true.",
        "full": _FULL,
        "oft": _ADAPTERS,
        "": _FREEZE,
    },
    "quantization_bit": {
        4: _BITS_4,
        8: _BITS_8,
        "": "There is none: bitsandbytes has 4 and 8 bits.",
    },
    "quantization_type": {"nf4": _BITS_4, "fp4": _FP4},
    "double_quantization": {True: _BITS_4, False: _ONCE},
    "flash_attn": {
        "auto": "transformers chooses it, always: leave it out.",
        "disabled": "Here it is attn_implementation: eager.",
        "fa2": "Here it is attn_implementation: flash_attention_2.",
        "fa3": "Here it is attn_implementation: flash_attention_3.",
        "": "Here it is attn_implementation: {value}.",
    },
    "lora_target": {
        "all": "Here it is lora.target_modules: all-linear.",
        "": "Here it is lora.target_modules: {listed}.",
    },
}
"""A key -> what a value of it is called here; the entry of "" is for all others."""

NOTES: dict[str, str] = {
    # TRL 1.16 and before.
    "predict_with_generate": _DRAWN,
    "model_init_kwargs": "Its entries are keys here: dtype, attn_implementation, revision, "
    "quantization.",
    "ref_model_init_kwargs": "The reference is loaded like the model: leave it out.",
    "dataset_num_proc": _ONE_PROCESS,
    "dataset_kwargs": _UNSUPPORTED,
    "packing": _PACKED,
    "padding_free": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "padding_value": _PACKED,
    "label_pad_token_id": _PACKED,
    "precompute_ref_batch_size": "The store is filled in batches of per_device_eval_batch_size.",
    "pad_token": _TOKENIZER,
    "eos_token": _TOKENIZER,
    "bos_token": _TOKENIZER,
    "unk_token": _TOKENIZER,
    "center_rewards_coefficient": _NO_REWARD,
    "reward_model_path": _NO_REWARD,
    "is_encoder_decoder": "Models are decoders, always: leave it out.",
    "use_logits_to_keep": _NO_LOGITS,
    "use_liger_loss": _NO_LOGITS,
    "use_num_logits_to_keep": _NO_LOGITS,
    "model_adapter_name": _ADAPTER,
    "ref_adapter_name": _ADAPTER,
    "force_use_ref_model": _ADAPTER,
    "base_model_attribute_name": _READ,
    "lora_task_type": "Models are causal language models, always: leave it out.",
    "bnb_4bit_quant_storage": "Here it is an entry of quantization, a mapping: {{load_in_4bit: "
    "true, bnb_4bit_quant_storage: {value}}}.",
    "bnb_4bit_compute_dtype": "Here it is an entry of quantization, a mapping: {{load_in_4bit: "
    "true, bnb_4bit_compute_dtype: {value}}}.",
    "ignore_bias_buffers": _UNSUPPORTED,
    "gradient_checkpointing_use_reentrant": "Here it is activation_checkpointing_kwargs: "
    "{{use_reentrant: {value}}}.",
    "max_new_tokens": "Samples before and after training have sample_tokens; answers to train on "
    "come from `fastpo sample`.",
    "temperature": _DRAWN,
    "do_sample": _DRAWN,
    "num_beams": _DRAWN,
    "length_penalty": _DRAWN,
    "eval_num_beams": _DRAWN,
    "vllm": _DRAWN,
    "rollout_func": _DRAWN,
    "top_p": _DRAWN,
    "top_k": _DRAWN,
    "min_p": _DRAWN,
    "num_generations": _DRAWN,
    "repetition_penalty": _DRAWN,
    "generation_kwargs": _DRAWN,
    "generation_batch_size": _DRAWN,
    "missing_eos_penalty": _DRAWN,
    "use_vllm": _DRAWN,
    "cache_implementation": _DRAWN,
    "ds3_gather_for_generation": _DRAWN,
    "reward_weights": _NO_REWARD,
    "reward_funcs": _NO_REWARD,
    "reward_model": _NO_REWARD,
    # transformers before 5.
    "logging_dir": "Trackers are told by their own variables, such as TENSORBOARD_LOGGING_DIR.",
    "overwrite_output_dir": "Here it is the flag --overwrite, without a value.",
    "overwrite": "Here it is the flag --overwrite, without a value.",
    "save_safetensors": _ALWAYS,
    "include_inputs_for_metrics": _NO_LOGITS,
    "include_tokens_per_second": _ALWAYS,
    "include_tkps": _ALWAYS,
    "half_precision_backend": _UNSUPPORTED,
    "fp16_backend": _UNSUPPORTED,
    "fp16_opt_level": _UNSUPPORTED,
    "use_mps_device": "Devices are found: leave it out, or set use_cpu.",
    "use_ipex": _UNSUPPORTED,
    "jit_mode_eval": _UNSUPPORTED,
    "torchdynamo": "Here it is torch_compile_backend.",
    "ray_scope": _UNSUPPORTED,
    "past_index": _UNSUPPORTED,
    "mp_parameters": _UNSUPPORTED,
    "push_to_hub_organization": "It is part of hub_model_id: ORGANISATION/NAME.",
    "fsdp_min_num_params": "Here it is an entry of fsdp_config.",
    "fsdp_transformer_layer_cls_to_wrap": "Here it is an entry of fsdp_config.",
    "tpu_num_cores": _UNSUPPORTED,
    # The alignment handbook.
    "dataset_mixer": "Here it is dataset: {first}. One data set a run: what is to be mixed is "
    "written into one file first.",
    "dataset_mixture": "Here it is dataset: {first}. One data set a run: what is to be mixed is "
    "written into one file first.",
    "dataset_splits": "Here they are split and eval_split, one each.",
    "preprocessing_num_workers": _ONE_PROCESS,
    "text_column": _COLUMNS,
    "auto_insert_empty_system_msg": "Rows bring their own system messages (docs/data.md).",
    "system_prompt": "Rows bring their own system messages (docs/data.md).",
    "model_code_revision": "The code's revision is the model's: revision.",
    "dataset_seed": "One seed serves all: seed.",
    # axolotl 0.19.
    "strict": _ALWAYS,
    "datasets": "Here it is dataset: {first}, one data set a run, with split. " + _COLUMNS,
    "base_model_config": _READ,
    "cls_model_config": _READ,
    "model_type": _READ,
    "type_of_model": _READ,
    "tokenizer_type": _READ,
    "tokenizer_use_fast": _READ,
    "tokenizer_legacy": _READ,
    "processor_type": "Rows are text: leave it out.",
    "is_llama_derived_model": _READ,
    "is_mistral_derived_model": _READ,
    "is_qwen_derived_model": _READ,
    "is_falcon_derived_model": _READ,
    "overrides_of_model_kwargs": "Its entries are keys here: dtype, attn_implementation, revision, "
    "quantization.",
    "overrides_of_model_config": "There is none: change config.json in a copy of the model.",
    "model_config": "There is none: change config.json in a copy of the model.",
    "rope_scaling": "There is none: change config.json in a copy of the model.",
    "trainer_cls": "The objective chooses the loss: objective.",
    "trl": "Its entries are keys here, such as beta, reference_update, max_response_length.",
    "batch_size": "It is per_device_train_batch_size times gradient_accumulation_steps.",
    "evals_per_epoch": "Here it is eval_steps, below 1 a share of the run: 1 / (evaluations "
    "of the whole run).",
    "saves_per_epoch": "Here it is save_steps, below 1 a share of the run: 1 / (checkpoints of "
    "the whole run).",
    "sample_packing": _PACKED,
    "eval_sample_packing": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "batch_flattening": _PACKED,
    "multipack_real_batches": _PACKED,
    "streaming_multipack_buffer_size": _PACKED,
    "tiled_mlp_use_original_mlp": _ALWAYS,
    "val_set_size": _HELD_OUT,
    "eval_sequence_len": "One limit serves both: max_length.",
    "min_sample_len": "There is none: leave short rows out of the file.",
    "train_on_inputs": _RESPONSES,
    "dataset_prepared_path": "There is none: rows are tokenised when a run begins.",
    "dataset_processes": _ONE_PROCESS,
    "dataset_keep_in_memory": _ALWAYS,
    "dataset_exact_deduplication": "There is none: leave equal rows out of the file.",
    "shuffle_merged_datasets": "Rows are shuffled by seed; train_sampling_strategy: sequential "
    "keeps their order.",
    "shuffle_before_merging_datasets": _MIXTURE,
    "dataset_shard_num": "Here it is max_rows, of the first rows.",
    "dataset_shard_idx": "Here it is max_rows, of the first rows.",
    "skip_prepare_dataset": _UNSUPPORTED,
    "push_dataset_to_hub": _UNSUPPORTED,
    "pretraining_dataset": "There is none: rows are preferences, or prompts with answers.",
    "hf_use_auth_token": "There is none: log in with `hf auth login`.",
    "special_tokens": _TOKENIZER,
    "tokens": _NEW_TOKENS,
    "added_tokens_overrides": _TOKENIZER,
    "eot_tokens": _TOKENIZER,
    "default_system_message": "Rows bring their own system messages (docs/data.md).",
    "fix_untrained_tokens": _UNSUPPORTED,
    "unfrozen_parameters": _FREEZE,
    "lr_groups": "There is none: one learning_rate.",
    "embedding_lr": "There is none: one learning_rate.",
    "embedding_lr_scale": "There is none: one learning_rate.",
    "loraplus_lr_ratio": "There is none: one learning_rate.",
    "loraplus_lr_embedding": "There is none: one learning_rate.",
    "lr_quadratic_warmup": "There is none: warmup is linear, of warmup_steps.",
    "cosine_min_lr_ratio": "Here it is lr_scheduler_type: cosine_with_min_lr and "
    "lr_scheduler_kwargs: {{min_lr_rate: {value}}}.",
    "cosine_constant_lr_ratio": _UNSUPPORTED,
    "lr_div_factor": _UNSUPPORTED,
    "adam_beta3": _OPTIMISER,
    "adam_epsilon2": _OPTIMISER,
    "torchdistx_path": _OPTIMISER,
    "xformers_attention": "Here it is attn_implementation: sdpa.",
    "sage_attention": "Here it is attn_implementation: sdpa.",
    "s2_attention": _UNSUPPORTED,
    "flash_attn_cross_entropy": _NO_LOGITS,
    "flash_attn_rms_norm": _KERNELS,
    "flash_attn_fuse_mlp": _KERNELS,
    "chunked_cross_entropy": _NO_LOGITS,
    "chunked_cross_entropy_num_chunks": _NO_LOGITS,
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "lora_embedding_kernel": _KERNELS,
    "plugins": _KERNELS,
    "experts_implementation": _KERNELS,
    "fused_attn_kernel": _KERNELS,
    "cut_cross_entropy": _NO_LOGITS,
    "large_head_attention": _KERNELS,
    "flash_attn_d512": _KERNELS,
    "sdpa_varlen": _PACKED,
    "flash_optimum": "Here it is attn_implementation: sdpa.",
    "torch_compile_options": "There is none: torch_compile_mode and torch_compile_backend choose.",
    "deepcompile": "Here it is an entry of the file that deepspeed names.",
    "fsdp_version": "Here it is an entry of fsdp_config: version.",
    "fsdp_final_state_dict_type": "Here it is an entry of fsdp_config: state_dict_type.",
    "ring_attn_func": _LAUNCH,
    "heads_k_stride": _LAUNCH,
    "use_ray": _LAUNCH,
    "resources_per_worker": _LAUNCH,
    "qlora_sharded_model_loading": _LAUNCH,
    "quantize_moe_experts": _UNSUPPORTED,
    "fp32_norms": _UNSUPPORTED,
    "fp32_norm_classes": _UNSUPPORTED,
    "use_onebitllms": _UNSUPPORTED,
    "curriculum_sampling": "Here it is train_sampling_strategy: sequential, of rows in order.",
    "dynamic_checkpoint": "Here they are save_steps; a run that is stopped saves and resumes.",
    "ebft": _DRAWN,
    "is_preprocess": _UNSUPPORTED,
    "use_kernels": _KERNELS,
    "merge_lora": _MERGE,
    "merge_method": _MERGE,
    "gptq": "There is none: quantization is bitsandbytes'.",
    "peft_autocast_adapter_dtype": "Adapters are float32, always: leave it out.",
    "lora_on_cpu": _UNSUPPORTED,
    "ddp": _LAUNCH,
    "device": "Devices are found: leave it out, or set use_cpu.",
    "device_map": _LAUNCH,
    "max_memory": _LAUNCH,
    "gpu_memory_limit": _LAUNCH,
    "world_size": _LAUNCH,
    "low_cpu_mem_usage": _ALWAYS,
    "dp_shard_size": _LAUNCH,
    "dp_replicate_size": _LAUNCH,
    "sequence_parallel_degree": _LAUNCH,
    "context_parallel_size": _LAUNCH,
    "tensor_parallel_size": _LAUNCH,
    "auto_resume_from_checkpoints": "The same command resumes, always: leave it out.",
    "save_first_step": _UNSUPPORTED,
    "use_tensorboard": "Here it is report_to: tensorboard.",
    "use_wandb": "Here it is report_to: wandb.",
    "use_mlflow": "Here it is report_to: mlflow.",
    "use_comet": "Here it is report_to: comet_ml.",
    "use_trackio": "Here it is report_to: trackio.",
    "eval_causal_lm_metrics": _UNSUPPORTED,
    "do_causal_lm_eval": _UNSUPPORTED,
    "do_bench_eval": _UNSUPPORTED,
    "loss_watchdog_threshold": "A loss that is not finite stops the run, always: leave it out.",
    "loss_watchdog_patience": "A loss that is not finite stops the run, always: leave it out.",
    "dpo_use_liger_kernel": _NO_LOGITS,
    "dpo_padding_free": _PACKED,
    "dpo_use_logits_to_keep": _NO_LOGITS,
    "dpo_generate_during_eval": "Here it is num_samples: 3.",
    "process_reward_model": _NO_REWARD,
    "num_labels": _NO_REWARD,
    "qat": _UNSUPPORTED,
    "fp8": _UNSUPPORTED,
    "selective_checkpointing": "Here it is activation_checkpointing, of every layer.",
    # LLaMA-Factory 0.9.5.
    "dataset_dir": "There is none: dataset is a file, a folder or a name on the hub, and its rows "
    "say what they are (docs/data.md).",
    "media_dir": "Rows are text: leave it out.",
    "template": "The checkpoint's own chat template is used, on rows of text where "
    "text_as_messages is true: leave it out, or name a .jinja file as chat_template.",
    "tags": _MESSAGES,
    "ranking": "Preferences are recognised by their columns (docs/data.md): leave it out.",
    # ms-swift and OpenRLHF.
    "new_special_tokens": _NEW_TOKENS,
    "apply_chat_template": "Rows of messages go through the chat template, always; "
    "text_as_messages: true makes messages of rows of text.",
    "input_template": "Rows are read as they are: write the template into the prompts, or name a "
    ".jinja file as chat_template, with text_as_messages: true.",
    # TRL 1.16: SFTConfig.
    "dataset_text_field": _COLUMNS,
    "assistant_only_loss": _RESPONSES,
    "completion_only_loss": _RESPONSES,
    "val_size": _HELD_OUT,
    "train_on_prompt": _RESPONSES,
    "mask_history": "Turns before the response are its prompt (docs/data.md): leave it out.",
    "mix_strategy": _MIXTURE,
    "interleave_probs": _MIXTURE,
    "eval_on_each_dataset": _MIXTURE,
    "buffer_size": _UNSUPPORTED,
    "overwrite_cache": "There is none: rows are tokenised when a run begins.",
    "tokenized_path": "There is none: rows are tokenised when a run begins.",
    "neat_packing": _PACKED,
    "ignore_pad_token_for_loss": _PACKED,
    "preprocessing_batch_size": _ONE_PROCESS,
    "data_shared_file_system": _ONE_PROCESS,
    "tool_format": "The chat template writes tools (docs/data.md): leave it out.",
    "default_system": "Rows bring their own system messages (docs/data.md).",
    "preserve_thinking": "Here it is an entry of chat_template_kwargs.",
    "create_new_adapter": "Merge the old one first, with `fastpo merge`, and name lora.",
    "pissa_iter": "Here it is lora.init_lora_weights: pissa_niter_{value}.",
    "pissa_convert": _UNSUPPORTED,
    "quantization_method": "quantization is bitsandbytes', always: leave it out.",
    "quantization_device_map": _LAUNCH,
    "ref_model_quantization_bit": "The reference is loaded like the model: leave it out.",
    "use_llama_pro": _FREEZE,
    "use_galore": _OPTIMISER,
    "use_apollo": _OPTIMISER,
    "use_badam": _OPTIMISER,
    "use_adam_mini": _OPTIMISER,
    "use_muon": _OPTIMISER,
    "use_unsloth": _KERNELS,
    "use_unsloth_gc": "Here it is offload_activations.",
    "use_swanlab": "Here it is report_to: swanlab.",
    "shift_attn": _UNSUPPORTED,
    "mixture_of_depths": _UNSUPPORTED,
    "upcast_layernorm": _UNSUPPORTED,
    "upcast_lmhead_output": _ALWAYS,
    "disable_gradient_checkpointing": "Here it is activation_checkpointing: false.",
    "use_reentrant_gc": "Here it is activation_checkpointing_kwargs: {{use_reentrant: {value}}}.",
    "cache_dir": "There is none: set the environment variable HF_HOME.",
    "use_fast_tokenizer": _ALWAYS,
    "split_special_tokens": _TOKENIZER,
    "add_tokens": _NEW_TOKENS,
    "add_special_tokens": _NEW_TOKENS,
    "new_special_tokens_config": _NEW_TOKENS,
    "init_special_tokens": _TOKENIZER,
    "plot_loss": "report.html has the curves, always: leave it out.",
    "compute_accuracy": "rewards/accuracies is always written: leave it out.",
    "disable_shuffling": "Here it is train_sampling_strategy: sequential.",
    "include_effective_tokens_per_second": _ALWAYS,
    "use_kv_cache": _ALWAYS,
    "ms_hub_token": "There is none: models come from folders or the Hugging Face hub.",
    "om_hub_token": "There is none: models come from folders or the Hugging Face hub.",
    "print_param_status": _UNSUPPORTED,
}
"""A key -> a sentence, where no key of ours is the same thing."""

BY_PREFIX: dict[str, str] = {
    "sample_packing_": _PACKED,
    "pretrain": "There is none: rows are preferences, or prompts with answers.",
    "profile": _UNSUPPORTED,
    "bench_": _UNSUPPORTED,
    "gradio_": _UNSUPPORTED,
    "lm_eval_": _UNSUPPORTED,
    "otel_": _UNSUPPORTED,
    "use_otel_": _UNSUPPORTED,
    "kd_": _LOSSES,
    "grokfast_": _UNSUPPORTED,
    "tokenizer_": _TOKENIZER,
    "processor_": "Rows are text: leave it out.",
    "total_": "Rows and tokens are counted when a run begins: leave it out.",
    "preprocess_": _ONE_PROCESS,
    "enable_torch_profiler": _UNSUPPORTED,
    "fp8": _UNSUPPORTED,
    "scaling_softmax": _UNSUPPORTED,
    "embeddings_": _UNSUPPORTED,
    "llama4_": _UNSUPPORTED,
    "eaft_": _LOSSES,
    "use_eaft": _LOSSES,
    "asft_": _LOSSES,
    "use_asft": _LOSSES,
    "use_dft": _LOSSES,
    "vllm_": _DRAWN,
    "sglang_": _DRAWN,
    "generation_": _DRAWN,
    "ppo_": _DRAWN,
    "reward_model_": _NO_REWARD,
    "wandb_": "Here it is report_to: wandb, and its own variables such as WANDB_PROJECT.",
    "swanlab_": "Here it is report_to: swanlab, and its own variables.",
    "comet_": "Here it is report_to: comet_ml, and its own variables.",
    "mlflow_": "Here it is report_to: mlflow, and its own variables.",
    "galore_": _OPTIMISER,
    "qgalore_": _OPTIMISER,
    "apollo_": _OPTIMISER,
    "badam_": _OPTIMISER,
    "dion_": _OPTIMISER,
    "use_mora": _ADAPTERS,
    "mora": _ADAPTERS,
    "lisa_": _FREEZE,
    "spectrum_": _FREEZE,
    "expert_parallel_": _LAUNCH,
    "relora": "There is none: adapters are trained in one go.",
    "jagged_restart_": "There is none: lr_scheduler_type names a schedule of transformers.",
    "oft_": _ADAPTERS,
    "module_dropout": _ADAPTERS,
    "freeze_": _FREEZE,
    "export_": _MERGE,
    "image_": "Rows are text: leave it out.",
    "video_": "Rows are text: leave it out.",
    "liger_": "Here it is layer_kernels: liger.",
    "ray_": _LAUNCH,
    "master_": _LAUNCH,
    "kt_": _UNSUPPORTED,
    "use_kt": _UNSUPPORTED,
    "use_mca": _UNSUPPORTED,
    "use_v1_kernels": _KERNELS,
    "use_hyper_parallel": _LAUNCH,
    "hyper_parallel_": _LAUNCH,
    "block_diag_attn": _PACKED,
    "infer_": _DRAWN,
    "skip_special_tokens": _DRAWN,
    "audio_": "Rows are text: leave it out.",
    "use_audio_": "Rows are text: leave it out.",
    "crop_to_patches": "Rows are text: leave it out.",
    "role_boundaries": _RESPONSES,
    "roles_to_train": _RESPONSES,
    "roles": _MESSAGES,
    "field_": _COLUMNS,
    "message_": _MESSAGES,
    "trackio_": "Here it is report_to: trackio, and its own variables.",
    "hf_mlflow_": "Here it is report_to: mlflow, and its own variables.",
    "offload_folder": _LAUNCH,
    "ple_cpu_offload": _UNSUPPORTED,
    "gemma4_": _KERNELS,
    "flex_attn_": _KERNELS,
    "num_dataset_shards_": _UNSUPPORTED,
    "axolotl_config_path": _UNSUPPORTED,
    "experimental_skip_": _UNSUPPORTED,
    "use_pose": "Here it is position_synthesis (docs/data.md).",
    "pose_": "Here it is position_synthesis (docs/data.md).",
}
"""The beginning of keys -> a sentence for all of them."""

TRAINER: dict[str, str] = {
    # TRL 1.16 and before, transformers 5.
    "peft_config": "wrap the model first: peft.get_peft_model(model, peft_config)",
    "tokenizer": "here it is processing_class",
    "quantization_config": "load the model with it first",
    "model_init": "give the model itself",
    "model_init_kwargs": "load the model with them first",
    "ref_model_init_kwargs": "load ref_model with them first",
    "data_collator": "groups are packed by the trainer's own collator: leave it out",
    "compute_metrics": "logits are never built: write a callback, or read metrics.jsonl",
    "preprocess_logits_for_metrics": "logits are never built: leave it out",
    "optimizer_cls_and_kwargs": "here it is optimizers=(optimizer, scheduler), or optim of args",
    "formatting_func": "rows are converted beforehand (docs/data.md): leave it out",
    "reward_funcs": "fastpo trains no reward models, and needs none: leave it out",
    "judge": "responses are drawn and graded beforehand: leave it out",
}
"""Keywords of other trainers -> what to do."""


def answer(key: str, value: Any, chosen: Sequence[str], hyper: Iterable[str]) -> str | None:
    """Return a sentence for another tool's key, or None for an unknown one.

    Args:
        key: its name there.
        value: its value there.
        chosen: the chosen objectives.
        hyper: their hyper-parameters.
    """
    said = losses.answer(key, value, chosen, hyper)
    if said is not None:
        return said
    said = _template(key, value)
    if said is None:
        return None
    if value is None or value in ("", [], {}):
        return losses.UNSET
    # A name alone takes the value as it is; the rest of these would switch something on.
    switch = key not in BY_VALUE and not _takes_value(said)
    if value is False and switch and said.startswith("Here it is "):
        return losses.OFF
    shown = str(value).lower() if isinstance(value, bool) else value
    words = value if isinstance(value, list | tuple) else str(value).split(",")
    listed = f"[{', '.join(str(word).strip() for word in words)}]"
    return said.format(value=shown, listed=listed, first=_first(value))


def _template(key: str, value: Any) -> str | None:
    """Return the sentence for a key, with a place for its value."""
    if key in BY_VALUE:
        table = BY_VALUE[key]
        sentence = next((said for each, said in table.items() if each == value), table.get(""))
        return sentence or f"Here it is one of {', '.join(map(str, table))}."
    if key in NAMES:
        return f"Here it is {NAMES[key]}."
    if key in NOTES:
        return NOTES[key]
    return next((note for start, note in BY_PREFIX.items() if key.startswith(start)), None)


def _takes_value(said: str) -> bool:
    return "{value}" in said or re.fullmatch(r"Here it is [\w.]+\.", said) is not None


def _first(value: Any) -> str:
    """Return the name of the first data set of a mixer or a list."""
    if isinstance(value, Mapping) and value:
        named = next((value[k] for k in ("path", "id", "datasets") if k in value), None)
        return _first(named if named is not None else str(next(iter(value))))
    if isinstance(value, list | tuple) and value:
        return _first(value[0])
    return value if isinstance(value, str) else "NAME"


def unknown(key: str, value: Any, keys: Iterable[str], objectives: Mapping[str, Objective]) -> str:
    """Return an answer to an unknown key: its name here, or the nearest.

    Args:
        key: the unknown key.
        value: its value.
        keys: the keys that there are.
        objectives: the chosen ones; their hyper-parameters are keys too.
    """
    hyper = list(dict.fromkeys(h for o in objectives.values() for h in o.hyper))
    chosen = " + ".join(objectives)
    said = answer(key, value, list(objectives) or ["dpo"], hyper)
    owners = [name for name, o in OBJECTIVES.items() if key in o.hyper]
    if said is None and owners:
        listed = ", ".join(owners[:4]) + (", ..." if len(owners) > 4 else "")
        said = f"It is a hyper-parameter of {listed}; {chosen} has {', '.join(hyper) or 'none'}."
    # Near misses are typing errors; `train_batch_size` is none of `auto_find_batch_size`.
    hint = nearest(key, [*keys, *hyper], cutoff=0.75).strip()
    return f"unknown key {key!r}. {said or hint or '`fastpo train --keys` lists them.'}"


def refuse_keywords(
    cls: type, keywords: Mapping[str, object], explain: Callable[[str, object], str]
) -> None:
    """Refuse keywords that the constructor of `cls` does not take.

    Raises:
        ValueError: a line for every such keyword, made by `explain` of its name and value.
    """
    parameters = inspect.signature(cls.__init__).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        wrong = [explain(name, value) for name, value in keywords.items() if name not in parameters]
        if wrong:
            raise ValueError("\n".join(wrong))
