"""README.md of a run's folder: a Hugging Face model card, drawn from the files there."""

from __future__ import annotations

from pathlib import Path

from fastpo.report.diagnosis import find_warnings
from fastpo.report.templates import fill
from fastpo.report.text import count, metrics, setting
from fastpo.run.folder import CARD, write_sealed
from fastpo.run.record import Run
from fastpo.yaml_text import written


def _on_hub(name: object) -> str | None:
    """Return a name that can only be a repository's, `owner/name`, no file or folder; else None."""
    files = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz")
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    return None if Path(name).suffix.startswith(files) or Path(name).exists() else name


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
        PackageError: jinja2 is not installed.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = Run.read(output_dir)
    data = run.section("data")
    base = run.section("model").get("name") or run.recipe.get("model")
    dataset = data.get("name") or run.recipe.get("dataset")
    on_hub = _on_hub(dataset)
    names = [name.split(" ", 1)[-1] for name in run.objective.split(" + ")]
    metadata = ModelCardData(
        base_model=_on_hub(base),
        library_name="peft" if run.recipe.get("lora") else "transformers",
        pipeline_tag="text-generation",
        tags=["fastpo", "preference-optimization", *names],
        datasets=[on_hub] if on_hub else None,
    )
    versions = run.section("environment").get("versions")
    text = fill(
        "card.md.j2",
        metadata=metadata.to_yaml(),
        title=title or run.folder.resolve().name,
        run=run,
        base=base,
        dataset=dataset,
        data=data,
        objective=run.section("objective"),
        metrics=metrics(run),
        warnings=[w for w in find_warnings(run) if w.level != "note"],
        versions=versions if isinstance(versions, dict) else {},
        recipe=written(run.recipe).rstrip() if run.recipe else "",
        count=count,
        setting=setting,
    )
    path = run.folder / CARD
    write_sealed(path, str(ModelCard(text)))
    return path
