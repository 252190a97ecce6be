"""Is everything right on this device? The part `right` of `bench.gpu`.

    python -m bench.gpu.right "head bfloat16" --device cuda   # one chunk, a JSON line a case

Every answer is compared with float64 by the rule of `bench.harness.check`, and computed twice: the
bits must be equal. Chunks run in processes of their own on a GPU, where compiling is most of the
time, and one after the other on a CPU, where kernels are interpreted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpo
from bench.gpu.book import find_packed_kernels
from bench.harness import Outputs, check
from bench.head import Inputs, less_label, make_inputs
from fastpo.loss.preference_loss import PreferenceLoss
from fastpo.segments import Segments


class Sizes(NamedTuple):
    """Hold sizes of the cases: ragged ones, and ones that launches specialise on."""

    tokens: tuple[int, ...]
    widths: tuple[int, ...]
    vocabularies: tuple[int, ...]
    dtypes: tuple[str, ...]
    groups: int
    response: int  # tokens
    model: dict[str, Any]
    slabs: tuple[int, ...]  # vocabularies of what is written in place
    thin: float  # MiB of a workspace that cuts slabs of a late pass by rows too


_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # far enough from uniform that gradients are not all rounding
}
# N = 1 and multiples of 16 are constants to the compiler, rows of 511 numbers no descriptors.
FULL = Sizes(
    (1000, 17, 1),
    (512, 511),
    (32000, 32001),
    ("bfloat16", "float16", "float32"),
    6,
    100,
    _MODEL,
    (32000, 32001, 131072),
    1.0,
)
# The interpreter takes milliseconds an instruction.
_SMALL = {**_MODEL, "hidden_size": 64}
# Nothing is compiled on a CPU, so only what a launch masks differs: odd sizes stand for all.
TOY = Sizes((5,), (31,), (64, 65), ("float32",), 2, 3, _SMALL, (64, 65), 5e-5)

Verdict = tuple[str, dict[str, Any]]
Checks = Callable[[torch.device, Sizes], Iterator[Verdict]]

LOSSES: dict[str, Any] = {
    "dpo": "dpo",
    "simpo": "simpo",
    "kto": "kto",
    "lipo": "lipo",
    "kl": {"dpo": 1.0, "kl_retain": 1.0},
}
KERNELS = ("logits_epilogue", "linear_stats", "linear_coefficients")
# name -> what the workspace holds, in groups: two, and less than one.
SCHEDULES = {"frozen": 2.5, "by groups": 2.5, "late": 0.4}


def verdict(
    ours: Outputs,
    again: Outputs,
    truth: Outputs,
    plain: Outputs,
    terms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Say how a case ended: `ok`, or `wrong` and why."""
    errors, why = check(ours, truth, plain, terms)
    moved = [name for name, value in ours.items() if not torch.equal(value, again[name])]
    if moved:
        why = f"other bits the second time: {', '.join(moved)}" + (f"; {why}" if why else "")
    found = {name: e["relative"] for name, e in errors.items()}
    return {"status": "wrong", "why": why, "errors": found} if why else {"status": "ok"}


def _wide(x: Inputs) -> Inputs:
    return Inputs(*(t.double() if t.is_floating_point() else t for t in x))


TIMES = 10
"""A race need not show the first time."""


def in_place(name: str, device: torch.device, sizes: Sizes) -> Iterator[Verdict]:
    """Compare coefficients over their products with those elsewhere, often, to the bit."""
    dtype, n = getattr(torch, name), sizes.tokens[0]
    rows = torch.arange(min(n, 64), device=device)
    for v in sizes.slabs:
        generator = torch.Generator(device).manual_seed(0)
        products = torch.empty(n, v, device=device).normal_(std=4, generator=generator)
        labels = torch.randint(v, (n,), generator=generator, device=device)
        elsewhere = written(products, labels, dtype, apart=True)
        moved = Counter[str]()
        for _ in range(TIMES):
            for output, value in written(products, labels, dtype).items():
                moved[output] += not torch.equal(value, elsewhere[output])
        case = f"in place {name} {n}x{v}"
        if moved.total():
            said = ", ".join(
                f"{output} {count} of {TIMES} times" for output, count in moved.items()
            )
            yield case, {"status": "wrong", "why": f"other bits than elsewhere: {said}"}
            continue

        def dense(wide: torch.dtype, p: Tensor = products, y: Tensor = labels) -> Outputs:
            log_p = p[rows].to(wide).log_softmax(1)
            c = less_label(log_p, y[rows]).neg_()
            c = c if wide == torch.float64 else c.to(dtype)  # rounded once, as the kernel does
            logps = log_p.gather(1, y[rows, None]).squeeze(1)
            return {"logps": logps, "epilogue": c, "kept": c}

        mine = {output: value[rows] for output, value in elsewhere.items()}
        yield case, verdict(mine, mine, dense(torch.float64), dense(torch.float32))


def written(products: Tensor, labels: Tensor, dtype: torch.dtype, apart: bool = False) -> Outputs:
    """Return statistics and C by both kernels that write it, over copies or `apart`."""
    from fastpo.kernels.kept_coefficients import kept_coefficients
    from fastpo.kernels.logits_epilogue import logits_epilogue, over

    def place() -> tuple[Tensor, Tensor]:
        slab = products if apart else products.clone()
        return slab, torch.empty_like(slab, dtype=dtype) if apart else over(slab, dtype)

    slab, out = place()
    want = ("logps", "lse", "lse_rest")
    stats, c = logits_epilogue(slab, labels, want=want, coefficient_of="logps", out=out)
    assert c is not None
    slab, out = place()
    given: dict[str, Any] = {**stats, "grad_logps": torch.ones_like(stats["logps"])}
    kept = kept_coefficients(
        slab, labels, v_start=0, vocab_size=products.shape[1], out=out, **given
    )
    return {"logps": stats["logps"], "epilogue": c, "kept": kept}


def products(name: str, device: torch.device, sizes: Sizes) -> Iterator[Verdict]:
    """Multiply in half precision into fp32, put or added, as the head's gradients are."""
    from fastpo.head.types import put_matmul_

    dtype, v = getattr(torch, name), sizes.vocabularies[-1]
    for (m, k, n), add in itertools.product(
        ((sizes.tokens[0], v, sizes.widths[0]), (v, sizes.tokens[0], sizes.widths[-1])),
        (False, True),
    ):
        generator = torch.Generator(device).manual_seed(0)
        a, b, sums = (
            torch.empty(size, device=device).normal_(generator=generator)
            for size in ((m, k), (k, n), (m, n))
        )
        a, b = a.to(dtype), b.to(dtype)

        def run(a: Tensor = a, b: Tensor = b, sums: Tensor = sums, add: bool = add) -> Outputs:
            return {"sum": put_matmul_(sums.clone(), a, b, add=add)}

        wide = a.double() @ b.double() + (sums if add else 0.0)
        plain = a.float() @ b.float() + (sums if add else 0.0)
        # Tensor cores cut a sum of k terms off at every step, in the same direction.
        found = verdict(run(), run(), {"sum": wide}, {"sum": plain}, {"sum": float(k)})
        yield f"product {name} {m}x{k}x{n}{', added' if add else ''}", found


def run_frozen(backend: Any, x: Inputs, mib: float) -> Outputs:
    """Return log-probs and the gradient to the hidden states."""
    leaf = x.hidden.detach().requires_grad_()
    logps = fastpo.linear_logps(leaf, x.weight, x.labels, backend=backend, workspace_mib=mib)
    (grad,) = torch.autograd.grad(logps, leaf, x.cotangents.to(logps))
    return {"logps": logps.detach(), "grad_hidden": grad}


def frozen_mib(n: int, v: int) -> float:
    """Return a workspace of three blocks of rows, the last one shorter."""
    return n * v * 4 / 2.5 / 2**20


def kept_mib(n: int, v: int) -> float:
    """Return a workspace that holds the products of n tokens."""
    return n * v * 4.01 / 2**20


def run_twice(backend: Any, x: Inputs, mib: float, walks: int = 2) -> Outputs:
    """Return log-probs of a trained head and its gradients, as often as the graph is walked."""
    leaves = hidden, weight = [t.detach().requires_grad_() for t in (x.hidden, x.weight)]
    logps = fastpo.linear_logps(hidden, weight, x.labels, backend=backend, workspace_mib=mib)
    found = {"logps": logps.detach()}
    for walk in range(walks):
        more = walk + 1 < walks
        grads = torch.autograd.grad(logps, leaves, x.cotangents.to(logps), retain_graph=more)
        found |= {f"{what} {walk}": g for what, g in zip(("dH", "dW"), grads, strict=True)}
    return found


def heads(name: str, device: torch.device, sizes: Sizes) -> Iterator[Verdict]:
    """Check the head by kernels: frozen at every size, then trained late by rows, and kept."""
    dtype = getattr(torch, name)

    def case(what: str, run: Callable[..., Outputs], x: Inputs, mib: float) -> Verdict:
        ours, again = run("triton", x, mib), run("triton", x, mib)
        size = "x".join(map(str, (*x.hidden.shape, len(x.weight))))
        found = verdict(ours, again, run("torch", _wide(x), mib), run("torch", x, mib))
        return f"{what} {name} {size}", found

    for n, d, v in itertools.product(sizes.tokens, sizes.widths, sizes.vocabularies):
        x = make_inputs((n, d, v), dtype, device)
        yield case("head", run_frozen, x, frozen_mib(n, v))
    n, d = sizes.tokens[0], sizes.widths[0]
    for v in sizes.vocabularies:
        x = make_inputs((n, d, v), dtype, device)
        yield case("late by rows", partial(run_twice, walks=1), x, sizes.thin)
        # The second walk finds its products spent, and forms them again.
        yield case("kept, walked twice", run_twice, x, kept_mib(n, v))


class Batch(NamedTuple):
    """Hold groups of responses of equal length, a few of whose tokens are not scored."""

    x: Inputs
    labels: Tensor  # [N]
    segments: Segments
    ref_logps: Tensor  # [N]


def make_batch(
    objective: str, name: str, sizes: Sizes, device: torch.device, shape: tuple[int, int]
) -> Batch:
    """Make groups of single responses for `kto`, of four for `lipo`, otherwise of pairs.

    Args:
        shape: (D, V).
    """
    groups, length, dtype = sizes.groups, sizes.response, getattr(torch, name)
    candidates = {"kto": 1, "lipo": 4}.get(objective, 2)
    responses = groups * candidates
    x = make_inputs((responses * length, *shape), dtype, device)
    labels = x.labels.clone()
    labels.view(responses, length)[:, 0] = -100
    desirable = torch.arange(candidates, device=device).expand(groups, candidates) == 0
    extras = {}
    if objective == "kto":
        desirable = torch.arange(groups, device=device)[:, None] % 2 == 0
        extras = {"mismatched": torch.arange(groups, device=device).roll(1)}
    generator = torch.Generator(device).manual_seed(1)
    segments = Segments(
        response=torch.arange(responses, device=device).repeat_interleave(length),
        grid=torch.arange(responses, device=device).view(groups, candidates),
        label=desirable,
        num_responses=responses,
        score=torch.rand(groups, candidates, generator=generator, device=device),
        extras=extras,
    )
    noise = torch.randn(len(labels), generator=generator, device=device)
    with torch.no_grad():
        logps = fastpo.linear_logps(x.hidden.float(), x.weight.float(), labels, backend="torch")
    return Batch(x, labels, segments, (logps + 0.1 * noise).where(labels >= 0, 0.0))


def run_loss(
    objective: str, batch: Batch, backend: Any, trained: bool, mib: float, dtype: torch.dtype
) -> Outputs:
    """Return loss and gradients of one call."""
    hidden = batch.x.hidden.detach().to(dtype).requires_grad_()
    weight = batch.x.weight.detach().to(dtype).requires_grad_(trained)
    loss = PreferenceLoss(LOSSES[objective])
    given: dict[str, Any] = {"ref_logps": batch.ref_logps} if loss.needs_reference else {}
    if loss.needs_kl:
        given = {"ref_hidden": batch.x.ref_hidden.to(dtype), "ref_weight": weight.detach()}
    out = loss(
        hidden,
        batch.labels,
        batch.segments,
        weight=weight,
        backend=backend,
        workspace_mib=mib,
        **given,
    )
    out.loss.backward()
    outputs = {"loss": out.loss.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    return {name: value for name, value in outputs.items() if value is not None}


def schedule_mib(schedule: str, objective: str, batch: Batch, sizes: Sizes) -> float:
    """Return a workspace that makes it the schedule."""
    tokens = sizes.response * batch.segments.grid.shape[1]
    heads = 2 if objective == "kl" else 1
    return heads * SCHEDULES[schedule] * tokens * len(batch.x.weight) * 4 / 2**20


def losses(name: str, device: torch.device, sizes: Sizes) -> Iterator[Verdict]:
    """Check a preference loss by kernels, next to the same loss by plain PyTorch."""
    shape = sizes.widths[0], sizes.vocabularies[-1]
    for kind in dict.fromkeys((sizes.dtypes[0], sizes.dtypes[-1])):
        dtype = getattr(torch, kind)
        batch = make_batch(name, kind, sizes, device, shape)
        # A sum of log-probs is rounded as what cancels in the margin is.
        nats = batch.ref_logps.double().abs().sum().item() / batch.segments.num_responses
        # Interpreted, a schedule takes seconds: one objective has them all.
        brief = sizes is TOY and name != "dpo"
        for schedule in SCHEDULES:
            if brief and schedule != "by groups":
                continue
            mib = schedule_mib(schedule, name, batch, sizes)
            run = partial(run_loss, name, batch, trained=schedule != "frozen", mib=mib)
            ours, again = (run(backend="triton", dtype=dtype) for _ in range(2))
            plain = run(backend="torch", dtype=dtype)
            truth = run(backend="torch", dtype=torch.float64)
            # A gradient carries the margin's rounding too: beta times it, as a share of itself.
            terms = {k: 0.1 * nats * v.abs().max().item() for k, v in truth.items()} | {
                "loss": nats
            }
            yield f"{name} {schedule} {kind}", verdict(ours, again, truth, plain, terms)


def kernel_results(kernel: str, x: Inputs, dtype: torch.dtype | None) -> Outputs:
    """Return one kernel's outputs; with a dtype those of its plain PyTorch reference."""
    from fastpo.kernels import linear_coefficients as c
    from fastpo.kernels import linear_stats as s
    from fastpo.kernels import logits_epilogue as e

    want = ("logps", "lse", "lse_rest", "entropy")
    given = (x.hidden, x.weight, x.labels)
    wide = given if dtype is None else (x.hidden.to(dtype), x.weight.to(dtype), x.labels)
    if kernel == "linear_stats":
        call = s.linear_stats if dtype is None else s.linear_stats_reference
        return {k: v for k, v in call(*wide, want=want).items() if k != "lse_rest"}
    if kernel == "logits_epilogue":
        products = x.hidden.float() @ x.weight.float().T
        call = e.logits_epilogue if dtype is None else e.logits_epilogue_reference
        raw = products if dtype is None else products.to(dtype)
        found, coefficients = call(raw, x.labels, want=want, coefficient_of="logps")
        assert coefficients is not None
        return {k: v for k, v in found.items() if k != "lse_rest"} | {"c": coefficients}
    if dtype is None:
        stats: dict[str, Any] = s.linear_stats(*given, want=want)
        coefficients = c.linear_coefficients(
            *given, v_start=0, vocab_size=len(x.weight), grad_logps=x.cotangents, **stats
        )
    else:
        cotangents = x.cotangents.to(torch.promote_types(x.cotangents.dtype, dtype))
        coefficients = c.linear_coefficients_reference(*wide, logps=cotangents)
        if dtype != torch.float64:
            coefficients = coefficients.to(x.hidden.dtype)  # rounded once, as the kernel does
    return {"c": coefficients}


def kernels(kernel: str, name: str, device: torch.device, sizes: Sizes) -> Iterator[Verdict]:
    """Check one kernel by itself, at every combination of sizes."""
    for n, d, v in itertools.product(sizes.tokens, sizes.widths, sizes.vocabularies):
        x = make_inputs((n, d, v), getattr(torch, name), device)
        ours, again = kernel_results(kernel, x, None), kernel_results(kernel, x, None)
        plain, truth = (kernel_results(kernel, x, dt) for dt in (torch.float32, torch.float64))
        terms = {"entropy": torch.tensor(float(v)).log().item()}
        terms |= {name: value.abs().max().item() for name, value in truth.items() if name == "lse"}
        terms["logps"] = terms.get("lse", 0.0)
        yield f"{kernel} {name} {n}x{d}x{v}", verdict(ours, again, truth, plain, terms)


def make_trainer(
    model: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    folder: str,
    *,
    attention: Any = "auto",
    prompt: int = 65,
    response: int = 33,
    callbacks: Sequence[Any] = (),
    steps: int = 1,
) -> Any:
    """Make a trainer of SimPO steps over two groups that share their prompts."""
    import numpy as np
    from transformers import AutoConfig

    from fastpo.data.groups import Group, Response
    from fastpo.model.random_init import byte_tokenizer, random_model
    from fastpo.train.config import PreferenceConfig
    from fastpo.train.trainer import PreferenceTrainer

    torch.manual_seed(0)
    # The same rounded weights for every dtype of the computation.
    policy: Any = random_model(
        AutoConfig.for_model(**model),
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        device=device,
    ).to(dtype)
    rng = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return rng.integers(0, model["vocab_size"], count).astype(np.int32)

    def answer(slot: int) -> Response:
        size = response + 3 * slot
        return Response(ids(size), np.ones(size, dtype=bool), label=slot == 0, rank=slot)

    data = [Group(ids(prompt + row), [answer(0), answer(1)], row=row) for row in range(2)]
    args = PreferenceConfig(
        output_dir=folder,
        objective="simpo",
        attention_backend=attention,
        per_device_train_batch_size=len(data),
        max_steps=steps,
        max_grad_norm=0.0,  # clipping would hide a wrong scale
        logging_steps=1,
        save_strategy="no",
        use_cpu=device.type == "cpu",
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        self_check=False,
        dataloader_pin_memory=False,
    )
    return PreferenceTrainer(
        policy,
        args,
        train_dataset=data,
        processing_class=byte_tokenizer(policy.config),
        callbacks=list(callbacks),
    )


def _trained(model: Any, device: torch.device, dtype: torch.dtype, attention: str) -> Outputs:
    """Return loss and gradient of a trainer's only step."""
    from transformers import TrainerCallback

    found: dict[str, Tensor] = {}

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model: Any = None, **more) -> None:
            found["gradient"] = torch.cat([p.grad.detach().flatten() for p in model.parameters()])

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model, device, dtype, folder, attention=attention, callbacks=[Gradient()]
        )
        trainer.train()
        record = trainer.state.log_history[0]
    return {"loss": torch.tensor(record["loss"], dtype=torch.float32), **found}


def attention(name: str, device: torch.device, sizes: Sizes) -> Iterator[Verdict]:
    """Check a training step by one attention back end, next to dense segments in float64."""
    from fastpo.model.attention.dispatch import choose_attention

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = sizes.model["hidden_size"] // sizes.model["num_attention_heads"]
    case = f"step {name}"
    try:
        choose_attention(name, device=device, dtype=dtype, width=width)
    except ValueError as why:
        yield case, {"status": "skipped", "why": str(why)}
        return
    ours, again = (_trained(sizes.model, device, dtype, name) for _ in range(2))
    plain = ours if name == "segments" else _trained(sizes.model, device, dtype, "segments")
    truth = _trained(sizes.model, device, torch.float64, "segments")
    found = verdict(ours, again, truth, plain)
    if "other bits" in (found.get("why") or "") and name in ("varlen", "merge", "flex"):
        # A flash backward adds dQ in any order: the library's choice, not ours.
        errors, why = check(ours, truth, plain)
        note = {
            "note": "bits differ between runs",
            "errors": {k: errors[k]["relative"] for k in errors},
        }
        found = {"status": "wrong", "why": why, **note} if why else {"status": "ok", **note}
    yield case, found


def chunks(sizes: Sizes) -> dict[str, Checks]:
    """Return name -> checks, the ones that no interpreter can vouch for first."""
    found: dict[str, Checks] = {f"in place {dt}": partial(in_place, dt) for dt in sizes.dtypes}
    found |= {f"head {dt}": partial(heads, dt) for dt in sizes.dtypes}
    found |= {f"products {dt}": partial(products, dt) for dt in sizes.dtypes}
    found |= {f"loss {name}": partial(losses, name) for name in LOSSES}
    for kernel in KERNELS:
        found |= {f"{kernel} {dt}": partial(kernels, kernel, dt) for dt in sizes.dtypes}
    for name in ("segments", "varlen", "merge", "flex"):
        found[f"attention {name}"] = partial(attention, name)
    return found


def run_chunk(name: str, device: torch.device) -> Iterator[Verdict]:
    """Run the cases of a chunk; an exception is its last one."""
    sizes = TOY if device.type == "cpu" else FULL
    try:
        yield from chunks(sizes)[name](device, sizes)
    except Exception as error:  # the next chunk may still be right
        why = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
        yield f"{name}: stopped", {"status": "failed", "why": why}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one chunk, a line of JSON a case."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.right", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("chunk", choices=chunks(FULL))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type != "cpu":
        find_packed_kernels()
    for case, found in run_chunk(options.chunk, device):
        print(json.dumps([case, found]), flush=True)


if __name__ == "__main__":
    main()
