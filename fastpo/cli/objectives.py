"""`fastpo objectives`: the catalogue, read from the same table that the engine uses."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import shutil
import textwrap

from fastpo.data.columns import CONTEXT_ROLES
from fastpo.data.options import DataSettings
from fastpo.domain import in_words
from fastpo.objectives import OBJECTIVES, SECTIONS, get_objective
from fastpo.objectives.base import Objective
from fastpo.objectives.vocabulary import SCORES

FAMILIES = {
    "pair": "pairs: one chosen, one rejected response",
    "point": "single responses, labelled good or bad",
    "list": "two or more ranked responses",
}
NOTATION = (
    "u = log pi(y|x) - log pi_ref(y|x), S = log pi(y|x), s = S / L, L tokens, F = summed "
    "KL(ref || pi); w chosen, l rejected; q the row's grade; u' after the context_prompt, u0 after "
    "the bare_prompt; R- and R+ two references' log-probs"
)


_MEMORY = {"none": "of the batch", "mean": "of all steps", "ema": "averaged over steps"}


def needs(objective: Objective) -> str:
    """Return what an objective needs beside the policy, in words."""
    words = []
    if objective.needs_kl:
        words.append("reference distribution")
    elif objective.needs_reference:
        words.append("reference")
    if objective.needs_second_reference:
        words.append("second reference")
    words += [score.words for score in objective.scores.values() if score.words]
    words += [f"{role} responses" for role in objective.extras if role not in CONTEXT_ROLES]
    words += dict.fromkeys(
        CONTEXT_ROLES[role][0] for role in objective.extras if role in CONTEXT_ROLES
    )
    words += [
        f"{name} {_MEMORY[statistic.memory]}" for name, statistic in objective.statistics.items()
    ]
    return ", ".join(words) or "nothing else"


def paper(objective: Objective) -> str:
    """The source as a link where it is an arXiv identifier."""
    source = objective.paper
    return f"https://arxiv.org/abs/{source}" if source[:4].isdigit() else source


def _hyper(objective: Objective) -> str:
    return (
        ", ".join(
            f"{name} {str(v).lower() if isinstance(v, bool) else v}"
            for name, v in objective.hyper.items()
        )
        or "-"
    )


def _as_dict(objective: Objective) -> dict[str, object]:
    return {
        "name": objective.name,
        "family": objective.family,
        "needs": needs(objective),
        "formula": objective.formula,
        "hyper": objective.hyper,
        "paper": objective.paper,
    }


def _table() -> str:
    width = shutil.get_terminal_size((100, 24)).columns
    name_width = max(map(len, OBJECTIVES)) + 2
    lines = []
    for title, section in SECTIONS.items():
        lines += ["", title, ""]
        for o in section.values():
            lines.append(f"  {o.name:<{name_width}}{o.formula}")
            facts = f"{o.family}; needs {needs(o)}; {_hyper(o)}; {o.paper}"
            indent = " " * (name_width + 2)
            lines += textwrap.wrap(
                facts, max(60, width), initial_indent=indent, subsequent_indent=indent
            )
    return "\n".join(lines[1:]) + (
        f"\n\n{NOTATION}.\nfastpo objectives NAME shows one in full; a recipe may mix them: "
        "objective: {dpo: 1, sft: 0.1}"
    )


def markdown() -> str:
    """The catalogue as it stands in docs/objectives.md."""
    lines = [f"{NOTATION}. Families: " + "; ".join(f"{k}, {v}" for k, v in FAMILIES.items()) + "."]
    for title, section in SECTIONS.items():
        lines += ["", f"### {title}", "", "| name | loss | family | needs | defaults | paper |"]
        lines += ["|---|---|---|---|---|---|"]
        for o in section.values():
            source = f"[{o.paper}]({paper(o)})" if o.paper[:4].isdigit() else o.paper
            formula = o.formula.replace("|", "\\|")
            lines.append(
                f"| `{o.name}` | `{formula}` | {o.family} | {needs(o)} | {_hyper(o)} | {source} |"
            )
    return "\n".join(lines)


def markdown_scores() -> str:
    """Return the table of scores as it stands in docs/objectives.md."""
    lines = ["| name | shape | definition |", "|---|---|---|"]
    for name, score in SCORES.items():
        # A bar would end the cell.
        definition = score.definition.replace(r"\|", r"\Vert")
        lines.append(f"| `{name}` | `{score.shape}` | {definition} |")
    return "\n".join(lines)


def _one(o: Objective, reference: str) -> str:
    # As a key of its own GRPO's max_length is the data's, and another's learning_rate the run's.
    taken = {field.name for field in dataclasses.fields(DataSettings)}
    long = set(o.hyper) if o.name not in OBJECTIVES else taken
    keys = {k: f"{o.name}.{k}" if k in long else k for k in o.hyper}
    rows = {
        "formula": o.formula,
        "compares": FAMILIES[o.family],
        "needs": needs(o),
        "defaults": _hyper(o),
        **({"grades": str(o.grades({}))} if "score" in o.needs else {}),
        "paper": paper(o),
        "recipe": "\n".join(
            [
                f"objective: {reference}",
                *(
                    f"{keys[k]}: {json.dumps(v)}  # {in_words(o.expected(k))}"
                    for k, v in o.hyper.items()
                ),
            ]
        ),
    }
    lines = [o.name, ""]
    for name, text in rows.items():
        first, *others = text.split("\n")
        lines += [f"  {name:<10}{first}", *(f"{'':12}{line}" for line in others)]
    document = inspect.getdoc(o.fn)
    return "\n".join([*lines, "", textwrap.indent(document or "", "  ")])


def objectives(arguments: argparse.Namespace) -> int:
    """Print the table, or one objective."""
    if arguments.markdown and (arguments.json or arguments.name is not None):
        raise ValueError("--markdown prints the whole table: drop it, or what is beside it")
    if arguments.name is not None:
        o = get_objective(arguments.name)
        print(json.dumps(_as_dict(o), indent=2) if arguments.json else _one(o, arguments.name))
    elif arguments.markdown:
        print(markdown())
    elif arguments.json:
        print(json.dumps([_as_dict(o) for o in OBJECTIVES.values()], indent=2))
    else:
        print(_table())
    return 0
