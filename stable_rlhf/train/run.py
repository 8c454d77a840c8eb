"""A whole run: every stage of a recipe in the order of the paper, finished stages skipped, one report at the end."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stable_rlhf.data.jsonl import read_json, to_json
from stable_rlhf.engine.process import start
from stable_rlhf.engine.run_folder import RunDirectory, Stage
from stable_rlhf.engine.signals import whole
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.ranks import barrier, world_size
from stable_rlhf.settings.recipe import DataArguments, Recipe, decisive
from stable_rlhf.show.progress import is_main_process, say
from stable_rlhf.train import evaluation, stages
from stable_rlhf.train.datasets import contents, digests
from stable_rlhf.train.inputs import check_inputs, check_model
from stable_rlhf.train.strength import measure_strength

if TYPE_CHECKING:
    from stable_rlhf.evaluate.report import Picture

_SCORER_OF = {"rejection": "rm", "rm": "rm", "rm-ma": "rm", "am": "am", "am-sr": "am", "am-critic-free": "am"}


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Run (or finish) a recipe in ``recipe.output_dir``; returns the summary, which is also in ``summary.json``."""
    start(recipe.seed)
    if recipe.model_name_or_path is None and "OMP_NUM_THREADS" not in os.environ:
        # The world's model is too small to share out: beside other work on the same cores two threads ran its SFT many
        # times slower than one, waiting for each other.
        torch.set_num_threads(1)
    root = Path(recipe.output_dir)
    # A folder that is there comes first: another run may be at work in it. A new one waits until it will be used.
    run = RunDirectory(root, recipe.checkpoint) if root.exists() else None
    finished = (root / "evaluation").exists()
    if not finished:
        check_inputs(recipe)
    run = run or RunDirectory(root, recipe.checkpoint)
    part = recipe.as_dict()
    common = {"seed": recipe.seed, "engine": part["engine"]}
    cache = FeatureCache()  # scorers on the same frozen lower blocks share their hidden states

    inputs: list[Stage] = []
    data = recipe.data
    if recipe.model_name_or_path is None:
        world = run.stage("world", {"seed": recipe.seed, "world": part["world"]}, lambda f: stages.run_world(recipe, f))
        data = recipe.data = world_data(recipe.data, world.folder)
        initial, inputs = world.folder / "model", [world]
    else:
        model = run.stage(
            "initial-policy",
            {"model": recipe.model_name_or_path, "bf16": recipe.engine.bf16, "fp16": recipe.engine.fp16},
            lambda f: stages.run_materialise(recipe, f),
        )
        initial, inputs = model.folder, [model]
    if not finished:
        check_model(recipe, str(initial))
    settings_data = {**part["data"]}
    if recipe.model_name_or_path is not None:  # the world's own files follow from its stage
        settings_data["contents"] = contents(recipe.data)
    if data.demonstrations:
        early = recipe.world.early_share if recipe.model_name_or_path is None else None
        sft = run.stage(
            "sft", {**common, "data": settings_data, "sft": part["sft"], "early": early},
            lambda f: stages.run_sft(recipe, str(initial), f, early_share=early), inputs,
        )  # fmt: skip
        policy, inputs = sft.folder, [sft]
    else:
        policy = initial
    if recipe.model_name_or_path is None:
        pairs = run.stage(
            "pairs", {**common, "world": part["world"], "max_new_tokens": recipe.ppo.max_new_tokens},
            lambda f: stages.run_pairs(recipe, world.folder, policy, f), inputs,
        )  # fmt: skip
        data.pairs = [str((pairs.folder / "pairs.jsonl.gz").resolve())]
        inputs = [*inputs, pairs]

    backbone = recipe.scorer_model_name_or_path or str(policy)
    scorer_settings = {
        **common,
        "data": settings_data,
        "scorer": part["scorer"],
        "backbone": recipe.scorer_model_name_or_path,
    }
    if recipe.scorer.meta_responses:
        scorer_settings["meta_responses"] = digests(data, [recipe.scorer.meta_responses])
    if recipe.scorer.denoise:
        strength = measure_strength(recipe, run, backbone, scorer_settings, inputs)
        data.pairs = [str((strength.folder / "pairs.jsonl.gz").resolve())]
        inputs = [*inputs, strength]
    if recipe.scorer.expected_coef:  # e(x) is regressed on samples of the policy, drawn as PPO draws them
        scorer_settings["ppo"] = part["ppo"]
    scorers: dict[str, Stage] = {}
    for objective in ("rm", "am"):
        scorers[objective] = run.stage(
            f"scorer-{objective}", scorer_settings,
            partial(stages.run_scorer, recipe, objective, backbone, str(policy), cache=cache), inputs,
        )  # fmt: skip
    judge: Stage | None = None
    if recipe.evaluate.judge == "scorer":
        judge = run.stage(
            "scorer-judge", scorer_settings,
            partial(stages.run_scorer, recipe, "rm", backbone, str(policy), cache=cache, split="judge"), inputs,
        )  # fmt: skip
    if recipe.iterate.rounds == 1:
        cache = FeatureCache()  # nothing after this needs the training pairs' hidden states
    ppo_settings = {**common, "data": settings_data, "ppo": part["ppo"]}
    selection: Stage | None = None
    if "am-sr" in recipe.variants:
        selection = run.stage(
            "selection", {**ppo_settings, "select": part["select"]},
            lambda f: stages.run_select(recipe, str(policy), str(scorers["am"].folder), f, needed=True),
            [*inputs, scorers["am"]],
        )  # fmt: skip
    trained: dict[str, Stage] = {}
    for variant in recipe.variants:
        scorer = scorers[_SCORER_OF[variant]]
        rehearsal = selection.folder / "rehearsal.jsonl.gz" if selection and variant == "am-sr" else None
        sources = [*inputs, *([selection] if selection and variant == "am-sr" else [])]
        last = trained[variant] = run.stage(
            f"ppo-{variant}", ppo_settings,
            partial(stages.run_ppo, recipe, variant, str(policy), str(scorer.folder), rehearsal), [*sources, scorer],
        )  # fmt: skip
        for number in range(2, recipe.iterate.rounds + 1):
            name, before = f"{variant}-round-{number}", str(last.folder)
            responses = run.stage(
                f"responses-{name}", {**ppo_settings, "iterate": {**part["iterate"], "rounds": None}},
                partial(stages.run_responses, recipe, before), [last],
            )  # fmt: skip
            shifted = str((responses.folder / stages.RESPONSES).resolve())
            scorer = scorers[name] = run.stage(
                f"scorer-{name}", scorer_settings,
                partial(
                    stages.run_scorer, replace(recipe, scorer=replace(recipe.scorer, meta_responses=shifted)),
                    _SCORER_OF[variant], backbone, before, cache=cache,
                ), [*inputs, responses],
            )  # fmt: skip
            last = trained[name] = run.stage(
                f"ppo-{name}", ppo_settings,
                partial(
                    stages.run_ppo, recipe, variant, before, str(scorer.folder), rehearsal, initial=str(policy)
                ), [*sources, last, scorer],
            )  # fmt: skip
    evaluated = run.stage(
        "evaluation",
        {
            "seed": recipe.seed, "data": settings_data, "evaluate": decisive(part["evaluate"]),
            "variants": recipe.variants,
        },
        lambda f: evaluation.run_evaluate(
            recipe, str(policy), {v: str(s.folder) for v, s in trained.items()}, str(judge.folder) if judge else None, f
        ),
        [*inputs, *trained.values(), *([judge] if judge else [])],
    )  # fmt: skip
    summary = summarise(recipe, part, run, scorers, selection, trained, evaluated)
    write_report(summary, run.root)
    say(f"report: {run.root / 'report.html'}")
    barrier()
    return summary


def world_data(data: DataArguments, folder: Path) -> DataArguments:
    """The data settings of a run in the skill world: its own files, the rest as given."""
    names = {
        "prompts": "prompts", "demonstrations": "sft", "eval_main": "eval_main", "eval_forget": "eval_forget"
    }  # fmt: skip
    files = {field: [str((folder / f"{name}.jsonl.gz").resolve())] for field, name in names.items()}
    return DataArguments(**{**vars(data), **files, "data_dir": None})


def summarise(
    recipe: Recipe, settings: dict[str, Any], run: RunDirectory, scorers: dict[str, Stage], selection: Stage | None,
    trained: dict[str, Stage], evaluated: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Every figure of the run as one JSON-ready dict; the report is rendered from it alone."""
    from stable_rlhf.evaluate import paper
    from stable_rlhf.evaluate.findings import findings
    from stable_rlhf.metrics import scorer_evaluation

    summary: dict[str, Any] = {
        "title": recipe.title,
        "kind": "world" if recipe.model_name_or_path is None else "real",
        "seed": recipe.seed,
        **circumstances(),
        "settings": settings,
        "stages": [{"name": s.name, "seconds": round(s.seconds, 2), "skipped": s.skipped} for s in run.stages],
        "scorers": {},
        "policies": {},
        "paper": paper.constants(),
    }
    for name, stage in scorers.items():
        scores = read_json(stage.folder / "scores.json", "chosen", "rejected", "tasks")
        summary["scorers"][name] = {
            **scorer_evaluation(
                scores["chosen"], scores["rejected"], scores["tasks"], bins=recipe.scorer.bins, seed=recipe.seed
            ),
            "rows": scores.get("rows"),
            "training": {k: v for k, v in stage.result.items() if k != "accuracy"},
        }  # fmt: skip
    if selection is not None:
        summary["selection"] = read_json(selection.folder / "selection.json")
    for variant, stage in trained.items():
        summary["policies"][variant] = {
            **evaluated.result["policies"][variant],
            "curve": stage.result["curve"],
            "tokens_seen": int(stage.result["tokens_seen"]),
        }
    summary["findings"] = findings(summary)
    return summary


def evaluate_models(
    recipe: Recipe, baseline: str | None, policies: Mapping[str, str], scorers: Mapping[str, str],
    test_pairs: list[str], judge_scorer: str | None, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Measure models of earlier runs: scorers on pairs, policies against ``baseline``; the report goes to ``folder``.

    Returns the figures without the score of every single pair, which is in ``summary.json``.
    """
    from stable_rlhf.evaluate import paper
    from stable_rlhf.evaluate.findings import findings

    summary: dict[str, Any] = {
        "title": recipe.title,
        "kind": "evaluation",
        "seed": recipe.seed,
        **circumstances(),
        "settings": recipe.as_dict(),
        "scorers": evaluation.evaluate_scorers(recipe, scorers, test_pairs),
        "policies": {},
        "paper": paper.constants(),
    }
    if policies:
        assert baseline is not None
        judged = evaluation.run_evaluate(recipe, baseline, policies, judge_scorer, folder)["policies"]
        summary["policies"] = {
            name: {**judged[name], "curve": evaluation.read_curve(path)} for name, path in policies.items()
        }
    summary["findings"] = findings(summary)
    write_report(summary, folder)
    lists = ("chosen", "rejected", "pair_tasks", "reliability", "reliability_after_temperature", "difference_curve")
    return {
        "scorers": {n: {k: v for k, v in part.items() if k not in lists} for n, part in summary["scorers"].items()},
        "policies": {n: {k: v for k, v in part.items() if k != "curve"} for n, part in summary["policies"].items()},
    }


def circumstances() -> dict[str, Any]:
    """What was called, on what."""
    return {
        "command": shlex.join(["stable-rlhf", *sys.argv[1:]]), "versions": versions(), "device": device_name()
    }  # fmt: skip


def write_report(summary: dict[str, Any], folder: Path) -> None:
    """``summary.json``, ``report.html``, ``overview.png``, and every picture of the report in ``pictures/``."""
    if not is_main_process():
        return
    from stable_rlhf.evaluate.figures import overview
    from stable_rlhf.evaluate.report import make_report

    page, pictures = make_report(summary)
    drawn = overview(summary)
    with whole():
        (folder / "summary.json").write_text(to_json(summary, indent=1) + "\n", encoding="utf-8")
        (folder / "report.html").write_text(page, encoding="utf-8", errors="surrogateescape")
        (folder / "overview.png").write_bytes(drawn)
        write_pictures(pictures, folder / "pictures")


def write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    """One PNG a picture; those of an earlier report go."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)


def versions() -> dict[str, str]:
    """Versions of everything that can change a figure."""
    names = (
        "stable-rlhf", "torch", "triton", "transformers", "deepspeed", "faiss-cpu", "sentence-transformers", "numpy",
        "scikit-learn",
    )  # fmt: skip
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """What the run ran on, in words."""
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}{ranks}"
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"CPU {name}, {torch.get_num_threads()} threads{ranks}"
