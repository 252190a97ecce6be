"""Prepare `bench.gpu` for a machine without a network: `python -m bench.gpu --pack .pack`.

The folder gets the wheels that such a machine lacks and `run.sh`, which installs them beside its
own packages and starts `bench.gpu`. Repository and folder together stay below 64 MiB, so that they
can be sent along. torch, triton and numpy are expected there.
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 64 << 20
PYTHON = "3.12"
CUDA = "130"
# Without what they need: torch brings some of it, and the rest is named here.
WHEELS = (
    "transformers==5.24.0",
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "trl==1.16.0",
    "liger-kernel==0.8.5",
    "cut-cross-entropy==25.1.1",
    "gguf==0.19.0",
    "bitsandbytes==0.50.2",
)
KERNELS = "triton.tar.gz"
EVERYTHING = b"*\n"  # what git is to ignore in the folder
GLIBC = ("2_39", "2_34", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")

RUN = r"""#!/usr/bin/env bash
set -eu
if [ $# = 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
  cat <<END
Measure a GPU without a network. From the repository's root:
  OUT=results bash $0 --smoke                 # is everything right? 3 minutes
  OUT=results bash $0 --measure --budget 480  # how fast is it?
OUT is the folder of the results, runs/gpu if it is not set. What follows run.sh is what
python3 -m bench.gpu takes: --only PART..., --list, --fresh; docs/gpu.md has it all.
END
  exit
fi
here=$(cd "$(dirname "$0")" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target "$site" "$here"/wheels/*.whl
export PYTHONPATH="$site${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
{cache}python3 -m bench.gpu "$@" --out "${{OUT:-runs/gpu}}"
"""
CACHE = r"""# Kernels compiled beforehand are found under this very path alone.
export TRITON_CACHE_DIR={place}
mkdir -p "$TRITON_CACHE_DIR" && tar -xzf "$here"/{kernels} -C "$TRITON_CACHE_DIR"
"""


def download(requirement: str, folder: Path) -> None:
    """Fetch one wheel for 64-bit Linux on x86, by pip as it is set up here.

    Raises:
        RuntimeError: there is none, with pip's last line.
    """
    platforms = [f"manylinux_{v}_x86_64" for v in GLIBC]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64", "any"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--python-version", PYTHON]
    command += ["--implementation", "cp", "-d", str(folder)]
    for name in platforms:
        command += ["--platform", name]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{requirement}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def trim(wheel: Path, keep: str = f"libbitsandbytes_cuda{CUDA}.so") -> None:
    """Leave one of the libraries of bitsandbytes: a wheel has one for every version of CUDA.

    Raises:
        RuntimeError: the wheel does not have it.
    """

    def unwanted(name: str) -> bool:
        library = name.rpartition("/")[2]
        return bool(re.fullmatch(r"libbitsandbytes_.*\.so", library)) and library != keep

    with zipfile.ZipFile(wheel) as old:
        names = old.namelist()
        if not any(name.endswith(f"/{keep}") for name in names):
            raise RuntimeError(f"{wheel.name} has no {keep}")
        with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
            torn = Path(folder) / wheel.name
            with zipfile.ZipFile(torn, "w", zipfile.ZIP_DEFLATED) as new:
                for name in names:
                    content = old.read(name)
                    if name.endswith(".dist-info/RECORD"):
                        rows = list(csv.reader(io.StringIO(content.decode())))
                        text = io.StringIO()
                        csv.writer(text, lineterminator="\n").writerows(
                            row for row in rows if row and not unwanted(row[0])
                        )
                        content = text.getvalue().encode()
                    if not unwanted(name):
                        new.writestr(old.getinfo(name), content)
            torn.replace(wheel)


def repository_bytes(root: Path, folder: Path) -> int:
    """Return the size of the files that git does not ignore, without the packed folder."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = [root / name for name in done.stdout.split("\0") if name]
    if done.returncode:
        files = [path for path in root.rglob("*") if path.is_file()]
    inside = [p for p in files if not p.resolve().is_relative_to(folder.resolve())]
    return sum(path.lstat().st_size for path in inside if path.exists() or path.is_symlink())


def prepare(folder: Path) -> Path:
    """Make the folder, or clear the wheels of an earlier pack; return where wheels go.

    Raises:
        RuntimeError: it cannot be written, or holds what no pack left there.
    """
    mark, store = folder / ".gitignore", folder / "wheels"
    try:
        found = {file.name for file in folder.iterdir()} if folder.exists() else set()
        packed = mark.is_file() and mark.read_bytes() == EVERYTHING
        strange = found - {mark.name, store.name, KERNELS, "run.sh"} if packed else found
        if strange:
            raise RuntimeError(f"{folder} holds {min(strange)}, not of a pack: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_bytes(EVERYTHING)
        store.mkdir(exist_ok=True)
        for old in store.glob("*.whl"):
            old.unlink()
    except OSError as why:
        raise RuntimeError(f"{why.filename}: {why.strerror}: name a folder to write to") from None
    return store


def pack(folder: Path, root: Path, cache: bool = True, wheels: Sequence[str] = WHEELS) -> int:
    """Fill the folder, print the size of every item; return 1, with a line, where it cannot be."""
    try:
        store = prepare(folder)
        for wheel in wheels:
            print(f"{wheel}", flush=True)
            download(wheel, store)
        for wheel in store.glob("bitsandbytes-*.whl"):
            trim(wheel)
    except RuntimeError as why:
        print(f"--pack: {why}", file=sys.stderr)
        return 1
    place = None
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if cache and here != PYTHON:
        print(f"kernels: left out, Python {PYTHON} would not find those of {here}'s triton")
    elif cache:
        from bench.gpu.warm import warm

        place = warm(folder / KERNELS)
    text = CACHE.format(place=place, kernels=KERNELS) if place else ""
    text = RUN.format(cache=text)
    (folder / "run.sh").write_text(text)
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(store.glob("*.whl"))}
    if place:
        sizes[KERNELS] = (folder / KERNELS).stat().st_size
    sizes["the repository"] = repository_bytes(root, folder)
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB  together, of {MOST_BYTES >> 20}")
    if total > MOST_BYTES:
        print(f"--pack: {total / 2**20:.1f} MiB are more than {MOST_BYTES >> 20}", file=sys.stderr)
        return 1
    print("\nThere:", flush=True)
    subprocess.run(["bash", str(folder / "run.sh"), "--help"], check=True)
    return 0
