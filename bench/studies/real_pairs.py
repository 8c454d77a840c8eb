"""Both scorers on all pairs of a dataset, one seed: figures over the epochs with intervals over the test pairs.

    python -m bench.studies.real run --data-dir DIR --output-dir OUT --output OUT/lines.jsonl --seeds 1 \\
        --datasets pairs --workers 2 --setting scorer.num_trainable_layers=1 --setting data.max_pairs=0 \\
        --setting data.max_length=2048 --setting data.max_prompt_length=2048 --setting data.test_fraction=0.25 \\
        --setting scorer.num_train_epochs=8 --setting scorer.per_device_train_batch_size=1 \\
        --setting scorer.gradient_accumulation_steps=8    # pairs are of all lengths: alone they need no padding
    python -m bench.studies.real_pairs keep OUT      # into bench/results, in place of what it had of the dataset
    python -m bench.studies.real_pairs report        # the tables of docs/results/human_pairs.md

HH-RLHF's were made by ``--datasets hh-rlhf``.

`bench.studies.real` repeats small trainings over seeds, and its intervals speak of seeds; this is one training on
everything, whose intervals speak of the prompts that it was tested on (a bootstrap that draws them with all their
pairs, for both scorers alike where they are compared).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.case import RESULTS, read_lines
from bench.common import write_json
from bench.pages import markdown, rendered
from bench.studies.real import FIGURES, PAGE, Figure, shown
from stable_rlhf.evaluate.findings import SCORER_NAMES
from stable_rlhf.metrics import bootstrap, calibration_statistic, credits

KEPT = RESULTS / "real-pairs.json"
Weights = NDArray[np.float64]
Statistic = Callable[[Weights], Weights]
MEASURED = ("accuracy", "ece", "loss")


def keep(folder: Path) -> None:
    """Scores of the test pairs and the lines of the run, from its folder."""
    content: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    lines = read_lines(folder / "lines.jsonl")
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        run: dict[str, Any] = {"lines": [line for line in lines if line["dataset"] == dataset], "scores": {}}
        for objective in SCORER_NAMES:
            file = folder / "scores" / f"{dataset}-{objective}-seed-1.json"
            by_epoch = json.loads(file.read_text(encoding="utf-8"))
            run["scores"][objective] = {
                epoch: {side: [round(x, 4) for x in scores[side]] for side in ("chosen", "rejected")}
                for epoch, scores in by_epoch.items()
            }
            run["prompts"] = next(iter(by_epoch.values()))["prompts"]  # of the same test pairs for every scorer
        content[dataset] = run
    write_json(content, KEPT)


def statistics_of(scores: dict[str, Any]) -> dict[str, Statistic]:
    """Figures of test pairs as functions of their weights."""
    chosen, rejected = (np.asarray(scores[side]) for side in ("chosen", "rejected"))
    right, loss = credits(chosen, rejected), np.logaddexp(0.0, rejected - chosen)

    def mean(values: Weights) -> Statistic:
        return lambda weights: weights @ values / weights.sum(axis=1)

    return {"accuracy": mean(right), "ece": calibration_statistic(chosen, rejected), "loss": mean(loss)}


def cell(statistic: Statistic, prompts: Sequence[int], figure: Figure, sign: str = "", low: float = -math.inf) -> str:
    interval = bootstrap(statistic, len(prompts), groups=prompts, low=low)
    text = shown(interval, figure, sign)
    apart = sign and (interval["low"] > 0 or interval["high"] < 0)
    return f"**{text}**" if apart else text


def block(run: dict[str, Any]) -> str:
    """A marked part of the page: the run of a dataset."""
    scores = run["scores"]
    rows: list[list[str]] = []
    prompts = run["prompts"]
    of = {o: {epoch: statistics_of(s) for epoch, s in by_epoch.items()} for o, by_epoch in scores.items()}
    for objective, title in SCORER_NAMES.items():
        for epoch, figures in of[objective].items():
            cells = [cell(figures[name], prompts, FIGURES[name], low=0.0) for name in MEASURED]
            rows.append([f"{title}, {epoch}", *cells])
    for epoch in of["am"]:
        cells = []
        for name in MEASURED:
            am, rm = of["am"][epoch][name], of["rm"][epoch][name]
            cells.append(cell(lambda w, am=am, rm=rm: am(w) - rm(w), prompts, FIGURES[name], "+"))  # type: ignore[misc]
        rows.append([f"difference, {epoch}", *cells])
    titles = [FIGURES[name].title for name in MEASURED]
    line, *others = run["lines"]
    seconds = ", ".join(f"{SCORER_NAMES[x['objective']]} {x['cpu_seconds']:,.0f}" for x in (line, *others))
    made = (
        f"{line['pairs']['fit']:,} pairs, {line['pairs']['train']:,} train ({line['tokens']:,} tokens an epoch) and "
        f"{len(prompts)} test, of {len(set(prompts))} prompts; one seed; 95 % over these prompts. "
        f"CPU seconds of training: {seconds}. "
        f"{line['environment']['cpu']}, {line['environment']['time'][:10]}."
    )
    return "\n\n".join([markdown(["Scorer, epochs", *titles], rows), made]) + "\n"


def report() -> None:
    content = json.loads(KEPT.read_text(encoding="utf-8"))
    text = rendered(PAGE.read_text(encoding="utf-8"), "real-pairs", lambda dataset: block(content[dataset]))
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("keep").add_argument("folder", type=Path, help="--output-dir of the run")
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "keep":
        keep(given.folder)
    else:
        report()


if __name__ == "__main__":
    main()
