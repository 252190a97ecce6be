"""Modules by the names that they had before: each still imports, with one line of deprecation."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "fastpo.by_groups": ("fastpo.loss.group_chunks",),
    "fastpo.cli.models": (
        "fastpo.cli.terminal",
        "fastpo.model.opening",
    ),
    "fastpo.cli.token_view": ("fastpo.report.tokens",),
    "fastpo.data.build": (
        "fastpo.data.options",
        "fastpo.data.builder",
        "fastpo.data.dataset",
        "fastpo.data.stream",
        "fastpo.data.source_rows",
    ),
    "fastpo.data.fit": ("fastpo.train.preflight",),
    "fastpo.data.follow_ups": ("fastpo.scoring.follow_ups",),
    "fastpo.data.schedules": ("fastpo.data.curation",),
    "fastpo.data.scored_weights": ("fastpo.scoring.rules",),
    "fastpo.model.attention_flex": ("fastpo.model.attention.flex",),
    "fastpo.model.attention_merge": ("fastpo.model.attention.merge",),
    "fastpo.model.attention_segments": ("fastpo.model.attention.segments",),
    "fastpo.model.attention_varlen": ("fastpo.model.attention.varlen",),
    "fastpo.model.check": ("fastpo.model.self_check",),
    "fastpo.model.facts": ("fastpo.model.head_facts",),
    "fastpo.model.scoring": ("fastpo.scoring.scorer",),
    "fastpo.model.shared_row": ("fastpo.model.attention.shared_row",),
    "fastpo.objectives.domain": (
        "fastpo.domain",
        "fastpo.objectives.vocabulary",
    ),
    "fastpo.objectives.fused": ("fastpo.loss.fused",),
    "fastpo.objectives.policy": ("fastpo.objectives.policy_gradient",),
    "fastpo.online": ("fastpo.head.online_softmax",),
    "fastpo.ops": ("fastpo.head.op",),
    "fastpo.plan": (
        "fastpo.planner.memory",
        "fastpo.planner.advice",
    ),
    "fastpo.schedules": ("fastpo.head.schedule",),
    "fastpo.scores": (
        "fastpo.segments",
        "fastpo.loss.scores",
    ),
    "fastpo.sharding": (
        "fastpo.head.vocab_parallel",
        "fastpo.distributed",
    ),
    "fastpo.tiles": (
        "fastpo.head.types",
        "fastpo.head.backend",
    ),
    "fastpo.torch_tiles": ("fastpo.head.torch_backend",),
    "fastpo.train.chart": (
        "fastpo.report.chart",
        "fastpo.report.text",
    ),
    "fastpo.train.checkpoint": ("fastpo.run.checkpoint",),
    "fastpo.train.diagnosis": ("fastpo.report.diagnosis",),
    "fastpo.train.folder": ("fastpo.run.folder",),
    "fastpo.train.recipe": (
        "fastpo.recipe.recipe",
        "fastpo.recipe.keys",
        "fastpo.recipe.reading",
        "fastpo.train.sections",
    ),
    "fastpo.train.reference": ("fastpo.reference.live",),
    "fastpo.train.report": (
        "fastpo.report.page",
        "fastpo.report.card",
        "fastpo.report.text",
    ),
    "fastpo.train.run": (
        "fastpo.run.record",
        "fastpo.reading",
    ),
    "fastpo.train.store": ("fastpo.reference.store",),
    "fastpo.train.sync": ("fastpo.reference.moving",),
    "fastpo.train.values": (
        "fastpo.recipe.values",
        "fastpo.yaml_text",
        "fastpo.errors",
    ),
    "fastpo.train.weigh": ("fastpo.scoring.weigh",),
    "fastpo.triton_tiles": ("fastpo.head.triton_backend",),
}
"""A module's old name -> the modules that hold its names now."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find what no file has: a module under its old name, filled from the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Bind the names of the new modules; their own imports are theirs, and come along."""
        names: dict[str, Any] = {}
        for name in MOVED[module.__name__]:
            names |= vars(importlib.import_module(name))
        vars(module).update({k: v for k, v in names.items() if not k.startswith("__")})
        here = " and ".join(MOVED[module.__name__])
        # 2: whoever imports; the import system's own frames are not counted.
        warnings.warn(f"{module.__name__} is {here} now", FutureWarning, stacklevel=2)


def install() -> None:
    """Look for old names last, where no file has them."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
