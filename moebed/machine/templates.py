"""HTML by Jinja templates, which escape all that they are given; each lies beside the code that fills it."""

from __future__ import annotations

import base64
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render(name: str, **values: Any) -> Markup:
    """A filled template.

    Args:
        name: Its package and file: ``probes.report/page.html`` is ``probes/report/templates/page.html``.
        values: What it is filled with; what is not Markup is escaped.

    Returns:
        HTML, which other templates take as it is.
    """
    from markupsafe import Markup

    return Markup(_environment().get_template(name).render(values))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda data: Markup(base64.b64encode(data).decode())
    return environment


def _read(name: str) -> str:
    package, _, file = name.partition("/")
    return (resources.files(package) / "templates" / file).read_text(encoding="utf-8")
