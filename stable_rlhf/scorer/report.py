"""What preference strength found, to read: a picture, one HTML page, tables for a terminal."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from stable_rlhf.scorer.figures import strength_picture
from stable_rlhf.show.pictures import plain

_MEANING = {
    "weakest": "the scorers would turn these labels round: read them before you trust or flip them",
    "most ambiguous": "the scorers see hardly a difference",
    "strongest": "the clearest labels; the last tenth teaches little more",
}


def write_report(
    title: str, summary: dict[str, Any], mean: ArrayLike, std: ArrayLike, check: list[float | None] | None, folder: Path
) -> None:
    """``strength.png`` and ``report.html``, one self-contained page, from the summary that ``strength.json`` holds."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    image = strength_picture(mean, std, check, summary["check"]["column"] if check is not None else "")
    (folder / "strength.png").write_bytes(image)
    environment = Environment(
        loader=PackageLoader("stable_rlhf.scorer", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("strength.html.j2").render(
        title=title, lead=in_words(summary), picture=base64.b64encode(image).decode(), notable=summary["notable"],
        meaning=_MEANING, check=summary.get("check"),
    )  # fmt: skip
    (folder / "report.html").write_text(page, encoding="utf-8", errors="surrogateescape")


def in_words(summary: dict[str, Any]) -> list[str]:
    """The summary as sentences."""
    how = f"{summary['scorers']} scorers"
    if summary["folds"] > 1:
        how += f" that had not seen it (of {summary['folds']} folds)"
    lines = [
        f"{summary['pairs']:,} pairs, each judged by {how}. Mean strength {summary['mean']:.3f}, mean deviation "
        f"{summary['deviation']:.3f}; {100 * summary['below_zero']:.1f} % of the pairs have a strength below 0."
    ]
    if check := summary.get("check"):
        found = f"Rank correlation (Spearman) {_interval(check['spearman'])}"
        if "auc" in check:
            found += f"; a pair of its higher value is the stronger in {_interval(check['auc'])} of cases (AUC)"
        lines.append(
            f"Strength against {check['column']!r} over {check['pairs']:,} pairs of {check['prompts']:,} prompts. "
            f"{found}. Brackets: 95 % intervals, by bootstrap over the prompts."
        )
    return lines


def _interval(found: dict[str, float] | None) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else "not defined"


def notable_tables(summary: dict[str, Any], width: int = 40) -> list[Any]:
    """A rich table for the weakest, the most ambiguous and the strongest pairs; texts are cut to ``width``."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for name, rows in summary["notable"].items():
        table = Table(title=f"{name}: {_MEANING[name]}", title_justify="left")
        for column in ("μ", "σ"):
            table.add_column(column, justify="right", no_wrap=True)
        for column in ("prompt", "chosen", "rejected"):
            table.add_column(column)
        table.add_column("where", no_wrap=True)
        for row in rows:
            # Text, not str: what stands in brackets in the data is no markup.
            texts = [Text(_line(row[key], width)) for key in ("prompt", "chosen", "rejected")]
            table.add_row(f"{row['mean']:.2f}", f"{row['std']:.2f}", *texts, Text(Path(row["source"]).name))
        tables.append(table)
    return tables


def _line(text: str, width: int) -> str:
    return plain(text, width).replace(r"\$", "$")
