"""Compile the kernels of `bench.gpu` for Hopper without a GPU: `python -m bench.gpu.warm FOLDER`.

Launches compile for real, specialisation included, and a driver that does not exist runs nothing.
Keys of triton's cache hold the absolute folder and the triton wheel: both must be the same on the
machine that reads it. A miss there costs what compiling costs.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

CHIP, WARP, MULTIPROCESSORS = 90, 32, 132
SHARED_BYTES, REGISTERS = 232448, 65536
MODULES = (
    "tile",
    "linear_stats",
    "linear_coefficients",
    "logits_epilogue",
    "divergence",
    "pairwise",
    "listwise",
    "segment_reduce",
)


def place() -> Path:
    """Where the cache has to lie on both machines."""
    return Path(tempfile.gettempdir()) / "fastpo-triton"


def warm(folder: Path) -> Path | None:
    """Fill the folder with a cache that works under the path returned; None where it cannot be."""
    cache = place()
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    command = [sys.executable, "-m", "bench.gpu.warm"]
    done = subprocess.run(
        command,
        env=env,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    print(f"kernels: {last}")
    if done.returncode or not cache.exists():
        print("kernels are compiled there, on first use")
        return None
    shutil.copytree(cache, folder)
    return cache


def fake_driver() -> list[bool]:
    """Make launches compile for Hopper and run nothing; whether each kernel was in the cache."""
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Launcher:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, *_: Any) -> None:
            pass

    class Utils:
        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 1, 0, 0, 1024

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {
                "max_shared_mem": SHARED_BYTES,
                "multiprocessor_count": MULTIPROCESSORS,
                "max_num_regs": REGISTERS,
                "warpSize": WARP,
            }

        def unload_module(self, *_: Any) -> None:
            pass

    class Fake:
        launcher_cls, utils = Launcher, Utils()

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: Any = None) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CHIP, WARP)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, _: str) -> str:
            return "x"

        def is_active(self) -> bool:
            return True

    hits: list[bool] = []

    def listener(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    fake: Any = Fake()
    driver.set_active(fake)
    knobs.compilation.listener = listener
    for name in MODULES:
        module: Any = importlib.import_module(f"fastpo.kernels.{name}")
        for attribute, value in (
            ("chip_of", f"sm_{CHIP}"),
            ("_programs_wanted", 4 * MULTIPROCESSORS),
        ):
            if hasattr(module, attribute):
                setattr(module, attribute, lambda device, value=value: value)
    return hits


def launches() -> dict[str, Callable[[], Any]]:
    """name -> a call that launches; no memory is touched, however large the tensors are."""
    import torch

    from bench.gpu.right import FULL
    from fastpo.kernels.linear_coefficients import linear_coefficients
    from fastpo.kernels.linear_stats import linear_stats
    from fastpo.kernels.listwise import ListForm, list_losses
    from fastpo.kernels.logits_epilogue import logits_epilogue
    from fastpo.kernels.pairwise import PairForm, pair_losses
    from fastpo.kernels.segment_reduce import segment_reduce

    f32, ids = torch.float32, torch.int64

    def of(*size: int, dtype: torch.dtype = f32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def one(n: int, d: int, v: int, dtype: torch.dtype) -> None:
        hidden, weight, labels = of(n, d, dtype=dtype), of(v, d, dtype=dtype), of(n, dtype=ids)
        want = ("logps", "lse", "lse_rest", "entropy")
        linear_stats(hidden, weight, labels, want=want)
        linear_stats(hidden, weight, labels, want=("logps",))
        row: dict[str, Any] = {name: of(n) for name in ("lse", "logps", "lse_rest", "grad_logps")}
        linear_coefficients(hidden, weight, labels, v_start=0, vocab_size=v, **row)
        logits_epilogue(of(n, v), labels, want=want, coefficient_of="logps")
        logits_epilogue(of(n, v), labels, want=("logps",))
        products = of(n, v)
        narrow = products if dtype == f32 else of(n, v, dtype=dtype)
        logits_epilogue(products, labels, want=("logps",), coefficient_of="logps", out=narrow)

    found: dict[str, Callable[[], Any]] = {}
    shapes = itertools.product(FULL.tokens, FULL.widths, FULL.vocabularies, FULL.dtypes)
    # Counts that 16 divides are specialised on: blocks of rows are such.
    large = [(n, 4096, 131072, "bfloat16") for n in (8192, 256)]
    large += [(512, d, v, "bfloat16") for d in FULL.widths for v in FULL.vocabularies]
    for n, d, v, name in [*large, *shapes]:
        found[f"{n}x{d}x{v} {name}"] = partial(one, n, d, v, getattr(torch, name))
    for groups in (1, 16, 6):
        mask = of(groups, 2, dtype=torch.bool)
        form = PairForm(chosen=0.1, rejected=0.1, reward=0.1)
        found[f"pairs {groups}"] = lambda g=groups, m=mask, f=form: pair_losses(f, of(g, 2), m)
    lists = ListForm("logistic", 0.1, lambda_weights=True)
    found["lists"] = lambda: list_losses(
        lists, of(6, 4), of(6, 4, dtype=torch.bool), grade=of(6, 4), tie_key=of(6, 4, dtype=ids)
    )
    found["segments"] = lambda: segment_reduce(of(100), of(13, dtype=ids))
    return found


def main() -> int:
    """Compile every launch; a form that is refused is a miss on the card and no failure here."""
    hits = fake_driver()
    refused = 0
    for name, launch in tqdm(launches().items(), unit="launch", disable=None):
        try:
            launch()
        except Exception as why:  # compilers raise anything
            refused += 1
            said = (str(why).strip() or "?").splitlines()[-1]
            print(f"{name}: {type(why).__name__}: {said}", flush=True)
    print(f"{len(hits) - sum(hits)} compiled, {sum(hits)} were there, {refused} refused")
    return 0 if hits else 1


if __name__ == "__main__":
    raise SystemExit(main())
