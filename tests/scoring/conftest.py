"""The tokenizers of the data's tests and the tiny models of the commands'."""

from tests.cli.conftest import tiny, worse  # noqa: F401
from tests.data.conftest import tokenizers  # noqa: F401
