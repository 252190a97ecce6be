"""How exact is the head when the model is sure of the next token?

    python -m bench.numerics                         # fp32 and bf16, every contender
    python -m bench.numerics --page docs/head.md     # measure what is missing, rewrite the section
    python -m bench.numerics --quick                 # seconds; nothing is kept

Label probabilities from .5 to .9999: a log-prob near zero and a gradient `onehot - p` near zero are
differences of numbers near one, and each implementation loses its own share of their digits. Errors
are the largest over all elements against float64 on the same rounded inputs, over the largest
magnitude of the truth. Whoever is wrong is listed with the error; nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.contenders import OURS, STEPS, TOKEN_OPS, Unavailable
from bench.harness import PACKAGES, RESULTS, Outputs, Record, device_slug, write_section
from bench.head import Inputs, bind, by_hand, make_inputs

P_LABEL = (0.5, 0.9, 0.99, 0.999, 0.9999)
DTYPES = ("float32", "bfloat16")
SHAPE, QUICK = (128, 256, 16384), (32, 32, 512)
TASKS = {"logps": TOKEN_OPS, "dpo": STEPS}
TITLES = {
    "logps": "Log-probs, arbitrary cotangents",
    "dpo": "DPO step of four pairs (Liger has no differentiable log-probs)",
}
ROUNDED = "float64, rounded"


def peaked(
    shape: tuple[int, int, int], p: float, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """`bench.head`'s inputs with every label moved to probability `p`; inputs are then rounded."""
    x = make_inputs(shape, torch.float32, device)
    weight, labels = x.weight.double(), x.labels[:, None]
    rows = weight[x.labels]
    hidden = x.hidden.double()
    wanted = torch.tensor(p, dtype=torch.float64).logit()
    # Along the label's row, which other logits hardly see: rows are nearly orthogonal. What they do
    # see shrinks by about sqrt(D) a step.
    for _ in range(4):
        logits = hidden @ weight.T
        others = logits.scatter(1, labels, -torch.inf).logsumexp(1, keepdim=True)
        missing = wanted + others - logits.gather(1, labels)
        hidden += missing * rows / rows.square().sum(1, keepdim=True)
    ref = hidden + (x.ref_hidden - x.hidden)
    return Inputs(hidden.to(dtype), weight.to(dtype), x.labels, ref.to(dtype), x.cotangents)


def relative(outputs: Outputs, truth: Outputs) -> dict[str, float]:
    """Return the largest error of each output over the truth's magnitude; NaN counts as inf."""
    return {
        name: (
            (outputs[name].to(true) - true).abs().nan_to_num(nan=torch.inf).max() / true.abs().max()
        ).item()
        for name, true in truth.items()
    }


def measure(key: dict[str, Any], device: torch.device, without: Sequence[str]) -> dict[str, Any]:
    """Return the errors of everyone in one case."""
    dtype = getattr(torch, key["dtype"])
    inputs = peaked(tuple(key["shape"]), key["p"], dtype, device)
    truth, p_label = by_hand(inputs, key["task"], "trained", torch.float64)
    kept = {name: true if name == "value" else true.to(dtype) for name, true in truth.items()}
    kept["value"] = kept["value"].float()
    errors: dict[str, Any] = {ROUNDED: relative(kept, truth)}
    for name in TASKS[key["task"]]:
        if name in without:
            errors[name] = "skipped: --without"
            continue
        try:
            errors[name] = relative(bind(name, key["task"], "trained", inputs)(), truth)
        except (Unavailable, NotImplementedError, RuntimeError) as why:
            errors[name] = f"failed: {str(why).splitlines()[0]}"
    quantiles = p_label.double().quantile(torch.tensor([0.0, 0.5, 1.0], device=device).double())
    return {"p_label": quantiles.tolist(), "errors": errors}


def tables(cases: Sequence[dict]) -> str:
    """Return a Markdown table for each task and dtype: who by p_y, `value / dH / dW`."""
    lines = []
    for task, dtype in dict.fromkeys((c["key"]["task"], c["key"]["dtype"]) for c in cases):
        mine = [c for c in cases if (c["key"]["task"], c["key"]["dtype"]) == (task, dtype)]
        heads = "".join(f" p {c['key']['p']:g} |" for c in mine)
        lines += [f"\n{TITLES[task]}, {dtype}\n", f"| value / dH / dW |{heads}"]
        lines.append("|---|" + "---|" * len(mine))
        for name in mine[0]["errors"]:
            found = [c["errors"][name] for c in mine]
            cells = [
                e if isinstance(e, str) else " / ".join(f"{x:.1e}" for x in e.values())
                for e in found
            ]
            title = f"**{name}**" if name == OURS else name
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(data: dict, cases: Sequence[dict]) -> str:
    """Return the section of docs/head.md."""
    stamp = data["environment"]
    versions = ", ".join(f"{name} {stamp[name] or 'absent'}" for name in PACKAGES)
    n, d, v = cases[0]["key"]["shape"]
    return f"""## How exact it is where the model is sure

`python -m bench.numerics --page docs/head.md` rewrites this section from
`bench/{RESULTS.name}/{stamp["slug"]}/numerics.json`. {stamp["device"]}; {versions}.

N {n}, D {d}, V {v}; every label has the probability at the column's head. Cells: largest error
against float64 on the same rounded inputs, over the largest magnitude of the truth, of the value,
of the hidden states' gradient and of the weight's. `{ROUNDED}` is the least that results in that
dtype can have: values in float32, gradients in the inputs' dtype. On bfloat16 inputs a CPU's other
contenders round the logits themselves to bfloat16; fastpo multiplies upcast blocks.
{tables(cases)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders")
    parser.add_argument("--quick", action="store_true", help="tiny shape, nothing compiled or kept")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run measured")
    parser.add_argument("--out", type=Path, help="bench/results/DEVICE/numerics.json by default")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="also write the section there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.quick:
        options.out, options.fresh = options.out or Path("runs/numerics-quick.json"), True
        options.without = [*options.without, "torch.compile", "CCE"]
    shape = list(QUICK if options.quick else SHAPE)
    keys = [
        {"task": task, "dtype": dtype, "p": p, "shape": shape}
        for task in TASKS
        for dtype in DTYPES
        for p in P_LABEL
    ]
    path = options.out or RESULTS / device_slug(device) / "numerics.json"
    method = {"inputs": " ".join((peaked.__doc__ or "").split())}
    record = Record(path, device, method, options.fresh)
    with tqdm(record.missing(keys), disable=None) as progress:
        for key in progress:
            progress.set_postfix_str(f"{key['task']} {key['dtype']} {key['p']}")
            record.add(key, **measure(key, device, options.without))
    cases = [case for case in record.data["cases"] if case["key"] in keys]
    print(tables(cases))
    print(f"\n{path}")
    if options.page is not None:
        write_section(options.page, "numerics", section(record.data, cases))


if __name__ == "__main__":
    main()
