"""Read rows of LOGO's official code (arXiv 2410.18533), and prompts that are made of chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastpo.data.bad_rows import BadField
from fastpo.data.example import Example
from fastpo.data.messages import is_sequence, parsed

# Columns of LOGO's official code, after its post-processing (arXiv 2410.18533).
LOGO = {
    "chunks": ("all_ref_text",),
    "question": ("combined_question",),
    "chosen": ("final_answer",),
    "partial": ("prefix_a",),  # the answer to half of the critical chunks
    "wrong": ("suffix_a", "siffix_a"),  # to none of them; one of its scripts misspells it
}


def joined_chunks(chunks: Sequence[str], question: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a prompt, chunks and then the question, and each chunk's characters."""
    text, spans = "", []
    for chunk in chunks:
        spans.append((len(text), len(text) + len(chunk)))
        text += f"{chunk}\n\n"
    return text + question, spans


def read_logo(row: Mapping[str, Any]) -> Example:
    """Read a row of LOGO's authors: a prompt of chunks, and a list of three responses."""

    def text(part: str) -> str:
        name = next((name for name in LOGO[part] if name in row), LOGO[part][0])
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise BadField(name, "missing or not text", value)
        return value

    chunks = parsed("all_ref_text", row["all_ref_text"])
    if not is_sequence(chunks) or not all(isinstance(c, str) and c.strip() for c in chunks):
        raise BadField("all_ref_text", "not a list of texts", chunks)
    prompt, spans = joined_chunks(chunks, text("question"))
    return Example(
        prompt=[{"role": "user", "content": prompt}],
        responses=[
            [{"role": "assistant", "content": text(part)}]
            for part in ("chosen", "partial", "wrong")
        ],
        names=["final_answer", "prefix_a", "suffix_a"],
        labels=[True, False, False],
        ranks=[0, 1, 1],  # the two may be alike
        scores=[None, None, None],
        ranked=True,
        chunk_spans=spans,
    )
