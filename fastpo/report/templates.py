"""Fill the templates beside this file. Whatever goes into a page is escaped, but for drawn SVG."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from fastpo.optional import require

if TYPE_CHECKING:
    import jinja2


@functools.cache
def _environment() -> jinja2.Environment:
    require("jinja2", "a report")
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def fill(template: str, **values: object) -> str:
    """Return a template's text with these values.

    Raises:
        PackageError: jinja2 is not installed.
    """
    return _environment().get_template(template).render(values)
