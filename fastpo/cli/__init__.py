"""The command line: `fastpo train | plan | score | sample | prepare | data | weigh | ...`.

This file parses and dispatches; nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import TracebackType
from typing import NoReturn

from fastpo.optional import PackageError
from fastpo.redact import learn, redact

USAGE_ERROR = 2
INTERRUPTED = 130

EXTRAS = {
    "train": (
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "safetensors",
        "yaml",
        "jinja2",
        "gguf",
        "sentencepiece",
    ),
    "quant": ("bitsandbytes",),
    "flash": ("flash_attn",),
}
"""Modules of each extra."""

TRAIN_HELP = """\
usage: fastpo train [RECIPE.yaml] [--key value ...] [--overwrite] [--keys [WORD]] [--debug]

Train a model on preferences. The recipe is a flat YAML mapping; flags win over it.

  fastpo train recipe.yaml
  fastpo train recipe.yaml --learning_rate 5e-7 --beta 0.05 --lora.r 32
  fastpo train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset prefs.jsonl --lora

needed     model, dataset
often      output_dir, objective, beta (any hyper-parameter of the objective), lora,
           max_length, learning_rate, num_train_epochs or max_steps,
           per_device_train_batch_size (in groups), eval_fraction or eval_dataset

  --keys [WORD]  list every key with its default (or those with WORD in the name) and stop
  --overwrite    remove what an earlier run wrote to output_dir, nothing else; without it, train
                 goes on from the newest complete checkpoint there
  --debug        show the traceback of an error

Ctrl-C or SIGTERM: the step is finished, a checkpoint is saved, and the command that goes on is
printed. A second Ctrl-C stops at once.
"""


class _Parser(argparse.ArgumentParser):
    """argparse, except that a mistyped flag or command is answered with the nearest one."""

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with status 2."""
        end = "" if message.endswith("?") else "."
        sys.stderr.write(f"{self.prog}: {message}{end} See {self.prog} --help.\n")
        raise SystemExit(USAGE_ERROR)

    def known_flags(self) -> list[str]:
        """The flags that this parser takes."""
        return [flag for action in self._actions for flag in action.option_strings]


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    def wide(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=30, width=96)

    top = _Parser(
        prog="fastpo",
        formatter_class=wide,
        description="Preference training of language models.",
        epilog="fastpo COMMAND --help explains a command.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, line: str, description: str) -> _Parser:
        return commands.add_parser(
            name, help=line, description=description, formatter_class=wide, allow_abbrev=False
        )

    def gguf_flag(parser: _Parser) -> None:
        parser.add_argument(
            "--gguf-file", help="weights in the folder of the model, or of an adapter's base model"
        )

    def reading_flags(parser: _Parser) -> None:
        parser.add_argument("--dialect", default="auto", help="how rows are read (auto)")
        parser.add_argument(
            "--columns",
            metavar="MAPPING",
            help="'{prompt: question}' reads that column as prompt, '{old: null}' drops one",
        )
        parser.add_argument(
            "--text-as-messages", action="store_true", help="make messages of rows of text"
        )
        parser.add_argument(
            "--chat-template-kwargs", metavar="MAPPING", help="arguments of the chat template"
        )
        parser.add_argument(
            "--no-append-eos", action="store_true", help="responses are not ended, as steps are not"
        )
        parser.add_argument(
            "--continue-final-message",
            action="store_true",
            help="responses go on with the assistant's message that ends the prompt",
        )
        parser.add_argument(
            "--bos", action="store_true", help="put BOS before texts where the tokenizer puts none"
        )

    command("train", "train a model from a recipe", "")

    score = command(
        "score",
        "log-probabilities, rewards and accuracy of a model on preferences",
        "Score every response of a preference data set: JSONL to --out or standard output, a "
        "summary to standard error. With --ref-model the implicit rewards are scored too.",
    )
    score.add_argument("--model", required=True, help="name on the hub, or a folder")
    score.add_argument("--dataset", required=True, help="file, folder or name on the hub")
    score.add_argument("--dataset-name", help="configuration of a hub data set")
    score.add_argument("--split", default="train", help="default: train")
    score.add_argument(
        "--ref-model",
        help="reference of the rewards; 'base' is the model with its adapter switched off",
    )
    score.add_argument(
        "--reference-prompt",
        choices=("prompt", "short_prompt"),
        default="prompt",
        help="column with the prompt that the reference reads (prompt)",
    )
    score.add_argument("--beta", type=float, default=0.1, help="scale of the rewards (0.1)")
    score.add_argument("--max-length", type=int, help="longest prompt and response in tokens")
    score.add_argument("--max-rows", type=int, help="score the first so many rows")
    score.add_argument("--skip-bad-rows", action="store_true", help="leave malformed rows out")
    score.add_argument("--batch-size", type=int, default=4, help="groups at a time (4)")
    score.add_argument(
        "--token-rewards",
        metavar="FILE.jsonl",
        help="the reward of every token, and beside it as a page (.html); needs --ref-model",
    )
    score.add_argument("--ches", action="store_true", help="CHES scores of pairs")
    score.add_argument(
        "--entanglement", action="store_true", help="how the gradients of pairs meet at the head"
    )
    score.add_argument(
        "--follow-up",
        nargs="?",
        const="",
        metavar="FILE.json",
        help="likelihood of praise over complaint as the next turn; FILE: "
        '{"positive": [...], "negative": [...]}',
    )

    sample = command(
        "sample",
        "answers of a model to prompts",
        "Answer prompts. Each line of --prompts has a `prompt`, text or a list of messages; each "
        'line of the output adds "samples".',
    )
    sample.add_argument("--prompts", required=True, help="JSONL file with a `prompt` column")
    sample.add_argument("--skip-bad-rows", action="store_true", help="leave malformed rows out")
    sample.add_argument("--num-samples", type=int, default=1, help="answers a prompt (1)")
    sample.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    sample.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    sample.add_argument("--top-p", type=float, default=1.0, help="nucleus (1.0)")
    sample.add_argument("--batch-size", type=int, default=8, help="prompts at a time (8)")
    sample.add_argument("--seed", type=int, default=0, help="of the sampler (0)")

    preparing = command(
        "prepare",
        "rows for LOGO from long documents",
        "From documents with a `text` (and, where there is one, a `question` with its `answer`): "
        "cut them into chunks, let the model ask about one, find the chunks that matter, and let "
        "it answer from all of them, from half of them, and from none. A run that was stopped goes "
        "on.",
    )
    preparing.add_argument("action", choices=("logo",))
    preparing.add_argument("documents", help="rows with `text`; .txt or .md files, a document each")
    preparing.add_argument("out", help="JSONL file to write")
    preparing.add_argument("--dataset-name", help="configuration of a hub data set")
    preparing.add_argument("--split", default="train", help="default: train")
    preparing.add_argument("--max-rows", type=int, help="read the first so many documents")
    preparing.add_argument("--questions", type=int, default=1, help="rows of a document (1)")
    preparing.add_argument("--chunk-tokens", type=int, default=512, help="of a chunk (512)")
    preparing.add_argument("--context-chunks", type=int, default=16, help="of a prompt (16)")
    preparing.add_argument("--critical-chunks", type=int, default=6, help="at most, of them (6)")
    preparing.add_argument(
        "--min-overlap",
        type=int,
        default=3,
        help="words a critical chunk shares with question and answer (3)",
    )
    preparing.add_argument(
        "--generator",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what runs the model (transformers)",
    )
    preparing.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (512)")
    preparing.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")
    preparing.add_argument("--batch-size", type=int, default=8, help="prompts at a time (8)")
    preparing.add_argument("--seed", type=int, default=0, help="of all draws (0)")

    data = command(
        "data",
        "how rows are read; samples or stages of pairs from scored lists",
        "`show` prints how the first rows of a file are read: who says what, and with --model the "
        "border, the scored tokens and the template's own text; with --to trl it writes all rows "
        "in TRL's form. From rows with `responses` and `scores`, `rso` keeps the answers that "
        "statistical rejection sampling accepts, `curriculum` writes stages of pairs from wide to "
        "narrow gaps of score, stage-1.jsonl and so on.",
    )
    data.add_argument("action", choices=("show", "rso", "curriculum"))
    data.add_argument("dataset", help="file, folder or name on the hub")
    data.add_argument("out", nargs="?", help="JSONL file to write; of a curriculum the folder")
    data.add_argument("--dataset-name", help="configuration of a hub data set")
    data.add_argument("--split", default="train", help="default: train")
    data.add_argument("--skip-bad-rows", action="store_true", help="leave malformed rows out")
    data.add_argument("--rows", type=int, help="show: so many rows (3)")
    data.add_argument("--model", help="show: whose tokenizer and template, a name or a folder")
    data.add_argument("--tokenizer", help="show: default: the model's")
    data.add_argument("--chat-template", help="show: a .jinja file or the template itself")
    data.add_argument(
        "--trust-remote-code", action="store_true", help="show: run code of the checkpoint"
    )
    data.add_argument("--to", choices=("trl",), help="show: write all rows in this form")
    data.add_argument(
        "--list-to-pairs", choices=("best_worst", "best_rest"), help="show: pairs of lists"
    )
    reading_flags(data)
    data.add_argument("--count", type=int, default=8, help="rso: answers kept a prompt (8)")
    data.add_argument("--beta", type=float, default=0.5, help="rso: 0 keeps the best (0.5)")
    data.add_argument("--seed", type=int, default=0, help="rso: of the draws (0)")

    weighing = command(
        "weigh",
        "weights or rewards of single tokens, from two scorers, as a column of the data",
        "Score every token twice, by two models or after two prompts, and write the rows with what "
        "the rule makes of the difference: `token_weights` (tis, critical) or `token_rewards` "
        "(treg). A run that was stopped goes on.",
    )
    weighing.add_argument("--dataset", required=True, help="file, folder or name on the hub")
    weighing.add_argument("--rule", required=True, help="tis, critical or treg")
    weighing.add_argument("--positive", required=True, help="the better scorer: a model")
    weighing.add_argument(
        "--negative",
        help="the worse one (the same model); 'base' is the better one, its adapter switched off",
    )
    for side in ("positive", "negative"):
        weighing.add_argument(
            f"--{side}-prompt", default="prompt", help=f"column the {side} scorer reads (prompt)"
        )
    weighing.add_argument("--out", required=True, help="JSONL file to write")
    weighing.add_argument("--rule-args", default="{}", help="arguments of the rule, in JSON")
    weighing.add_argument("--dataset-name", help="configuration of a hub data set")
    weighing.add_argument("--split", default="train", help="default: train")
    weighing.add_argument("--max-length", type=int, help="longest prompt and response in tokens")
    weighing.add_argument("--max-rows", type=int, help="weigh the first so many rows")
    weighing.add_argument("--batch-size", type=int, default=4, help="groups at a time (4)")
    weighing.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32")
    weighing.add_argument("--tokenizer", help="of the model to be trained (the better scorer's)")
    weighing.add_argument("--chat-template", help="a .jinja file or the template itself")
    weighing.add_argument(
        "--trust-remote-code", action="store_true", help="run code of the checkpoint"
    )

    for parser in (preparing, sample):
        parser.add_argument("--model", required=True, help="name on the hub, or a folder")
    for parser in (score, weighing):
        reading_flags(parser)
    for parser in (score, sample, preparing):
        gguf_flag(parser)
        parser.add_argument("--revision", help="branch, tag or commit of the model")
        parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32")
        parser.add_argument("--tokenizer", help="default: the model's")
        parser.add_argument("--chat-template", help="a .jinja file or the template itself")
        parser.add_argument(
            "--trust-remote-code", action="store_true", help="run code of the checkpoint"
        )
    for parser in (score, sample):
        parser.add_argument("--out", help="JSONL file; default: standard output")
    for parser in (score, sample, preparing, data, weighing):
        parser.add_argument(
            "--overwrite", action="store_true", help="write over files that are there already"
        )

    merge = command(
        "merge",
        "an adapter and its base model as one ordinary model",
        "Merge the adapter that a LoRA run left in a folder into its base model's weights and "
        "write safetensors and tokenizer, ready for from_pretrained without peft.",
    )
    merge.add_argument("model", help="folder with the adapter: the run's output_dir")
    merge.add_argument("out", help="folder to write")
    gguf_flag(merge)
    merge.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32")
    merge.add_argument("--tokenizer", help="default: the adapter's")
    merge.add_argument("--trust-remote-code", action="store_true", help="run code of the model")

    objectives = command(
        "objectives",
        "the catalogue of objectives, or one of them in full",
        "List every objective, or print one's formula, hyper-parameters and needs.",
    )
    objectives.add_argument("name", nargs="?", help="one objective")
    objectives.add_argument("--json", action="store_true", help="for programs")
    objectives.add_argument("--markdown", action="store_true", help="the table of the docs")

    doctor = command(
        "doctor",
        "what this installation can do here, and why",
        "Check the installation: versions, devices, back ends, what `auto` chooses, and with "
        "--model what the head costs and whether prompts can be shared. Weights are not read.",
    )
    doctor.add_argument("--model", help="name on the hub, or a folder")
    gguf_flag(doctor)
    doctor.add_argument("--revision", help="branch, tag or commit of the model")
    doctor.add_argument(
        "--trust-remote-code", action="store_true", help="run code of the checkpoint"
    )
    doctor.add_argument("--tokens", type=int, default=4096, help="target tokens a batch (4096)")
    doctor.add_argument("--workspace-mib", default="auto", help="as in recipes (auto)")

    planned = command(
        "plan",
        "memory and time of a training step on a card, and what makes it fit",
        "Add up GPU and host memory by part and the time of a step, from the model's shape alone: "
        "no weights, no GPU. Where the step does not fit, the cheapest switch that helps is named.",
    )
    planned.add_argument(
        "--model", help="llama-3-8b and other presets, a config.json, a folder, a name on the hub"
    )
    planned.add_argument("--recipe", help="take everything from a recipe; other flags win over it")
    planned.add_argument("--context", type=int, help="longest prompt + response in tokens")
    planned.add_argument("--response", type=int, help="of them, the response (512)")
    planned.add_argument("--objective", help="name of an objective (dpo)")
    planned.add_argument("--k", type=int, dest="candidates", help="responses a prompt")
    planned.add_argument("--groups", type=int, help="prompts a micro-batch (1)")
    planned.add_argument("--gpu", default="h100", help="h100, a100, rtx4090, ... (h100)")
    planned.add_argument("--host-gib", type=float, help="host memory there is; default: any")
    planned.add_argument("--method", choices=("full", "lora", "qlora"), help="default: lora")
    planned.add_argument("--rank", type=int, help="of the adapter (16)")
    planned.add_argument("--weights", choices=("bfloat16", "float32"), help="default: by method")
    planned.add_argument("--optim", help="name of the Trainer's; default: AdamW")
    planned.add_argument("--reference", choices=("adapter", "copy", "store", "none"))
    planned.add_argument("--mlp-tile", help="tokens, or auto")
    planned.add_argument("--offload-activations", action="store_true", default=None, dest="offload")
    planned.add_argument(
        "--no-share-prompt", action="store_false", default=None, dest="share_prompt"
    )
    planned.add_argument("--json", action="store_true", help="for programs")

    report = command(
        "report",
        "write report.html and the model card of a run again",
        "Draw the report of a run's folder from the files in it; works while the run goes on.",
    )
    report.add_argument("run", help="the run's output_dir")

    for parser in commands.choices.values():
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top, dict(commands.choices)


def _report(arguments: argparse.Namespace) -> int:
    from fastpo.report.card import write_model_card
    from fastpo.report.page import write_report
    from fastpo.run.record import Run

    run = Run.read(arguments.run)
    if not (run.facts or run.log or run.state or run.recipe):
        raise ValueError(
            f"{arguments.run} holds no run: name the output_dir of one, where run.json lies"
        )
    print(write_report(arguments.run))
    print(write_model_card(arguments.run))
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    top, commands = _parser()
    if words and not words[0].startswith("-") and words[0] not in commands:
        near = get_close_matches(words[0], commands, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Choose from {', '.join(commands)}."
        sys.stderr.write(f"fastpo: unknown command {words[0]!r}.{hint}\n")
        raise SystemExit(USAGE_ERROR)
    parser = commands.get(words[0], top) if words else top
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in parser.known_flags():
            near = get_close_matches(flag, parser.known_flags(), n=1)
            parser.error(f"unknown flag {flag}" + (f", did you mean {near[0]}?" if near else ""))
    arguments = top.parse_args(words)
    if arguments.version:
        from fastpo import __version__

        print(f"fastpo {__version__}")
        raise SystemExit(0)
    if arguments.command is None:
        top.print_help()
        raise SystemExit(USAGE_ERROR)
    return arguments


def _extra_of(message: str) -> str | None:
    """The extra whose package a failed import is about; None where a fault of ours broke it."""
    for extra, modules in EXTRAS.items():
        if set(modules) & set(re.findall(r"\w+", message)):
            return extra
    return None


def _of_a_package(error: ImportError) -> bool:
    """Whether a package is missing, or a library says so; else an import of ours is at fault."""
    if error.name is None:  # raised by hand: the import system gives a name
        return True
    return isinstance(error, ModuleNotFoundError) and error.name.partition(".")[0] != "fastpo"


def _run(words: Sequence[str]) -> int:
    if words and words[0] == "train":
        if {"-h", "--help"} & set(words):
            print(TRAIN_HELP, end="")
            return 0
        from fastpo.cli.train import train

        return train(words[1:])
    arguments = _parse(words)
    if arguments.command == "score":
        from fastpo.cli.score import score

        return score(arguments)
    if arguments.command == "sample":
        from fastpo.cli.sample import sample

        return sample(arguments)
    if arguments.command == "prepare":
        from fastpo.cli.prepare import prepare

        return prepare(arguments)
    if arguments.command == "data":
        from fastpo.cli.data import data

        return data(arguments)
    if arguments.command == "weigh":
        from fastpo.cli.weigh import weigh

        return weigh(arguments)
    if arguments.command == "merge":
        from fastpo.cli.merge import merge

        return merge(arguments)
    if arguments.command == "objectives":
        with _no_torch():
            from fastpo.cli.objectives import objectives

            return objectives(arguments)
    if arguments.command == "plan":
        from fastpo.cli.plan import plan_step

        return plan_step(arguments)
    if arguments.command == "doctor":
        from fastpo.cli.doctor import doctor

        return doctor(arguments)
    return _report(arguments)


@contextmanager
def _no_torch() -> Iterator[None]:
    """Stand in for torch while the catalogue is printed, unless it is loaded anyway.

    Its modules define functions that nobody calls here; importing torch takes two seconds. What was
    imported meanwhile is forgotten.
    """
    if "torch" in sys.modules:
        yield
        return
    from unittest.mock import MagicMock

    before = set(sys.modules)
    stood_for = dict.fromkeys(("torch", "torch.nn", "torch.nn.functional"), MagicMock())
    sys.modules |= stood_for
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name in stood_for or name.startswith("fastpo."):
                del sys.modules[name]


def _show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print what Python prints of an error that nobody catches, without secrets."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the console entry point.

    Args:
        argv: the words after `fastpo`; by default those of this process.

    Returns:
        0: done. 1: `doctor` found a broken installation. 2: a wrong flag, value, file or row,
        told in a line on standard error, like a failed self-check, a loss that is not finite and
        an extra that is not installed; `--debug` shows the traceback instead. 130: interrupted.
    """
    if argv is None:  # this process is the command's
        sys.excepthook = _show_traceback
    words = list(sys.argv[1:] if argv is None else argv)
    learn(words)
    try:
        return _run(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("\nfastpo: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # `fastpo objectives | head`
        sys.stderr.close()
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        # transformers explains a missing model or package in a paragraph; its first line says it.
        text = str(error) if isinstance(error, ValueError) else str(error).strip().split("\n")[0]
        if isinstance(error, ImportError) and not isinstance(error, PackageError):
            if (extra := _extra_of(text)) is not None:
                text = f"{text}: pip install -U 'fastpo[{extra}]'"
            elif not _of_a_package(error):
                raise
            elif text.startswith("No module named"):
                text = f"{text}: pip install {str(error.name).partition('.')[0]}"
        if "--debug" in words:
            raise
        for line in redact(text or type(error).__name__).splitlines():
            sys.stderr.write(f"fastpo: {line}\n")
        return USAGE_ERROR
