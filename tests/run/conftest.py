"""The tiny runs of the trainer's tests."""

from tests.train.conftest import config, groups, tokenizer, trainer  # noqa: F401
