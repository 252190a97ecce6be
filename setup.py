"""Packaging for fastpo. `kernels/` ships as `fastpo.kernels` through the symlink `fastpo/kernels`.

`kernels/` has no `__init__.py` on purpose: a regular package of that name at the root would shadow
Hugging Face's `kernels`, which transformers imports.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

train = [
    "transformers>=5.23,<6",
    "accelerate>=1.10.1",
    "datasets>=4.8",
    "peft>=0.18",
    "safetensors>=0.8",
    "pydantic>=2.8",
    "pyyaml>=6.0.1",
    "jinja2>=3.1.6",
    "gguf>=0.16",
    "sentencepiece>=0.2",
    "protobuf>=4.25",
]
bench = ["trl>=1.16,<1.17", "liger-kernel==0.8.5", "cut-cross-entropy>=25.1.1", "matplotlib>=3.9"]
dev = [
    "pytest>=9.1",
    "pytest-xdist>=3.6.1",
    "mpmath>=1.3",
    "matplotlib>=3.9",
    "ruff==0.17.6",
    "basedpyright==1.40.2",
    "import-linter>=2.5",
    "kernels>=0.12",
    "bitsandbytes>=0.50.0",
    "torchao>=0.15",
    "setuptools>=70.1",  # a test builds the wheel
]

setup(
    name="fastpo",
    version="0.1.0",
    description="Preference training of language models that does not run out of memory or time",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["fastpo", "fastpo.*"]),
    package_data={"fastpo": ["py.typed"], "fastpo.report": ["*.j2", "*.css"]},
    install_requires=["torch>=2.11", "numpy>=2.0", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": train,
        "bench": bench,
        "quant": ["bitsandbytes>=0.50.0"],
        "torchao": ["torchao>=0.15"],
        "flash": ["flash-attn>=2.7"],
        "dev": train + dev,
    },
    entry_points={"console_scripts": ["fastpo=fastpo.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
