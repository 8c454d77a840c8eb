"""What the HTML pages of the package share: one environment, one style, pictures inside the page, safe texts.

A page is a template beside the module that fills it; it extends ``show/base.html.j2``.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Picture:
    """A drawn picture: ``name`` is its file's, without ending."""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def data(self) -> str:
        """The bytes as the page embeds them."""
        return base64.b64encode(self.png).decode("ascii")


def drawn(*rows: tuple[Any, str, str, str, Callable[[], bytes]]) -> list[Picture]:
    """Pictures of rows: whether there is anything to show, name, title, caption, and what draws it."""
    return [Picture(name, title, caption, draw()) for shown, name, title, caption, draw in rows if shown]


def render(template: str, **values: Any) -> str:
    """A page from a template, named by its path in the package: every value escaped, a missing one an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stable_rlhf", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def write_html(path: Path, page: str) -> None:
    """``page`` as UTF-8; what a file name or an argument holds beyond it comes back as the bytes it was."""
    path.write_text(page, encoding="utf-8", errors="surrogateescape")


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
