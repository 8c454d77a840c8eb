"""Scorer x rehearsal x dose x reduction: what each cell of the factorial gained and lost.

    stable-rlhf study recipes/study-rehearsal-factorial.yaml --validation
    python -m bench.studies.dose RUN/validation/results.json    # tables and picture of docs/results/rehearsal_dose.md

The results are kept beside the page, without curves; with no file named the page is made anew from those.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from bench.common import ROOT
from bench.pages import markdown, rendered
from stable_rlhf.data.jsonl import read_json, to_json
from stable_rlhf.show.pictures import legend_below, picture, png

FOLDER = ROOT / "docs" / "results"
PAGE, KEPT, PICTURE = (
    FOLDER / name for name in ("rehearsal_dose.md", "rehearsal-factorial.json", "rehearsal-doses.png")
)
SCORERS = {"rm": "reward model", "am": "Advantage Model"}
TOKENS = 4.2  # of a rehearsed answer, by which a sum over its tokens is a larger dose than their mean
COLORS = {"best": "#0b6e4f", "chance": "#c8553d", "data": "#335c9e"}
# name: (heading, how it is written)
FIGURES = {
    "gold": ("gold score of both sets, over no rehearsal's", "+.3f"),
    "share": ("share of the gradient", ".2f"),
}

Row = Mapping[str, Any]


class Cell(NamedTuple):
    scorer: str
    rehearsed: str  # `none`, or what is
    way: str  # `mean` or `sum` over tokens, or `target`
    dose: float


def cell_of(variant: str) -> Cell | None:
    """What a policy's name says; None: of something else."""
    if variant in SCORERS:
        return Cell(variant, "none", "mean", 0.0)
    found = re.fullmatch(r"(rm|am)-(best|chance|data)(?:-(sum|target))?-([0-9.]+)", variant)
    return Cell(found[1], found[2], found[3] or "mean", float(found[4])) if found else None


def by_cell(results: Row) -> dict[Cell, list[Row]]:
    """The rows of each cell, by seed."""
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in sorted(results["policies"], key=lambda row: row["seed"]):
        if cell := cell_of(row["variant"]):
            cells[cell].append(row)
    return cells


def gold(row: Row) -> float:
    """The rule that the dose was chosen by: the mean of the gold scores on both sets."""
    return (row["main_gold"] + row["forget_gold"]) / 2


def by_seed(cells: Mapping[Cell, Sequence[Row]], cell: Cell, name: str) -> list[float]:
    rows = cells[cell]
    if name == "share":
        return [row["rehearsal_share"] for row in rows]
    none = cells[Cell(cell.scorer, "none", "mean", 0.0)]
    return [gold(a) - gold(b) for a, b in zip(rows, none, strict=True)]


def figure(cells: Mapping[Cell, Sequence[Row]], cell: Cell, name: str) -> str:
    """The mean over the seeds; of gains also each seed's, for what they are over is of the seed."""
    values, form = by_seed(cells, cell, name), FIGURES[name][1]
    each = ", ".join(format(value, form) for value in values)
    return format(fmean(values), form) + (f" ({each})" if name == "gold" else "")


def doses(cells: Mapping[Cell, Sequence[Row]], name: str) -> str:
    """A row for each scorer, rehearsal and reduction, a column for each gamma."""
    heading = FIGURES[name][0]
    columns = sorted({cell.dose for cell in cells if cell.rehearsed != "none" and cell.way != "target"})
    kinds = list(dict.fromkeys(cell[:3] for cell in cells if cell.rehearsed != "none" and cell.way != "target"))
    rows = [
        [
            f"{SCORERS[scorer]}, {rehearsed}{', sum' if way == 'sum' else ''}",
            *(
                figure(cells, cell, name) if (cell := Cell(scorer, rehearsed, way, dose)) in cells else "–"
                for dose in columns
            ),
        ]
        for scorer, rehearsed, way in kinds
    ]
    return markdown([heading, *(f"γ {dose:g}" for dose in columns)], rows)


def targets(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """What a share that is held did, and where gamma went."""
    rows = []
    for cell in cells:
        if cell.way == "target":
            rows.append([
                f"{SCORERS[cell.scorer]}, {cell.dose:g}",
                *(figure(cells, cell, key) for key in ("share", "gold")),
                f"{100 * fmean(row['main_lose'] for row in cells[cell]):.1f}",
                f"{100 * fmean(row['forget_lose'] for row in cells[cell]):.1f}",
                f"{fmean(row['train_score_late'] for row in cells[cell]):.3f}",
                " / ".join(f"{row['rehearsal_coef_last']:.3g}" for row in cells[cell]),
            ])  # fmt: skip
    head = ["share held", "mean share", FIGURES["gold"][0], "main: loses %", "forget: loses %",
            "late change of score", "γ in the last quarter, seed by seed"]  # fmt: skip
    return markdown(head, rows)


def contrasts(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """`best` less each control, the mean over the doses from 1, seed by seed."""
    seeds = [row["seed"] for row in next(iter(cells.values()))]
    rows = []
    for scorer in SCORERS:
        for control in ("chance", "data"):
            of_seeds = []
            for place in range(len(seeds)):
                pairs = [
                    (rows_[place], cells[cell._replace(rehearsed=control)][place])
                    for cell, rows_ in cells.items()
                    if cell.scorer == scorer and cell.rehearsed == "best" and cell.way == "mean" and cell.dose >= 1
                ]
                of_seeds.append([
                    fmean(a["main_gold"] - b["main_gold"] for a, b in pairs),
                    100 * fmean(a["forget_lose"] - b["forget_lose"] for a, b in pairs),
                ])  # fmt: skip
            rows.append([
                f"{SCORERS[scorer]}: best less {control}",
                " / ".join(f"{main:+.3f}" for main, _ in of_seeds),
                " / ".join(f"{forget:+.1f}" for _, forget in of_seeds),
            ])  # fmt: skip
    of = f"seeds {', '.join(map(str, seeds))}"
    return markdown([f"mean over γ 1, 5, 10; {of}", "main: gold", "forget: loses %"], rows)


def draw(cells: Mapping[Cell, Sequence[Row]]) -> bytes:
    """Main-set gold and forget-set losses against gamma; a sum over tokens stands where its mean would."""
    of = {"main_gold_gain": ("main set: gold less SFT's", 1), "forget_lose": ("forget set: losses %", 100)}
    with picture(2, 2, (9, 6.4), sharex=True, sharey="row") as (drawn, axes):
        for column, (scorer, title) in enumerate(SCORERS.items()):
            for line, (key, (label, factor)) in enumerate(of.items()):
                ax = axes[line, column]
                none = factor * fmean(row[key] for row in cells[Cell(scorer, "none", "mean", 0.0)])
                ax.axhline(none, color="#5f6b6d", linestyle=":", label="no rehearsal")
                for rehearsed, color in COLORS.items():
                    for way, style in (("mean", "o-"), ("sum", "x--")):
                        points = sorted(
                            (cell.dose * (TOKENS if way == "sum" else 1), factor * fmean(row[key] for row in rows))
                            for cell, rows in cells.items()
                            if cell[:3] == (scorer, rehearsed, way)
                        )
                        name = rehearsed if way == "mean" else f"{rehearsed}, sums, at {TOKENS:g} γ"
                        if points:
                            ax.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=4)
                ax.set_xscale("log")
                ax.set_ylabel(label if not column else "")
                ax.set_title("" if line else title)
                ax.set_xlabel("γ" if line else "")
        legend_below(drawn, axes[0, 0], 5)
        return png(drawn)


def block(results: Row, name: str) -> str:
    cells = by_cell(results)
    if name == "contrasts":
        return f"{contrasts(cells)}\n"
    if name == "targets":
        return f"{targets(cells)}\n"
    return f"{doses(cells, name)}\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="results.json of a run, to be kept beside the page")
    arguments = parser.parse_args(argv)
    if arguments.results:
        KEPT.write_text(to_json(read_json(arguments.results) | {"curves": []}, indent=1) + "\n", encoding="utf-8")
    results = read_json(KEPT)
    PAGE.write_text(
        rendered(PAGE.read_text(encoding="utf-8"), "dose", lambda name: block(results, name)), encoding="utf-8"
    )
    PICTURE.write_bytes(draw(by_cell(results)))


if __name__ == "__main__":
    main()
