"""What a study's policies rehearsed: how much of it is right, and which skills it is about.

    stable-rlhf study recipes/study-rehearsal.yaml
    python -m bench.studies.rehearsed run runs/study-rehearsal    # writes bench/results/rehearsed.jsonl
    python -m bench.studies.rehearsed report                      # the tables of docs/results/rehearsal.md

A seed's selections stand in its folder (``selection-rm``, ``selection-chance``, …); the world's gold score judges every
answer in them, which no selection saw.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from bench.case import RESULTS, Line, read_lines
from bench.common import ROOT
from bench.pages import append, markdown, rendered
from stable_rlhf.data.jsonl import read_jsonl
from stable_rlhf.evaluate.over_seeds import seed_mean
from stable_rlhf.world import STRONG_SKILLS, gold_score

OUTPUT = RESULTS / "rehearsed.jsonl"
PAGE = ROOT / "docs" / "results" / "rehearsal.md"
NAMES = {"selection-rm": "best", "selection-chance": "chance", "selection-data": "data"}
# name: (heading, factor)
FIGURES = {
    "rows": ("rows", 1), "right": ("right %", 100), "gold": ("gold", 1), "forget": ("of forget skills %", 100),
    "largest": ("of the skill with most %", 100), "skills": ("skills", 1), "characters": ("characters", 1),
}  # fmt: skip


def measure(folder: Path) -> dict[str, float]:
    """Figures of a selection."""
    rows = read_jsonl(folder / "rehearsal.jsonl.gz")
    golds = [gold_score(row["prompt"], row["response"]) for row in rows]
    tasks = Counter(row["task"] for row in rows)
    return {
        "rows": len(rows), "right": sum(gold == 1 for gold in golds) / len(rows), "gold": sum(golds) / len(rows),
        "forget": sum(tasks[task] for task in STRONG_SKILLS) / len(rows), "largest": max(tasks.values()) / len(rows),
        "skills": len(tasks), "characters": sum(len(row["response"]) for row in rows) / len(rows),
    }  # fmt: skip


def run(study: Path, output: Path) -> None:
    known = {(line["seed"], line["set"]) for line in read_lines(output)} if output.exists() else set()
    for seed in sorted((path for path in (study / "seeds").iterdir() if path.is_dir()), key=lambda path: path.name):
        for folder, name in NAMES.items():
            if (int(seed.name), name) not in known and (seed / folder / "rehearsal.jsonl.gz").exists():
                append({"seed": int(seed.name), "set": name, **measure(seed / folder)}, output)


def table(lines: list[Line]) -> str:
    """A row a set; means over seeds with their intervals."""
    of_set = defaultdict(list)
    for line in lines:
        of_set[line["set"]].append(line)
    rows = []
    for name in NAMES.values():
        cells = []
        for figure, (_, factor) in FIGURES.items():
            found = seed_mean([factor * line[figure] for line in of_set[name]])
            spread = f" [{found['low']:.3g}, {found['high']:.3g}]" if found["high"] > found["low"] else ""
            cells.append(f"{found['value']:.3g}{spread}")
        rows.append([name, *cells])
    return markdown(["rehearsed", *(heading for heading, _ in FIGURES.values())], rows)


def block(name: str) -> str:
    lines = read_lines(OUTPUT)
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    return f"{table(lines)}\n\nSeeds {seeds}; mean [95 % interval over the seeds].\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure the selections of a study")
    runs.add_argument("study", type=Path, help="the study's folder")
    runs.add_argument("--output", type=Path, default=OUTPUT, help="a line for each seed and set (%(default)s)")
    commands.add_parser("report", help=f"write the table into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        run(arguments.study, arguments.output)
    else:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), "rehearsed", block), encoding="utf-8")


if __name__ == "__main__":
    main()
