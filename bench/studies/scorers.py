"""Scorers side by side in the skill world, whose gold score is known: denoising, contrastive terms, MetaRM.

The material is a quickstart's: its SFT model, and the pairs that two alternates of it answered.

    stable-rlhf quickstart --output-dir runs/quickstart
    python -m bench.studies.scorers noise     # a fifth of the labels turned round
    python -m bench.studies.scorers shift     # right labels; trained on some skills, tested on the others
    python -m bench.studies.scorers report    # tables and pictures of docs/method/scorers.md, from the results

A finished (method, objective, seed) is a line of the results and is not redone. Within a seed every method meets the
same pairs, the same heads before training and the same order, so that methods are compared seed by seed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.case import RESULTS, Line, read_lines
from bench.common import ROOT, environment
from bench.pages import append, finished, markdown, rendered
from bench.studies.strength import plant, plant_and_measure
from bench.studies.workers import as_they_come, trainers, without_line
from stable_rlhf.cli.arguments import parse as parse_recipe
from stable_rlhf.data import Comparison, read_comparisons, write_jsonl
from stable_rlhf.data.encoding import Encoded, encode, encode_prompt
from stable_rlhf.data.jsonl import read_jsonl
from stable_rlhf.data.splits import split_rows
from stable_rlhf.engine.order import stream_seed
from stable_rlhf.engine.run_folder import RunDirectory
from stable_rlhf.evaluate.findings import SCORER_NAMES
from stable_rlhf.evaluate.over_seeds import seed_mean
from stable_rlhf.metrics import calibration, pair_accuracy, temperature_scaled
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.loading import load_causal_lm, load_tokenizer
from stable_rlhf.rollout.local import GenerationSettings, generate
from stable_rlhf.run.datasets import load_preferences
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison, encode_comparisons, with_logprobs
from stable_rlhf.scorer.denoise import denoise, parse_bands
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show.pictures import FAINT, INK, KEPT, legend_below, picture, png

Settings = dict[str, Any]

UNLABELLED = "unlabelled.jsonl.gz"
WRONG, NUM_SCORERS, FOLDS = 0.2, 3, 2
SAMPLES = 4  # responses a prompt that carry no label
# Skills that the SFT model answers well give hardly any pair, so these five are what there is to hold out.
SKILLS = ("add", "next", "reverse", "sort", "swap")

# For every scorer, where the quickstart has other settings: the frozen lower blocks read every response once for all
# scorers of a seed, so that each takes seconds.
BASE: Settings = {
    "scorer.num_trainable_layers": 1, "scorer.num_train_epochs": 3, "scorer.per_device_train_batch_size": 64,
    "scorer.learning_rate": 2e-3,
}  # fmt: skip
ALL = {"quantiles": [0.0, 1.0]}
# The paper's bands: the lowest tenth harmful, as far as two fifths near chance.
DENOISING: Settings = {"scorer.denoise": [{"lowest": 0.1, "flip": True}, {"lowest": 0.4, "label_smoothing": 0.3}]}
META: Settings = {"scorer.meta_responses": UNLABELLED, "scorer.meta_learning_rate": 0.01}
SIMCSE: Settings = {"scorer.contrastive": "simcse"}
SWAV: Settings = {"scorer.contrastive": "swav"}
DIFFERENCES: Settings = {"scorer.contrastive_on": "differences"}
METHODS: dict[str, Settings] = {
    "plain": {},
    "label smoothing": {"scorer.label_smoothing": WRONG},
    "flip": {"scorer.denoise": [{"lowest": 0.1, "flip": True}]},
    "drop": {"scorer.denoise": [{"lowest": 0.2, "drop": True}]},
    "soft labels": {"scorer.denoise": [{**ALL, "soft_labels": True}]},
    "adaptive margin": {"scorer.denoise": [{**ALL, "adaptive_margin": True}]},
    "flip, label smoothing": DENOISING,
    "simcse": SIMCSE,
    "simcse, differences": SIMCSE | DIFFERENCES,
    "swav": SWAV,
    "swav, differences": SWAV | DIFFERENCES,
    "metarm, step 0.01": META,
    "metarm, step 0.1": META | {"scorer.meta_learning_rate": 0.1},
    "metarm, step 1": META | {"scorer.meta_learning_rate": 1.0},
    "denoising, simcse, metarm": DENOISING | SIMCSE | META,
    "simcse, metarm": SIMCSE | META,
    "true labels": {"labels": "true"},
}


class Measure(NamedTuple):
    """A column of a table: a share of pairs, or a calibration error."""

    on: str
    name: str
    title: str


ACCURACY, ECE, SCALED = "accuracy", "ece", "ece_after_temperature"


@dataclass(frozen=True)
class Study:
    methods: tuple[str, ...]
    columns: tuple[Measure, ...]
    shown: tuple[Measure, Measure]


_HELD_OUT = Measure("held out", ACCURACY, "accuracy, held-out pairs")
_SEEN_THROUGH = Measure("wrong labels", ACCURACY, "accuracy, wrongly labelled training pairs")
_IN, _OUT = (Measure(on, ACCURACY, f"accuracy, {on}") for on in ("trained skills", "other skills"))
STUDIES = {
    "noise": Study(
        tuple(name for name in METHODS if name not in ("metarm, step 0.1", "simcse, metarm")),
        (_HELD_OUT, _SEEN_THROUGH, Measure("held out", ECE, "ECE"), Measure("held out", SCALED, "ECE after T")),
        (_HELD_OUT, _SEEN_THROUGH),
    ),
    "shift": Study(
        (
            "plain", "simcse", "simcse, differences", "swav", "swav, differences", "metarm, step 0.01",
            "metarm, step 0.1", "metarm, step 1", "simcse, metarm",
        ),
        (
            _IN, _OUT, Measure("trained skills", ECE, "ECE, trained skills"),
            Measure("other skills", ECE, "ECE, other skills"), Measure("other skills", SCALED, "the same after T"),
        ),
        (_IN, _OUT),
    ),
}  # fmt: skip


class Job(NamedTuple):
    method: str
    objective: str
    seed: int


# The material of a seed.


def sample(quickstart: Path, folder: Path) -> None:
    """Answers of the SFT model to every prompt of the pairs, ``SAMPLES`` each: what MetaRM takes from."""

    def answer(target: Path) -> dict[str, Any]:
        rows = read_comparisons([quickstart / "pairs" / "pairs.jsonl.gz"]).rows
        prompts = list({row.prompt: row.task for row in rows if isinstance(row.prompt, str)}.items())
        model, tokenizer = load_causal_lm(str(quickstart / "sft")), load_tokenizer(str(quickstart / "sft"))
        ids = [encode_prompt(tokenizer, prompt) for prompt, _ in prompts for _ in range(SAMPLES)]
        seeds = [stream_seed(0, "unlabelled", i) for i in range(len(ids))]
        new_tokens = parse_recipe("quickstart", [])[0].ppo.max_new_tokens
        rollouts = generate(model, tokenizer, ids, GenerationSettings(new_tokens), seeds=seeds, description="responses")
        texts = [rollout.text for rollout in rollouts]
        write_jsonl(
            target / "responses.jsonl.gz",
            (
                {"prompt": prompt, "task": task, "responses": texts[SAMPLES * i : SAMPLES * (i + 1)]}
                for i, (prompt, task) in enumerate(prompts)
            ),
        )
        return {"prompts": len(prompts)}

    RunDirectory(folder / "samples").stage("responses", {"samples": SAMPLES}, answer)


def unlabelled(folder: Path, prompts: Iterable[Any]) -> list[dict[str, Any]]:
    """Samples for these prompts; those with one response only are left out, they say nothing about differences."""
    wanted = set(prompts)
    rows = read_jsonl(folder / "samples" / "responses" / "responses.jsonl.gz")
    different = ({**row, "responses": list(dict.fromkeys(row["responses"]))} for row in rows)
    return [row for row in different if row["prompt"] in wanted and len(row["responses"]) > 1]


def place(study: str, seed: int, folder: Path) -> Path:
    return folder / study / f"seed-{seed}"


def prepare(study: str, seed: int, quickstart: Path, folder: Path) -> None:
    """Write the files of a seed: pairs (with their strength in ``noise``) and unlabelled responses."""
    here = place(study, seed, folder)
    if study == "noise":
        planted = plant_and_measure(
            quickstart, here, seed, labels="gold", wrong=WRONG, scorers=NUM_SCORERS, folds=FOLDS,
            settings=flags(BASE),
        )  # fmt: skip
        prompts = [row.prompt for row in load_preferences(planted.recipe.data, seed).train]
    else:
        here.mkdir(parents=True, exist_ok=True)
        rows = plant(quickstart / "pairs" / "pairs.jsonl.gz", 0.0, "gold", seed)
        other = held_out(seed)
        for name, tasks in (("pairs.jsonl.gz", False), ("other.jsonl.gz", True)):
            write_jsonl(here / name, (row for row in rows if (row["task"] in other) == tasks))
        prompts = [row.prompt for row in other_skills(here, seed)[0]]
    write_jsonl(here / UNLABELLED, unlabelled(folder, prompts))


def held_out(seed: int) -> tuple[str, str]:
    """Two skills that a seed does not train on; five seeds in a row hold out each of them twice."""
    return SKILLS[seed % 5], SKILLS[(seed + 2) % 5]


def other_skills(here: Path, seed: int) -> list[list[Comparison]]:
    """Pairs of the skills not trained on, in halves: those whose prompts MetaRM may see answers to, and test pairs."""
    return split_rows(read_comparisons([here / "other.jsonl.gz"]).rows, [0.5, 0.5], seed)


def pairs_of(study: str, here: Path) -> Path:
    return here / "strength" / "pairs.jsonl.gz" if study == "noise" else here / "pairs.jsonl.gz"


@dataclass
class Material:
    """What all scorers of a seed share, encoded once; with frozen lower blocks their hidden states too."""

    train: list[EncodedComparison]
    tests: dict[str, list[EncodedComparison]]
    unlabelled: list[list[Encoded]]
    tokenizer: Any
    cache: FeatureCache


@functools.lru_cache(maxsize=1)  # jobs come seed by seed
def material(study: str, seed: int, backbone: str, folder: Path) -> Material:
    here = place(study, seed, folder)
    data = replace(recipe_of("plain").data, pairs=[str(pairs_of(study, here))])
    tokenizer = load_tokenizer(backbone)

    def encoded(rows: Sequence[Comparison]) -> list[EncodedComparison]:
        return encode_comparisons(rows, tokenizer, data.max_length, data.max_prompt_length)[0]

    split = load_preferences(data, seed)
    train = with_logprobs(encoded(split.train), None)
    if study == "noise":
        tests = {"held out": encoded(split.test), "wrong labels": [e for e in train if e.row.meta["planted"]]}
    else:
        tests = {"trained skills": encoded(split.test), "other skills": encoded(other_skills(here, seed)[1])}
    rows = read_jsonl(here / UNLABELLED)
    unlabelled = [[encode(tokenizer, row["prompt"], text) for text in row["responses"]] for row in rows]
    return Material(train, tests, unlabelled, tokenizer, FeatureCache())


# One scorer.


def settings_of(study: str, method: str) -> Settings:
    """What a line depends on beside its seed and objective."""
    chosen = BASE | METHODS[method] | {"samples": SAMPLES}
    return chosen | ({"wrong": WRONG, "num_scorers": NUM_SCORERS, "folds": FOLDS} if study == "noise" else {})


def flags(settings: Settings) -> list[str]:
    """Those of a recipe as NAME=VALUE."""
    named = {name: value for name, value in settings.items() if "." in name}
    return [f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in named.items()]


@functools.cache
def recipe_of(method: str) -> Recipe:
    recipe, _ = parse_recipe("quickstart", [f"--{flag}" for flag in flags(BASE | METHODS[method])])
    recipe.checkpoint.save_steps, recipe.report_to = 0, []
    return recipe


def train(study: str, job: Job, quickstart: Path, folder: Path) -> Line:
    """Train one scorer as `train-scorer` does, and measure it."""
    began = time.process_time()
    backbone = str(quickstart / "sft")
    recipe, shared = recipe_of(job.method), material(study, job.seed, backbone, folder)
    rows = shared.train
    if "labels" in METHODS[job.method]:
        rows = [right(item) for item in rows]
    if recipe.scorer.denoise:
        new_rows = denoise([item.row for item in rows], parse_bands(job.method, recipe.scorer.denoise)).rows
        rows = [replace(item, row=row) for item, row in zip(rows, new_rows, strict=True) if row is not None]
    settings = ScorerSettings("rm")
    if job.objective == "am":
        assert rows[0].row.alt_logprobs is not None
        alternates = len(rows[0].row.alt_logprobs[0])
        settings = ScorerSettings("am", alternates + 1, alternates, recipe.scorer.margin)
    scorer = AdvantageModel(
        load_causal_lm(backbone).base_model, shared.tokenizer, settings,
        num_trainable_layers=recipe.scorer.num_trainable_layers, seed=stream_seed(job.seed, "heads"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        train_scorer(
            scorer, rows, recipe, Path(name), seed=stream_seed(job.seed, "scorer", "train"), cache=shared.cache,
            meta_responses=shared.unlabelled if recipe.scorer.meta_responses else (),
        )  # fmt: skip
    measured = {on: measure(gold_gaps(scorer, test, shared.cache)) for on, test in shared.tests.items()}
    seconds = round(time.process_time() - began, 1)
    return {**job._asdict(), "study": study, "measured": measured, "cpu_seconds": seconds}


def right(item: EncodedComparison) -> EncodedComparison:
    """The comparison with its label before planting."""
    ((better, worse),) = item.row.pairs
    return replace(item, row=replace(item.row, pairs=((worse, better),))) if item.row.meta["planted"] else item


def gold_gaps(scorer: AdvantageModel, rows: Sequence[EncodedComparison], cache: FeatureCache) -> np.ndarray:
    """Score of the response that is better by gold less the other's, [pairs]."""
    scores = scorer.score_encoded([e for item in rows for e in item.examples], cache=cache).double().view(-1, 2)
    gold = np.array([item.row.meta["gold_chosen"] - item.row.meta["gold_rejected"] for item in rows])
    return (scores[:, 0] - scores[:, 1]).numpy() * np.sign(gold)


def measure(gaps: np.ndarray) -> dict[str, float]:
    """Accuracy and calibration of score differences that a perfect scorer makes positive."""
    zero = np.zeros_like(gaps)
    scaled, _ = temperature_scaled(gaps, zero)  # fitted on other pairs than those it scales
    return {
        "pairs": len(gaps), ACCURACY: pair_accuracy(gaps, zero), ECE: calibration(gaps, zero)[0],
        SCALED: calibration(scaled, zero)[0],
    }  # fmt: skip


# The results.


def unfinished(study: str, jobs: Sequence[Job], lines: Sequence[Line]) -> list[Job]:
    """Jobs without a line; one of a method that there is no more is left alone."""
    done = {Job(line["method"], line["objective"], line["seed"]): line for line in lines if line["method"] in METHODS}
    return without_line(jobs, done, lambda job: settings_of(study, job.method))


def write_down(lines: Iterable[Line], path: Path, about: dict[str, Any]) -> None:
    """Append lines as they come."""
    for line in lines:
        append(line | {"settings": settings_of(line["study"], line["method"])} | about, path)


def run(study: str, jobs: Sequence[Job], workers: int, quickstart: Path, folder: Path) -> Iterator[Line]:
    """Lines of the jobs in the order in which they finish."""
    with trainers(workers, folder, threads=1) as pool:  # the world's models are too small to share out
        pool.submit(sample, quickstart, folder).result()
        calls = [(study, seed, quickstart, folder) for seed in dict.fromkeys(job.seed for job in jobs)]
        list(as_they_come(pool, "pairs and their strength", "seeds", prepare, calls))
        yield from as_they_come(
            pool, "scorers", "scorers", train, [(study, job, quickstart, folder) for job in jobs],
            lambda line: f"{line['method']}, {line['objective']}, seed {line['seed']}",
        )  # fmt: skip


# The report.

PAGE = ROOT / "docs" / "method" / "scorers.md"


def path_of(study: str) -> Path:
    return RESULTS / f"scorers-{study}.jsonl"


def by_seed(lines: Sequence[Line], method: str, objective: str, measure: Measure) -> dict[int, float]:
    return {
        line["seed"]: line["measured"][measure.on][measure.name]
        for line in lines if (line["method"], line["objective"]) == (method, objective)
    }  # fmt: skip


def over_plain(lines: Sequence[Line], method: str, objective: str, measure: Measure) -> list[float]:
    """Differences to plain, seed by seed."""
    own, plain = (by_seed(lines, name, objective, measure) for name in (method, "plain"))
    return [own[seed] - plain[seed] for seed in sorted(own.keys() & plain.keys())]


def signed(differences: Sequence[float]) -> str:
    """Mean and interval in percentage points, bold where the interval is on one side of 0."""
    if len(differences) < 2:
        return "–"
    mean = seed_mean(differences)
    value, low, high = (round(100 * mean[end], 1) + 0.0 for end in ("value", "low", "high"))  # no -0.0
    text = f"{value:+.1f} [{low:.1f}, {high:.1f}]".replace("-", "−")
    return f"**{text}**" if mean["low"] > 0 or mean["high"] < 0 else text


def table(study: str, lines: Sequence[Line]) -> str:
    """A table for each objective: means over the seeds, and differences to plain with their intervals."""
    columns = STUDIES[study].columns
    parts = []
    for objective, title in SCORER_NAMES.items():
        head = [title] + [cell for column in columns for cell in (column.title, "over plain")]
        rows = []
        for method in STUDIES[study].methods:
            if not by_seed(lines, method, objective, columns[0]):
                continue
            row = [method]
            for column in columns:
                row.append(f"{100 * statistics.fmean(by_seed(lines, method, objective, column).values()):.1f}")
                row.append("" if method == "plain" else signed(over_plain(lines, method, objective, column)))
            rows.append(row)
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def origin(study: str, lines: Sequence[Line]) -> str:
    """How to get these figures again."""
    seeds = sorted({line["seed"] for line in lines})
    sizes = {on: statistics.fmean(line["measured"][on]["pairs"] for line in lines) for on in lines[0]["measured"]}
    where = lines[-1]["environment"]
    return (
        f"{len(lines)} scorers, seeds {', '.join(map(str, seeds))}; pairs measured on, mean over the seeds: "
        + ", ".join(f"{size:,.0f} {on}" for on, size in sizes.items())
        + f". torch {where['versions']['torch']}, {where['time'][:10]}. Again: "
        f"`python -m bench.studies.scorers {study}`."
    )


def block(study: str) -> str:
    lines = read_lines(path_of(study))
    return f"{table(study, lines)}\n\n{origin(study, lines)}\n"


def draw(study: str, lines: Sequence[Line]) -> bytes:
    """Differences to plain with their intervals, a dot a seed."""
    methods = [name for name in STUDIES[study].methods if name != "plain"]
    colours = {"rm": INK, "am": KEPT}
    with picture(2, size=(9, 1.2 + 0.42 * len(methods)), sharey=True) as (figure, axes):
        for axis, column in zip(axes[0], STUDIES[study].shown, strict=True):
            axis.axvline(0, color=FAINT, linewidth=1)
            for objective, offset in (("rm", 0.17), ("am", -0.17)):
                for i, method in enumerate(methods):
                    gains = [100 * x for x in over_plain(lines, method, objective, column)]
                    if len(gains) < 2:
                        continue
                    height = len(methods) - i + offset
                    mean = seed_mean(gains)
                    axis.plot(gains, [height] * len(gains), "o", color=FAINT, markersize=3, zorder=3)
                    axis.errorbar(
                        mean["value"], height, xerr=mean["high"] - mean["value"], fmt="o",
                        color=colours[objective], markersize=5, capsize=2, label=None if i else SCORER_NAMES[objective],
                    )  # fmt: skip
            axis.set(xlabel="percentage points over plain")
            axis.set_title(column.title[0].upper() + column.title[1:])
            axis.set_yticks(range(len(methods), 0, -1), methods)
        legend_below(figure, axes[0][0], 2)
        return png(figure)


def report() -> None:
    for study in STUDIES:
        if path_of(study).exists():
            picture_of = PAGE.parent / f"scorers-{study}.png"
            picture_of.write_bytes(draw(study, read_lines(path_of(study))))
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), "scorers", block), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="study", required=True)
    for name in STUDIES:
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="output folder of a quickstart")
        command.add_argument("--output-dir", type=Path, default=Path("runs/scorers"), help="pairs, strengths and log")
        command.add_argument("--output", type=Path, default=path_of(name), help="results, a line a scorer")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
        command.add_argument("--methods", nargs="+", choices=STUDIES[name].methods, default=STUDIES[name].methods)
        command.add_argument("--objectives", nargs="+", choices=list(SCORER_NAMES), default=list(SCORER_NAMES))
        command.add_argument("--workers", type=int, default=1, help="processes")
    commands.add_parser("report")
    given = parser.parse_args()
    if given.study == "report":
        return report()
    jobs = [Job(m, o, s) for s in given.seeds for o in given.objectives for m in given.methods]
    todo = unfinished(given.study, jobs, finished(given.output))
    if todo:
        lines = run(given.study, todo, given.workers, given.run.resolve(), given.output_dir.resolve())
        write_down(lines, given.output, {"environment": environment(torch.device("cpu"))})
    print(table(given.study, finished(given.output)))
    return None


if __name__ == "__main__":
    main()
