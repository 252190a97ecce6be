"""Launch configurations of the head's kernels: one table and a lookup, nothing tuned at run time.

    TABLE[kernel][chip, regime] -> Config        launch("split_kernel", "sm_90", torch.bfloat16)

`tile.pick` says what regimes are and how they fall back. `python -m bench.tune_head` measures the
rows of the GPU that it runs on and rewrites what stands between the two marks; the chips it has
done so for are MEASURED. All other rows come from what the compiler reports (`aot`, docs/head.md):

- A [BN, BV] fp32 tile takes BN * BV / (32 * warps) registers a thread: 128 at 128 x 256 and 8
  warps. On sm_90 the plain epilogue fits beside it under the 255 a thread may own; entropy or a
  soft-cap does not (248 bytes spilled), nor does the plain one on sm_100 (16 bytes).
- 16 warps have no tcgen05.mma, only mma.sync.
- Rich `split_kernel` at 128 x 128 on gfx942 spills 12 bytes under triton 3.6, none under 3.9; 116
  registers of 128 x 64 leave room under both.
- Descriptors (TMA) free the registers of addresses: 233 -> 178 in `coefficients_kernel` on sm_90.
  Rich statistics of 128 x 128 then fit, where pointers spill 152 bytes and left 64 x 256, a quarter
  more operand bytes a FLOP. Pointers, which odd widths need, take the row `pointers` there.
- Sums over rows in memory: 16 fp32 logits a thread are four 16-byte loads in flight, and a row
  maximum costs two block-wide reductions per 4096 columns. With two heads 8 columns a thread, a
  soft-cap and the mixture spill 8 bytes on sm_90, so 4.
- The interpreter (`cpu`) pays about 5 ms a block whatever its size.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .tile import Config, Table, pick

NARROW = 1024
"""Widths D up to this are `narrow`: by prediction a fifth of a tile's time on sm_90 is epilogue."""

# Columns: BN, BV, BD, group, warps, stages, TMA.
# <table>
MEASURED: tuple[str, ...] = ()
TABLE: dict[str, Table] = {
    "split_kernel": {
        ("any", "16"): Config(64, 64, 32, 8, 4, 2),
        ("any", "32"): Config(64, 64, 32, 8, 4, 2),
        ("any", "64"): Config(32, 32, 16, 8, 4, 1),
        ("cpu", "16"): Config(64, 512, 128, 1, 4, 1),
        ("cpu", "32"): Config(64, 512, 128, 1, 4, 1),
        ("cpu", "64"): Config(64, 512, 128, 1, 4, 1),
        ("gfx942", "16"): Config(128, 128, 64, 8, 8, 2),
        ("gfx942", "16 rich"): Config(128, 64, 64, 8, 8, 2),
        ("sm_100", "16"): Config(128, 128, 64, 16, 8, 3, True),
        ("sm_100", "16 rich"): Config(128, 64, 64, 16, 8, 3, True),
        ("sm_100", "32 rich"): Config(64, 64, 32, 8, 8, 2),
        ("sm_80", "16"): Config(128, 128, 64, 8, 8, 3),
        ("sm_80", "16 rich"): Config(128, 64, 64, 8, 8, 3),
        ("sm_80", "32 rich"): Config(64, 64, 32, 8, 8, 2),
        ("sm_90", "16"): Config(128, 256, 64, 16, 8, 3, True),
        ("sm_90", "16 rich"): Config(128, 128, 64, 16, 8, 3, True),
        ("sm_90", "16 rich pointers"): Config(64, 256, 64, 16, 8, 3),
        ("sm_90", "32 rich"): Config(64, 64, 32, 8, 8, 2),
    },
    "coefficients_kernel": {
        ("any", "16"): Config(64, 64, 32, 8, 4, 2),
        ("any", "32"): Config(64, 64, 32, 8, 4, 2),
        ("any", "64"): Config(32, 32, 16, 8, 4, 1),
        ("cpu", "16"): Config(64, 512, 128, 1, 4, 1),
        ("cpu", "32"): Config(64, 512, 128, 1, 4, 1),
        ("cpu", "64"): Config(64, 512, 128, 1, 4, 1),
        ("gfx942", "16"): Config(128, 128, 64, 8, 8, 2),
        ("sm_100", "16"): Config(128, 256, 64, 8, 8, 3, True),
        ("sm_100", "16 rich"): Config(128, 128, 64, 8, 8, 3, True),
        ("sm_80", "16"): Config(128, 128, 64, 8, 8, 3),
        ("sm_80", "16 rich"): Config(128, 64, 64, 8, 8, 3),
        ("sm_90", "16"): Config(128, 256, 64, 8, 8, 3, True),
        ("sm_90", "16 rich"): Config(128, 128, 64, 8, 8, 3, True),
    },
    "epilogue_kernel": {
        ("any", "16"): Config(1, 4096, 0, 1, 8, 1),
        ("any", "32"): Config(1, 4096, 0, 1, 8, 1),
        ("any", "64"): Config(1, 1024, 0, 1, 4, 1),
        ("cpu", "16"): Config(64, 1024, 0, 1, 4, 1),
        ("cpu", "32"): Config(64, 1024, 0, 1, 4, 1),
        ("cpu", "64"): Config(64, 1024, 0, 1, 4, 1),
    },
    "divergence_kernel": {
        ("any", "16"): Config(1, 1024, 0, 1, 8, 1),
        ("any", "32"): Config(1, 1024, 0, 1, 8, 1),
        ("any", "64"): Config(1, 512, 0, 1, 4, 1),
        ("cpu", "16"): Config(64, 1024, 0, 1, 4, 1),
        ("cpu", "32"): Config(64, 1024, 0, 1, 4, 1),
        ("cpu", "64"): Config(64, 1024, 0, 1, 4, 1),
    },
    "divergence_coefficients_kernel": {
        ("any", "16"): Config(1, 1024, 0, 1, 8, 1),
        ("any", "32"): Config(1, 1024, 0, 1, 8, 1),
        ("any", "64"): Config(1, 512, 0, 1, 4, 1),
        ("cpu", "16"): Config(64, 1024, 0, 1, 4, 1),
        ("cpu", "32"): Config(64, 1024, 0, 1, 4, 1),
        ("cpu", "64"): Config(64, 1024, 0, 1, 4, 1),
    },
}
# </table>


def launch(
    kernel: str,
    chip: str,
    dtype: torch.dtype,
    *,
    rich: bool = False,
    width: int | None = None,
    described: bool = False,
) -> Config:
    """Return the configuration of a kernel on a chip.

    Args:
        kernel: a name of the table.
        dtype: of its inputs.
        rich: a soft-cap, or more than log-probabilities, is asked of it.
        width: D of a kernel that multiplies matrices.
        described: TMA can read its matrices, see `tile.described`; else the answer asks for none.
    """
    table, words = TABLE[kernel], ["rich"] if rich else []
    if width is not None:
        words += ["pointers"] * (not described) + ["narrow"] * (width <= NARROW)
    config = pick(table, chip, dtype, words)
    return config if described else replace(config, tma=False)
