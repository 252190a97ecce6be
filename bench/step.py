"""How long is a training step, and how much memory does it take?

    python -m bench.step                      # the CPU grid
    python -m bench.step --grid gpu
    python -m bench.step --quick              # seconds; nothing is kept
    python -m bench.step --page docs/benchmarks.md   # measure what is missing, write the section

One DPO step of one prompt with K responses, all weights trained, every layer checkpointed,
reference log-probs given: `training_step` of a trainer, then AdamW.

`fastpo`, and `unshared`, the same with a row for each response. `TRL`, its DPOTrainer: a list of K
is K - 1 pairs in one batch, each with its own copy of the chosen response, since it knows no K > 2.
`TRL, compacted`, its head on the responses' rows alone, as on a GPU; on a CPU TRL itself scores
every position, prompts included.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig

from bench.contenders import BETA, OURS, _require
from bench.harness import (
    GATE,
    PACKAGES,
    RESULTS,
    Outputs,
    Record,
    check,
    device_slug,
    interleaved,
    memory_in_fresh_process,
    peak_extra_bytes,
    summary,
    write_section,
)
from fastpo.data.groups import Group, Response
from fastpo.data.packing import collate
from fastpo.model.random_init import byte_tokenizer, random_model
from fastpo.optional import require_transformers
from fastpo.train.config import PreferenceConfig
from fastpo.train.trainer import PreferenceTrainer

_SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
}
# The shape of Llama-3.2-1B.
_LARGE: dict[str, Any] = {
    **_SMALL,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_TINY = {**_SMALL, "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
_SIZES = (2, 3, 8)
GRIDS: dict[str, tuple[dict[str, Any], str, list[tuple[int, int, int]]]] = {
    "cpu": (
        _SMALL,
        "float32",
        [(p, r, k) for p, r in ((2048, 128), (256, 256), (2048, 256)) for k in _SIZES],
    ),
    "gpu": (
        _LARGE,
        "bfloat16",
        [
            (p, r, k)
            for p, r in ((2048, 128), (8192, 512), (32768, 512), (256, 256), (2048, 256))
            for k in _SIZES
        ],
    ),
    "quick": (_TINY, "float32", [(48, 8, 2), (48, 8, 3)]),
}
"""name -> (model, dtype, its cases (prompt, response, K))"""

COMPACTED = "TRL, compacted"

_TRUTH_SCORES = 1 << 27
"""Elements of one block of attention scores of the truth: 1 GiB of float64.

No fused kernel takes float64, so at prompt 32768 SDPA makes [32, 33280, 33280], 283 GB, several
times over. A block of 126 queries is 1 GiB and its backward holds four such; beside it stand 12 GB
of weights, 12 of gradients, 9 of checkpoints and 13 of one layer's MLP: 50 GB in all.
"""


class Step:
    """Hold a trainer with one batch: a call is a training step whose learning rate is 0.

    Args:
        trainer: of transformers' kind; its model is trained.
        inputs: of `training_step`.
        counts: of the whole optimiser step, as the trainer wants them.
        pairs: number of pairs that the loss is the sum of; 1: it is a mean.
        around: a context to run in.
    """

    def __init__(
        self,
        trainer: Any,
        inputs: Any,
        counts: Any = None,
        pairs: int = 1,
        around: Callable[[], Any] = nullcontext,
    ) -> None:
        self.trainer, self.model = trainer, trainer.model
        self.inputs, self.counts, self.pairs, self.around = inputs, counts, pairs, around
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def outputs(self) -> Outputs:
        """Return loss and gradient of the mean over pairs; no optimiser step."""
        with self.around():
            loss = self.trainer.training_step(self.model, self.inputs, self.counts)
        found = {"loss": loss.detach() / self.pairs, "gradient": _gradient(self.model) / self.pairs}
        self.optimizer.zero_grad()
        return found

    def __call__(self) -> None:
        with self.around():
            self.trainer.training_step(self.model, self.inputs, self.counts)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def make_model(model: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Make random weights, the same at every call; every layer checkpointed."""
    torch.manual_seed(0)
    found: Any = random_model(AutoConfig.for_model(**model), dtype=dtype, device=device)
    found.activation_checkpointing_enable()
    return found.train()


def make_group(key: dict[str, Any], vocabulary: int) -> tuple[Group, np.ndarray]:
    """Make random tokens, the first response preferred; reference log-probs near -log V, [K R]."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    length, count = key["response"], key["candidates"]
    responses = [
        Response(ids(length), np.ones(length, dtype=bool), label=not i, rank=i, score=float(not i))
        for i in range(count)
    ]
    ref = -math.log(vocabulary) + 0.3 * rng.standard_normal(count * length)
    return Group(ids(key["prompt"]), responses, row=0), ref.astype(np.float32)


def fastpo_step(key: dict[str, Any], device: torch.device, shared: bool = True) -> Step:
    """Make our step: `dpo` of a pair, `pair_logistic` of a longer list, which sums its pairs."""
    model = make_model(key["model"], getattr(torch, key["dtype"]), device)
    group, ref = make_group(key, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceConfig(
            output_dir=folder,
            objective="dpo" if key["candidates"] == 2 else "pair_logistic",
            beta=BETA,
            reference="store",
            share_prompt="true" if shared else "false",
            use_cpu=device.type == "cpu",
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PreferenceTrainer(
            model,
            args,
            train_dataset=[group],
            processing_class=byte_tokenizer(model.config),
        )
    batch = collate([group], share_prompt=shared, pad_token_id=0, ref_logps=[ref])
    (rows,), counts = trainer.get_batch_samples(iter([batch]), 1, device)
    return Step(trainer, rows, counts, pairs=key["candidates"] - 1)


def trl_step(key: dict[str, Any], device: torch.device, compacted: bool = False) -> Step:
    """Make TRL's DPOTrainer step on K - 1 pairs."""
    _require("trl", "trl")
    _require("datasets", "datasets")
    import trl
    from datasets import Dataset

    model = make_model(key["model"], getattr(torch, key["dtype"]), device)
    group, ref = make_group(key, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            output_dir=folder,
            beta=BETA,
            precompute_ref_log_probs=True,
            max_length=None,
            use_cpu=device.type == "cpu",
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        )
        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = trl.DPOTrainer(
            model, args=args, train_dataset=text, processing_class=byte_tokenizer(model.config)
        )
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it
    sums = ref.reshape(key["candidates"], -1).sum(1, dtype=np.float64).tolist()
    chosen, *others = (response.input_ids.tolist() for response in group.responses)
    examples = [
        {
            "prompt_ids": group.prompt_ids.tolist(),
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "ref_chosen_logps": sums[0],
            "ref_rejected_logps": total,
        }
        for rejected, total in zip(others, sums[1:], strict=True)
    ]

    def compact() -> Any:
        return mock.patch("trl.trainer.utils._use_triton", return_value=True)

    return Step(
        trainer, trainer.data_collator(examples), around=compact if compacted else nullcontext
    )


def causal_in_blocks(
    module: Any,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,  # [1, Hk, T, Dv]
    attention_mask: None,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention [1, T, H, Dv] by its definition, a block of queries at a time.

    A block's scores have `_TRUTH_SCORES` elements at most, and backward forms them again.
    """
    _, heads, length, width = query.shape
    groups = heads // key.shape[1]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = q.shape[2], k.shape[2]
        scores = (q * scaling).reshape(1, -1, groups * rows, width) @ k.mT
        later = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
        later = later.triu(columns - rows + 1).repeat(groups, 1)
        out = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return out.view(1, heads, rows, -1).transpose(1, 2)

    size = max(1, _TRUTH_SCORES // (heads * length))
    blocks = [(first, min(first + size, length)) for first in range(0, length, size)]
    outputs = [
        checkpoint(
            block, query[:, :, a:b], key[:, :, :b], value[:, :, :b],
            use_reentrant=False, preserve_rng_state=False,
        )
        for a, b in blocks
    ]  # fmt: skip
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("causal_in_blocks", causal_in_blocks)


def by_hand(
    key: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[Outputs, dict[str, float]]:
    r"""Return (loss and gradient in `dtype` by plain PyTorch, one sequence at a time; their terms).

    The margin is a difference of sums s of hundreds of nats, so that rounding them moves the loss
    by $\beta |s| \epsilon$ and the gradient by as large a share of itself.
    """
    model = make_model(key["model"], getattr(torch, key["dtype"]), device).to(dtype)
    if dtype == torch.float64:
        model.set_attn_implementation("causal_in_blocks")
    group, ref = make_group(key, model.config.vocab_size)
    prompt = torch.from_numpy(group.prompt_ids)
    start = len(prompt) - 1

    def logps(response: Response) -> Tensor:
        tokens = torch.from_numpy(response.input_ids)
        ids = torch.cat([prompt, tokens]).long().to(device)
        hidden = model.model(ids[None], use_cache=False).last_hidden_state[0, start:-1]
        exact = torch.promote_types(dtype, torch.float32)
        logits = model.lm_head(hidden).to(exact).log_softmax(-1)
        return logits.gather(1, ids[start + 1 :, None]).sum()

    sums = torch.from_numpy(ref).double().view(key["candidates"], -1).sum(1).to(device)
    with torch.no_grad():
        found = torch.stack([logps(response) for response in group.responses])
    leaf = (found.double() - sums).requires_grad_()
    loss = -F.logsigmoid(BETA * (leaf[0] - leaf[1:])).mean()
    loss.backward()
    assert leaf.grad is not None
    for response, weight in zip(group.responses, leaf.grad, strict=True):
        (weight * logps(response)).backward()
    gradient, terms = _gradient(model), BETA * found.abs().max().item()
    return (
        {"loss": loss.detach(), "gradient": gradient},
        {"loss": terms, "gradient": terms * gradient.abs().max().item()},
    )


CONTENDERS: dict[str, Callable[[dict[str, Any], torch.device], Step]] = {
    OURS: fastpo_step,
    "unshared": lambda key, device: fastpo_step(key, device, shared=False),
    "TRL": trl_step,
    COMPACTED: lambda key, device: trl_step(key, device, compacted=True),
}


def _reason(error: Exception) -> str:
    """Say why something failed, on one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def measure(
    key: dict[str, Any], device: torch.device, options: argparse.Namespace, progress: tqdm
) -> dict[str, Any]:
    """Measure one case: gate, time and memory of everyone who can run it."""
    what = f"{key['prompt']}/{key['response']}, K = {key['candidates']}"
    builders = {
        name: build
        for name, build in CONTENDERS.items()
        if name not in options.without and (name != COMPACTED or device.type != "cuda")
    }
    progress.set_postfix_str(f"{what}: truth")
    try:
        truth, terms = by_hand(key, torch.float64, device)
        plain, _ = by_hand(key, getattr(torch, key["dtype"]), device)
    except Exception as error:  # the other cases may have a truth
        reason = f"no truth: {_reason(error)}"
        return {"contenders": {name: {"status": "failed", "reason": reason} for name in builders}}
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Step] = {}
    for name, build in builders.items():
        progress.set_postfix_str(f"{what}, {name}: gate")
        try:
            step = build(key, device)
            errors, rejected = check(step.outputs(), truth, plain, terms)
        except Exception as error:  # and the other contenders may run
            found[name] = {"status": "failed", "reason": _reason(error)}
            continue
        found[name] = {"status": "rejected" if rejected else "ok", "errors": errors}
        if rejected:
            found[name]["reason"] = rejected
        else:
            runs[name] = step
    del truth, plain
    progress.set_postfix_str(f"{what}: timing")
    seconds = interleaved(runs, options.rounds, device) if runs else {}
    distinct = key["prompt"] + key["candidates"] * key["response"]
    for name, times in seconds.items():
        found[name]["seconds"] = summary(times)
        if OURS in seconds:
            ratios = [t / ours for t, ours in zip(times, seconds[OURS], strict=True)]
            found[name]["times_ours"] = summary(ratios)
        found[name]["tokens_per_second"] = round(distinct / found[name]["seconds"]["median"], 1)
        if options.memory:
            progress.set_postfix_str(f"{what}, {name}: memory")
            found[name]["peak_extra_bytes"] = (
                memory_in_fresh_process("bench.step", name, key, options.threads)
                if device.type == "cpu"
                else peak_extra_bytes(runs[name], device)
            )
    return {"contenders": found}


def table(cases: Sequence[dict]) -> str:
    """Return every contender of every case as one row of Markdown."""
    lines = [
        "| prompt | response | K | contender | median s | quartiles | tokens/s | x ours | peak MiB "
        "| relative error: loss, gradient |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        key = case["key"]
        row = f"| {key['prompt']} | {key['response']} | {key['candidates']} |"
        for name, c in case["contenders"].items():
            if "seconds" not in c:
                lines.append(f"{row} {name} | {c['status']}: {c['reason']} | | | | | |")
                continue
            t = c["seconds"]
            memory = f"{c['peak_extra_bytes'] / 2**20:.0f}" if "peak_extra_bytes" in c else ""
            ratio = f"{c['times_ours']['median']:.2f}" if "times_ours" in c else ""
            errors = ", ".join(f"{e['relative']:.1e}" for e in c["errors"].values())
            title = f"**{name}**" if name == OURS else name
            if name.startswith("TRL") and key["candidates"] > 2:
                title += f", {key['candidates'] - 1} pairs"
            lines.append(
                f"{row} {title} | {t['median']:.3g} | {t['q25']:.3g}-{t['q75']:.3g} "
                f"| {c['tokens_per_second']:.0f} | {ratio} | {memory} "
                f"| {errors} |"
            )
    return "\n".join(lines)


def section(data: dict, cases: Sequence[dict]) -> str:
    """Return the part of a Markdown page with the method and the table of a record."""
    stamp, method = data["environment"], data["method"]
    versions = ", ".join(f"{name} {stamp[name] or 'absent'}" for name in PACKAGES[:4])
    shape = ", ".join(f"{name} {size}" for name, size in cases[0]["key"]["model"].items())
    loads = sorted({f"{case['load_average']:g}" for case in cases}, key=float)
    return f"""## The training step

![Tokens a second](figures/step-{stamp["slug"]}.png)

`python -m bench.step --page FILE.md` rewrites this section from
`bench/{RESULTS.name}/{stamp["slug"]}/step.json`. Device: {stamp["device"]}, {stamp["threads"]} \
threads, load {"-".join(dict.fromkeys((loads[0], loads[-1])))}; {versions}.

- One call: {method["call"]}
- Contenders: {method["contenders"]}
- Model: random weights, {cases[0]["key"]["dtype"]}; {shape}.
- Gate: {method["gate"]}; who fails it gets no speed.
- Time: {method["rounds"]} rounds, everyone once a round in rotating order; `x ours` is the median
  over rounds of the time next to fastpo's in the same round. Tokens a second count every distinct
  token once, P + K R of them, whatever a contender runs.
- `peak MiB` is the most memory alive during a step beyond what was there before it, gradients
  included, each contender in a process of its own.

{table(cases)}
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--grid", choices=GRIDS, default="gpu" if on_gpu else "cpu")
    parser.add_argument("--case", action="append", metavar="P,R,K", help="these of the grid only")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--memory", action=flag, default=True, help="measure peak memory")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no memory")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run measured")
    parser.add_argument("--out", type=Path, help="JSON; bench/results/DEVICE/step.json by default")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="also write the section there")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if OURS in options.without:
        parser.error(f"{OURS!r} is what everyone is compared with: it cannot be left out")
    if options.quick:
        options.grid, options.rounds, options.fresh, options.memory = "quick", 3, True, False
        options.out = options.out or Path("runs/step-quick.json")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the table."""
    options = parse(arguments)
    require_transformers("bench.step")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.memory_of:
        key = json.loads(options.memory_of)
        print(peak_extra_bytes(CONTENDERS[key.pop("name")](key, device), device))
        return
    model, dtype, shapes = GRIDS[options.grid]
    keys = [
        {"model": model, "dtype": dtype, "prompt": p, "response": r, "candidates": k}
        for p, r, k in shapes
        if not options.case or f"{p},{r},{k}" in options.case
    ]
    call, who = (" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[-2:])
    method = {
        "call": call,
        "contenders": who,
        "gate": f"error <= {GATE} * (error of plain PyTorch in the same dtype + eps * scale), the "
        "scale of a loss being that of the sums whose difference its margin is",
        "rounds": options.rounds,
    }
    path = options.out or RESULTS / device_slug(device) / "step.json"
    record = Record(path, device, method, options.fresh)
    with tqdm(record.missing(keys), disable=None) as progress:
        for key in progress:
            record.add(key, **measure(key, device, options, progress))
    cases = [case for case in record.data["cases"] if case["key"] in keys]
    print(table(cases))
    print(f"\n{path}")
    if options.page is not None:
        write_section(options.page, "step", section(record.data, record.data["cases"]))


if __name__ == "__main__":
    main()
