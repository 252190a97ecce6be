"""The tokenizers of the data's tests."""

from tests.data.conftest import tokenizers  # noqa: F401
