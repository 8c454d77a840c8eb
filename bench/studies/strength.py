"""Wrong labels planted in the skill world: how many does preference strength find, and what does mending them buy?

The material is a quickstart's: its SFT model and the pairs that two alternates of it answered. Every seed plants wrong
labels anew, measures the strength of the training pairs, and trains reward models on the labels as they are, as the
strength mends them, and as they were before. Held-out pairs are judged by the gold score.

    stable-rlhf quickstart --output-dir runs/quickstart
    python -m bench.studies.strength runs/quickstart --output-dir runs/strength-study
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bench.common import environment
from stable_rlhf.cli.arguments import parse as parse_recipe
from stable_rlhf.data import Comparison, write_jsonl
from stable_rlhf.data.jsonl import read_json, read_jsonl, to_json
from stable_rlhf.engine.process import start
from stable_rlhf.engine.run_folder import RunDirectory, Stage
from stable_rlhf.evaluate.over_seeds import seed_mean
from stable_rlhf.run.datasets import load_preferences, read_preferences, split_preferences
from stable_rlhf.run.stages import run_scorer
from stable_rlhf.run.strength import measure_strength, train_head
from stable_rlhf.scorer.denoise import denoise, parse_bands
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show.pictures import FAINT, INK, KEPT, picture, png
from stable_rlhf.world import utility

# What each reward model is trained on; None: the labels before the wrong ones were planted.
CONDITIONS: dict[str, list[dict[str, Any]] | None] = {
    "as they are": [],
    "flip below 0": [{"below": 0.0, "flip": True}],
    "flip the lowest tenth": [{"lowest": 0.1, "flip": True}],
    "drop the lowest fifth": [{"lowest": 0.2, "drop": True}],
    "true labels": None,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of `stable-rlhf quickstart`")
    parser.add_argument("--output-dir", type=Path, required=True, help="finished parts found here are not redone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--labels", choices=["gold", "annotator"], default="gold",
                        help="right labels before planting: by the gold score, or the noisy annotator's")  # fmt: skip
    parser.add_argument("--wrong", type=float, default=0.2, help="share of labels turned round (default %(default)s)")
    parser.add_argument("--scorers", type=int, default=5)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the recipe")
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    parser.add_argument("--figure", type=Path, help="where to write the picture as well")
    return parser.parse_args()


def plant(pairs: Path, wrong: float, labels: str, seed: int) -> list[dict[str, Any]]:
    """Rows of the quickstart with `planted`: whether the label was turned round. Pairs of equal gold have no right
    label and are left out."""
    rng = random.Random(seed)
    rows = []
    for row in read_jsonl(pairs):
        if row["gold_chosen"] == row["gold_rejected"]:
            continue
        flipped = row.pop("flipped")
        if flipped if labels == "annotator" else row["gold_chosen"] < row["gold_rejected"]:
            row = turned(row)
        planted = rng.random() < wrong
        rows.append((turned(row) if planted else row) | {"planted": planted})
    return rows


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its two responses, and what the row says of each, in each other's place."""
    new = row | {
        "chosen": row["rejected"], "rejected": row["chosen"], "gold_chosen": row["gold_rejected"],
        "gold_rejected": row["gold_chosen"],
    }  # fmt: skip
    for name in ("logprobs", "alt_logprobs"):
        if name in row:
            new[name] = {"chosen": row[name]["rejected"], "rejected": row[name]["chosen"]}
    return new


def mended(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its label before planting."""
    return turned(row) | {"planted": False} if row["planted"] else row


def recall_precision(suspicion: np.ndarray, planted: np.ndarray) -> tuple[list[float], list[float]]:
    """Recall and precision of calling the first 1, 2, ... most suspicious pairs wrong."""
    hits = np.cumsum(planted[np.argsort(-suspicion, kind="stable")])
    return (hits / planted.sum()).tolist(), (hits / np.arange(1, len(hits) + 1)).tolist()


@dataclass(frozen=True)
class Planted:
    """The pairs of a seed with wrong labels planted, and their strength.

    Attributes:
        recipe: settings of the seed; its pairs are those that carry their strength.
        run: with ``pairs-noisy.jsonl.gz`` and ``pairs-true.jsonl.gz``, the labels after and before planting.
        common: what every later stage depends on.
        strength: the stage that measured.
    """

    recipe: Recipe
    run: RunDirectory
    common: dict[str, Any]
    strength: Stage


def plant_and_measure(
    quickstart: Path, folder: Path, seed: int, *, labels: str, wrong: float, scorers: int, folds: int,
    settings: Sequence[str] = (),
) -> Planted:  # fmt: skip
    """Plant wrong labels in the pairs of a quickstart and measure the strength of each; ``settings``: NAME=VALUE."""
    rows = plant(quickstart / "pairs" / "pairs.jsonl.gz", wrong, labels, seed)
    run = RunDirectory(folder)
    noisy = folder / "pairs-noisy.jsonl.gz"
    write_jsonl(noisy, rows)
    write_jsonl(folder / "pairs-true.jsonl.gz", map(mended, rows))
    recipe, _ = parse_recipe("quickstart", [f"--seed={seed}", "--report_to=[]", *(f"--{s}" for s in settings)])
    recipe.strength.num_scorers, recipe.strength.folds = scorers, folds
    recipe.data.pairs = [str(noisy)]
    common: dict[str, Any] = {
        "scorer": recipe.as_dict()["scorer"], "seed": seed, "labels": labels, "wrong": wrong,
    }  # fmt: skip
    measured = measure_strength(recipe, run, str(quickstart / "sft"), common)
    recipe.data.pairs = [str(measured.folder / "pairs.jsonl.gz")]
    return Planted(recipe, run, common, measured)


def study(arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """One seed: planting, strength, one reward model for each condition."""
    planted = plant_and_measure(
        arguments.run, folder, seed, labels=arguments.labels, wrong=arguments.wrong, scorers=arguments.scorers,
        folds=arguments.folds, settings=arguments.setting,
    )  # fmt: skip
    result: dict[str, Any] = {"seed": seed, **detection(planted.recipe, arguments.labels)}
    if planted.recipe.strength.heads_only:
        outcome = heads(planted, arguments.conditions)
    else:
        outcome = whole_models(planted, str(arguments.run / "sft"), arguments.conditions)
    result["gold_accuracy"], result["test_pairs"] = outcome
    return result


def whole_models(planted: Planted, backbone: str, conditions: list[str]) -> tuple[dict[str, float], int]:
    """Gold accuracy of a reward model for each condition, trained by `train-scorer`, and the number of test pairs."""
    recipe, run, measured = planted.recipe, planted.run, planted.strength
    enriched, true = recipe.data.pairs, [str(run.root / "pairs-true.jsonl.gz")]
    accuracy: dict[str, float] = {}
    test: list[Comparison] = []
    for name in conditions:
        bands = CONDITIONS[name]
        recipe.data.pairs, recipe.scorer.denoise = true if bands is None else enriched, bands or []
        stage = run.stage(
            f"scorer-{name.replace(' ', '-')}", {**planted.common, "denoise": bands},
            lambda folder: run_scorer(recipe, "rm", backbone, None, folder), [measured],
        )  # fmt: skip
        scores = read_json(stage.folder / "scores.json")
        test = load_preferences(recipe.data, recipe.seed).test
        accuracy[name] = gold_accuracy(test, [c - r for c, r in zip(scores["chosen"], scores["rejected"], strict=True)])
    return accuracy, len(test)


def heads(planted: Planted, conditions: list[str]) -> tuple[dict[str, float], int]:
    """The same for linear heads on the hidden states that the strength was measured by."""
    recipe = planted.recipe
    (file,) = (planted.run.root / "strength-hidden").glob("hidden-*.safetensors")
    hidden = load_file(file)["hidden"]
    rows = read_preferences(recipe.data, recipe.seed)
    split = split_preferences(recipe.data, rows, recipe.seed)
    place = {row.source: 2 * i for i, row in enumerate(rows)}
    accuracy: dict[str, float] = {}
    for name in conditions:
        bands = CONDITIONS[name]
        if bands is None:
            labels = [(row.source, row.pairs[0][:: -1 if row.meta["planted"] else 1]) for row in split.train]
        else:
            kept = denoise(split.train, parse_bands(name, bands)).rows
            labels = [(row.source, row.pairs[0]) for row in kept if row is not None]
        pairs = [[(place[source] + better, place[source] + worse)] for source, (better, worse) in labels]
        score = train_head(hidden, pairs, recipe.scorer, recipe.engine, recipe.seed).tolist()
        gaps = [score[place[row.source]] - score[place[row.source] + 1] for row in split.test]
        accuracy[name] = gold_accuracy(split.test, gaps)
    return accuracy, len(split.test)


def gold_accuracy(rows: list[Comparison], gaps: list[float]) -> float:
    """Share of pairs whose score difference has the sign of the gold difference."""
    gold = [row.meta["gold_chosen"] - row.meta["gold_rejected"] for row in rows]
    return statistics.fmean(float(gap * g > 0) for gap, g in zip(gaps, gold, strict=True))


def detection(recipe: Recipe, labels: str) -> dict[str, Any]:
    """How well the strength of the training pairs tells planted labels: flipping below 0, and at every threshold."""
    rows = load_preferences(recipe.data, recipe.seed).train
    planted = np.array([row.meta["planted"] for row in rows])
    decided = denoise(rows, parse_bands("below 0", [{"below": 0.0, "flip": True}])).decisions
    flipped = np.array([bool(decision.get("flip")) for (decision,) in decided])
    mean = np.array([row.strength[0].mean for row in rows if row.strength])
    suspicions = {"strength": -mean}
    if labels == "annotator":  # whose own utility nobody can better
        bonus = recipe.world.length_bonus
        felt = [[utility(row.prompt, text, length_bonus=bonus) for text in row.responses] for row in rows]
        suspicions["annotator"] = np.array([rejected - chosen for chosen, rejected in felt])
    keep = np.linspace(0, len(rows) - 1, 200).astype(int)
    curves = {}
    for name, suspicion in suspicions.items():
        recall, precision = recall_precision(suspicion, planted)
        curves[name] = [(recall[i], precision[i]) for i in keep]
    clear = np.array([max(row.meta["gold_chosen"], row.meta["gold_rejected"]) == 1 for row in rows])

    def rate(part: np.ndarray) -> dict[str, float]:
        both = float((flipped & planted & part).sum())
        return {
            "recall": both / float((planted & part).sum()), "precision": both / max(float((flipped & part).sum()), 1.0)
        }  # fmt: skip

    return {
        "train_pairs": len(rows), "planted": float(planted.mean()), "flipped": float(flipped.mean()),
        "all": rate(np.ones_like(clear)), "clear": rate(clear), "clear_share": float(clear.mean()),
        "wrong_after": float((flipped != planted).mean()), "curves": curves,
    }  # fmt: skip


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval over the seeds, in per cent."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    mean = seed_mean(values)
    value, low, high = (100 * mean[end] for end in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def table(results: list[dict[str, Any]]) -> str:
    names = list(results[0]["gold_accuracy"])
    base = [r["gold_accuracy"][names[0]] for r in results]
    lines = [
        f"{len(results)} seeds, {results[0]['train_pairs']} training and {results[0]['test_pairs']} test pairs; per "
        "cent, mean [95 % interval over the seeds].", "",
        "| flipped below 0 | recall | precision |", "|---|---:|---:|",
        *(
            f"| {words} | {interval([r[part]['recall'] for r in results])} | "
            f"{interval([r[part]['precision'] for r in results])} |"
            for part, words in (("all", "all pairs"), ("clear", "pairs with one right response"))
        ), "",
        f"Wrong labels: {interval([r['planted'] for r in results])} before, "
        f"{interval([r['wrong_after'] for r in results])} after.", "",
        "| labels | gold accuracy | over the labels as they are |", "|---|---:|---:|",
    ]  # fmt: skip
    for name in names:
        accuracies = [r["gold_accuracy"][name] for r in results]
        gain = interval([a - b for a, b in zip(accuracies, base, strict=True)]) if name != names[0] else ""
        lines.append(f"| {name} | {interval(accuracies)} | {gain} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]]) -> bytes:
    """Recall against precision at every threshold, one line a seed; gold accuracy by condition."""
    with picture(2, size=(9, 3.8)) as (figure, axes):
        left, right = axes[0]
        for i, result in enumerate(results):
            for name, colour, label in (("annotator", FAINT, "by the annotator's own utility"),
                                        ("strength", KEPT, "by strength")):  # fmt: skip
                if name not in result["curves"]:
                    continue
                recall, precision = zip(*result["curves"][name], strict=True)
                left.plot(recall, precision, color=colour, linewidth=1, label=None if i else label)
            left.plot(
                result["all"]["recall"],
                result["all"]["precision"],
                "o",
                color=INK,
                markersize=4,
                label=None if i else "flipping below 0",
            )
        left.axvline(0.8, color=FAINT, linestyle=":", linewidth=1)
        left.axhline(0.8, color=FAINT, linestyle=":", linewidth=1)
        left.set(xlabel="recall of planted labels", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        left.set_title("Finding wrong labels")
        left.legend(loc="lower left")
        names = list(results[0]["gold_accuracy"])
        for result in results:
            right.plot(names, [100 * result["gold_accuracy"][n] for n in names], color=FAINT, marker="o", markersize=4)
        means = [100 * statistics.fmean(r["gold_accuracy"][n] for r in results) for n in names]
        right.plot(names, means, color=INK, marker="o", linewidth=2)
        right.set(ylabel="gold accuracy of the scorer, %")
        right.set_title("Reward models trained on these labels")
        right.tick_params(axis="x", labelrotation=20)
        return png(figure)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)  # the world's models are too small to share out
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    start(0)
    results = []
    for seed in arguments.seeds:
        results.append(study(arguments, seed, arguments.output_dir / f"seed-{seed}"))
        record = {"command": environment(torch.device("cpu"))["command"], "results": results}
        (arguments.output_dir / "study.json").write_text(to_json(record, indent=1) + "\n", encoding="utf-8")
        print(table(results), flush=True)
        for path in filter(None, (arguments.output_dir / "study.png", arguments.figure)):
            path.write_bytes(draw(results))


if __name__ == "__main__":
    main()
