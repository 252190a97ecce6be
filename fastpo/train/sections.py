"""Name the keys of a recipe that are not the trainer's: which model, which rows, which pages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fastpo.domain import Count, ProperShare
from fastpo.fields import documented


@documented
@dataclass
class ModelSection:
    """Say which model is trained, in which form.

    Args:
        model: name on the hub, or a folder; one with an adapter goes on with that adapter.
        revision: branch, tag or commit of `model`.
        gguf_file: file inside `model`, or its adapter's base, with the weights in GGUF form.
        dtype: dtype that the weights are loaded in; `auto` is float32 where all are trained (`bf16`
            multiplies them in bfloat16), and the checkpoint's under an adapter.
        trust_remote_code: run Python code that comes with the checkpoint.
        quantization: quantised base weights for LoRA; see `fastpo.model.load.load_model`.
        random_init: draw the weights instead of reading them, to measure memory and speed; `model`
            may be a preset of `fastpo plan` or a config.json, and without `tokenizer` one token is
            one byte.
        attn_implementation: attention of the unshared path; the default is transformers' choice.
        lora: `true`, or arguments of `peft.LoraConfig` such as `{r: 16, lora_alpha: 32}`.
        tokenizer: name or folder; `model` by default.
        resize_embeddings: grow the embedding and the head of `model`, and of references, to the
            tokenizer's length; one that is long enough stays. An adapter then trains both whole.
        chat_template: a .jinja file, or the template itself.
        ref_model: another model as the reference; by default the model as it is at the start. A
            mapping of models to shares that add up to 1 is their soup, or with a negative share
            an extrapolation.
        ref_model2: the second reference, of objectives that compare with two; likewise.
    """

    model: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False
    quantization: str | dict[str, object] | None = None
    random_init: bool = False
    attn_implementation: str | None = None
    lora: bool | dict[str, Any] | None = None
    tokenizer: str | None = None
    resize_embeddings: bool = False
    chat_template: str | None = None
    ref_model: str | dict[str, float] | None = None
    ref_model2: str | dict[str, float] | None = None


@documented
@dataclass
class DataSection:
    """Hold where the rows come from. How they become tokens is `PreferenceConfig`'s part.

    Args:
        dataset: name on the hub, a .jsonl, .json, .csv or .parquet file, or a folder of them.
        dataset_name: configuration of a hub data set.
        split: split to train on.
        eval_dataset: data set to evaluate on; `dataset` itself when only `eval_split` is given.
        eval_split: its split; "train" by default.
        eval_fraction: share of the training rows that is held out, chosen by `seed`.
        streaming: read rows as they are needed instead of all at once.
        max_rows: use the first so many training rows only.
    """

    dataset: str
    dataset_name: str | None = None
    split: str = "train"
    eval_dataset: str | None = None
    eval_split: str | None = None
    eval_fraction: ProperShare = 0.0
    streaming: bool = False
    max_rows: Count | None = None

    def __post_init__(self) -> None:
        if self.eval_fraction and (self.eval_dataset or self.eval_split):
            raise ValueError("eval_fraction and eval_dataset/eval_split exclude each other")
        if self.eval_fraction and self.streaming:
            raise ValueError("eval_fraction needs all rows at once: give eval_split when streaming")

    @property
    def evaluates(self) -> bool:
        """Return whether any rows are kept for evaluation."""
        return bool(self.eval_dataset or self.eval_split or self.eval_fraction)


@documented
@dataclass
class ReportSection:
    """Hold what is written beside the checkpoints.

    Args:
        report: write report.html and the model card at the end.
    """

    report: bool = True


# Sections that `PreferenceConfig` knows nothing of, and their keys.
SECTIONS = (ModelSection, DataSection, ReportSection)


OUTSIDE = frozenset(f.name for cls in SECTIONS for f in dataclasses.fields(cls))
