"""Single cells of a row: numbers, switches, spans and lists, each checked and named where wrong."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastpo.data.bad_rows import BadField
from fastpo.data.example import Span
from fastpo.data.messages import is_sequence, parsed, plain


def read_number(name: str, value: Any) -> float:
    """Return a finite number; BadField for anything else, as in all functions here."""
    kinds = (int, float, np.integer, np.floating, str)  # CSV has no numbers
    try:
        number = float(value) if isinstance(value, kinds) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise BadField(name, "not a finite number", value)
    return number


def read_weight(value: Any) -> float:
    """Return a row's weight, which is not negative."""
    try:
        weight = read_number("weight", value)
    except BadField as bad:
        reason = f"{bad.reason}, and every objective weighs rows by it: rename the column if it "
        raise BadField("weight", reason + "means something else", value) from None
    if weight < 0:
        raise BadField("weight", "negative", weight)
    return weight


def read_switch(name: str, value: Any) -> bool:
    """Return what a cell says, true or false."""
    said = {"true": True, "false": False}.get(str(value).strip().lower())  # CSV has no bools
    if said is None:
        raise BadField(name, "neither true nor false", value)
    return said


def read_population(value: Any) -> int:
    """Return a number for a population's name, the same in every process; 3.0 is 3."""
    if isinstance(value, (float, np.floating)) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise BadField("group", "a number of more than 64 bits", value)
        return int(value)
    if not isinstance(value, str):
        raise BadField("group", "neither a name nor a whole number", value)
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest(), "big")


def one_each(row: Mapping[str, Any], name: str, count: int, what: str) -> Sequence[Any] | None:
    """Return a column with one item a response, or None where the row has none."""
    values = parsed(name, row.get(name))
    if values is None:
        return None
    if not is_sequence(values) or len(values) != count:
        length = len(values) if is_sequence(values) else 1
        raise BadField(name, f"{length} {what} for {count} responses", values)
    return values


def read_grades(row: Mapping[str, Any], name: str, count: int) -> list[Any] | None:
    """Return the grades of responses, or None where the row has none."""
    values = one_each(row, name, count, name)
    if values is None:
        return None
    return [read_number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def read_arrays(row: Mapping[str, Any], name: str, order: Sequence[int]) -> list[np.ndarray]:
    """Return arrays [R] float32 of finite numbers, one a response, best first."""
    values = one_each(row, name, len(order), "lists of numbers") or ()
    arrays = []
    for i in order:
        where = f"{name}[{i}]"
        if not is_sequence(values[i]):
            raise BadField(where, "not a list of numbers", values[i])
        try:
            array = np.asarray(values[i], dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadField(where, f"not a list of numbers: {error}") from error
        if array.ndim != 1 or not np.isfinite(array).all():
            raise BadField(where, "not a list of finite numbers", values[i])
        arrays.append(array)
    return arrays


def read_spans(name: str, value: Any) -> list[Span]:
    """Return spans that are written as [start, stop, weight]."""
    spans = []
    value = [] if value is None else parsed(name, value)
    if not is_sequence(value):
        raise BadField(name, "not a list of [start, stop, weight]", value)
    for i, item in enumerate(value):
        where = f"{name}[{i}]"
        if not is_sequence(item) or len(item) != 3:
            raise BadField(where, "not [start, stop, weight]", item)
        start, stop, weight = (read_number(where, x) for x in item)
        if start != int(start) or stop != int(stop) or not 0 <= start < stop:
            raise BadField(where, "start and stop are no characters of a text", item)
        spans.append(Span(int(start), int(stop), weight))
    return spans


def read_span_lists(row: Mapping[str, Any], name: str, count: int) -> list[list[Span]] | None:
    """Return the spans of each response, or None where the row has none."""
    values = one_each(row, name, count, "lists of spans")
    if values is None:
        return None
    return [read_spans(f"{name}[{i}]", value) for i, value in enumerate(values)]


def refuse_spans(row: Mapping[str, Any], reason: str, *names: str) -> None:
    """Refuse spans in columns that this kind of row does not read."""
    for name in names:
        value = parsed(name, row.get(name))
        if value is not None and not (is_sequence(value) and not len(value)):
            raise BadField(name, reason, value)


def read_chunk_spans(value: Any) -> list[tuple[int, int]]:
    """Return intervals in order that are written as [start, stop]."""
    value = parsed("chunk_spans", value)
    if not is_sequence(value) or not len(value):
        raise BadField("chunk_spans", "not a list of [start, stop]", value)
    spans, end = [], 0
    for i, item in enumerate(value):
        where = f"chunk_spans[{i}]"
        if not is_sequence(item) or len(item) != 2:
            raise BadField(where, "not [start, stop]", item)
        start, stop = (read_number(where, x) for x in item)
        if start != int(start) or stop != int(stop) or not end <= start < stop:
            raise BadField(where, "empty, or begins before the one in front of it ends", item)
        spans.append((int(start), end := int(stop)))
    return spans


def read_tools(value: Any) -> list[Any]:
    """Return tools beside text; a word in a column of that name is none of ours."""
    try:
        value = plain(parsed("tools", value))
    except BadField:
        return []
    return value if isinstance(value, list) else []


def read_template_kwargs(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row's own arguments of its chat template, tools included."""
    kwargs = parsed("chat_template_kwargs", row.get("chat_template_kwargs", {}))
    if not isinstance(kwargs, Mapping):
        raise BadField("chat_template_kwargs", "not a dict", kwargs)
    tools = parsed("tools", row.get("tools"))
    # An empty list makes some templates write an empty tool section.
    tools = plain(tools)
    return {**plain(kwargs), **({"tools": tools} if tools else {})}
