"""A whole run: every stage of a recipe in the order of the paper, finished stages skipped, one report at the end."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.engine.process import start
from stable_rlhf.engine.run_folder import RunDirectory, Stage
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.ranks import barrier
from stable_rlhf.run import evaluation, stages
from stable_rlhf.run.datasets import contents, digests
from stable_rlhf.run.inputs import check_inputs, check_model
from stable_rlhf.run.strength import measure_strength
from stable_rlhf.run.summary import summarise, write_report
from stable_rlhf.settings.recipe import DataArguments, Recipe, decisive
from stable_rlhf.settings.variants import rehearsed
from stable_rlhf.show.progress import say


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
    selections: dict[str, Stage] = {}
    for name in rehearsed(recipe.chosen):
        selections[name] = run.stage(
            "selection" if name == "am" else f"selection-{name}", {**ppo_settings, "select": part["select"]},
            partial(stages.run_select, recipe, str(policy), str(scorers[name].folder), needed=True),
            [*inputs, scorers[name]],
        )  # fmt: skip
    trained: dict[str, Stage] = {}
    for variant in recipe.chosen:
        scorer = scorers[variant.scorer]
        selection = selections[variant.scorer] if variant.rehearsal else None
        rehearsal = selection.folder / "rehearsal.jsonl.gz" if selection else None
        sources = [*inputs, *([selection] if selection else [])]
        last = trained[variant.name] = run.stage(
            f"ppo-{variant.name}", ppo_settings,
            partial(stages.run_ppo, recipe, variant, str(policy), str(scorer.folder), rehearsal), [*sources, scorer],
        )  # fmt: skip
        for number in range(2, recipe.iterate.rounds + 1):
            name, before = f"{variant.name}-round-{number}", str(last.folder)
            responses = run.stage(
                f"responses-{name}", {**ppo_settings, "iterate": {**part["iterate"], "rounds": None}},
                partial(stages.run_responses, recipe, before), [last],
            )  # fmt: skip
            shifted = str((responses.folder / stages.RESPONSES).resolve())
            scorer = scorers[name] = run.stage(
                f"scorer-{name}", scorer_settings,
                partial(
                    stages.run_scorer, replace(recipe, scorer=replace(recipe.scorer, meta_responses=shifted)),
                    variant.scorer, backbone, before, cache=cache,
                ), [*inputs, responses],
            )  # fmt: skip
            last = trained[name] = run.stage(
                f"ppo-{name}", ppo_settings,
                partial(
                    stages.run_ppo, recipe, variant, before, str(scorer.folder), rehearsal, reference=str(policy)
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
    summary = summarise(recipe, part, run, scorers, list(selections.values()), trained, evaluated)
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
