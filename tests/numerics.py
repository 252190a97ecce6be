"""Numeric rule of the tests, which ships with the package."""

from fastpo.testing.three_way import assert_three_way, error

__all__ = ["assert_three_way", "error"]
