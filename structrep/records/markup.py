"""HTML and SVG from templates, in which whatever is filled in is escaped."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def filled(template: str, **values: Any) -> Markup:
    """A template of this package with values put in."""
    from markupsafe import Markup

    return Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # takes longer to import than a plan to print

    environment = Environment(
        loader=PackageLoader("structrep"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"linked": _linked, "broken": _broken}
    return environment


def _linked(text: str) -> Markup:
    """A source with links to arXiv."""
    from markupsafe import Markup, escape

    return Markup(ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', str(escape(text))))


def _broken(path: str) -> Markup:
    """A module's path, with a line break allowed behind each dot."""
    from markupsafe import Markup, escape

    return Markup(str(escape(path)).replace(".", ".<wbr>"))
