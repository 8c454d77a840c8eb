"""Policies of a study trained again with one setting changed, from the study's own SFT models, scorers and prompts.

    stable-rlhf study recipes/study-skill-world.yaml
    python -m bench.studies.controls run runs/study-skill-world    # goes on after a kill
    python -m bench.studies.controls report    # tables and pictures of docs/results/skill_world.md

Four questions. How far is one run from another of the same settings, on code that rounds otherwise (``rm-again``)?
Is the Advantage Model ahead of the reward model only because its scores are narrower? RM-PPO with ``kl_coef`` as many
times larger as its scores are wider answers that (``rm-kl``). Would the temperature that calibrates the reward model do
as well (``rm-temperature``)? Scores divided by T are, but for the scale of the critic's loss, ``kl_coef`` times T,
since advantages are whitened. And does the number of clusters matter (the paper's Fig. 6)? AM-PPO-SR with other
numbers, about as many rows kept in all. Each evaluation measures the study's own policy of the same variant too, and
must find the study's figures again.

The page has the study's first five seeds (docs/results/skill_world.json) together with five further ones that ran later
(skill_world-further.json there), and seed 1 once more with all that comes before PPO (skill_world-again.json).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.case import RESULTS, Line, read_lines
from bench.common import ROOT, environment
from bench.pages import append, finished, markdown, rendered
from stable_rlhf.data.jsonl import read_json
from stable_rlhf.evaluate.over_seeds import NAMES, means, paired_difference, pooled, seed_mean
from stable_rlhf.evaluate.over_seeds_report import make_page
from stable_rlhf.evaluate.over_seeds_report import markdown as study_tables
from stable_rlhf.settings.variants import VARIANTS
from stable_rlhf.show.pictures import FAINT, KEPT, picture, png

RECIPE = ROOT / "recipes" / "study-skill-world.yaml"
OUTPUT = RESULTS / "controls.jsonl"
PAGE = ROOT / "docs" / "results" / "skill_world.md"
STUDY = PAGE.with_suffix(".json")
FURTHER = PAGE.with_name("skill_world-further.json")
AGAIN = PAGE.with_name("skill_world-again.json")
TITLE = "Skill world: seven variants, ten seeds"
PICTURE = PAGE.with_name("skill_world-clusters.png")


@dataclass(frozen=True)
class Control:
    title: str
    variant: str  # of the study, and what it is compared with
    settings: tuple[str, ...]
    clusters: int = 0  # a selection of its own with so many clusters
    by_temperature: bool = False  # kl_coef times the temperature fitted to the scorer


STUDY_CLUSTERS, BUDGET = 20, 200  # of the study's recipe: 20 clusters, ten of each
KL_COEF = 0.05  # of the study's recipe
CONTROLS = {
    "rm-again": Control("RM-PPO, trained again", "rm", ()),  # how far a run is from another with other rounding
    "rm-kl": Control("RM-PPO, `kl_coef` 0.175", "rm", ("--ppo.kl_coef", "0.175")),
    "rm-temperature": Control("RM-PPO, scores divided by T", "rm", (), by_temperature=True),
    **{f"sr-{c}": Control(f"AM-PPO-SR, {c} clusters", "am-sr", (), c) for c in (5, 100)},
}

# name: (heading, factor)
FIGURES = {
    "main_win": ("main: wins %", 100), "main_lose": ("main: loses %", 100), "main_gold_gain": ("main: gold − SFT", 1),
    "forget_lose": ("forget: loses %", 100), "forget_gold_gain": ("forget: gold − SFT", 1), "main_kl": ("KL", 1),
}  # fmt: skip


def figures(policy: dict[str, Any]) -> dict[str, float]:
    """Those of a policy in an evaluation's summary, named as in docs/results/skill_world.json."""
    values: dict[str, float] = {}
    for on in ("main", "forget"):
        part = policy[on]
        values |= {f"{on}_{key}": part[key] for key in ("win", "lose", "kl")}
        values[f"{on}_gold_gain"] = part["gold"] - part["sft_gold"]
    return values


def call(*words: Any, log: Path) -> None:
    """One command of stable-rlhf with as many threads as the study's seeds have; what it says goes to ``log``."""
    command, threads = [sys.executable, "-m", "stable_rlhf", *map(str, words)], {"OMP_NUM_THREADS": "1"}
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=threads | os.environ)
    if done.returncode:
        raise RuntimeError(f"stable-rlhf {words[0]} ended with status {done.returncode}, see {log}")


def measure(control: str, seed: int, study: Path, folder: Path, recipe: Path = RECIPE) -> Line:
    """Train and evaluate one control; finished stages in ``folder`` are not redone."""
    what, source = CONTROLS[control], study / "seeds" / str(seed)
    here = folder / control / str(seed)
    here.mkdir(parents=True, exist_ok=True)
    log = here / "log.txt"
    data = {name: source / "world" / f"{name}.jsonl.gz" for name in ("prompts", "eval_main", "eval_forget")}
    shared = ["--config", recipe, "--model-name-or-path", source / "sft", "--seed", seed]
    shared += [word for name, path in data.items() for word in (f"--data.{name}", path)]
    scorer = source / f"scorer-{VARIANTS[what.variant].scorer}"
    summary, settings = read_json(source / "summary.json"), what.settings
    if what.by_temperature:
        settings = ("--ppo.kl_coef", f"{KL_COEF * summary['scorers'][what.variant]['temperature']:.4f}")
    trained = ["--variant", what.variant, "--scorer", scorer, *settings]
    if what.clusters:
        each = max(1, BUDGET // what.clusters)
        number = ["--select.num_clusters", what.clusters, "--select.top_k", each]
        call("select", *shared, "--scorer", scorer, *number, "--output-dir", here / "selection", log=log)
        trained += ["--rehearsal", here / "selection" / "selection" / "rehearsal.jsonl.gz"]
    call("train-ppo", *shared, *trained, "--output-dir", here / "policy", log=log)
    policies = [f"changed={here / 'policy' / f'ppo-{what.variant}'}", f"study={source / f'ppo-{what.variant}'}"]
    call("evaluate", *shared, "--policies", *policies, "--output-dir", here / "evaluation", log=log)
    by_policy = read_json(here / "evaluation" / "evaluation" / "summary.json")["policies"]
    known = summary["policies"][what.variant]
    if figures(by_policy["study"]) != figures(known):
        raise RuntimeError(f"{source}: its {what.variant} measures {figures(by_policy['study'])}, not {figures(known)}")
    stage = read_json(here / "policy" / f"ppo-{what.variant}" / "stage.json")
    return {
        "control": control, "variant": what.variant, "settings": list(settings), "clusters": what.clusters,
        "seed": seed, **figures(by_policy["changed"]), "seconds": round(stage["seconds"], 1),
    }  # fmt: skip


def run(study: Path, folder: Path, seeds: Sequence[int], controls: Sequence[str], workers: int, output: Path) -> None:
    """Measure what has no line in ``output`` yet."""
    done = {(line["control"], line["seed"]) for line in finished(output)}
    todo = [(control, seed) for control in controls for seed in seeds if (control, seed) not in done]
    with ThreadPoolExecutor(workers) as pool:
        for line in pool.map(lambda job: measure(job[0], job[1], study, folder), todo):
            append(line | {"environment": environment(torch.device("cpu"))}, output)
            print(f"{line['control']}, seed {line['seed']}: {line['seconds']:.0f} s of training", flush=True)


# The report.


def by_seed(lines: Sequence[Line], control: str) -> dict[int, Line]:
    return {line["seed"]: line for line in lines if line["control"] == control}


def whole_study() -> dict[str, Any]:
    """All ten seeds."""
    return pooled([read_json(path) for path in (STUDY, FURTHER)]) | {"title": TITLE}


def of_study(variant: str) -> dict[int, Line]:
    return {row["seed"]: row for row in whole_study()["policies"] if row["variant"] == variant}


def cell(interval: Any, factor: int, *, sign: bool = False) -> str:
    digits = 3 if factor == 1 else 1
    value, low, high = (factor * interval[key] for key in ("value", "low", "high"))
    return f"{value:{'+' if sign else ''}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean_row(title: str, rows: dict[int, Line], seeds: Sequence[int]) -> list[str]:
    mean = means({title: {key: [rows[s][key] for s in seeds] for key in FIGURES}})[title]
    return [title] + [cell(mean[key], factor) for key, (_, factor) in FIGURES.items()]


def minus_row(title: str, ours: dict[int, Line], theirs: dict[int, Line], seeds: Sequence[int]) -> list[str]:
    def of(key: str) -> Any:
        return paired_difference([ours[s][key] for s in seeds], [theirs[s][key] for s in seeds])

    return [title] + [cell(of(key), factor, sign=True) for key, (_, factor) in FIGURES.items()]


def block(name: str) -> str:
    """The part ``name`` of docs/results/skill_world.md."""
    if name == "study":
        return study_tables(whole_study())
    lines = read_lines(OUTPUT)
    if name == "again":
        return again()
    if name == "rounding":
        rm, seeds = by_seed(lines, "rm-again"), sorted(by_seed(lines, "rm-again"))
        rows = [mean_row("RM-PPO", of_study("rm"), seeds), mean_row(CONTROLS["rm-again"].title, rm, seeds)]
    elif name == "scale":
        scaled = {key: by_seed(lines, key) for key in ("rm-kl", "rm-temperature")}
        am, sr, seeds = of_study("am"), of_study("am-sr"), sorted(scaled["rm-kl"])
        rows = [mean_row("RM-PPO", of_study("rm"), seeds)]
        rows += [mean_row(CONTROLS[key].title, control_rows, seeds) for key, control_rows in scaled.items()]
        rows += [mean_row("AM-PPO", am, seeds), mean_row("AM-PPO-SR", sr, seeds)]
        for key, control_rows in scaled.items():
            rows.append(minus_row(f"AM-PPO less {CONTROLS[key].title}", am, control_rows, seeds))
        rows.append(minus_row(f"AM-PPO-SR less {CONTROLS['rm-kl'].title}", sr, scaled["rm-kl"], seeds))
    else:
        sweep, seeds = cluster_rows(lines)
        rows = [mean_row(f"{count} clusters, {BUDGET // count} of each", sweep[count], seeds) for count in sweep]
    table = markdown(["", *(heading for heading, _ in FIGURES.values())], rows)
    return f"{table}\n\nSeeds {', '.join(map(str, seeds))}; mean [95 % interval over the seeds].\n"


def again() -> str:
    """Every variant of the seeds of docs/results/skill_world-again.json beside the study's own, in percent."""
    second = read_json(AGAIN)
    keys = ("main_win", "main_lose", "forget_lose")
    head = [f"seed {', '.join(map(str, second['seeds']))}"]
    head += [heading + part for heading in (FIGURES[key][0] for key in keys) for part in (", first run", ", again")]
    rows = []
    for row in second["policies"]:
        if row["variant"] != "sft":
            first = of_study(row["variant"])[row["seed"]]
            rows.append([NAMES[row["variant"]], *(f"{100 * of[key]:.1f}" for key in keys for of in (first, row))])
    return markdown(head, rows) + "\n"


def cluster_rows(lines: Sequence[Line]) -> tuple[dict[int, dict[int, Line]], list[int]]:
    """AM-PPO-SR by number of clusters, the study's own among them, and the seeds that all of them have."""
    sweep = {c.clusters: by_seed(lines, name) for name, c in CONTROLS.items() if c.clusters and by_seed(lines, name)}
    sweep[STUDY_CLUSTERS] = of_study("am-sr")
    seeds = sorted(set.intersection(*(set(rows) for rows in sweep.values())))
    return dict(sorted(sweep.items())), seeds


def draw(lines: Sequence[Line]) -> bytes:
    """Gold score over SFT against the number of clusters, a dot a seed."""
    sweep, seeds = cluster_rows(lines)
    counts = list(sweep)
    with picture(2, size=(9, 3.4)) as (figure, axes):
        for axis, on in zip(axes[0], ("main", "forget"), strict=True):
            values = [[sweep[count][s][f"{on}_gold_gain"] for s in seeds] for count in counts]
            for column in zip(*values, strict=True):
                axis.plot(counts, column, "o-", color=FAINT, markersize=3, linewidth=1)
            intervals = [seed_mean(v) for v in values]
            half = [mean["high"] - mean["value"] for mean in intervals]
            axis.errorbar(counts, [mean["value"] for mean in intervals], yerr=half, fmt="o-", color=KEPT, capsize=3)
            axis.axhline(0, color=FAINT, linewidth=1)
            axis.set_xscale("log")
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
            axis.set(xlabel="clusters", ylabel="gold score − SFT's", title=f"{on.capitalize()} set")
        return png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("run", help="train and evaluate what is not measured yet")
    measured.add_argument("study", type=Path, help="output folder of `stable-rlhf study`")
    measured.add_argument("--output-dir", type=Path, default=Path("runs/controls"), help="policies and logs")
    measured.add_argument("--output", type=Path, default=OUTPUT, help="results, a line a control and seed")
    measured.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    measured.add_argument("--controls", nargs="+", choices=list(CONTROLS), default=list(CONTROLS))
    measured.add_argument("--workers", type=int, default=2, help="at a time")
    commands.add_parser("report", help="tables and pictures of docs/results/skill_world.md")
    given = parser.parse_args()
    if given.command == "run":
        study, folder = given.study.resolve(), given.output_dir.resolve()
        return run(study, folder, given.seeds, given.controls, given.workers, given.output)
    PICTURE.write_bytes(draw(read_lines(OUTPUT)))
    for shown in make_page(whole_study())[1]:
        PAGE.with_name(f"skill_world-{shown.name}.png").write_bytes(shown.png)
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), "controls", block), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
