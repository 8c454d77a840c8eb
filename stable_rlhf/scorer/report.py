"""What preference strength found, to read: a picture, one HTML page, tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stable_rlhf.scorer.strength import deviation_curve
from stable_rlhf.show.page import Picture, render, write_html
from stable_rlhf.show.pictures import FAINT, INK, KEPT, picture, plain, png

_MEANING = {
    "weakest": "the scorers would turn these labels round: read them before you trust or flip them",
    "most ambiguous": "the scorers see hardly a difference",
    "strongest": "the clearest labels; the last tenth teaches little more",
}


def write_report(
    title: str, summary: dict[str, Any], mean: ArrayLike, std: ArrayLike, check: list[float | None] | None, folder: Path
) -> None:
    """``strength.png`` and ``report.html``, one self-contained page, from the summary that ``strength.json`` holds."""
    image = Picture(
        "strength", "Histogram of the strength, and the scorers' deviation against it", "",
        strength_picture(mean, std, check, summary["check"]["column"] if check is not None else ""),
    )  # fmt: skip
    (folder / "strength.png").write_bytes(image.png)
    page = render(
        "scorer/strength.html.j2", title=title, lead=in_words(summary), picture=image, notable=summary["notable"],
        meaning=_MEANING, check=summary.get("check"),
    )  # fmt: skip
    write_html(folder / "report.html", page)


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
        sentence = f"Rank correlation (Spearman) {_interval(check['spearman'])}"
        if "auc" in check:
            sentence += f"; a pair of its higher value is the stronger in {_interval(check['auc'])} of cases (AUC)"
        lines.append(
            f"Strength against {check['column']!r} over {check['pairs']:,} pairs of {check['prompts']:,} prompts. "
            f"{sentence}. Brackets: 95 % intervals, by bootstrap over the prompts."
        )
    return lines


def _interval(interval: dict[str, float] | None) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]" if interval else "not defined"


def notable_tables(summary: dict[str, Any]) -> list[Any]:
    """A rich table for the weakest, the most ambiguous and the strongest pairs; texts are cut."""
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
            texts = [Text(plain(row[key], 40).replace(r"\$", "$")) for key in ("prompt", "chosen", "rejected")]
            table.add_row(f"{row['mean']:.2f}", f"{row['std']:.2f}", *texts, Text(Path(row["source"]).name))
        tables.append(table)
    return tables


_WRONG = "#D55E00"


_MOST_GROUPS = 8


def strength_picture(
    mean: ArrayLike, std: ArrayLike, check: Sequence[float | None] | None = None, check_name: str = ""
) -> bytes:
    """Histogram of μ, the scorers' deviation against it, and, with ``check``, μ by the values of a column of the data
    (None where a pair has none)."""
    mu, sigma = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    with picture(3 if check is not None else 2, size=(12 if check is not None else 9, 3.6)) as (figure, axes):
        left, right = axes[0, 0], axes[0, 1]
        low, high = (float(q) for q in np.quantile(mu, [0.002, 0.998]))
        # 0 is an edge, so that no bar stands for both kinds of pairs.
        width = (high - low) / 40 or 1.0
        edges = width * np.arange(np.floor(low / width), np.floor(high / width) + 2)
        clipped = np.clip(mu, edges[0], np.nextafter(edges[-1], edges[0]))
        for part, colour, label in ((clipped < 0, _WRONG, "μ < 0"), (clipped >= 0, KEPT, "μ ≥ 0")):
            left.hist(clipped[part], edges, color=colour, label=f"{label}: {100 * part.mean():.1f} %")
        left.set(xlabel="strength μ: mean of r(chosen) − r(rejected)", ylabel="pairs")
        left.set_title("How sure the scorers are")
        left.legend(loc="upper right")
        right.scatter(mu, sigma, s=float(np.clip(4000 / len(mu), 1, 12)), color=FAINT, linewidths=0)
        curve = deviation_curve(mu, sigma)
        right.plot([c["mean"] for c in curve], [c["std"] for c in curve], color=INK, marker="o", markersize=3)
        right.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        right.set(xlabel="strength μ", ylabel="deviation σ over the scorers", ylim=(0, None))
        right.set_title("How far they disagree (line: groups of equal size)")
        if check is not None:
            _by_value(axes[0, 2], mu, check, check_name)
        return png(figure)


def _by_value(ax: Any, mu: np.ndarray, check: Sequence[float | None], name: str) -> None:
    """Boxes of μ by value; many different values are grouped into equally large parts."""
    known = np.array([value is not None for value in check])
    value = np.array([v for v in check if v is not None], dtype=np.float64)
    strength = mu[known]
    distinct = np.unique(value)
    if len(distinct) <= _MOST_GROUPS:
        groups = [(f"{v:.3g}", strength[value == v]) for v in distinct]
    else:
        parts = np.array_split(np.argsort(value, kind="stable"), _MOST_GROUPS)
        groups = [(f"≤ {value[p].max():.3g}", strength[p]) for p in parts]
    ax.boxplot(
        [g for _, g in groups], showfliers=False, showmeans=True, medianprops={"color": INK},
        meanprops={"markerfacecolor": KEPT, "markeredgecolor": KEPT},
    )  # fmt: skip
    ax.set_xticks(range(1, len(groups) + 1), [f"{label}\n{len(g)}" for label, g in groups])
    ax.axhline(0, color=INK, linewidth=0.8, linestyle="--")
    ax.set(xlabel=f"{plain(name)} (below: pairs)", ylabel="strength μ")
    ax.set_title(f"Strength by {plain(name)}")
