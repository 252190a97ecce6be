"""The tiny trainer and its data, as in tests/train."""

from tests.train.conftest import (  # noqa: F401
    absent_packages_skip,
    config,
    groups,
    tokenizer,
    trainer,
)
