"""`fastpo merge`: an adapter and its base model as one ordinary model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastpo.model.load import check_place, trained_adapter
from fastpo.model.merge import write_merged
from fastpo.model.opening import open_model, open_tokenizer
from fastpo.run.folder import RunFolder


def merge(arguments: argparse.Namespace) -> int:
    """Write safetensors that `from_pretrained` loads without peft.

    Raises:
        ValueError: no adapter in the folder, something already where the result would go, or a
            result that is another model than was trained.
    """
    check_place(arguments.model)
    if trained_adapter(arguments.model) is None:
        raise ValueError(
            f"{arguments.model} holds no adapter, so there is nothing to merge: name the "
            "output_dir of a run with lora"
        )
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: name another")
    remote = {"trust_remote_code": arguments.trust_remote_code}

    def load() -> Any:
        source = {"dtype": arguments.dtype, "gguf_file": arguments.gguf_file}
        return open_model(arguments.model, **source, **remote)

    with RunFolder(out).placing() as staging:
        write_merged(load, staging)
        open_tokenizer(arguments.model, arguments.tokenizer, None, **remote).save_pretrained(
            staging
        )
    print(out)
    return 0
