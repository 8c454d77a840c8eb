"""What a study's policies rehearsed, and what they say of the forget set.

    stable-rlhf study recipes/study-rehearsal.yaml
    python -m bench.studies.rehearsed run runs/study-rehearsal    # writes bench/results/rehearsed.jsonl
    python -m bench.studies.rehearsed report                      # the tables of docs/results

A seed's selections stand in its folder (``selection-rm``, ``selection-chance``, …), its policies' answers in
``evaluation``; the world's gold score judges every answer, which no selection saw.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from bench.case import RESULTS, Line, read_lines
from bench.common import ROOT
from bench.pages import append, markdown, rendered
from stable_rlhf.data.jsonl import read_jsonl
from stable_rlhf.evaluate.over_seeds import seed_mean
from stable_rlhf.world import FORGET_SKILLS, gold_score, misread, right_answer

OUTPUT = RESULTS / "rehearsed.jsonl"
PAGES = [ROOT / "docs" / "results" / f"{name}.md" for name in ("rehearsal", "lookalikes")]
FORGET = {skill for skills in FORGET_SKILLS.values() for skill in skills}
# Names of selections that are not those of their variation: of the reward model's own, and of the Advantage Model's.
NAMES = {"selection-rm": "best", "selection": "am-best"}
# name: (heading, factor)
OF_SETS = {
    "rows": ("rows", 1), "right": ("right %", 100), "gold": ("gold", 1), "forget": ("of forget skills %", 100),
    "forget_right": ("of these right %", 100), "largest": ("of the skill with most %", 100), "skills": ("skills", 1),
    "characters": ("characters", 1),
}  # fmt: skip
OF_ANSWERS = {
    "right": ("right %", 100), "taken": ("right for what it is taken for %", 100), "else": ("neither %", 100),
}  # fmt: skip


def measure(folder: Path) -> dict[str, float]:
    """Figures of a selection."""
    rows = read_jsonl(folder / "rehearsal.jsonl.gz")
    golds = [gold_score(row["prompt"], row["response"]) for row in rows]
    tasks = Counter(row["task"] for row in rows)
    forget = [gold for gold, row in zip(golds, rows, strict=True) if row["task"] in FORGET]
    return {
        "rows": len(rows), "right": sum(gold == 1 for gold in golds) / len(rows), "gold": sum(golds) / len(rows),
        "forget": len(forget) / len(rows), "forget_right": sum(gold == 1 for gold in forget) / max(len(forget), 1),
        "largest": max(tasks.values()) / len(rows), "skills": len(tasks),
        "characters": sum(len(row["response"]) for row in rows) / len(rows),
    }  # fmt: skip


def answers(folder: Path) -> Iterator[Line]:
    """Of each policy, and of SFT: how much of what it says of the forget set is right, or would be if the prompt were
    the one that it is taken for."""
    of_policy = defaultdict(list)
    for row in read_jsonl(folder / "responses.jsonl.gz"):
        if row["set"] == "forget":
            of_policy[row["policy"]].append((row["prompt"], row["response"]))
            of_policy["SFT"].append((row["prompt"], row["sft"]))
    for policy, said in of_policy.items():
        right = sum(response == right_answer(prompt) for prompt, response in said) / len(said)
        taken = sum(response == right_answer(misread(prompt)) != right_answer(prompt) for prompt, response in said)
        yield {"policy": policy, "right": right, "taken": taken / len(said), "else": 1 - right - taken / len(said)}


def run(study: Path, output: Path) -> None:
    """Lines for each selection and policy of the seeds that have none."""
    lines = read_lines(output) if output.exists() else []
    name = study.resolve().name.removeprefix("study-")
    known = {line["seed"] for line in lines if line["study"] == name}
    for seed in sorted((path for path in (study / "seeds").iterdir() if path.is_dir()), key=lambda path: path.name):
        if int(seed.name) in known or not (seed / "summary.json").exists():
            continue
        found: list[Line] = [
            {"set": NAMES.get(folder.name, folder.name.removeprefix("selection-")), **measure(folder)}
            for folder in sorted(seed.glob("selection*"))
        ]
        # All of a seed is measured before any of it is written: a seed with a line is a finished one.
        for line in [*found, *answers(seed / "evaluation")]:
            append({"study": name, "seed": int(seed.name), **line}, output)


def table(lines: list[Line], key: str, figures: dict[str, tuple[str, int]]) -> str:
    """A row a set or policy, in the order of the lines; means over seeds with their intervals."""
    of_name = defaultdict(list)
    for line in lines:
        of_name[line[key]].append(line)
    figures = {name: figure for name, figure in figures.items() if all(name in line for line in lines)}
    rows = []
    for name, of_seeds in of_name.items():
        cells = []
        for figure, (heading, factor) in figures.items():
            found = seed_mean([factor * line[figure] for line in of_seeds])
            low, high = found["low"], found["high"]
            if heading.endswith("%"):
                low, high = max(low, 0.0), min(high, 100.0)
            spread = f" [{low:.3g}, {high:.3g}]" if high > low else ""
            cells.append(f"{found['value']:.3g}{spread}")
        rows.append([name, *cells])
    head = {"set": "rehearsed", "policy": "policy"}[key]
    return markdown([head, *(heading for heading, _ in figures.values())], rows)


def block(name: str) -> str:
    """The table of a study's selections, or of its policies' answers where the name ends so."""
    study, key, figures = name, "set", OF_SETS
    if name.endswith("-answers"):
        study, key, figures = name.removesuffix("-answers"), "policy", OF_ANSWERS
    lines = [line for line in read_lines(OUTPUT) if line["study"] == study and key in line]
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    return f"{table(lines, key, figures)}\n\nSeeds {seeds}; mean [95 % interval over the seeds].\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure the selections and answers of a study")
    runs.add_argument("study", type=Path, help="the study's folder")
    runs.add_argument("--output", type=Path, default=OUTPUT, help="a line for each seed and set (%(default)s)")
    commands.add_parser("report", help="write the tables into " + ", ".join(page.name for page in PAGES))
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        run(arguments.study, arguments.output)
    else:
        for page in PAGES:
            page.write_text(rendered(page.read_text(encoding="utf-8"), "rehearsed", block), encoding="utf-8")


if __name__ == "__main__":
    main()
