"""Compile every kernel for a chip that is not here, and read what the compiler made of it.

    python -m fastpo.kernels.aot sm_90

needs no GPU: triton emits the binary, the ELF's own tables name its registers and spills, and the
disassembly its instructions. What is checked this way is what a wrong block size breaks first:
registers spilled to memory, more shared memory than a block may have, a matrix product that misses
the tensor cores. `python -m bench.account` prints what follows from it for an H100.

Argument types follow from names: `x_ptr` is a pointer (to the input's dtype, to int64 for labels,
to the accumulator for the rest), any other runtime argument an int32. A tuple has members of its
name's type, None for those that are absent.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import listwise, pairwise, segment_reduce
from .coefficient import Grads, Rows
from .divergence import Both, RefRows, divergence_coefficients_kernel, divergence_kernel
from .kept_coefficients import kept_kernel
from .launch_table import NARROW, launch
from .linear_coefficients import coefficients_kernel
from .linear_stats import merge_kernel, split_kernel
from .logits_epilogue import epilogue_kernel
from .online import STATISTICS, accumulated, pointers
from .tile import INTERPRETED, Config, Strides, logit_arguments, pick, precision, tile_of

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
# A line of `cuobjdump -sass`: address, opcode without what qualifies it, where a branch goes.
SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\w+)([^;]*);", re.MULTILINE)
WIDTH = 4096
"""D of the kernels compiled for `wide` rows of the table."""


@dataclass(frozen=True)
class Report:
    """Hold what the compiler made of one kernel in one configuration.

    spill_bytes is a thread's stack and local memory (gfx942: 4 bytes a spilled register);
    matrix_instruction is the first one's whole name, shape and types included, None where the
    binary multiplies without tensor cores; tensor_copies, whether it loads by descriptors through
    TMA; machine is the cubin, on gfx942 its assembly, ttir the
    kernel before anything of the chip entered it.
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
    tensor_copies: bool
    width: int
    machine: bytes = field(repr=False)
    ttir: str = field(repr=False)


@dataclass(frozen=True)
class _Case:
    """Hold a kernel and its arguments that are known to the compiler.

    constants holds values of constexprs, None for absent pointers, and tuples in which `...` is a
    member that a launch brings.
    """

    kernel: triton.JITFunction
    config: Config
    constants: dict
    input_dtype: torch.dtype
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def has_dot(self) -> bool:
        return "TILE" in self.constants


def _cases(
    chip: str, dtype: torch.dtype, rich: bool, described: bool = True, width: int = WIDTH
) -> Iterator[_Case]:
    """Yield every kernel with all its regime allows switched on: the most registers it can need.

    An 8B model's shapes, so that offsets are 16-byte aligned as they are in real runs.
    """
    matrices = dict(rich=rich, width=width, described=described)
    stats, coefficients = (
        launch(kernel.__name__, chip, dtype, **matrices)
        for kernel in (split_kernel, coefficients_kernel)
    )
    epilogue, both, both_coefficients = (
        launch(kernel.__name__, chip, dtype, rich=rich)
        for kernel in (epilogue_kernel, divergence_kernel, divergence_coefficients_kernel)
    )
    want = STATISTICS if rich else ("lse", "lse_rest", "logps")
    statistics = dict(statistics_ptr=pointers(dict.fromkeys(want, ...)))
    accumulate = dict(WANT=accumulated(want))
    acc = dict(ACC=precision(dtype)["ACC"])
    logit = logit_arguments(30.0 if rich else None, logit_scale=1.0, temperature=0.7)
    if rich:
        del logit["temperature_ptr"]
        logit["LOGIT"] = logit["LOGIT"]._replace(TEMPERATURES=True)
    also = ... if rich else None  # a pointer of rich kernels alone
    grads = dict(rows_ptr=Rows(..., ..., ..., also, ..., also, also, also))
    grads |= dict(GRADS=Grads(True, rich, rich, rich))

    def blocks(config: Config) -> dict[str, int]:
        return dict(BN=config.BN, BV=config.BV)

    def matrix(config: Config) -> dict[str, object]:
        low = {} if rich else dict(lora_ptr=None)
        tile = tile_of(config, dtype, width, 16 if rich else 0)
        return logit | low | dict(strides=Strides(..., ..., also), TILE=tile)

    yield _Case(split_kernel, stats, dict(BLOCKS=32) | accumulate | matrix(stats), dtype)
    merge = dict(BN=64, BS=16)
    yield _Case(merge_kernel, Config(BN=64, BV=0), statistics | acc | merge, dtype)
    yield _Case(coefficients_kernel, coefficients, grads | matrix(coefficients), dtype)
    sweep = logit | acc | blocks(epilogue)
    sweep |= dict(BLOCKS=triton.cdiv(128256, epilogue.BV), IN_PLACE=True)
    yield _Case(kept_kernel, epilogue, grads | sweep, dtype)
    one = dict(GRADS=Grads(logps=not rich, lse=False, mean_logit=False, entropy=rich))
    yield _Case(epilogue_kernel, epilogue, statistics | accumulate | one | sweep, dtype)
    pair = logit | acc | dict(BETA=0.5, strides=(..., ...))
    pair |= {name: (..., ...) for name in ("products_ptr", "bias_ptr")}
    ref = dict.fromkeys(("lse", "lse_rest", "logps"), ...)
    yield _Case(
        divergence_kernel,
        both,
        dict(ref_statistics_ptr=pointers(ref), both_ptr=Both(..., ..., also, also))
        | dict(BLOCKS=triton.cdiv(128256, both.BV), REF_WANT=accumulated(()))
        | (statistics | accumulate | pair | blocks(both)),
        dtype,
    )
    grads["rows_ptr"] = grads["rows_ptr"]._replace(grad_logps=also)
    grads["GRADS"] = grads["GRADS"]._replace(logps=rich)
    yield _Case(
        divergence_coefficients_kernel,
        both_coefficients,
        grads | pair | blocks(both_coefficients)
        | dict(ref_rows_ptr=RefRows(..., ..., ..., also, also, ..., also, also)),
        dtype,
    )  # fmt: skip


def _loss_cases(chip: str) -> Iterator[_Case]:
    """Yield the loss kernels in the forms that need most registers; scores are fp32."""
    fp32 = torch.float32
    pair = pick(pairwise.CONFIGS, chip, fp32)
    forms = (
        pairwise.PairForm("logistic", rate=0.1, sides="squares", given="wins"),
        pairwise.PairForm("modulated", transform="twice sigmoid", penalty=1.0),
        pairwise.PairForm("kl", transform="power", power=-0.5, clamp=80.0, rate=0.1),
        pairwise.PairForm("logistic", transform="log odds", given="log ratio", given_scale=1.0),
    )
    for form in forms:
        constants = form.constants(fp32) | dict(BN=pair.BN)
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
    constants = dict(REDUCTION="normalised", BN=tokens.BN)
    yield _Case(segment_reduce.reduce_kernel, tokens, constants, fp32)
    constants |= dict(ACC=precision(fp32)["ACC"])
    yield _Case(segment_reduce.spread_kernel, tokens, constants, fp32)


def _types(case: _Case) -> dict[str, object]:
    """Return argument name -> triton type, a tuple of types for a tuple."""
    element = {dtype: name for name, dtype in DTYPES.items()}[case.input_dtype]
    matrices = {"hidden_ptr": case.config.BN, "weight_ptr": case.config.BV}
    matrices["lora_ptr"] = case.config.BV
    inputs = ("hidden_ptr", "weight_ptr", "lora_ptr", "bias_ptr", "out_ptr")

    def kind(name: str) -> str:
        if name in ("labels_ptr", "key_ptr", "starts_ptr"):
            return "*i64"
        if name == "mask_ptr":
            return "*i1"
        if name in matrices and case.config.tma:
            return f"tensordesc<{element}[{matrices[name]}, {case.config.BD}]>"
        if name in inputs:
            return f"*{element}"
        return "*fp32" if name.endswith("_ptr") else "i32"

    def typed(name: str) -> object:
        value = case.constants.get(name, ...)
        if isinstance(value, tuple) and ... in value:
            members = (kind(name) if member is ... else "constexpr" for member in value)
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        return kind(name) if value is ... else "constexpr"

    return {name: typed(name) for name in case.kernel.arg_names}


def _paths(types: dict[str, object]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Yield (path, argument name, type) of every argument and of every member of a tuple."""
    for i, (name, kind) in enumerate(types.items()):
        if isinstance(kind, tuple):
            yield from (((i, j), name, member) for j, member in enumerate(kind))
        else:
            yield (i,), name, kind


def _constants(case: _Case, types: dict[str, object]) -> dict[tuple[int, ...], object]:
    """Return path -> value of what the compiler knows."""
    return {
        path: case.constants[name] if len(path) == 1 else None
        for path, name, kind in _paths(types)
        if kind == "constexpr"
    }


def _aligned(types: dict[str, object]) -> dict[tuple[int, ...], list[list[object]]]:
    """Return what a launch would find divisible by 16: pointers, strides and sizes, not counts."""
    exact = ("N", "num_splits", "v_start")
    return {
        path: [["tt.divisibility", 16]]
        for path, name, kind in _paths(types)
        if name not in exact and not kind.startswith(("constexpr", "tensordesc"))
    }


def _cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(report: Report) -> tuple[Counter[str], Counter[str]]:
    """Count each opcode of an NVIDIA kernel, HGMMA, MUFU and so on: (outside loops, inside)."""
    lines = [
        (int(address, 16), opcode, re.search(r"0x([0-9a-f]+)$", rest.strip()))
        for address, opcode, rest in SASS.findall(_cuobjdump(report.machine, "--dump-sass"))
    ]
    back = [(int(to[1], 16), at) for at, opcode, to in lines if opcode == "BRA" and to]
    loops = [(first, last) for first, last in back if first < last]  # BRA to itself ends a kernel
    inside = Counter(op for at, op, _ in lines if any(lo <= at <= hi for lo, hi in loops))
    return Counter(opcode for _, opcode, _ in lines) - inside, inside


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, spilled bytes) of a thread, from the binary's own resource table."""
    text = _cuobjdump(cubin, "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amdgcn_resources(assembly: str) -> tuple[int, int]:
    """Return (vector registers, spilled bytes) of a lane, from the assembly's metadata."""
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return usage["vgpr_count"], 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"])


def _compile(case: _Case, target: str, dtype: str, rich: bool) -> Report:
    types = _types(case)
    source = ASTSource(case.kernel, types, _constants(case, types), _aligned(types))
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages, **case.options}
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"]
        machine = text.encode()
        registers, spill_bytes = _amdgcn_resources(text)
    else:
        text = binary.asm["ptx"]
        machine = binary.asm["cubin"]
        registers, spill_bytes = _cubin_resources(machine)
    product = MATRIX_INSTRUCTION.search(text)
    return Report(
        kernel=case.name,
        target=target,
        dtype=dtype,
        rich=rich,
        config=case.config,
        has_dot=case.has_dot,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=binary.metadata.shared,
        matrix_instruction=product.group(1) if product else None,
        tensor_copies="cp.async.bulk.tensor" in text,
        width=case.constants["TILE"].D if case.has_dot else 0,
        machine=machine,
        ttir=binary.asm["ttir"],
    )


def compile_all(target: str, dtypes: Iterable[str] = tuple(DTYPES)) -> list[Report]:
    """Compile every kernel of the head in every configuration that it has on `target` for `dtypes`.

    Each once, with descriptors or pointers, wide or narrow, plain and rich.

    Args:
        target: sm_80, sm_90, sm_100 or gfx942.
        dtypes: names out of `DTYPES`.

    Raises:
        ValueError: an unknown target.
        RuntimeError: TRITON_INTERPRET was set, so there is nothing to compile.
    """
    _check(target)
    cases: dict[tuple, _Case] = {}
    both = (False, True)
    for dtype, rich, addressed, narrow in itertools.product(dtypes, both, both, both):
        width = NARROW if narrow else WIDTH
        for case in _cases(target, DTYPES[dtype], rich, not addressed, width):
            cases.setdefault((dtype, rich, case.name, case.config), case)
    return [_compile(case, target, key[0], key[1]) for key, case in cases.items()]


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
    head = f"{'kernel':30} {'dtype':14} {'block':>13} {'warps':>5} {'stages':>6}"
    lines = [f"{head} {'regs':>4} {'spill':>5} {'shared':>7}  matrix instruction"]
    for r in reports:
        c, regime = r.config, r.dtype + " rich" * r.rich + " TMA" * r.config.tma
        block = "x".join(str(b) for b in (c.BN, c.BV, c.BD) if b)
        lines.append(
            f"{r.kernel:30} {regime:14} {block:>13} {c.warps:5} {c.stages:6} "
            f"{r.registers:4} {r.spill_bytes:5} {r.shared_bytes:7}  {r.matrix_instruction or '-'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:] or TARGETS:
        print(name, _table(compile_all(name) + compile_losses(name)), sep="\n", end="\n\n")
