"""Compile every kernel for a chip that is not here, and read what the compiler made of it.

    python -m fastpo.kernels.aot sm_90

needs no GPU: triton emits the binary, and the ELF's own tables name its registers and spills. What
is checked this way is what a wrong block size breaks first: registers spilled to memory, more
shared memory than a block may have, a matrix product that misses the tensor cores.

Argument types follow from the naming rule of `tile`: `x_ptr` is a pointer (to the input's dtype, to
int64 for labels, to the accumulator for the rest), any other runtime argument is an int32.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    divergence,
    linear_coefficients,
    linear_stats,
    listwise,
    logits_epilogue,
    pairwise,
    segment_reduce,
)
from .divergence import divergence_coefficients_kernel, divergence_kernel
from .linear_coefficients import coefficients_kernel
from .linear_stats import merge_kernel, split_kernel
from .logits_epilogue import epilogue_kernel
from .online import ACCUMULATED, STATISTICS, flags
from .tile import INTERPRETED, Config, pick, precision, transform_arguments

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory (LDS) one block may use, in bytes."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATRIX_INSTRUCTION = re.compile(r"\b((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)[\w.:]*)")


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel in one configuration.

    spill_bytes is a thread's stack and local memory (gfx942: 4 bytes a spilled register);
    matrix_instruction is the first one's whole name, shape and types included, None where the
    binary multiplies without tensor cores.
    """

    kernel: str
    target: str
    dtype: str
    rich: bool
    config: Config
    has_dot: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instruction: str | None


@dataclass(frozen=True)
class _Case:
    kernel: triton.JITFunction
    config: Config
    constants: dict
    input_dtype: torch.dtype
    options: dict = field(default_factory=dict)

    @property
    def has_dot(self) -> bool:
        return "DOT" in self.constants


def _cases(chip: str, dtype: torch.dtype, rich: bool) -> Iterator[_Case]:
    """Every kernel with all its regime allows switched on: the most registers it can need.

    An 8B model's shapes, so that offsets are 16-byte aligned as they are in real runs.
    """
    stats, coefficients, epilogue, both = (
        pick(module.CONFIGS, chip, dtype, rich)
        for module in (linear_stats, linear_coefficients, logits_epilogue, divergence)
    )
    want = STATISTICS if rich else ("lse", "lse_rest", "logps")
    kinds = precision(dtype)
    transform = transform_arguments(30.0 if rich else None, logit_scale=1.0, temperature=0.7)
    del transform["temperature_ptr"]
    transform["HAS_TEMPERATURE"] = rich
    rank = dict(R=16 if rich else 0)

    def blocks(config: Config, *names: str) -> dict[str, int]:
        return {name: getattr(config, name) for name in names}

    yield _Case(
        split_kernel,
        stats,
        dict(D=4096, BLOCKS=32, HAS_BIAS=True, GROUP=stats.group)
        | (transform | kinds | flags(want, ACCUMULATED) | blocks(stats, "BN", "BV", "BD") | rank),
        dtype,
    )
    merge = dict(BN=64, BS=16, ACC=kinds["ACC"])
    yield _Case(merge_kernel, Config(BN=64, BV=0), flags(want) | merge, dtype)
    yield _Case(
        coefficients_kernel,
        coefficients,
        dict(D=4096, GROUP=coefficients.group, HAS_BIAS=True, HAS_REST=True, HAS_LOGPS=True)
        | dict(HAS_LSE=rich, HAS_MEAN=rich, HAS_ENTROPY=rich)
        | (transform | kinds | blocks(coefficients, "BN", "BV", "BD") | rank),
        dtype,
    )
    yield _Case(
        epilogue_kernel,
        epilogue,
        dict(BLOCKS=triton.cdiv(128256, epilogue.BV), HAS_BIAS=True, HAS_OUT=True)
        | dict(OF_LOGPS=not rich, OF_LSE=False, OF_MEAN_LOGIT=False, OF_ENTROPY=rich)
        | (transform | flags(want) | dict(ACC=kinds["ACC"]) | blocks(epilogue, "BN", "BV")),
        dtype,
    )
    mixture = dict(HAS_BIAS=True, HAS_REF_BIAS=True, BETA=0.5, ACC=kinds["ACC"])
    yield _Case(
        divergence_kernel,
        both,
        dict(BLOCKS=triton.cdiv(128256, both.BV), WANT_JSD=rich)
        | (transform | flags(want) | mixture | blocks(both, "BN", "BV")),
        dtype,
    )
    yield _Case(
        divergence_coefficients_kernel,
        both,
        dict(HAS_LOGPS=rich, HAS_LSE=rich, HAS_MEAN=rich, HAS_ENTROPY=rich)
        | dict(HAS_KL_REF_POLICY=True, HAS_KL_POLICY_REF=rich, HAS_JSD=rich)
        | (transform | mixture | blocks(both, "BN", "BV")),
        dtype,
    )


def _loss_cases(chip: str) -> Iterator[_Case]:
    """The loss kernels in the forms that need most registers; scores are fp32."""
    fp32 = torch.float32
    pair = pick(pairwise.CONFIGS, chip, fp32)
    forms = (
        pairwise.PairForm("logistic", rate=0.1, sides="squares", given="wins"),
        pairwise.PairForm("modulated", transform="twice sigmoid", penalty=1.0),
        pairwise.PairForm("kl", transform="power", power=-0.5, clamp=80.0, rate=0.1),
        pairwise.PairForm("logistic", transform="log odds", given="log ratio", given_scale=1.0),
    )
    for form in forms:
        constants = form.constants(fp32) | dict(HAS_REWARD_OF=True, BN=pair.BN)
        yield _Case(pairwise.pair_kernel, pair, constants, fp32)
    widest = ("below", 8), ("exo", 64), ("smooth rank", 64), ("logistic", 64), ("logistic", 1024)
    for name, candidates in widest:
        lambdas = name == "logistic"
        form = listwise.ListForm(name, 0.1, lambda_weights=lambdas, normalise=name != "below")
        sizes, options = listwise.blocks(candidates), listwise.launch_options(chip)
        config = Config(BN=sizes["BI"], BV=sizes["BK"], warps=options.pop("num_warps"))
        constants = form.constants() | sizes | dict(ACC=precision(fp32)["ACC"])
        yield _Case(listwise.list_kernel, config, constants, fp32, options)
    tokens = pick(segment_reduce.CONFIGS, chip, fp32)
    constants = dict(REDUCTION="normalised", HAS_WEIGHTS=True, BN=tokens.BN)
    yield _Case(segment_reduce.reduce_kernel, tokens, constants, fp32)
    constants |= dict(ACC=precision(fp32)["ACC"])
    yield _Case(segment_reduce.spread_kernel, tokens, constants, fp32)


def _signature(case: _Case) -> dict[str, str]:
    """Argument name -> triton type."""
    named = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    inputs = ("hidden_ptr", "weight_ptr", "lora_ptr", "bias_ptr", "ref_bias_ptr", "out_ptr")

    def kind(name: str) -> str:
        if name in case.constants:
            return "constexpr"
        if name in ("labels_ptr", "key_ptr", "starts_ptr"):
            return "*i64"
        if name == "mask_ptr":
            return "*i1"
        if name in inputs:
            return named[case.input_dtype]
        return "*fp32" if name.endswith("_ptr") else "i32"

    return {name: kind(name) for name in case.kernel.arg_names}


def _aligned(case: _Case) -> dict[tuple[int], list[list[object]]]:
    """Pointers, strides and sizes that a launch would find divisible by 16: all but the counts."""
    exact = ("N", "num_splits", "v_start")
    return {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(case.kernel.arg_names)
        if name not in case.constants and name not in exact
    }


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread, from the binary's own resource table."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amdgcn_resources(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled bytes) of a lane, from the assembly's metadata."""
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return usage["vgpr_count"], 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"])


def _compile(case: _Case, target: str, dtype: str, rich: bool) -> Report:
    source = ASTSource(case.kernel, _signature(case), case.constants, _aligned(case))
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages, **case.options}
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"]
        registers, spill_bytes = _amdgcn_resources(text)
    else:
        text = binary.asm["ptx"]
        registers, spill_bytes = _cubin_resources(binary.asm["cubin"])
    found = MATRIX_INSTRUCTION.search(text)
    return Report(
        kernel=case.kernel.__name__,
        target=target,
        dtype=dtype,
        rich=rich,
        config=case.config,
        has_dot=case.has_dot,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=binary.metadata.shared,
        matrix_instruction=found.group(1) if found else None,
    )


def compile_all(target: str, dtypes: Iterable[str] = tuple(DTYPES)) -> list[Report]:
    """Compile every kernel of the head in the configurations its table gives `target` for `dtypes`.

    Args:
        target: sm_80, sm_90, sm_100 or gfx942.
        dtypes: names out of `DTYPES`.

    Raises:
        ValueError: an unknown target.
        RuntimeError: TRITON_INTERPRET was set, so there is nothing to compile.
    """
    _check(target)
    return [
        _compile(case, target, dtype, rich)
        for dtype in dtypes
        for rich in (False, True)
        for case in _cases(target, DTYPES[dtype], rich)
    ]


def compile_losses(target: str) -> list[Report]:
    """Compile the kernels of losses and reductions in their widest forms; raises the same."""
    _check(target)
    return [_compile(case, target, "fp32", True) for case in _loss_cases(target)]


def _check(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; choose from {', '.join(TARGETS)}")
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile kernels")


def _table(reports: Iterable[Report]) -> str:
    head = f"{'kernel':20} {'dtype':10} {'block':>13} {'warps':>5} {'stages':>6}"
    lines = [f"{head} {'regs':>4} {'spill':>5} {'shared':>7}  matrix instruction"]
    for r in reports:
        c, regime = r.config, r.dtype + " rich" * r.rich
        block = "x".join(str(b) for b in (c.BN, c.BV, c.BD) if b)
        lines.append(
            f"{r.kernel:20} {regime:10} {block:>13} {c.warps:5} {c.stages:6} "
            f"{r.registers:4} {r.spill_bytes:5} {r.shared_bytes:7}  {r.matrix_instruction or '-'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:] or TARGETS:
        print(name, _table(compile_all(name) + compile_losses(name)), sep="\n", end="\n\n")
