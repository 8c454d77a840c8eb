"""The figures of a run as one dict, and the report, page and pictures made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_rlhf.data.jsonl import read_json, to_json
from stable_rlhf.engine.run_folder import RunDirectory, Stage
from stable_rlhf.engine.signals import whole
from stable_rlhf.run import evaluation
from stable_rlhf.run.circumstances import circumstances
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show.page import Picture, write_html
from stable_rlhf.show.progress import is_main_process


def summarise(
    recipe: Recipe, run: RunDirectory, scorers: dict[str, Stage],
    selections: Sequence[Stage], policies: dict[str, Stage], comparison: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Every figure of the run as one JSON-ready dict; the report is rendered from it alone."""
    from stable_rlhf.evaluate.findings import findings, round_of

    summary = _about(recipe, "world" if recipe.model_name_or_path is None else "real")
    summary["stages"] = [{"name": s.name, "seconds": round(s.seconds, 2), "skipped": s.skipped} for s in run.stages]
    for name, stage in scorers.items():
        scores = read_json(stage.folder / "scores.json", "chosen", "rejected", "tasks")
        summary["scorers"][name] = {
            **evaluation.scorer_figures(recipe, scores),
            "training": {k: v for k, v in stage.result.items() if k != "accuracy"},
        }
    for stage in selections:
        summary[stage.name] = read_json(stage.folder / "selection.json")
    for name, stage in policies.items():
        first = round_of(name)[0]
        variant, settings = recipe.policies[first]
        label = first if first in recipe.variations else variant.label_under(settings.ppo, settings.rewards)
        summary["policies"][name] = {
            **comparison.result["policies"][name],
            "label": label,
            "curve": stage.result["curve"],
            "tokens_seen": int(stage.result["tokens_seen"]),
        }
    summary["findings"] = findings(summary)
    return summary


def evaluate_models(
    recipe: Recipe, baseline: str | None, policies: Mapping[str, str], scorers: Mapping[str, str],
    test_pairs: list[str], judge_scorer: str | None, benchmark: tuple[str, str | None] | None, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Measure models of earlier runs: scorers on pairs, policies against ``baseline``; the report goes to ``folder``.
    ``benchmark``: one whose pairs the scorers are measured on, and where it is read from (None: where it was
    published).

    Returns the figures without the score of every single pair, which is in ``summary.json``.
    """
    from stable_rlhf.evaluate.findings import findings

    summary = _about(recipe, "evaluation")
    if benchmark is None:
        summary["scorers"] = evaluation.evaluate_scorers(recipe, scorers, test_pairs)
    else:
        summary["scorers"], summary["benchmark"] = evaluation.evaluate_benchmark(recipe, scorers, *benchmark)
    if policies:
        assert baseline is not None
        comparison = evaluation.run_evaluate(recipe, baseline, policies, judge_scorer, folder)["policies"]
        summary["policies"] = {
            name: {**comparison[name], "curve": evaluation.read_curve(path)} for name, path in policies.items()
        }
    summary["findings"] = findings(summary)
    write_report(summary, folder)
    lists = (
        "chosen", "rejected", "pair_tasks", "pair_prompts", "reliability", "reliability_after_temperature",
        "difference_curve",
    )  # fmt: skip
    found = {"benchmark": summary["benchmark"]} if benchmark else {}
    return {
        **found,
        "scorers": {n: {k: v for k, v in part.items() if k not in lists} for n, part in summary["scorers"].items()},
        "policies": {n: {k: v for k, v in part.items() if k != "curve"} for n, part in summary["policies"].items()},
    }


def _about(recipe: Recipe, kind: str) -> dict[str, Any]:
    """A summary's frame, with no figures yet."""
    from stable_rlhf.evaluate import paper

    about = {"title": recipe.title, "kind": kind, "seed": recipe.seed, **circumstances(), "settings": recipe.as_dict()}
    return about | {"scorers": {}, "policies": {}, "paper": paper.constants()}


def write_report(summary: dict[str, Any], folder: Path) -> None:
    """``summary.json``, ``report.html``, ``overview.png``, and every picture of the report in ``pictures/``."""
    if not is_main_process():
        return
    from stable_rlhf.evaluate.figures import overview
    from stable_rlhf.evaluate.report import make_report

    page, pictures = make_report(summary)
    picture = overview(summary)
    with whole():
        (folder / "summary.json").write_text(to_json(summary, indent=1) + "\n", encoding="utf-8")
        write_html(folder / "report.html", page)
        (folder / "overview.png").write_bytes(picture)
        write_pictures(pictures, folder / "pictures")


def write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    """One PNG a picture; those of an earlier report go."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
