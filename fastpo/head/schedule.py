r"""The head's schedules: which matrix products run, in what order, in how much workspace.

| name        | when                                        | matmuls     | kept for backward     |
|-------------|---------------------------------------------|-------------|-----------------------|
| `forward`   | nothing requires a gradient                 | h           | nothing               |
| `frozen`    | only the hidden states do                   | h + k       | k buffers [N, D] fp32 |
| `kept`      | the head does too, logits fit the workspace | h + outputs | the logits            |
| `recompute` | the head does too, they do not fit          | 2h + outputs| [N] per statistic     |

One matmul is 2NDV FLOP; h is 2 with a reference head in the same pass, else 1; k is the number of
statistics that carry a gradient; `outputs` counts dH and dW. `frozen` forms
$r_t = \partial stat_t / \partial h_t$ while a chunk of logits is alive, so its backward is an
elementwise scale of each token's row, exact for any loss. `recompute` goes through the vocabulary
in the outer loop: each chunk of dW is finished by one matmul and rounded once, and no fp32 [V, D]
buffer exists. The plain backend keeps the logits of as many columns as the workspace holds and
recomputes only the others.

The kernels' chunks of tokens are equal and whole tiles. Their chunks in the backward pass of
`recompute` hold coefficients alone, and are cut by tokens too where that moves fewer bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# Chunks of the vocabulary start where blocks of the kernels do: ragged ones cost registers.
_VOCAB_MULTIPLE = 128
# Narrower ones would spend their time on reading and writing the [N, D] gradient of the states.
_LEAST_COLUMNS = 1024
# Of kept logits: columns of dW that are summed at a time, 134 MB of fp32 at D = 4096.
_KEPT_COLUMNS = 8192


class Workload(NamedTuple):
    """Hold what one call of a head has to compute."""

    num_tokens: int  # N
    vocab_size: int  # V
    width: int = 0  # D
    dtype: torch.dtype = torch.float32  # of hidden states and weight
    want: tuple[str, ...] = ("logps",)  # statistics
    num_grad_stats: int = 1  # how many of them carry a gradient
    needs_hidden: bool = True  # the hidden states require a gradient
    needs_head: bool = False  # the weight, the bias or a low-rank delta does
    needs_weight: bool | None = None  # the weight does; None for what `needs_head` says
    with_reference: bool = False  # a second head's logits are formed in the same pass
    softcap: float | None = None

    @property
    def itemsize(self) -> int:
        """Return the bytes of an accumulator."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def num_heads(self) -> int:
        """Return how many heads' logits are formed."""
        return 2 if self.with_reference else 1

    @property
    def trains_weight(self) -> bool:
        """Return whether dW is due."""
        return self.needs_head if self.needs_weight is None else self.needs_weight


class Traits(NamedTuple):
    """Hold what a schedule has to know about a backend.

    Args:
        num_chunks: chunks of accumulators that are alive at once.
        largest_chunk: elements above which a chunk only gets slower, or None. Where it is set, as
            many logits are kept as fit beside the chunks, else all where they fit alone, or none.
        multiple: tokens that a matmul takes at a time; chunks of tokens are a multiple of it and
            of equal size. 1 where that does not matter.
    """

    num_chunks: int = 2
    largest_chunk: int | None = None
    multiple: int = 1


_PLAIN = Traits()


class Schedule(NamedTuple):
    """Hold what `choose_schedule` decided, in the words of the module docstring."""

    name: str
    matmuls: float
    chunk_tokens: int
    chunk_columns: int
    late_tokens: int  # of a chunk of the backward pass
    kept: int  # columns whose logits wait for the backward pass
    reason: str


def auto_workspace_mib(card_bytes: int | None) -> int:
    """Return the default workspace: min(1 GiB, 2 % of the card), 256 MiB where there is no card.

    1 GiB is 2048 tokens of V = 131072: fewer would spend more time on the sum of dW, which each
    part of a batch reads and writes, than on its matmuls.
    """
    return 256 if card_bytes is None else min(1024, card_bytes // 50 >> 20)


def even_chunks(total: int, most: int, multiple: int) -> int:
    """Return the size of equal chunks of `total`: whole multiples, at most `most`."""
    most = max(1, most)
    if multiple == 1 or total <= most or most < multiple:
        return min(most, max(1, total))
    most -= most % multiple
    count = -(-total // most)
    return -(-total // (count * multiple)) * multiple


def late_chunk(
    num_tokens: int, element: int, column: int, workspace_bytes: int, multiple: int
) -> tuple[int, int]:
    """Return (tokens, columns) of a chunk of coefficients in the backward pass.

    A chunk of C columns reads and writes dH once, 8 N D bytes; one of R tokens dW once, 8 V D.
    Both together are least where R = C.

    Args:
        element: bytes of a coefficient and what it is made of.
        column: bytes that a column takes whatever its tokens are: its dW in fp32.
    """
    half = column / (2 * element)
    side = int(math.sqrt(half * half + workspace_bytes / element) - half)
    tokens = even_chunks(num_tokens, side, multiple)
    return tokens, max(1, workspace_bytes // (tokens * element + column))


def choose_schedule(
    work: Workload, traits: Traits = _PLAIN, workspace_bytes: int = 256 << 20
) -> Schedule:
    """Return the cheapest schedule by matmuls; among equals the one that keeps less.

    Args:
        traits: of the backend.
        workspace_bytes: the most that the chunks may take together.
    """
    vocab_size, itemsize, num_heads = work.vocab_size, work.itemsize, work.num_heads
    tokens = max(1, work.num_tokens)
    most = workspace_bytes // (vocab_size * itemsize * traits.num_chunks)
    chunk_tokens = even_chunks(tokens, most, traits.multiple)
    late_tokens, columns = _late_sizes(work, traits, workspace_bytes)
    outputs = int(work.needs_hidden) + int(work.trains_weight)

    def schedule(name: str, matmuls: float, reason: str, kept: int = 0) -> Schedule:
        late = work.num_tokens if name == "kept" else late_tokens
        return Schedule(name, matmuls, chunk_tokens, columns, max(1, late), kept, reason)

    if work.num_grad_stats == 0 or not (work.needs_hidden or work.needs_head):
        return schedule("forward", num_heads, "no gradient is needed")
    if not work.needs_head and work.num_grad_stats < num_heads + 1:
        return schedule(
            "frozen", num_heads + work.num_grad_stats, "frozen head: gradient formed in forward"
        )
    column = tokens * itemsize
    if traits.largest_chunk is None:
        # Formed where they are kept, and C is written over them; the chunks of dW come on top.
        kept = workspace_bytes // (num_heads * column)
        columns = min(vocab_size, _KEPT_COLUMNS) if kept >= vocab_size else columns
    else:
        # A reference's logits come with all of their columns: with one, all are kept or none.
        chunk = column * (vocab_size if work.with_reference else columns)
        kept = max(0, workspace_bytes - traits.num_chunks * chunk) // (num_heads * column)
    if kept >= vocab_size:
        return schedule("kept", num_heads + outputs, "the logits fit the workspace", vocab_size)
    kept = 0 if work.with_reference or traits.largest_chunk is None else kept - kept % columns
    return schedule(
        "recompute",
        ((2 * num_heads + outputs) * vocab_size - num_heads * kept) / vocab_size,
        f"{100 * kept // vocab_size}% of {num_heads * column * vocab_size >> 20} MiB of logits fit "
        f"the workspace of {workspace_bytes >> 20} MiB",
        kept,
    )


def _late_sizes(work: Workload, traits: Traits, workspace_bytes: int) -> tuple[int, int]:
    """Return (tokens, columns) of a chunk of the backward pass that recomputes."""
    tokens, itemsize, largest = max(1, work.num_tokens), work.itemsize, traits.largest_chunk
    if largest is None:
        size = work.dtype.itemsize
        # Where the weight has the accumulator's dtype, dW is summed in its place.
        column = itemsize * work.width if work.trains_weight and size < itemsize else 0
        element = itemsize * traits.num_chunks if work.with_reference else size
        late, columns = late_chunk(tokens, element, column, workspace_bytes, traits.multiple)
    else:
        late, columns = tokens, max(1, workspace_bytes // (tokens * itemsize * traits.num_chunks))
        columns = min(columns, max(largest // tokens, _LEAST_COLUMNS))
    if columns > _VOCAB_MULTIPLE:
        columns -= columns % _VOCAB_MULTIPLE
    return late, min(columns, work.vocab_size)
