"""Random recipes and broken files for `fastpo`, and a table of what became of them.

    python -m tests.fuzz --recipes 2000 --files 500 --seed 0

Every case has a number; `--only recipe:0.17` or `--only file:0.3` runs one again and shows what it
said.
The commands run in this process on a model of a few thousand weights, a training step at most each.
A case ends in one of:

- refused: exit status 2 and a message;
- used: the command did its work, and every key that was given is in the saved recipe and in force;
- traceback, silent (a key, or damage, was passed over), lost (a file is not as it was before),
  unnamed (refused without the name of the broken file), stopped (longer than `--seconds`): faults.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastpo.domain import choices
from fastpo.yaml_text import parse

FAULTS = ("traceback", "silent", "lost", "unnamed", "stopped")


class Outcome(NamedTuple):
    case: str  # recipe:17
    kind: str  # how it was made
    result: str
    words: list[str]
    told: str


class Stopped(BaseException):
    """A case took too long; no `except Exception` of a command holds it up."""


def _stop(*_: Any) -> None:
    raise Stopped


def run(words: list[str], seconds: int) -> tuple[int | str, str]:
    """(exit status, or what was raised; all that was printed) of `fastpo WORDS`."""
    from fastpo.cli import main

    said = io.StringIO()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status: int | str = main(words)
    except Stopped:
        status = "stopped"
    except BaseException:
        status = "traceback"
        said.write(traceback.format_exc())
    finally:
        signal.alarm(0)
    return status, said.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    """Of every file below a folder; where links lead does not count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


# --- recipes --------------------------------------------------------------------------------------

# Harmless values alone: others would start thousands of processes, compilers, or rename files.
_SMALL: dict[str, list[Any]] = {
    "dataloader_num_workers": [0, 1, -1, "two", None, 0.5],
    "dataloader_prefetch_factor": [None, 2, "two"],
    "max_steps": [0, 1, -1, "one", None, 1.5],
    "num_train_epochs": [0, 1, -1, 0.1, "one", math.nan],
    "sample_tokens": [1, 2, 0, -1, "x"],
    "num_samples": [0, 1, -1, None, 1.5],
    "torch_compile": [False, None, "x"],
    "torch_compile_backend": [None, 3],
    "torch_compile_mode": [None, 3],
    "gradient_accumulation_steps": [1, 2, 0, -1, "x", 1.5],
    "local_rank": [-1, "x"],
    "dialect": ["auto", "trl", "alpaca", "x", None, 3],
    "columns": [{}, {"prompt": "prompt"}, {"chosen": "rejected", "rejected": "chosen"},
                {"prompt": None}, {"prompt": 3}, {"x": "prompt"}, {"chosen": "x"}, {"": ""}, "x",
                [1]],
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e308, -0.5,
    math.nan, math.inf, -math.inf, "", " ", "x", "none", "null", "no", "auto", "1", "1e-5", "0x10",
    "\u00e9\u202e\u4e2d", "\x1b[31m\x07", "line\nline", ".", "..", "../..", "~", "/dev/null",
    "a/b/c",
    [], [1], [[1, [2]]], ["x"], [None], {}, {"a": 1}, {"": None}, {"a": {"b": [1]}}, [0.5, 1.0],
    datetime.date(2026, 1, 2), "x" * 100_000, {"dpo": 1, "sft": 0.1}, {"r": 2}, {"every": 1},
]  # fmt: skip
NAMES = [
    "", " ", ".", "..", "../..", "/", "~", "~/x", "/dev/null", "/dev/zero", "a", "a/b", "a/b/c",
    "a//b",
    "a b", "-x", "--model", "\u00e9", "x" * 300, "\x1b[0m", "a\tb", "http://a/b",
    "file:///etc/passwd",
    "C:\\model", "*", "[", "?", "{}", "nan", "1", "None", "model.gguf", "x.jsonl", "x.csv", "x.zip",
]  # fmt: skip
TEXTS: list[bytes] = [
    b"", b"\n", b"#\n", b"\xef\xbb\xbf", b"\x00", b"a\x00b: 1", b"\xff\xfe", b"\xe9: 1", b"[]",
    b"3",
    b"null", b"text", b"- a\n- b", b"{", b"a: b: c", b"\ta: 1", b"a:\n\tb: 1", b"a: 1\na: 2",
    b"lora: {r: 2, r: 4}", b"1: 2", b"null: 1", b"true: 1", b"[a]: 1", b"? {a: 1}\n: 2",
    b"? [a, b]",
    b"2026-01-02: 1", b"2026-99-99", b"seed: 2026-99-99", b"a: &a [*a]", b"lora: &a {r: *a}",
    b"x: &x {beta: 0.2}\n<<: *x", b"<<: {beta: 0.2}", b"<<: 3", b"a: *b", b"--- {}\n--- {}", b"...",
    b"a: !!python/object:os.system x", b"a: !x 3", b"!!binary x", b"a: !!binary '*'",
    b"seed: !!int x",
    b"seed: 0b2", b"seed: 1_000", b"seed: 1:30", b"seed: " + b"9" * 5000, b"learning_rate: 1e999",
    b"a: " + b"[" * 2000, b"%YAML 9.9\n---\na: 1", b"seed: 3\r\nbeta: 0.2\r\n", b"'': 1", b"' ': 1",
    # An alias of an alias of an alias: a million items.
    b"a: &a [x]\n"
    + b"".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n".encode()
        for a, b in itertools.pairwise("abcdefg")
    ),
    b"seed: 3\x0bx", b"\x1b[31m: 1", b"model: [m]", b"model: {m: 1}", b"dataset: 3", b"model: null",
]  # fmt: skip
FLAGS = [
    ["--"], ["---x"], ["--="], ["--=3"], ["--beta="], ["--beta"], ["--lora.r.x", "3"],
    ["--.x", "3"],
    ["--lora."], ["--lora.r="], ["-x"], ["-"], ["x"], ["--beta", "0.1", "0.2"], ["--beta", "-1"],
    ["--beta", "--beta", "0.2"], ["--beta=0.1", "--beta=0.2"], ["--learning-rate", "1e-5"],
    ["--LEARNING_RATE", "1"], ["--beta", ""], ["--seed", "{"], ["--seed", "[1"], ["--seed", "*a"],
    ["--seed", "&a"], ["--seed", "!!x"], ["--seed", "9" * 5000], ["--seed", "2026-99-99"],
    ["--lora"],
    ["--lora", "null"], ["--lora.r", "2"], ["--lora.r", "x"], ["--objective.sft", "0.1"],
    ["--keys=x"],
    ["--objective"], ["--objective", "dpo", "sft"], ["--objective.x.y", "1"], ["--overwrite=1"],
    ["--overwrite", "no"], ["--debug=1"], ["--model"], ["--dataset", "a", "b"], ["--report=maybe"],
    ["--beta", "\u00e9"], ["--beta", "\x00"], ["--\u00e9", "1"], ["--objective_args.beta", "0.2"],
    ["--objective_args", "3"], ["--max_length", "1e400"], ["--help=1"], ["--seed", "[" * 2000],
]  # fmt: skip
_NAMED = ("model", "dataset", "tokenizer", "ref_model", "eval_dataset", "chat_template")
_PLAIN: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [1, 2, 3, 100],
    float: [0.1, 0.5, 1.0, 2, 10],
    str: ["x", "auto", "none"],
    list: [[], ["x"]],
    dict: [{}],
}
# Names of values that libraries write in another way.
_SAME = {"report_to": {"none": []}, "dtype": {"auto": "float32"}}


class Recipes:
    """Makes a recipe from a number: (kind, YAML bytes or None, flags, values to be found again)."""

    def __init__(self, keys: dict[str, Any], hyper: list[str]) -> None:
        self.kinds, self.keys, self.hyper = keys, sorted(keys), hyper

    def valid(self, rng: random.Random, key: str) -> Any:
        """A value of the key's own type."""
        if key in _SMALL or key in _NAMED:
            return self.value(rng, key)
        kinds = [self.kinds[key], *typing.get_args(self.kinds[key])]
        pool = [each for kind in kinds for each in choices(kind)]
        for kind in kinds:
            pool += _PLAIN.get(typing.get_origin(kind) or kind, [])
        return rng.choice(pool or ODD)

    def value(self, rng: random.Random, key: str) -> Any:
        if key in _NAMED:
            return rng.choice([*NAMES, *ODD])
        return rng.choice(_SMALL.get(key, ODD))

    def misspelt(self, rng: random.Random) -> str:
        key = rng.choice([*self.keys, *self.hyper])
        i = rng.randrange(len(key))
        return rng.choice(
            [key[:i] + key[i + 1 :], key[:i] + "x" + key[i:], key.upper(), key.replace("_", "-"),
             key + ".x", "." + key, key + " ", key[::-1], f"{key}.{key}", key + "_"]
        )  # fmt: skip

    def make(self, number: str) -> tuple[str, bytes | None, list[str], dict[str, Any]]:
        rng = random.Random(number)
        kinds = ["odd", "odd", "valid", "valid", "several", "misspelt", "flag", "text", "nested"]
        kind = rng.choice(kinds)
        given: dict[str, Any] = {}
        flags: list[str] = []
        text: bytes | None = None
        if kind in ("odd", "several"):
            for _ in range(1 if kind == "odd" else rng.randint(2, 5)):
                key = rng.choice(self.keys if rng.random() < 0.8 else self.hyper)
                given[key] = self.value(rng, key)
        elif kind == "valid":
            for key in rng.sample(self.keys, rng.randint(1, 3)):
                given[key] = self.valid(rng, key)
        elif kind == "misspelt":
            given[self.misspelt(rng)] = rng.choice(ODD)
        elif kind == "nested":
            key = rng.choice([*self.keys, *self.hyper])
            given[key] = {rng.choice([*self.keys, 1, "", "a.b"]): rng.choice(ODD)}
        elif kind == "text":
            text = rng.choice(TEXTS)
            if rng.random() < 0.3:
                text = text.decode("latin-1").encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
        else:
            flags = list(rng.choice(FLAGS))
            if rng.random() < 0.5:
                key = rng.choice(self.keys)
                value = self.value(rng, key)
                flags += [
                    f"--{key}",
                    value if isinstance(value, str) else json.dumps(value, default=str),
                ]
        return kind, text, flags, given


def _same(key: str, given: Any, found: Any) -> bool:
    found = getattr(found, "value", found)
    if given in _SAME.get(key, {}) if isinstance(given, str) else False:
        return found in (given, _SAME[key][given])
    if isinstance(given, dict) and isinstance(found, dict):
        return all(k in found and _same(key, v, found[k]) for k, v in given.items())
    if isinstance(given, list) and isinstance(found, list):
        return len(given) == len(found) and all(map(_same, [key] * len(given), given, found))
    if isinstance(given, float) and isinstance(found, float) and math.isnan(given):
        return math.isnan(found)
    return type(given) in (type(found), int, float) and given == found


# Fields that TrainingArguments or PreferenceConfig rewrite, as they say.
_REWRITTEN = {
    "bf16", "share_prompt", "report_to", "output_dir", "accelerator_config", "fsdp", "fsdp_config",
    "deepspeed", "lr_scheduler_kwargs", "optim_args", "debug", "run_name", "logging_dir",
    "hub_token",
    "ddp_find_unused_parameters", "dataloader_pin_memory", "metric_for_best_model",
    "greater_is_better",
    "parallelism_config", "gradient_checkpointing_kwargs", "use_cpu", "warmup_ratio", "log_level",
    "include_num_input_tokens_seen",
}  # fmt: skip


def unused(given: dict[str, Any], folder: Path) -> str | None:
    """The first key that the run's own files do not have as it was given."""
    saved = yaml.unsafe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    hyper = {str(k).rpartition(".")[2]: v for k, v in saved.get("objective_args", {}).items()}
    for key, value in given.items():
        if value is None or "token" in key.split("_"):  # null is the default; secrets are redacted
            continue
        value = parse(yaml.dump(value, allow_unicode=True))[1]  # PyYAML writes "1e-5" as a number
        head, _, rest = key.partition(".")
        if rest and isinstance(saved.get(head), dict):
            key, value = head, {rest: value}
        held = saved.get(key, hyper.get(key, "absent"))
        if not _same(key, value, held):
            return f"{key} = {value!r:.80} was given, the saved recipe has {held!r:.80}"
        in_force = facts["arguments"].get(key, value)
        if key not in _REWRITTEN and not _same(key, value, in_force):
            return f"{key} = {value!r:.80} was given, {in_force!r:.80} is in force"
    return None


def recipe_case(number: str, maker: Recipes, tiny: Path, seconds: int) -> Outcome:
    kind, text, flags, given = maker.make(number)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name) / "here"  # what a case calls `..` is its own
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        base = {
            "model": str(tiny / "model"),
            "dataset": str(tiny / "prefs.jsonl"),
            "output_dir": str(folder / "run"),
            "max_steps": 1,
            "learning_rate": 1e-4,
            "report": False,
            "num_samples": 0,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        whole = {k: v for k, v in base.items() if text is None or k.encode() not in text} | given
        written = yaml.dump(whole, allow_unicode=True, sort_keys=False).encode()
        rng = random.Random(f"place {number}")
        out = folder / "run"
        if rng.random() < 0.2:  # somebody's files where the run would write
            out.mkdir()
            theirs = rng.choice(
                ["notes.md", "README.md", "model.safetensors", "recipe.yaml", "config.json"]
            )
            (out / theirs).write_text("theirs")
        path = folder / "r.yaml"
        path.write_bytes(written + (b"" if text is None else text))
        before = {**hashes(folder), **{f"tiny/{k}": v for k, v in hashes(tiny).items()}}
        here = Path.cwd()
        os.chdir(folder)
        try:
            status, said = run(["train", str(path), *flags], seconds)
        finally:
            os.chdir(here)
        after = {**hashes(folder), **{f"tiny/{k}": v for k, v in hashes(tiny).items()}}
        words = ["train", written.decode()[-300:] if text is None else repr(text[:200]), *flags]
        result = {0: "used", 2: "refused"}.get(status, str(status))  # pyright: ignore
        if result == "traceback" and "--debug" in flags:  # asked for
            result = "refused"
        changed = [k for k, v in before.items() if after.get(k) != v]
        if changed:
            result, said = "lost", f"{changed}\n{said}"
        elif result == "used" and (out / "run.json").exists():
            problem = unused({k: v for k, v in given.items() if k != "output_dir"}, out)
            if problem is not None:
                result, said = "silent", problem
        return Outcome(f"recipe:{number}", kind, result, words, said)


# --- files ----------------------------------------------------------------------------------------


def _truncated(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 10, 100])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


def _inserted(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    i = rng.randrange(len(data))
    path.write_bytes(
        data[:i] + rng.choice([b"\x00", b"\xff\xfe", b"\n", b'"', b"}", b"\t"]) + data[i:]
    )


def _encoded(path: Path, rng: random.Random) -> None:
    text = path.read_bytes().decode("latin-1") + "\u00e9"
    path.write_bytes(text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"])))


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _other_json(path: Path, rng: random.Random) -> None:
    """JSON of another type, or a value of another type somewhere inside."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    junk = rng.choice([None, 3, "x", [], {}, True, [None], -1, 1e400, {"a": [1]}])
    if isinstance(value, dict) and value and rng.random() < 0.8:
        inner = value
        while True:
            key = rng.choice(sorted(inner))
            if not (isinstance(inner[key], dict) and inner[key]) or rng.random() < 0.3:
                break
            inner = inner[key]
        if rng.random() < 0.4:
            del inner[key]
        else:
            inner[key] = junk
        junk = value
    path.write_text(json.dumps(junk))


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    _truncated, _truncated, _flipped, _flipped, _garbage, _inserted, _encoded, _folder, _dangling,
    _pipe, _other_json, _other_json, _other_json,
    lambda path, rng: path.write_bytes(b""),
    lambda path, rng: path.write_bytes(rng.choice(TEXTS)),
    lambda path, rng: path.unlink(),
]  # fmt: skip


class Files:
    """Valid things to break: a folder made once, copied for every case."""

    def __init__(self, home: Path, tiny: Path) -> None:
        import pandas

        self.home = home
        shutil.copytree(tiny / "model", home / "model")
        rows = [json.loads(line) for line in (tiny / "prefs.jsonl").read_text().splitlines()]
        data = home / "data"
        data.mkdir()
        (data / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (data / "d.json").write_text(json.dumps(rows))
        (data / "d.jsonl.gz").write_bytes(gzip.compress((data / "d.jsonl").read_bytes()))
        table = pandas.DataFrame(rows)
        table.to_csv(data / "d.csv", index=False)
        table.to_csv(data / "d.tsv", index=False, sep="\t")
        table.to_parquet(data / "d.parquet")
        lists = [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}] * 3
        (home / "lists.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lists))
        (home / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        (home / "turns.json").write_text('{"positive": ["Good."], "negative": ["Bad."]}')
        common = (
            "report: true\nnum_samples: 0\nuse_cpu: true\ndisable_tqdm: true\nlogging_steps: 1\n"
        )
        recipe = f"model: model\ndataset: data/d.jsonl\noutput_dir: run\nmax_steps: 1\n{common}"
        (home / "r.yaml").write_text(recipe)
        here = Path.cwd()
        os.chdir(home)
        try:
            made = [
                ["train", "r.yaml", "--output_dir", "adapter", "--lora.r", "2"],
                ["train", "r.yaml", "--output_dir", "run", "--max_steps", "2", "--save_steps", "1"],
                ["train", "r.yaml", "--output_dir", "stored", "--reference", "store",
                 "--reference_store", "store"],
            ]  # fmt: skip
            for words in made:
                status, said = run(words, 300)
                assert status == 0, said
        finally:
            os.chdir(here)
        shutil.rmtree(home / "stored")
        self.commands = self._commands()

    def _commands(self) -> list[list[tuple[list[str], list[str]]]]:
        """By kind: (patterns of files to break, words of a command that reads them)."""
        model = ["model/*.json", "model/*.safetensors"]
        adapter = ["adapter/adapter*", "adapter/tokenizer*", "adapter/recipe.yaml"]
        resumed = ["run/checkpoint-2/*", "run/run.json", "run/metrics.jsonl",
        "run/trainer_state.json",
                   "run/recipe.yaml", "run/samples.jsonl"]  # fmt: skip
        train = ["train", "r.yaml", "--output_dir", "out"]
        score = ["score", "--model", "model", "--dataset"]
        found: list[tuple[list[str], list[str]]] = [
            (["r.yaml"], train),
            (model, train),
            (model, [*score, "data/d.jsonl", "--max-rows", "2"]),
            (
                model,
                [
                    "sample",
                    "--model",
                    "model",
                    "--prompts",
                    "data/d.jsonl",
                    "--max-new-tokens",
                    "1",
                ],
            ),
            (model, ["plan", "--model", "model", "--context", "64", "--response", "9"]),
            (model, ["doctor", "--model", "model"]),
            (adapter, ["merge", "adapter", "merged"]),
            (adapter, [*train, "--model", "adapter"]),
            (
                resumed,
                ["train", "r.yaml", "--output_dir", "run", "--max_steps", "3", "--save_steps", "1"],
            ),
            (resumed, ["report", "run"]),
            (["store/*"], [*train, "--reference", "store", "--reference_store", "store"]),
            (["t.jinja"], [*train, "--chat_template", "t.jinja"]),
            (
                ["turns.json"],
                [*score, "data/d.jsonl", "--max-rows", "2", "--follow-up", "turns.json"],
            ),
        ]
        for path in sorted((self.home / "data").iterdir()):
            name = f"data/{path.name}"
            found += [
                ([name], [*train, "--dataset", name]),
                ([name], [*train, "--dataset", name, "--streaming"]),
                ([name], [*train, "--dataset", name, "--on_bad_row", "skip"]),
                ([name], [*score, name, "--max-rows", "2"]),
            ]
        found.append((["lists.jsonl"], ["data", "rso", "lists.jsonl", "sampled.jsonl"]))
        kinds: dict[str, list[tuple[list[str], list[str]]]] = {}
        for patterns, words in found:
            kinds.setdefault(patterns[0].split("/")[0], []).append((patterns, words))
        return list(kinds.values())

    def case(self, number: str, seconds: int) -> Outcome:
        rng = random.Random(f"file {number}")
        patterns, words = rng.choice(rng.choice(self.commands))
        here = Path.cwd()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            folder = Path(name) / "w"
            shutil.copytree(self.home, folder)
            every = sorted({p for each in patterns for p in folder.glob(each) if p.is_file()})
            path = rng.choice(every)
            mutation = rng.choice(MUTATIONS)
            whole = path.read_bytes()
            mutation(path, rng)
            same = path.is_file() and path.read_bytes() == whole
            broken = str(path.relative_to(folder))
            ours = {"run"} if "run" in words else set()  # what a resumed run writes over
            before = {k: v for k, v in hashes(folder).items() if k.split("/")[0] not in ours}
            os.chdir(folder)
            try:
                status, said = run(words, seconds)
            finally:
                os.chdir(here)
            after = hashes(folder)
        result = {0: "used", 1: "used", 2: "refused"}.get(status, str(status))  # pyright: ignore
        changed = [k for k, v in before.items() if after.get(k) != v]
        if changed:
            result, said = "lost", f"{changed}\n{said}"
        elif result == "used" and words[0] == "train" and "/checkpoint-2/" in broken:
            # An older checkpoint goes on, and that is said.
            result = "used" if "skipping" in said or same else "silent"
        # A recipe that still is one may have another value, which is what is refused then.
        elif result == "refused" and path.suffix != ".yaml" and not _named(broken, said):
            result = "unnamed"
        kind = broken.split("/")[0]
        what = getattr(mutation, "__name__", "").strip("_")
        return Outcome(f"file:{number}", kind, result, [f"{broken} ({what})", *words], said)


def _named(broken: str, said: str) -> bool:
    """Whether the file is named, or a folder of it, which a library reads as a whole."""
    path = Path(broken)
    return any(part in said for part in (path.name, *map(str, path.parents[:-1])))


# --- the table ------------------------------------------------------------------------------------


def table(outcomes: list[Outcome]) -> str:
    """Counts by kind of case and by outcome."""
    results = ("refused", "used", *FAULTS)
    counts = Counter((o.case.split(":")[0], o.kind, o.result) for o in outcomes)
    kinds = sorted({(o.case.split(":")[0], o.kind) for o in outcomes})
    rows = [("", *results)]
    rows += [(f"{a} {b}", *(str(counts[a, b, r]) for r in results)) for a, b in kinds]
    rows.append(("all", *(str(sum(o.result == r for o in outcomes)) for r in results)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    )


def make_tiny(folder: Path) -> Path:
    """A folder with `model/` and `prefs.jsonl`."""
    from tests.cli.conftest import make

    make(folder)
    return folder


def fuzz(
    recipes: int,
    files: int,
    seed: int,
    *,
    seconds: int = 20,
    budget: float = math.inf,
    only: str = "",
) -> Iterator[Outcome]:
    """Run the cases in turn until the time, in seconds, is spent."""
    import datasets
    import torch
    import transformers

    from fastpo.objectives import OBJECTIVES
    from fastpo.recipe.keys import fields_of_recipe

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-home-") as name:
        home = Path(name)
        tiny = make_tiny(home / "tiny")
        hyper = sorted({key for o in OBJECTIVES.values() for key in o.hyper})
        maker = Recipes(fields_of_recipe(), hyper)
        breaker = None
        cases = [f"recipe:{seed}.{i}" for i in range(recipes)] + [
            f"file:{seed}.{i}" for i in range(files)
        ]
        for case in [only] if only else cases:
            if time.monotonic() - begin > budget:
                return
            kind, _, number = case.partition(":")
            if kind == "recipe":
                yield recipe_case(number, maker, tiny, seconds)
                continue
            if breaker is None:
                (home / "files").mkdir()
                breaker = Files(home / "files", tiny)
            yield breaker.case(number, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipes", type=int, default=2000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=20, help="of a case")
    parser.add_argument("--minutes", type=float, default=60, help="of all")
    parser.add_argument("--only", default="", help="one case, such as recipe:0.17")
    args = parser.parse_args()
    outcomes = []
    found = fuzz(
        args.recipes, args.files, args.seed,
        seconds=args.seconds, budget=60 * args.minutes, only=args.only,
    )  # fmt: skip
    for outcome in found:
        outcomes.append(outcome)
        if outcome.result in FAULTS or args.only:
            told = outcome.told if args.only else outcome.told.strip()[-300:]
            print(
                f"{outcome.case} {outcome.kind}: {outcome.result}\n  {outcome.words}\n  {told}\n",
                flush=True,
            )
    print(table(outcomes))
    return int(any(o.result in FAULTS for o in outcomes))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="fuzz-cache-"))
    sys.exit(main())
