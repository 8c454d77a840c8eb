"""Results in the documents: files of lines, one for each finished job, and the parts of a page made from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.case import Line, read_lines
from stable_rlhf.data.jsonl import to_json


def finished(path: Path) -> list[Line]:
    """Lines of finished jobs; of a line that a kill cut short nothing is kept."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return read_lines(path)


def append(line: Line, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(line) + "\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def marked(kind: str) -> re.Pattern[str]:
    """What stands from `<!-- KIND:NAME -->` (or `<!-- KIND -->`) to `<!-- /KIND -->`."""
    return re.compile(rf"(<!-- {kind}:?(?P<name>[a-z-]*) -->\n).*?(<!-- /{kind} -->)", re.DOTALL)


def rendered(page: str, kind: str, block: Callable[[str], str]) -> str:
    """The page with every marked part made anew by its name."""
    return marked(kind).sub(lambda m: f"{m[1]}{block(m['name'])}{m[3]}", page)
