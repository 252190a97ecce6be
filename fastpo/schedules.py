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
"""

from __future__ import annotations

from typing import NamedTuple

# Slices of the vocabulary start where rows of kernels' blocks do: ragged ones cost registers.
_VOCAB_MULTIPLE = 128
# Narrower ones would spend their time on reading and writing the [N, D] gradient of the states.
_LEAST_COLUMNS = 1024
# On a GPU 2048 tokens' dH, 33 MB at D = 4096, is read and written once a slice: 16 times here.
_KEPT_COLUMNS = 8192


class Schedule(NamedTuple):
    """What `choose_schedule` decided, in the words of the module docstring."""

    name: str
    products: float
    row_block: int
    vocab_block: int
    kept: int  # columns whose logits wait for the backward pass
    reason: str


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
    largest_slab: int | None = None,
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
        largest_slab: see `Tiles`; where it is set, as many logits are kept as fit beside the slabs,
            else all where they fit alone, or none.
    """
    heads = 2 if with_reference else 1
    row_block = max(1, workspace_bytes // (vocab_size * itemsize * num_slabs))
    vocab_block = max(1, workspace_bytes // (max(1, num_tokens) * itemsize * num_slabs))
    if largest_slab is not None:
        vocab_block = min(vocab_block, max(largest_slab // max(1, num_tokens), _LEAST_COLUMNS))
    if vocab_block > _VOCAB_MULTIPLE:
        vocab_block -= vocab_block % _VOCAB_MULTIPLE
    row_block, vocab_block = min(row_block, max(1, num_tokens)), min(vocab_block, vocab_size)
    outputs = int(needs_hidden) + int(needs_weight)

    def schedule(name: str, products: float, reason: str, kept: int = 0) -> Schedule:
        return Schedule(name, products, row_block, vocab_block, kept, reason)

    if num_grad_stats == 0 or not (needs_hidden or needs_head):
        return schedule("forward", heads, "no gradient is needed")
    if not needs_head and num_grad_stats < heads + 1:
        return schedule("frozen", heads + num_grad_stats, "frozen head: gradient formed in forward")
    column = max(1, num_tokens) * itemsize
    if largest_slab is None:
        # Formed where they are kept; the slices of the backward pass come on top.
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
