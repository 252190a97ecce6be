"""Read and write YAML 1.2 scalars.

`5e-7` is a number and `no` is the word that `eval_strategy` takes; PyYAML's own rules, those of
YAML 1.1, read them as text and as false, and `010` as eight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import yaml

_OLDER = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "timestamp")}


class Loader(yaml.SafeLoader):
    """Read YAML 1.2 core scalars: 5e-7 is a float, 010 is ten, 1:30 and 2026-01-01 are text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0] not in _OLDER]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?\d[\d_]*|0o[0-7]+|0x[\da-fA-F]+)$"),
    list("-+0123456789"),
)


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class Dumper(yaml.SafeDumper):
    """Quote text that PyYAML or `Loader` would read as something else, such as `1e10`."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *Loader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
    }


def written(values: Mapping[str, object]) -> str:
    """Return a mapping as YAML, which `parse` reads back as it was."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


_MOST_NODES = 100_000


def _nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the nodes that a node has once its aliases are written out."""
    if id(node) not in counts:
        counts[id(node)] = 0  # meanwhile: an alias inside itself
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [each for pair in node.value for each in pair]
        counts[id(node)] = 1 + sum(_nodes(child, counts) for child in children)
    if not 0 < counts[id(node)] <= _MOST_NODES:
        raise yaml.YAMLError("aliases that stand inside themselves, or for too much")
    return counts[id(node)]


def parse(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the node and the value of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, or YAML that no recipe can mean.
    """
    try:
        node = yaml.compose(text, Loader)
        if node is not None:
            _nodes(node, {})
        return node, yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError("brackets inside brackets without end") from None
    except ValueError as error:  # `!!int x`, an integer of thousands of digits
        raise yaml.YAMLError(str(error).partition(";")[0]) from error


def scalar(text: str) -> Any:
    """Return a flag's value: YAML, and plain text where YAML sees no value (`a: b: c`, `@x`)."""
    try:
        return parse(text)[1]
    except yaml.YAMLError:
        return text
