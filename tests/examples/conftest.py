"""The examples are scripts: they import each other by name from their own folder."""

import sys
from pathlib import Path

from tests.absent import absent_packages_skip  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
