"""`fastpo doctor`: what this installation can do here, and why `auto` chooses what it chooses."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress

import torch

from fastpo import __version__
from fastpo.cli import EXTRAS
from fastpo.head.select import choose_backend
from fastpo.head.spec import check_workspace
from fastpo.model.device import default_device, native_bf16
from fastpo.model.installation import (
    Verdict,
    attention_verdicts,
    chosen_attention,
    head_costs,
    head_verdicts,
)
from fastpo.optional import PackageError, require_transformers

VERSIONS = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "numpy")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _line(name: str, text: str) -> None:
    print(f"  {name:<13}{text}")


def _verdicts(title: str, verdicts: Iterable[Verdict]) -> bool:
    """Print how backends fare; return False where one that runs is wrong."""
    print(f"\n{title}")
    sound = True
    for verdict in verdicts:
        _line(verdict.backend, str(verdict))
        sound = sound and verdict.sound
    return sound


def _environment(device: torch.device) -> None:
    print(f"fastpo {__version__}")
    _line("versions", ", ".join(f"{name} {_version(name)}" for name in VERSIONS))
    _line("python", f"{platform.python_version()}, {sys.executable}")
    if device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            kind = f"compute capability {p.major}.{p.minor}" if torch.version.cuda else "ROCm"
            _line(f"device {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {kind}")
    else:
        _line("device", f"{device.type}, {torch.get_num_threads()} threads")
    yes = native_bf16(device)
    _line("bfloat16", "native" if yes else "emulated here: models are loaded in float32")


def _extras() -> None:
    print("\nextras")
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        text = f"no {', '.join(missing)}: pip install 'fastpo[{extra}]'" if missing else "installed"
        if extra == "train" and "transformers" not in missing:
            try:
                require_transformers(extra)
            except PackageError as old:
                text = f"{old}; {text}" if missing else str(old)
        _line(extra, text)


def _chat_template(arguments: argparse.Namespace) -> None:
    """Print what the model's chat template does with conversations."""
    from fastpo.cli.reading import source_of
    from fastpo.data.template_facts import TemplateFacts
    from fastpo.model.opening import open_tokenizer

    print("\nchat template")
    try:
        tokenizer = open_tokenizer(arguments.model, None, None, **source_of(arguments))
    except (OSError, ValueError) as error:  # a folder of weights alone
        _line("tokenizer", f"none: {str(error).splitlines()[0]}")
        return
    if tokenizer.chat_template is None:
        _line("template", "none: rows must be text, or bring a template with chat_template")
        return
    try:
        facts = TemplateFacts(tokenizer, {})
    except ValueError as error:
        _line("template", str(error))
        return
    for name, text in facts.describe().items():
        _line(name, text)


def _model(arguments: argparse.Namespace, device: torch.device) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastpo.model.head_facts import read_head
    from fastpo.model.load import trained_adapter
    from fastpo.model.self_check import can_share_prompt
    from fastpo.reading import opening
    from fastpo.report.text import short

    adapter = trained_adapter(arguments.model)
    name = adapter.base if adapter else arguments.model
    remote = {"trust_remote_code": arguments.trust_remote_code}
    source = {"revision": adapter.revision if adapter else arguments.revision, **remote}
    if gguf_file := arguments.gguf_file or (adapter and adapter.gguf_file):
        source["gguf_file"] = gguf_file
    with opening(name), torch.device("meta"):  # shapes without weights
        config = AutoConfig.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_config(config, **remote)
    print(f"\n{arguments.model}")
    count = sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    _line("class", f"{type(model).__name__}, {short(count)} parameters")
    head = read_head(model)
    facts = [f"{key} {value}" for key, value in head.facts().items() if value not in (None, 1.0)]
    embeddings = "tied to the input embeddings" if tied else "its own weight"
    _line("head", ", ".join([embeddings, *facts]))
    able, reason = can_share_prompt(model)
    _line("prompts", f"{'shared' if able else 'one copy per response'}: {reason}")
    tokens, (vocabulary, width) = arguments.tokens, head.weight.shape
    matmul = 2 * tokens * vocabulary * width / 1e12
    print(f"\nhead, {tokens} target tokens x {width} x {vocabulary}; 2NDV is {matmul:.3g} TFLOP")
    for name, text in head_costs(head, device, tokens, arguments.workspace_mib):
        _line(name, text)


def doctor(arguments: argparse.Namespace) -> int:
    """Print the state of the installation; 1 where something that should work does not."""
    if arguments.workspace_mib != "auto":
        with suppress(ValueError):  # what is no number is refused by the next line
            arguments.workspace_mib = float(arguments.workspace_mib)
    check_workspace(arguments.workspace_mib)
    if arguments.model is not None:
        from fastpo.model.load import check_place

        check_place(arguments.model)
    device = default_device()
    _environment(device)
    sound = _verdicts("back ends of the head", head_verdicts(device))
    _line("auto", choose_backend("auto", device)[1])
    if importlib.util.find_spec("transformers") is not None:
        sound = _verdicts("attention of shared prompts", attention_verdicts(device)) and sound
        for case, text in chosen_attention(device):
            _line(case, text)
    _extras()
    if arguments.model is not None:
        _model(arguments, device)
        _chat_template(arguments)
    if not sound:
        print("\na back end gives wrong numbers: please report the lines above")
    return 0 if sound else 1
