"""The tokenizers of the data's tests and the tiny model of the commands'."""

from tests.cli.conftest import tiny  # noqa: F401
from tests.data.conftest import tokenizers  # noqa: F401
