"""What a run leaves behind for people: report.html, one file that works offline, and a model card.

Both are drawn from the files of the run's folder, so they can be made again at any time, while
the run goes on, and by scripts that never saw `fastpo train`.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastpo.report.chart import MANY, Series, chart, short
from fastpo.report.diagnosis import find_warnings
from fastpo.run.folder import CARD, REPORT, write_sealed
from fastpo.run.record import Run, ends, finite, number
from fastpo.yaml_text import written


class Panel(NamedTuple):
    """One chart of the report: (metric, label, tone) lines under a title and a reading aid."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    aid: str
    bounds: tuple[float, float] | None = None


PANELS = (
    Panel("Loss", (("loss", "train", "a"), ("eval_loss", "eval", "b")), "down is good"),
    Panel(
        "Accuracy",
        (("rewards/accuracies", "train", "a"), ("eval_rewards/accuracies", "eval", "b")),
        "share of pairs ranked right; 0.5 is chance",
        (0.0, 1.0),
    ),
    Panel(
        "Rewards",
        (("rewards/chosen", "chosen", "good"), ("rewards/rejected", "rejected", "bad")),
        "implicit rewards; chosen should not sink",
    ),
    Panel(
        "Margin",
        (("rewards/margins", "train", "a"), ("eval_rewards/margins", "eval", "b")),
        "chosen minus rejected reward",
    ),
    Panel(
        "Log-probability",
        (("logps/chosen", "chosen", "good"), ("logps/rejected", "rejected", "bad")),
        "nats a response; both sinking is a warning",
    ),
    Panel(
        "Distance from the reference",
        (("kl/chosen", "chosen", "good"), ("kl/rejected", "rejected", "bad")),
        "nats a response; kl_budget ends a run here",
    ),
    Panel("Gradient norm", (("grad_norm", "norm", "a"),), "spikes point at single rows"),
    Panel("Learning rate", (("learning_rate", "rate", "a"),), "as scheduled"),
)


def _panels(run: Run) -> list[Panel]:
    """The fixed panels and one for each logged entropy, speed and memory."""
    panels = list(PANELS)
    aids = {
        "entropy": "nats a token; collapse shows here",
        "second": "speed of training",
        "memory": "peak so far",
    }
    for key in run.names():
        words = key.replace("/", "_").split("_")
        word = next((w for w in aids if w in words), None)
        # The closing line of a run repeats its speed as train_...: one point, no curve.
        if word and words[0] not in ("eval", "train"):
            title = " ".join(words).capitalize().replace("gib", "(GiB)")
            panels.append(Panel(title, ((key, "train", "a"),), aids[word]))
    return panels


STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1d2129;--soft:#676e7b;--rule:#e4e2dd;
--a:#3563c9;--b:#c2410c;--good:#0f8a6d;--bad:#c2410c;--stop:#b3261e;--warn:#a16207;--tint:#f3f1ec}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1b1e24;--ink:#dcdfe5;--soft:#949cab;
--rule:#2c313a;--a:#7aa2f7;--b:#f0a35e;--good:#5ac8a8;--bad:#f0a35e;--stop:#ff8a80;--warn:#e3b341;
--tint:#22262e}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:44px 24px 72px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:19px;margin:48px 0 14px;letter-spacing:-.005em}
.sub{color:var(--soft);margin:0}.mono,pre,code{font-family:ui-monospace,SFMono-Regular,Menlo,
Consolas,monospace;font-size:.87em}
.formula{margin:14px 0 0;padding:10px 14px;background:var(--tint);border-radius:8px;
overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;
margin-top:26px}
.tile,.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:13px 15px}.tile b{display:block;white-space:nowrap;font-size:23px;font-weight:600;
line-height:1.25;
letter-spacing:-.01em}.tile span{color:var(--soft);font-size:13.5px;display:block}
.alert{border-left:4px solid var(--soft);background:var(--card);border-radius:4px 10px 10px 4px;
padding:11px 16px;margin:10px 0;border-top:1px solid var(--rule);border-right:1px solid var(--rule);
border-bottom:1px solid var(--rule)}
.alert.stop{border-left-color:var(--stop)}.alert.warn{border-left-color:var(--warn)}
.alert b{display:block}.alert.stop b{color:var(--stop)}.alert.warn b{color:var(--warn)}
.alert p{margin:2px 0 0}
.fine{color:var(--good);margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px}
figure{margin:0;padding:12px 14px 6px}figcaption{display:flex;flex-wrap:wrap;gap:0 10px;
align-items:baseline;margin-bottom:8px}figcaption b{font-size:15px}
figcaption small{color:var(--soft);font-size:12.5px;flex-basis:100%}
.key{font-size:12.5px;white-space:nowrap}.key:before{content:"";display:inline-block;width:14px;
height:3px;border-radius:2px;background:currentColor;vertical-align:middle;margin-right:5px}
.keys{margin-left:auto;display:flex;gap:10px}
.a{color:var(--a)}.b{color:var(--b)}.good{color:var(--good)}.bad{color:var(--bad)}
svg{display:block;width:100%;height:auto}.grid{stroke:var(--rule)}.zero{stroke:var(--soft);
stroke-dasharray:3 3}.tick{fill:var(--soft);font-size:11px}
polyline{fill:none;stroke:currentColor;stroke-linejoin:round;stroke-linecap:round}
.line{stroke-width:2}.thin{stroke-width:1.3;stroke-dasharray:2 3}.raw{stroke-width:1;opacity:.28}
.dot{fill:currentColor}.hit{fill:transparent}
.sample{margin-bottom:18px}.prompt{padding:12px 16px;border-bottom:1px solid var(--rule);
color:var(--soft);max-height:170px;overflow:auto}.text{white-space:pre-wrap;overflow-wrap:anywhere}
.two{display:grid;grid-template-columns:1fr 1fr}.two>div{padding:12px 16px 16px;min-width:0}
.two>div+div{border-left:1px solid var(--rule)}
.tag{font-size:12px;letter-spacing:.04em;color:var(--soft);margin-bottom:4px}
.two .text{max-height:340px;overflow:auto}
@media (max-width:700px){.two{grid-template-columns:1fr}.two>div+div{border-left:0;
border-top:1px solid var(--rule)}}
table{border-collapse:collapse;width:100%;font-size:14.5px}td,th{text-align:left;
padding:6px 14px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top;
overflow-wrap:anywhere}th{font-weight:600;color:var(--soft)}
td.n,th.n{text-align:right;white-space:nowrap}
.wide{overflow-x:auto}.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));
gap:0 44px}.pair td:first-child{color:var(--soft);width:50%}
details{margin-top:14px}summary{cursor:pointer;color:var(--soft)}
.sample details{margin:0;padding:10px 16px;border-top:1px solid var(--rule)}
footer{margin-top:56px;color:var(--soft);font-size:13.5px}
@media print{body{background:#fff}figure,.card,.tile,.alert{break-inside:avoid}}
"""


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _value(value: Any) -> str:
    """A configuration value as YAML would write it on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "[]"
    return str(value)


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{_e(k)}</td><td class=mono>{_e(_value(v))}</td></tr>" for k, v in rows.items()
    )
    return f"<div class=wide><table>{cells}</table></div>"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d}"
    return (
        f"{minutes} min" if minutes > 9 else f"{minutes}:{secs:02d} min" if minutes else f"{secs} s"
    )


def _count(value: Any) -> str:
    return f"{number(value):,.0f}" if math.isfinite(number(value)) else "-"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(number, name, remark): what one wants to know first."""
    tiles = []
    for key, name in (
        ("rewards/accuracies", "accuracy"),
        ("rewards/margins", "margin"),
        ("loss", "loss"),
    ):
        curve = run.curve(key)
        if finite(curve):
            before, after = ends(curve)
            held = finite(run.curve(f"eval_{key}"))
            remark = f"eval {held[-1][1]:.3g}" if held else f"from {before:.3g}"
            tiles.append((f"{after:.3g}", name, remark))
    data = run.facts.get("data", {})
    saved, plain = number(data.get("tokens")), number(data.get("unshared_tokens"))
    if saved < plain:
        tiles.append((f"{1 - saved / plain:.0%}", "tokens saved", "by one prompt copy"))
    for key in run.names():
        if "tokens_per_second" in key and not key.startswith(("eval_", "train_")):
            tiles.append((short(ends(run.curve(key))[1]), "tokens / s", "while training"))
            break
    memory = [k for k in run.names() if "memory" in k and not k.startswith("eval_")]
    if memory and finite(run.curve(memory[0])):
        peak = max(v for _, v in finite(run.curve(memory[0])))
        tiles.append((f"{peak:.3g}", "GiB of memory", "at the peak"))
    if math.isfinite(number(run.facts.get("seconds"))):
        tiles.append((_duration(run.facts["seconds"]), "of training", f"{run.steps} steps"))
    return tiles


def _sample(index: int, row: Mapping[str, Any]) -> str:
    sides = "".join(
        f"<div><div class=tag>{name}</div><div class=text>{_e(row.get(name, '')) or '<i>empty</i>'}"
        "</div></div>"
        for name in ("before", "after")
    )
    chosen = row.get("chosen")
    extra = (
        f"<details><summary>the preferred answer in the data</summary><div class=text>{_e(chosen)}"
        "</div></details>"
        if chosen
        else ""
    )
    return (
        f"<div class='card sample'><div class='prompt text'><div class=tag>prompt {index}</div>"
        f"{_e(row.get('prompt', ''))}</div><div class=two>{sides}</div>{extra}</div>"
    )


def metric_rows(run: Run) -> list[tuple[str, float, float, float]]:
    """(metric, start, end, last evaluation) of the metrics that both train and eval log."""
    rows = []
    for key in run.names():
        if key.startswith(("eval_", "train_")) or not key.startswith(
            ("loss", "rewards/", "logps/")
        ):
            continue
        held = finite(run.curve(f"eval_{key}"))
        rows.append((key, *ends(run.curve(key)), held[-1][1] if held else math.nan))
    return rows


def write_report(output_dir: str | Path) -> Path:
    """Write report.html into a run's folder from the files that lie there.

    Reads metrics.jsonl (else the log history in trainer_state.json), run.json, recipe.yaml,
    samples.jsonl and skipped.jsonl; any of them may be missing.

    Returns:
        The report's path.

    Raises:
        ValueError: `output_dir` is no folder, or holds a file of that name that this tool did not
            write, or that was edited.
    """
    run = Run.read(output_dir)
    facts = run.facts
    model = facts.get("model", {}).get("name") or run.recipe.get("model", "")
    dataset = facts.get("data", {}).get("name") or run.recipe.get("dataset", "")
    out = [
        f"<h1>{_e(run.folder.resolve().name)}</h1>",
        f"<p class=sub>{_e(run.objective)}{_e(f' on {model}') if model else ''}"
        f"{_e(f', trained with {dataset}') if dataset else ''}</p>",
    ]
    formula = facts.get("objective", {}).get("formula")
    if formula:
        out.append(f"<div class='formula mono'>{_e(formula)}</div>")
    tiles = "".join(
        f"<div class=tile><b>{_e(v)}</b><span>{_e(n)}</span><span>{_e(r)}</span></div>"
        for v, n, r in _tiles(run)
    )
    out.append(f"<div class=tiles>{tiles}</div>" if tiles else "")

    out.append("<h2>What to look at first</h2>")
    warnings = find_warnings(run)
    out += [
        f"<div class='alert {w.level}'><b>{_e(w.title)}</b><p>{_e(w.text)}</p></div>"
        for w in warnings
    ]
    if not run.log:
        out.append("<p class=sub>No metrics were logged yet.</p>")
    elif not warnings:
        out.append("<p class=fine>Nothing in the numbers speaks against this run.</p>")

    figures = []
    for panel in _panels(run):
        lines = [
            Series(label, run.curve(key), tone, dots=key.startswith("eval_"))
            for key, label, tone in panel.lines
        ]
        svg = chart(lines, bounds=panel.bounds)
        if svg:
            shown = [s for s in lines if finite(s.curve)]
            keys = "".join(f"<span class='key {s.tone}'>{_e(s.label)}</span>" for s in shown)
            figures.append(
                f"<figure><figcaption><b>{_e(panel.title)}</b>"
                f"<span class=keys>{keys if len(shown) > 1 else ''}</span>"
                f"<small>{_e(panel.aid)}</small></figcaption>{svg}</figure>"
            )
    if figures:
        out.append(f"<h2>Curves</h2><div class=charts>{''.join(figures)}</div>")
        if any(len(finite(run.curve(k))) > MANY for p in PANELS for k, *_ in p.lines):
            out.append(
                "<p class=sub>Bold lines are running means, the shadow is what was logged.</p>"
            )
    rows = metric_rows(run)
    if rows:
        body = "".join(
            f"<tr><td class=mono>{_e(k)}</td>"
            + "".join(f"<td class=n>{short(v)}</td>" for v in values)
            + "</tr>"
            for k, *values in rows
        )
        out.append(
            "<details><summary>the same in numbers</summary><div class=wide><table><tr><th>metric"
            "</th><th class=n>first fifth</th><th class=n>last fifth</th><th class=n>last eval</th>"
            f"</tr>{body}</table></div></details>"
        )

    if run.samples:
        out.append("<h2>Before and after</h2>")
        out += [_sample(i, row) for i, row in enumerate(run.samples, 1)]

    data = facts.get("data", {})
    if data or run.skipped:
        out.append("<h2>Data</h2>")
        named = {
            "groups": "groups",
            "eval_groups": "groups held out",
            "responses": "responses",
            "tokens": "tokens, one prompt copy",
            "unshared_tokens": "tokens, a copy per response",
            "label_tokens": "tokens scored",
            "longest": "longest group (tokens)",
            "context": "longest prompt and response (real tokens)",
            "synthetic_context": "the same in synthetic positions",
        }
        table = {label: _count(data[key]) for key, label in named.items() if key in data}
        out.append(f"<div class=pair>{_table(table)}</div>" if table else "")
    if run.skipped:
        body = "".join(
            f"<tr><td>{_e(r.get('source', ''))}</td><td class=n>{_e(r.get('row', ''))}</td>"
            f"<td>{_e(r.get('field', ''))}</td><td>{_e(r.get('reason', ''))}</td></tr>"
            for r in run.skipped[:20]
        )
        rest = len(run.skipped) - 20
        more = f"<p class=sub>and {rest} more in skipped.jsonl</p>" if rest > 0 else ""
        out.append(
            "<details open><summary>skipped rows</summary><div class=wide><table><tr><th>source"
            f"</th><th class=n>row</th><th>field</th><th>reason</th></tr>{body}</table></div>{more}"
            "</details>"
        )

    stamp = facts.get("environment", {})
    left = {k: v for k, v in run.recipe.items()}
    right: dict[str, Any] = {}
    for key, label in (("parameters", "parameters"), ("trainable", "trained parameters")):
        if key in facts.get("model", {}):
            right[label] = _count(facts["model"][key])
    for key in ("reference", "schedule"):
        if key in facts:
            right[key] = facts[key]
    right |= dict(stamp.get("versions", {}))
    right |= {k: stamp[k] for k in ("python", "system", "devices") if k in stamp}
    if left or right:
        out.append(f"<h2>How it was made</h2><div class=pair>{_table(left)}{_table(right)}</div>")
    if facts.get("arguments"):
        out.append(
            "<details><summary>every training argument</summary>"
            f"{_table(facts['arguments'])}</details>"
        )
    out.append(
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} from the files in "
        f"<span class=mono>{_e(run.folder.resolve().name)}/</span>; "
        "<span class=mono>fastpo report</span> draws it again.</footer>"
    )
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{_e(run.folder.resolve().name)}: {_e(run.objective)}</title>"
        f"<style>{STYLE}</style></head><body><main>{''.join(out)}</main></body></html>"
    )
    path = run.folder / REPORT
    write_sealed(path, page)
    return path


def _on_hub(name: Any) -> bool:
    """Whether a name can only be a repository's: `owner/name`, and no file or folder of ours."""
    return (
        isinstance(name, str)
        and name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not Path(name).suffix.startswith((".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz"))
        and not Path(name).exists()
    )


def write_model_card(output_dir: str | Path, *, title: str | None = None) -> Path:
    """Write README.md, a Hugging Face model card, into a run's folder from the files there.

    Args:
        output_dir: the run's folder.
        title: first heading; the folder's name by default.

    Returns:
        The card's path.

    Raises:
        ValueError: `output_dir` is no folder, or holds a file of that name that this tool did not
            write, or that was edited.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = Run.read(output_dir)
    facts = run.facts
    base = facts.get("model", {}).get("name") or run.recipe.get("model")
    dataset = facts.get("data", {}).get("name") or run.recipe.get("dataset")
    names = [n.split(" ", 1)[-1] for n in run.objective.split(" + ")]
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        library_name="peft" if run.recipe.get("lora") else "transformers",
        pipeline_tag="text-generation",
        tags=["fastpo", "preference-optimization", *names],
        datasets=[str(dataset)] if _on_hub(dataset) else None,
    )
    title = title or run.folder.resolve().name
    lines = [f"# {title}", ""]
    lines += [
        f"Fine-tuned from `{base}` on preference data with `{run.objective}`."
        if base
        else f"Trained on preference data with `{run.objective}`.",
        "",
    ]
    objective = facts.get("objective", {})
    lines += ["## Objective", ""]
    if objective.get("formula"):
        lines += ["```text", objective["formula"], "```", ""]
    if objective.get("hyper"):
        lines += [f"Hyper-parameters: {_value(objective['hyper'])}.", ""]
    if objective.get("paper"):
        lines += [f"Paper: {objective['paper']}.", ""]
    if facts.get("reference"):
        lines += [f"Reference: {facts['reference']}.", ""]
    counts = facts.get("data", {})
    lines += ["## Data", "", f"`{dataset}`" if dataset else "Not recorded.", ""]
    if "groups" in counts:
        lines += [
            f"{_count(counts['groups'])} groups, {_count(counts.get('tokens'))} tokens with one "
            f"prompt copy per group, {len(run.skipped)} rows skipped.",
            "",
        ]
    if "synthetic_context" in counts:
        lines += [
            f"No context has more than {_count(counts['context'])} tokens; synthetic positions "
            f"spread them over {_count(counts['synthetic_context'])}.",
            "",
        ]
    rows = metric_rows(run)
    if rows:
        lines += [
            f"## Metrics after {run.steps} steps",
            "",
            "| metric | first fifth | last fifth | last eval |",
            "|---|---:|---:|---:|",
            *(f"| {k} | {' | '.join(short(v) for v in values)} |" for k, *values in rows),
            "",
        ]
    warnings = [w for w in find_warnings(run) if w.level != "note"]
    if warnings:
        lines += ["## Known weaknesses of this run", ""]
        lines += [f"- **{w.title}.** {w.text}" for w in warnings] + [""]
    versions = facts.get("environment", {}).get("versions", {})
    if versions:
        lines += ["## Versions", "", ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", ""]
    if run.recipe:
        recipe = written(run.recipe)
        lines += ["## Recipe", "", "```yaml", recipe.rstrip(), "```", ""]
    path = run.folder / CARD
    write_sealed(path, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))))
    return path
