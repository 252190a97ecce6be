"""A tiny random Llama with a byte tokenizer, and a file of preferences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.absent import absent_packages_skip  # noqa: F401


def make(folder: Path) -> None:
    """Write `model/` and `prefs.jsonl` into a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<pad>"]
    raw = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=words.index("<s>"),
        eos_token_id=words.index("</s>"),
        pad_token_id=words.index("<pad>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [
        {
            "prompt": f"What is {i} plus {i + 1}? ",
            "chosen": f"It is {2 * i + 1}.",
            "rejected": "I do not know",
        }
        for i in range(8)
    ]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` and `prefs.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def worse(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model with the tokenizer of the first."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("worse")
    shutil.copytree(tiny / "model", folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    """A recipe of two steps in an empty folder; its run goes to `run/` beside it."""
    path = tmp_path / "first.yaml"
    path.write_text(
        f"model: {tiny / 'model'}\n"
        f"dataset: {tiny / 'prefs.jsonl'}\n"
        f"output_dir: {tmp_path / 'run'}\n"
        "lora: {r: 2}\n"
        "learning_rate: 1e-3\n"
        "per_device_train_batch_size: 3\n"
        "max_steps: 2\n"
        "logging_steps: 1\n"
        "eval_fraction: 0.25\n"
        "sample_tokens: 4\n"
        "num_samples: 1\n"
        "use_cpu: true\n"
        "disable_tqdm: true\n"
    )
    return path
