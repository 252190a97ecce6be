"""The table of commands: what each takes, in groups, and which function runs it.

A flag is named as a key of a recipe is, with underscores. Flags of several commands are said once.
Those that say how rows are read are the fields of `DataSettings`, with its help.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fastpo.domain import Domain, choices, domain_of, options, plain_of


@dataclass(frozen=True)
class Flag:
    """A flag, or a word that stands in its own place.

    Args:
        name: with underscores.
        help: a line; a default that is neither None nor False is added in brackets.
        kind: type of the value; bool: the flag takes none.
        default: the value without the flag.
        choices: the values that there are.
        required: whether the command needs it.
        place: whether it is a word without a flag; with a default of "" it may be left out.
        alone: the value of a flag that stands without one; None: it needs a value.
        metavar: what stands for the value in the help.
        into: the attribute that it sets, where that is not `name`.
        sets: what a flag without a value sets.
        domain: of a number; None: any.
        needs: flags or words of which one at least must be there, or this one does nothing.
    """

    name: str
    help: str = ""
    kind: type = str
    default: object = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    place: bool = False
    alone: str | None = None
    metavar: str | None = None
    into: str | None = None
    sets: bool = True
    domain: Domain | None = None
    needs: tuple[str, ...] = ()


Groups: TypeAlias = Mapping[str, tuple[Flag, ...]]
"""A title in the help -> its flags."""


@dataclass(frozen=True)
class Command:
    """A command of `fastpo`.

    Args:
        name: the word after `fastpo`.
        line: what it does, in the list of commands.
        description: the same at length.
        run: "module:function", called with the flags as attributes.
        groups: makes the flags, when the command is chosen.
        light: whether it runs without torch.
    """

    name: str
    line: str
    description: str
    run: str
    groups: Callable[[], Groups]
    light: bool = False


AT_LEAST_0 = Domain(0)
AT_LEAST_1 = Domain(1)


def _changed(flag: Flag, **changes: object) -> Flag:
    return dataclasses.replace(flag, **changes)  # pyright: ignore[reportArgumentType]


MODEL = Flag("model", "name on the hub, or a folder", required=True)
REVISION = Flag("revision", "branch, tag or commit of the model")
GGUF_FILE = Flag("gguf_file", "weights in the folder of the model, or of an adapter's base model")
DTYPE = Flag(
    "dtype",
    "of the weights",
    default="auto",
    choices=("auto", "bfloat16", "float16", "float32", "float64"),
)
TOKENIZER = Flag("tokenizer", "default: the model's")
CHAT_TEMPLATE = Flag("chat_template", "a .jinja file or the template itself")
TRUST_REMOTE_CODE = Flag("trust_remote_code", "run code of the checkpoint", bool)
MODEL_FLAGS = (MODEL, REVISION, GGUF_FILE, DTYPE, TOKENIZER, CHAT_TEMPLATE, TRUST_REMOTE_CODE)

DATASET = Flag("dataset", "file, folder or name on the hub", required=True)
DATASET_NAME = Flag("dataset_name", "configuration of a hub data set")
SPLIT = Flag("split", "split of the data set", default="train")
MAX_ROWS = Flag("max_rows", "read the first so many rows", int, domain=AT_LEAST_1)
SKIP_BAD_ROWS = Flag("skip_bad_rows", "leave malformed rows out", bool)

OUT = Flag("out", "JSONL file; default: standard output")
OVERWRITE = Flag(
    "overwrite", "write over files that are there already", bool, needs=("out", "token_rewards")
)
BATCH_SIZE = Flag("batch_size", "groups at a time", int, 4, domain=AT_LEAST_1)
SEED = Flag("seed", "of all draws", int, 0, domain=Domain(0, 2**32 - 1))  # NumPy's
DEBUG = Flag("debug", "show the traceback of an error", bool)

READING = (
    *("dialect", "columns", "text_as_messages", "chat_template_kwargs", "append_eos"),
    *("continue_final_message", "bos"),
)
"""Fields of `DataSettings` that every command which reads preferences has as flags."""


def settings_flags(*names: str) -> tuple[Flag, ...]:
    """Return the flags of fields of `DataSettings`; one that is on has `no_` before its name."""
    from fastpo.data.options import DataSettings
    from fastpo.fields import summary

    hints = typing.get_type_hints(DataSettings, include_extras=True)
    flags = []
    for field in (DataSettings.__dataclass_fields__[name] for name in names):
        hint, text = hints[field.name], summary(field.metadata.get("help", ""))
        kinds, words = list(map(plain_of, options(hint))), tuple(choices(hint))
        if hint is bool:
            on = bool(field.default)
            name = f"no_{field.name}" if on else field.name
            text = f"do not {text}" if on else text
            flags.append(Flag(name, text, bool, on, into=field.name, sets=not on))
        elif words:
            flags.append(Flag(field.name, text, default=field.default, choices=words))
        else:
            kind = int if int in kinds else str
            mapping = "MAPPING" if dict in kinds else None
            domain = domain_of(hint)
            flags.append(
                Flag(field.name, text, kind, field.default, metavar=mapping, domain=domain)
            )
    return tuple(flags)


def _score() -> Groups:
    return {
        "model": (
            *MODEL_FLAGS,
            Flag(
                "ref_model",
                "reference of the rewards; 'base' is the model with its adapter switched off",
            ),
        ),
        "data": (
            *(DATASET, DATASET_NAME, SPLIT, MAX_ROWS, SKIP_BAD_ROWS),
            *settings_flags("max_length", "reference_prompt", *READING),
        ),
        "scores": (
            Flag(
                "beta",
                "scale of the rewards",
                float,
                0.1,
                domain=AT_LEAST_0,
                needs=("ref_model",),
            ),
            Flag(
                "token_rewards",
                "the reward of every token, and beside it as a page (.html); needs --ref_model",
                metavar="FILE.jsonl",
            ),
            Flag("ches", "CHES scores of pairs", bool),
            Flag("entanglement", "how the gradients of pairs meet at the head", bool),
            Flag(
                "follow_up",
                "likelihood of praise over complaint as the next turn; FILE: "
                '{"positive": [...], "negative": [...]}',
                alone="",
                metavar="FILE.json",
            ),
        ),
        "output": (OUT, OVERWRITE, BATCH_SIZE),
    }


def _sample() -> Groups:
    return {
        "model": MODEL_FLAGS,
        "prompts": (
            Flag("prompts", "JSONL file with a `prompt` column", required=True),
            SKIP_BAD_ROWS,
        ),
        "responses": (
            Flag("num_samples", "responses a prompt", int, 1, domain=AT_LEAST_1),
            Flag("max_new_tokens", "longest response in tokens", int, 256, domain=AT_LEAST_1),
            Flag("temperature", "0 is greedy", float, 1.0, domain=AT_LEAST_0),
            Flag("top_p", "nucleus", float, 1.0, domain=Domain(0, 1, open_low=True)),
            SEED,
        ),
        "output": (OUT, OVERWRITE, _changed(BATCH_SIZE, help="prompts at a time", default=8)),
    }


def _prepare() -> Groups:
    return {
        "what": (
            Flag("action", choices=("logo",), place=True),
            Flag("documents", "rows with `text`; .txt or .md files, a document each", place=True),
            Flag("out", "JSONL file to write", place=True),
        ),
        "model": (
            *MODEL_FLAGS,
            Flag(
                "generator",
                "what runs the model",
                default="transformers",
                choices=("transformers", "vllm"),
            ),
        ),
        "data": (DATASET_NAME, SPLIT, MAX_ROWS),
        "rows": (
            Flag("questions", "rows of a document", int, 1, domain=AT_LEAST_1),
            Flag("chunk_tokens", "tokens of a chunk", int, 512),
            Flag("context_chunks", "chunks of a prompt", int, 16),
            Flag("critical_chunks", "at most so many of them are critical", int, 6),
            Flag("min_overlap", "words a critical chunk shares with question and answer", int, 3),
            Flag("max_new_tokens", "longest response in tokens", int, 512, domain=AT_LEAST_1),
            Flag("temperature", "0 is greedy", float, 0.7, domain=AT_LEAST_0),
            SEED,
        ),
        "output": (OVERWRITE, _changed(BATCH_SIZE, help="prompts at a time", default=8)),
    }


def _data() -> Groups:
    opened = ("model", "tokenizer")
    return {
        "what": (
            Flag("action", choices=("show", "rso", "curriculum"), place=True),
            _changed(DATASET, place=True, required=False),
            Flag("out", "JSONL file to write; of a curriculum the folder", place=True, default=""),
        ),
        "data": (DATASET_NAME, SPLIT, SKIP_BAD_ROWS),
        "show": (
            Flag("rows", "so many rows; default: 3", int, domain=AT_LEAST_1),
            *(_changed(MODEL, required=False), TOKENIZER),
            *(_changed(flag, needs=opened) for flag in (CHAT_TEMPLATE, TRUST_REMOTE_CODE)),
            Flag("to", "write all rows in this form", choices=("trl",)),
            *settings_flags("list_to_pairs", *READING),
        ),
        "rso": (
            # One alone is no pair.
            Flag("count", "responses kept a prompt", int, 8, domain=Domain(2)),
            Flag("beta", "0 keeps the best", float, 0.5),
            SEED,
        ),
        "output": (OVERWRITE,),
    }


def _weigh() -> Groups:
    return {
        "scorers": (
            Flag("positive", "the better scorer: a model", required=True),
            Flag(
                "negative",
                "the worse one; default: the same model; 'base' is the better one, its adapter "
                "switched off",
            ),
            Flag("positive_prompt", "column that the positive scorer reads", default="prompt"),
            Flag("negative_prompt", "column that the negative scorer reads", default="prompt"),
            Flag(
                "rule",
                "what becomes of the two scores",
                required=True,
                choices=("tis", "critical", "treg"),
            ),
            Flag("rule_args", "arguments of the rule, in JSON", default="{}"),
            *(DTYPE, TRUST_REMOTE_CODE, CHAT_TEMPLATE),
            Flag("tokenizer", "of the model to be trained; default: the better scorer's"),
        ),
        "data": (
            *(DATASET, DATASET_NAME, SPLIT, MAX_ROWS),
            *settings_flags("max_length", *READING),
        ),
        "output": (
            Flag("out", "JSONL file to write", required=True),
            *(OVERWRITE, BATCH_SIZE),
        ),
    }


def _merge() -> Groups:
    return {
        "what": (
            Flag("model", "folder with the adapter: the run's output_dir", place=True),
            Flag("out", "folder to write", place=True),
        ),
        "model": (
            *(GGUF_FILE, DTYPE, TRUST_REMOTE_CODE),
            Flag("tokenizer", "default: the adapter's"),
        ),
    }


def _objectives() -> Groups:
    return {
        "what": (Flag("name", "one objective", place=True, default=""),),
        "output": (
            Flag("json", "for programs", bool),
            Flag("markdown", "the table of the docs", bool),
        ),
    }


def _doctor() -> Groups:
    def of_model(flag: Flag) -> Flag:
        return _changed(flag, needs=("model",))

    return {
        "model": (
            _changed(MODEL, required=False),
            *(of_model(flag) for flag in (GGUF_FILE, REVISION, TRUST_REMOTE_CODE)),
        ),
        "head": (
            of_model(Flag("tokens", "target tokens a batch", int, 4096, domain=AT_LEAST_1)),
            of_model(Flag("workspace_mib", "as in recipes", default="auto")),
        ),
    }


def _plan() -> Groups:
    return {
        "what": (
            Flag(
                "model", "llama-3-8b and other presets, a config.json, a folder, a name on the hub"
            ),
            Flag("recipe", "take everything from a recipe; other flags win over it"),
            Flag("objective", "name of an objective; default: dpo"),
        ),
        "size": (
            Flag("context", "longest prompt + response in tokens", int, domain=AT_LEAST_1),
            Flag("response", "of them, the response; default: 512", int, domain=AT_LEAST_1),
            Flag("k", "responses a prompt", int, into="candidates", domain=AT_LEAST_1),
            Flag("groups", "prompts a micro-batch; default: 1", int, domain=AT_LEAST_1),
        ),
        "machine": (
            Flag("gpu", "h100, a100, rtx4090, ...", default="h100"),
            Flag("host_gib", "host memory there is; default: any", float),
        ),
        "training": (
            Flag("method", "default: lora", choices=("full", "lora", "qlora")),
            Flag("rank", "of the adapter; default: 16", int, domain=AT_LEAST_1),
            Flag("weights", "default: by method", choices=("bfloat16", "float32")),
            Flag("optim", "name of the Trainer's; default: AdamW"),
            Flag(
                "reference",
                "default: auto",
                choices=("auto", "adapter", "copy", "store", "none"),
            ),
            Flag("mlp_tile", "tokens, or auto"),
            Flag("offload_activations", "layer inputs wait on the host", bool, into="offload"),
            Flag(
                "no_share_prompt",
                "a prompt copy a response",
                bool,
                into="share_prompt",
                sets=False,
            ),
        ),
        "output": (Flag("json", "for programs", bool),),
    }


def _report() -> Groups:
    return {"what": (Flag("run", "the run's output_dir", place=True),)}


COMMANDS = {
    command.name: command
    for command in (
        Command("train", "train a model from a recipe", "", "fastpo.cli.train:train", dict),
        Command(
            "score",
            "log-probabilities, rewards and accuracy of a model on preferences",
            "Score every response of a preference data set: JSONL to --out or standard output, a "
            "summary to standard error. With --ref_model the implicit rewards are scored too.",
            "fastpo.cli.score:score",
            _score,
        ),
        Command(
            "sample",
            "responses of a model to prompts",
            "Answer prompts. Each line of --prompts has a `prompt`, text or a list of messages; "
            'each line of the output adds "samples".',
            "fastpo.cli.sample:sample",
            _sample,
        ),
        Command(
            "prepare",
            "rows for LOGO from long documents",
            "From documents with a `text` (and, where there is one, a `question` with its "
            "`answer`): cut them into chunks, let the model ask about one, find the chunks that "
            "matter, and let it answer from all of them, from half of them, and from none. A run "
            "that was stopped goes on.",
            "fastpo.cli.prepare:prepare",
            _prepare,
        ),
        Command(
            "data",
            "how rows are read; samples or stages of pairs from scored lists",
            "`show` prints how the first rows of a file are read: who says what, and with --model "
            "the border, the scored tokens and the template's own text; with --to trl it writes "
            "all rows in TRL's form. From rows with `responses` and `scores`, `rso` keeps the "
            "responses that statistical rejection sampling accepts, `curriculum` writes stages of "
            "pairs from wide to narrow gaps of score, stage-1.jsonl and so on.",
            "fastpo.cli.data:data",
            _data,
        ),
        Command(
            "weigh",
            "weights or rewards of single tokens, from two scorers, as a column of the data",
            "Score every token twice, by two models or after two prompts, and write the rows with "
            "what the rule makes of the difference: `token_weights` (tis, critical) or "
            "`token_rewards` (treg). A run that was stopped goes on.",
            "fastpo.cli.weigh:weigh",
            _weigh,
        ),
        Command(
            "merge",
            "an adapter and its base model as one ordinary model",
            "Merge the adapter that a LoRA run left in a folder into its base model's weights and "
            "write safetensors and tokenizer, ready for from_pretrained without peft.",
            "fastpo.cli.merge:merge",
            _merge,
        ),
        Command(
            "objectives",
            "the catalogue of objectives, or one of them in full",
            "List every objective, or print one's formula, hyper-parameters and needs.",
            "fastpo.cli.objectives:objectives",
            _objectives,
            light=True,
        ),
        Command(
            "doctor",
            "what this installation can do here, and why",
            "Check the installation: versions, devices, back ends, what `auto` chooses, and with "
            "--model what the head costs and whether prompts can be shared. Weights are not read.",
            "fastpo.cli.doctor:doctor",
            _doctor,
        ),
        Command(
            "plan",
            "memory and time of a training step on a card, and what makes it fit",
            "Add up GPU and host memory by part and the time of a step, from the model's shape "
            "alone: no weights, no GPU. Where the step does not fit, the cheapest switch that "
            "helps is named.",
            "fastpo.cli.plan:plan_step",
            _plan,
        ),
        Command(
            "report",
            "write report.html and the model card of a run again",
            "Draw the report of a run's folder from the files in it; works while the run goes on.",
            "fastpo.cli.report:report",
            _report,
        ),
    )
}
