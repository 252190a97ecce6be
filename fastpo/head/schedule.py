r"""The head's schedules: which matrix products run, in what order, in how much workspace.

| name        | when                                        | products    | kept for backward     |
|-------------|---------------------------------------------|-------------|-----------------------|
| `forward`   | nothing requires a gradient                 | h           | nothing               |
| `frozen`    | only the hidden states do                   | h + k       | k buffers [N, D] fp32 |
| `kept`      | the head does too, logits fit the workspace | h + outputs | the logits            |
| `recompute` | the head does too, they do not fit          | 2h + outputs| [N] per statistic     |

One product is 2NDV FLOP; h is 2 with a reference head in the same pass, else 1; k is the number of
statistics that carry a gradient; `outputs` counts dH and dW. `frozen` forms
$r_t = \partial stat_t / \partial h_t$ while a slab is alive, so its backward is an elementwise row
scale, exact for any loss. `recompute` walks the vocabulary in the outer loop: each slice of dW is
finished by one product and rounded once, and no fp32 [V, D] buffer exists. The plain backend keeps
the logits of as many columns as the workspace holds and recomputes only the rest.

The kernels' blocks of rows are equal and whole tiles. Their slabs in the backward pass of
`recompute` hold coefficients alone, and are cut by rows too where that moves fewer bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# Slices of the vocabulary start where rows of kernels' blocks do: ragged ones cost registers.
_VOCAB_MULTIPLE = 128
# Narrower ones would spend their time on reading and writing the [N, D] gradient of the states.
_LEAST_COLUMNS = 1024
# Of kept logits: columns of dW that are summed at a time, 134 MB of fp32 at D = 4096.
_KEPT_COLUMNS = 8192


class Schedule(NamedTuple):
    """What `choose_schedule` decided, in the words of the module docstring."""

    name: str
    products: float
    row_block: int
    vocab_block: int
    late_rows: int  # of a slab of the backward pass
    kept: int  # columns whose logits wait for the backward pass
    reason: str


def auto_workspace_mib(card_bytes: int | None) -> int:
    """Return the default workspace: min(1 GiB, 2 % of the card), 256 MiB where there is no card.

    1 GiB is 2048 tokens of V = 131072: fewer would spend more time on the sum of dW, which each
    part of a batch reads and writes, than on its products.
    """
    return 256 if card_bytes is None else min(1024, card_bytes // 50 >> 20)


def even_blocks(total: int, most: int, tile: int) -> int:
    """Return the rows of equal blocks of `total` rows: whole tiles, at most `most` rows."""
    most = max(1, most)
    if tile == 1 or total <= most or most < tile:
        return min(most, max(1, total))
    most -= most % tile
    count = -(-total // most)
    return -(-total // (count * tile)) * tile


def late_slab(
    num_tokens: int, element: int, column: int, workspace_bytes: int, tile: int
) -> tuple[int, int]:
    """Return (rows, columns) of a slab of coefficients in the backward pass.

    A slice of C columns reads and writes dH once, 8 N D bytes; a block of R rows dW once, 8 V D.
    Both together are least where R = C.

    Args:
        element: bytes of a coefficient and what it is made of.
        column: bytes that a column takes whatever its rows are: its dW in fp32.
    """
    half = column / (2 * element)
    side = int(math.sqrt(half * half + workspace_bytes / element) - half)
    rows = even_blocks(num_tokens, side, tile)
    return rows, max(1, workspace_bytes // (rows * element + column))


def choose_schedule(
    num_tokens: int,
    vocab_size: int,
    *,
    needs_hidden: bool,
    needs_head: bool = False,
    needs_weight: bool = False,
    num_grad_stats: int = 1,
    with_reference: bool = False,
    num_slabs: int = 2,
    workspace_bytes: int = 256 << 20,
    itemsize: int = 4,
    width: int = 0,
    weight_itemsize: int | None = None,
    largest_slab: int | None = None,
    tile: int = 1,
) -> Schedule:
    """The cheapest schedule by matrix products; among equals the one that keeps less.

    Args:
        num_tokens, vocab_size: N and V.
        needs_hidden: the hidden states require a gradient.
        needs_head: the weight or the bias does; `needs_weight`: the weight does.
        num_grad_stats: statistics that carry a gradient.
        with_reference: a second head's logits are formed in the same pass.
        num_slabs: slabs alive at once, of `itemsize` bytes an element (see `Tiles.num_slabs`).
        workspace_bytes: the most that they may take together.
        itemsize: bytes of an accumulator, 8 for float64.
        width: D, of which a slice of dW has as many sums a column.
        weight_itemsize: bytes of an element of the weight, and of a coefficient of the kernels;
            None for an accumulator's.
        largest_slab, tile: see `Tiles`; where the former is set, as many logits are kept as fit
            beside the slabs, else all where they fit alone, or none.
    """
    heads = 2 if with_reference else 1
    rows, late_rows = max(1, num_tokens), max(1, num_tokens)
    row_block = even_blocks(rows, workspace_bytes // (vocab_size * itemsize * num_slabs), tile)
    if largest_slab is None:
        size = weight_itemsize or itemsize
        # Where the weight has the accumulator's dtype, dW is summed in its place.
        column = itemsize * width if needs_weight and size < itemsize else 0
        element = itemsize * num_slabs if with_reference else size
        late_rows, vocab_block = late_slab(rows, element, column, workspace_bytes, tile)
    else:
        vocab_block = max(1, workspace_bytes // (rows * itemsize * num_slabs))
        vocab_block = min(vocab_block, max(largest_slab // rows, _LEAST_COLUMNS))
    if vocab_block > _VOCAB_MULTIPLE:
        vocab_block -= vocab_block % _VOCAB_MULTIPLE
    vocab_block = min(vocab_block, vocab_size)
    outputs = int(needs_hidden) + int(needs_weight)

    def schedule(name: str, products: float, reason: str, kept: int = 0) -> Schedule:
        rows = num_tokens if name == "kept" else late_rows
        return Schedule(name, products, row_block, vocab_block, max(1, rows), kept, reason)

    if num_grad_stats == 0 or not (needs_hidden or needs_head):
        return schedule("forward", heads, "no gradient is needed")
    if not needs_head and num_grad_stats < heads + 1:
        return schedule("frozen", heads + num_grad_stats, "frozen head: gradient formed in forward")
    column = max(1, num_tokens) * itemsize
    if largest_slab is None:
        # Formed where they are kept, and C is written over them; the slices of dW come on top.
        kept = workspace_bytes // (heads * column)
        vocab_block = min(vocab_size, _KEPT_COLUMNS) if kept >= vocab_size else vocab_block
    else:
        # A reference's logits come in slabs of whole rows: with one, all are kept or none.
        slab = column * (vocab_size if with_reference else vocab_block)
        kept = max(0, workspace_bytes - num_slabs * slab) // (heads * column)
    if kept >= vocab_size:
        return schedule("kept", heads + outputs, "the logits fit the workspace", vocab_size)
    kept = 0 if with_reference or largest_slab is None else kept - kept % vocab_block
    return schedule(
        "recompute",
        ((2 * heads + outputs) * vocab_size - heads * kept) / vocab_size,
        f"{100 * kept // vocab_size}% of {heads * column * vocab_size >> 20} MiB of logits fit the "
        f"workspace of {workspace_bytes >> 20} MiB",
        kept,
    )
