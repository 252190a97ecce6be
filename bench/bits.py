"""Does a change of the code's form leave every number as it was, to the bit?

    python -m bench.bits                  # the working tree against HEAD
    python -m bench.bits --base REV       # against another commit
    python -m bench.bits --only dpo       # the cases whose names hold a word

Both trees compute the same things in one go, since bits depend on the CPU: outputs and gradients of
`bench.numerics`'s inputs, and 20-step runs of six objectives on a tiny model, each with shared and
unshared prompts, with LoRA, with a reference store, and with a trained head by groups of a batch;
two of them also on two ranks. Runs are compared by their metrics, weights and stored log-probs. The
working tree then goes on with runs that the other tree left at their tenth step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
STEPS, SAVED = 20, 10
VOCAB = 4096  # 1 MiB, the least workspace of a recipe, holds logits of some 30 tokens

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "beta": 0.3},
    "simpo": {"objective": "simpo"},
    "kto": {"objective": "kto", "beta": 0.3},
    "lipo": {"objective": "lipo", "dataset": "lists.jsonl"},
    "tdpo2": {"objective": "tdpo2"},
    "orpo-sft": {"objective": {"orpo": 0.8, "sft": 1.0}, "token_weights": {"ld": 0.5}},
}
MODES: dict[str, dict[str, Any]] = {
    "shared": {"share_prompt": "true"},
    "unshared": {"share_prompt": "false", "gradient_accumulation_steps": 2},
    "lora": {"lora": {"r": 4}, "max_tokens_per_row": 160},
    "store": {"reference": "store", "lora": {"r": 4}},
    "groups": {
        "workspace_mib": 1,
        "per_device_train_batch_size": 8,
    },  # logits of a few groups at a time
}
RANKS = ("dpo", "lipo")
RESUMED = ("dpo lora", "dpo store", "simpo shared")
# A store holds log-probs, of which TDPO's divergence is none; those without reference have none.
SKIPPED = {"tdpo2 store", "simpo store", "orpo-sft store"}
# Of the clock, or of the machine's memory.
VOLATILE = ("time", "_runtime", "_per_second", "peak_memory_gib")


def cases(only: str = "") -> dict[str, dict[str, Any]]:
    """Return every run's recipe by name, `two ranks` among them."""
    found = {
        f"{name} {mode}": {**objective, **form}
        for name, objective in OBJECTIVES.items()
        for mode, form in MODES.items()
    }
    found |= {f"{name} two ranks": {**OBJECTIVES[name]} for name in RANKS}
    return {n: recipe for n, recipe in found.items() if n not in SKIPPED and only in n}


def write_inputs(folder: Path) -> None:
    """Write a tiny Llama with a word tokenizer, pairs and lists of preferences."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # far from uniform, so that losses and gradients are not tiny
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")

    def text(seed: int, length: int) -> str:
        return " ".join(
            f"w{4 + (seed * 311 + k * k * 71 + k) % (VOCAB - 4)}" for k in range(length)
        )

    pairs, lists = [], []
    for i in range(24):
        prompt = text(i, 3 + i % 7)
        responses = [text(100 + 5 * i + k, 2 + (i + 3 * k) % 9) for k in range(2 + i % 3)]
        pairs.append({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]})
        scores = [float((i + 2 * k) % 5) + 0.1 * k for k in range(len(responses))]
        lists.append({"prompt": prompt, "responses": responses, "scores": scores})
    for name, rows in (("pairs", pairs), ("lists", lists)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_recipe(inputs: Path, run: Path, recipe: dict[str, Any]) -> Path:
    """Write the whole recipe of a run beside its folder."""
    whole = {
        "model": str(inputs / "model"),
        "output_dir": str(run),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 3,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "eval_fraction": 0.25,
        "eval_strategy": "steps",
        "eval_steps": SAVED,
        "num_samples": 1,
        "sample_tokens": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "dtype": "float32",
        "dataset": "pairs.jsonl",
        **recipe,
    }
    whole["dataset"] = str(inputs / whole["dataset"])
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return path


def digest_of(folder: Path) -> dict[str, str]:
    """Return what a run left, each thing by a digest: metrics, and tensors by name and number."""
    from safetensors.numpy import load_file

    found = {}
    for number, line in enumerate((folder / "metrics.jsonl").read_text().splitlines()):
        kept = {k: v for k, v in json.loads(line).items() if not k.endswith(VOLATILE)}
        if "train_loss" not in kept:  # the mean of the losses since a run went on
            found[f"metrics {number}"] = json.dumps(kept, sort_keys=True)
    tensors = []
    for path in folder.rglob("*.safetensors"):
        named = "" if path.name.startswith("shard-") else str(path.relative_to(folder))
        for name, value in load_file(path).items():
            bits = hashlib.sha256(value.tobytes()).hexdigest()[:16]
            tensors.append(f"{named} {name} {value.shape} {bits}")
    found |= {" ".join(t.split(" ")[:-1]) + f" #{i}": t for i, t in enumerate(sorted(tensors))}
    return found


def numerics() -> Iterator[tuple[str, str]]:
    """Yield outputs and gradients of the head on inputs of `bench.numerics`, each by a digest."""
    import torch

    from bench.contenders import OURS
    from bench.head import bind
    from bench.numerics import DTYPES, P_LABEL, TASKS, peaked

    for shape in ((32, 32, 512), (96, 64, 4096)):
        for task in TASKS:
            for dtype in DTYPES:
                for p in P_LABEL:
                    inputs = peaked(shape, p, getattr(torch, dtype), torch.device("cpu"))
                    for head in ("frozen", "trained"):
                        for name, value in bind(OURS, task, head, inputs)().items():
                            bits = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
                            which = f"{task} {head} {dtype} {p} {shape} {name}"
                            yield which, hashlib.sha256(bits).hexdigest()[:16]


def record(inputs: Path, out: Path, only: str) -> None:
    """Run everything in the tree that is imported here; write digests to `out`/digests.json."""
    import torch

    from fastpo.cli import main as fastpo

    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    if only in "numerics":
        found["numerics"] = dict(numerics())
    for name, recipe in cases(only).items():
        run = out / name.replace(" ", "_")
        path = write_recipe(inputs, run, recipe)
        if name.endswith("two ranks"):
            script = Path(sys.executable).parent / "fastpo"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            subprocess.run([*launcher, "--standalone", script, "train", path], check=True)
        elif (code := fastpo(["train", str(path)])) not in (0, None):
            raise SystemExit(f"{name}: fastpo train ended with {code}")
        found[name] = digest_of(run)
    (out / "digests.json").write_text(json.dumps(found), encoding="utf-8")


def start(tree: Path, *arguments: Any) -> subprocess.Popen:
    """Start this file's `record` on the code of a tree; what it prints goes to `out`.log."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    log = Path(arguments[1]).with_suffix(".log").open("w")
    command = [sys.executable, Path(__file__), "--record", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=tree, stdout=log, stderr=log)


def differences(was: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names of what is not equal in two records."""
    names = list(dict.fromkeys((*was, *now)))
    return [name for name in names if was.get(name) != now.get(name)]


def leave_at_tenth(source: Path, target: Path, inputs: Path, recipe: dict[str, Any]) -> Path:
    """Copy a finished run as if it had been killed after its checkpoint; returns its recipe."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        if path.name == f"checkpoint-{STEPS}" or path.suffix == ".safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    facts = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps({**facts, "status": "running"}), encoding="utf-8")
    return write_recipe(inputs, target, recipe)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.bits", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", default="HEAD", help="a commit; HEAD by default")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose names hold it")
    parser.add_argument("--record", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.record is not None:
        record(Path(options.record[0]), Path(options.record[1]), options.record[2])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), options.base, options.only)


def compare(work: Path, base: str, only: str) -> int:
    """Run both trees side by side, then the runs that the working tree goes on with."""
    inputs = work / "inputs"
    inputs.mkdir()
    write_inputs(inputs)
    tree = work / "base"
    subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, base], cwd=ROOT, check=True)
    try:
        outs = {tree: work / "was", ROOT: work / "now"}
        for out in outs.values():
            out.mkdir()
        jobs = [start(each, inputs, out, only) for each, out in outs.items()]
        failed = [job.wait() for job in jobs]
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    for code, out in zip(failed, outs.values(), strict=True):
        if code:
            print(out.with_suffix(".log").read_text()[-3000:])
            return code
    was, now = (json.loads((out / "digests.json").read_text()) for out in outs.values())
    for name in RESUMED:
        if name not in now:
            continue
        run = work / "resumed" / name.replace(" ", "_")
        run.parent.mkdir(exist_ok=True)
        path = leave_at_tenth(work / "was" / run.name, run, inputs, cases()[name])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        script = Path(sys.executable).parent / "fastpo"
        done = subprocess.run(
            [sys.executable, script, "train", path],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(done.stderr[-3000:])
            return done.returncode
        now[f"{name}, resumed"] = digest_of(run)
        was[f"{name}, resumed"] = was[name]
    wrong = 0
    for name, found in now.items():
        different = differences(was[name], found)
        wrong += bool(different)
        print(f"{name:24s} {len(found):5d} things, {len(different)} differ  {different[:3]}")
    print("equal to the bit" if not wrong else f"{wrong} of {len(now)} cases differ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
