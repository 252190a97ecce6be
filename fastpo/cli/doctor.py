"""`fastpo doctor`: what this installation can do here, and why `auto` chooses what it chooses."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fastpo import __version__
from fastpo.cli import EXTRAS
from fastpo.head.functional import linear_logps
from fastpo.head.head import Head
from fastpo.head.schedule import Workload
from fastpo.head.select import choose_backend, most_kept_tokens, plan_head, workspace_in_mib
from fastpo.head.spec import BackendName, HeadOptions, Workspace, check_workspace
from fastpo.model.device import default_device, native_bf16
from fastpo.optional import PackageError, require_transformers

VERSIONS = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "numpy")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _line(name: str, text: str) -> None:
    print(f"  {name:<13}{text}")


def _step(
    hidden: Tensor, weight: Tensor, labels: Tensor, backend: BackendName | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and their gradient to the hidden states; None is plain PyTorch."""
    h = hidden.detach().requires_grad_()
    if backend is None:
        logps = (h @ weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    else:
        logps = linear_logps(h, weight, labels, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), h)
    return logps.detach(), grad


def check_backend(backend: BackendName, device: torch.device) -> tuple[float, float]:
    """(error, bound) of a back end's log-probs and gradients against float64.

    The bound is twice the error of plain PyTorch in the same dtype plus one rounding.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 48, generator=generator)
    weight = torch.randn(96, 48, generator=generator) / 3
    labels = torch.randint(0, 96, (24,), generator=generator)
    truth = _step(hidden.double(), weight.double(), labels, None)
    inputs = (hidden.to(device), weight.to(device), labels.to(device))
    ours, plain = _step(*inputs, backend), _step(*inputs, None)
    return _worst(ours, plain, truth, torch.finfo(hidden.dtype).eps)


def check_attention(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(error, bound) of one attention back end, forward and backward, against float64.

    Two groups and five responses, in a layer of two key heads for four query heads; the bound is
    twice the error of separate calls in the same dtype plus one rounding.
    """
    from fastpo.batch import GroupSpan, Layout
    from fastpo.model.attention.dispatch import BACKENDS
    from fastpo.model.attention.shared_row import AttentionOptions, SharedRow

    layout = Layout(
        (
            GroupSpan((0, 40), ((40, 60), (60, 95), (95, 100))),
            GroupSpan((100, 130), ((130, 133), (133, 150))),
        ),
        150,
    )
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, 150, 32, generator=generator).to(dtype) for h in (4, 2, 2)]

    def run(name: str, place: torch.device, precision: torch.dtype) -> list[Tensor]:
        leaves = [t.to(place, precision).requires_grad_() for t in inputs]
        out = BACKENDS[name](SharedRow(layout), *leaves, AttentionOptions())  # pyright: ignore
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        return [t.detach().double().cpu() for t in (out, *grads)]

    truth = run("segments", torch.device("cpu"), torch.float64)
    ours, plain = run(backend, device, dtype), run("segments", device, dtype)
    return _worst(ours, plain, truth, torch.finfo(dtype).eps)


def _worst(
    ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], eps: float
) -> tuple[float, float]:
    """The largest error and bound of several results, each in units of its own scale."""
    error = bound = 0.0
    for value, same, exact in zip(ours, plain, truth, strict=True):
        scale = exact.abs().max().item()
        error = max(error, (value.double().cpu() - exact).abs().max().item() / scale)
        own = (same.double().cpu() - exact).abs().max().item()
        bound = max(bound, 2 * (own / scale + eps))
    return error, bound


def _attention(device: torch.device) -> bool:
    """Print what each attention back end does here; False where one that runs is wrong."""
    from fastpo.model.attention.dispatch import BACKENDS, choose_attention

    print("\nattention of shared prompts")
    sound = True
    half = device.type == "cuda" and native_bf16(device)
    dtype = torch.bfloat16 if half else torch.float32
    facts: dict[str, Any] = {"device": device, "dtype": dtype, "width": 32}
    for backend in BACKENDS:
        try:
            choose_attention(backend, **facts)
        except ValueError as refusal:
            _line(backend, f"not here: {refusal}")
            continue
        error, bound = check_attention(backend, device, dtype)
        verdict = "works" if error <= bound else "WRONG"
        sound = sound and error <= bound
        _line(backend, f"{verdict}: relative error {error:.1e}, rounding explains {bound:.1e}")
    for case, capped in (("auto", False), ("auto, capped", True)):
        _line(case, ": ".join(choose_attention(**facts, softcap=capped)))
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


def _backends(device: torch.device) -> bool:
    """Print what each back end does here; False where one that runs is wrong."""
    print("\nback ends of the head")
    sound = True
    for backend in ("torch", "triton"):
        try:
            choose_backend(backend, device)
        except ValueError as refusal:
            _line(backend, f"not here: {refusal}")
            continue
        error, bound = check_backend(backend, device)
        verdict = "works" if error <= bound else "WRONG"
        sound = sound and error <= bound
        _line(backend, f"{verdict}: relative error {error:.1e}, rounding explains {bound:.1e}")
    _line("auto", choose_backend("auto", device)[1])
    return sound


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


def _head_costs(head: Head, device: torch.device, tokens: int, workspace_mib: Workspace) -> None:
    vocabulary, width = head.weight.shape
    product, mib = 2 * tokens * vocabulary * width / 1e12, workspace_in_mib(workspace_mib, device)
    print(f"\nhead, {tokens} target tokens x {width} x {vocabulary}; 2NDV is {product:.3g} TFLOP")
    dtype = head.weight.dtype if native_bf16(device) else torch.float32
    cases: dict[str, dict[str, Any]] = {
        "scoring": {"needs_hidden": False},
        "frozen": {},
        "trained": {"needs_head": True},
        "frozen + KL": {
            "want": ("logps", "kl_ref_policy"),
            "num_grad_stats": 2,
            "with_reference": True,
        },
    }
    for name, needs in cases.items():
        work = Workload(tokens, vocabulary, width, dtype, **needs)
        backend, schedule, _ = plan_head(work, HeadOptions(workspace_mib=mib), device=device)
        matmuls = f"{schedule.matmuls:.3g} x 2NDV"
        _line(name, f"{matmuls}, schedule {schedule.name}, {backend}: {schedule.reason}")
    most = most_kept_tokens(vocabulary, width, device=device, dtype=dtype, workspace_mib=mib)
    _line("by groups", f"a loss on a trained head costs 3 x 2NDV for groups of up to {most} tokens")
    full = tokens * vocabulary * 4 / 2**20
    _line("logits", f"{full:,.0f} MiB in float32 if they were stored; {mib:g} MiB are used")


def _chat_template(arguments: argparse.Namespace) -> None:
    """Print what the model's chat template does with conversations."""
    from fastpo.cli.models import open_tokenizer
    from fastpo.data.template_facts import TemplateFacts

    source = {name: getattr(arguments, name) for name in ("gguf_file", "revision")}
    remote = arguments.trust_remote_code
    print("\nchat template")
    try:
        tokenizer = open_tokenizer(arguments.model, None, None, **source, trust_remote_code=remote)
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
    from fastpo.report.chart import short

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
    _head_costs(head, device, arguments.tokens, arguments.workspace_mib)


def doctor(arguments: argparse.Namespace) -> int:
    """Print the state of the installation; 1 where something that should work does not."""
    if arguments.workspace_mib != "auto":
        with suppress(ValueError):  # what is no number is refused by the next line
            arguments.workspace_mib = float(arguments.workspace_mib)
    check_workspace(arguments.workspace_mib)
    if arguments.tokens < 1:
        raise ValueError(f"--tokens {arguments.tokens} must be at least 1")
    if arguments.model is not None:
        from fastpo.model.load import check_place

        check_place(arguments.model)
    device = default_device()
    _environment(device)
    sound = _backends(device)
    if importlib.util.find_spec("transformers") is not None:
        sound = _attention(device) and sound
    _extras()
    if arguments.model is not None:
        _model(arguments, device)
        _chat_template(arguments)
    if not sound:
        print("\na back end gives wrong numbers: please report the lines above")
    return 0 if sound else 1
