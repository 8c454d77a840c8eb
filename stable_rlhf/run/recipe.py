"""A whole run: every stage of a recipe in the order of the paper, finished stages skipped, one report at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.data.digest import json_digest
from stable_rlhf.engine.process import start
from stable_rlhf.engine.run_folder import RunDirectory, Stage
from stable_rlhf.evaluate.findings import round_of
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.ranks import barrier
from stable_rlhf.run import dependencies, evaluation, stages
from stable_rlhf.run.dependencies import Dependencies, shifted_responses
from stable_rlhf.run.inputs import check_inputs, check_model
from stable_rlhf.run.strength import measure_strength
from stable_rlhf.run.summary import summarise, write_report
from stable_rlhf.settings.recipe import DataArguments, Recipe
from stable_rlhf.settings.variants import Variant
from stable_rlhf.show.progress import say


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Run (or finish) a recipe in ``recipe.output_dir``; returns the summary, which is also in ``summary.json``."""
    start(recipe.seed)
    if recipe.model_name_or_path is None and "OMP_NUM_THREADS" not in os.environ:
        # The world's model is too small to share out: beside other work on the same cores two threads ran its SFT many
        # times slower than one, waiting for each other.
        torch.set_num_threads(1)
    root = Path(recipe.output_dir)
    # A folder that is there is locked before the inputs are checked; a new one is made only after they pass.
    run = RunDirectory(root, recipe.checkpoint) if root.exists() else None
    finished = (root / dependencies.EVALUATION.name).exists()
    if not finished:
        check_inputs(recipe)
    run = run or RunDirectory(root, recipe.checkpoint)
    given, depends = recipe, Dependencies(recipe)  # records hold what was given, not the paths that stages add

    # 1. A model to begin with, and in the skill world the data.
    world: Stage | None = None
    if recipe.model_name_or_path is None:
        world = run.stage(dependencies.WORLD.name, depends.of(dependencies.WORLD), partial(stages.run_world, recipe))
        recipe = replace(recipe, data=world_data(recipe.data, world.folder))
        inputs, policy = [world], str(world.folder / "model")
    else:
        kind = dependencies.INITIAL_POLICY
        model = run.stage(kind.name, depends.of(kind), partial(stages.run_materialise, recipe))
        inputs, policy = [model], str(model.folder)
    if not finished:
        check_model(recipe, policy)

    # 2. The initial policy, by supervised fine-tuning where there are demonstrations.
    if recipe.data.demonstrations:
        early = recipe.world.early_share if world else None
        work = partial(stages.run_sft, recipe, policy, early_share=early)
        sft = run.stage(dependencies.SFT.name, depends.of(dependencies.SFT, early=early), work, inputs)
        inputs, policy = [sft], str(sft.folder)

    # 3. Pairs, in the skill world sampled; to be denoised they are measured.
    if world:
        work = partial(stages.run_pairs, recipe, world.folder, Path(policy))
        pairs = run.stage(dependencies.PAIRS.name, depends.of(dependencies.PAIRS), work, inputs)
        recipe, inputs = _with_pairs(recipe, pairs), [*inputs, pairs]
    backbone = recipe.scorer_model_name_or_path or policy
    if recipe.scorer.denoise:
        settings = depends.of(dependencies.STRENGTH, **shifted_responses(recipe))
        strength = measure_strength(recipe, run, backbone, settings, inputs)
        recipe, inputs = _with_pairs(recipe, strength), [*inputs, strength]

    # 4. Scorers, and the one that only judges.
    ground = _Ground(recipe, run, depends, policy, backbone, inputs)
    cache = FeatureCache()  # scorers on the same frozen lower blocks share their hidden states
    scorers = {objective: ground.scorer(objective, objective, cache) for objective in recipe.scorers}
    judge = ground.scorer("judge", "rm", cache, split="judge") if recipe.evaluate.judge == "scorer" else None
    if recipe.iterate.rounds == 1:
        cache = FeatureCache()  # nothing after this needs the training pairs' hidden states

    # 5. What is rehearsed, by the scores of each scorer whose policies rehearse; variations may select otherwise.
    grounds = {
        name: replace(ground, recipe=own, depends=Dependencies(given.policies[name][1]))
        for name, (_, own) in recipe.policies.items()
    }
    selections: dict[tuple[str, str], Stage] = {}
    for name, (variant, own) in recipe.policies.items():
        if variant.rehearsal and (how := (variant.scorer, _how(own))) not in selections:
            plain = how[1] == _how(recipe)
            # Its answers are drawn by the run's own settings, whichever policy is the first to rehearse them.
            chosen = given.policies[name][1]
            selecting = replace(
                ground, recipe=replace(recipe, select=own.select, data=own.data),
                depends=Dependencies(replace(given, select=chosen.select, data=chosen.data)),
            )  # fmt: skip
            selections[how] = selecting.selection(variant.scorer, scorers[variant.scorer], None if plain else name)

    # 6. The policies, round after round.
    policies: dict[str, Stage] = {}
    for first, (variant, own) in recipe.policies.items():
        here = grounds[first]
        selection = selections[variant.scorer, _how(own)] if variant.rehearsal else None
        last = policies[first] = here.policy_of(variant, first, scorers.get(variant.scorer), selection)
        for number in range(2, recipe.iterate.rounds + 1):
            name = f"{first}-round-{number}"
            work = partial(stages.run_responses, own, str(last.folder))
            of_round = here.depends.of(dependencies.RESPONSES)
            responses = run.stage(dependencies.RESPONSES.named(name), of_round, work, [last])
            scorers[name] = ground.scorer(name, variant.scorer, cache, before=last, responses=responses)
            last = policies[name] = here.policy_of(variant, name, scorers[name], selection, before=last)

    # 7. Every policy against the initial one.
    folders = {name: str(stage.folder) for name, stage in policies.items()}
    work = partial(evaluation.run_evaluate, recipe, policy, folders, str(judge.folder) if judge else None)
    sources = [*inputs, *policies.values(), *([judge] if judge else [])]
    comparison = run.stage(dependencies.EVALUATION.name, depends.of(dependencies.EVALUATION), work, sources)
    summary = summarise(given, run, scorers, list(selections.values()), policies, comparison)
    write_report(summary, run.root)
    say(f"report: {run.root / 'report.html'}")
    barrier()
    return summary


@dataclass(frozen=True)
class _Ground:
    """What all scorers and policies of a run start from."""

    recipe: Recipe
    run: RunDirectory
    depends: Dependencies
    policy: str  # the initial one
    backbone: str
    inputs: Sequence[Stage]

    def scorer(
        self, name: str, objective: str, cache: FeatureCache, *, split: str = "train", before: Stage | None = None,
        responses: Stage | None = None,
    ) -> Stage:  # fmt: skip
        """``before``: the policy of the round before, and its ``responses``, which the scorer learns to tell apart."""
        recipe, policy = self.recipe, str(before.folder) if before else self.policy
        settings = self.depends.of(dependencies.SCORER, **shifted_responses(recipe))
        if responses:
            shifted = str((responses.folder / stages.RESPONSES).resolve())
            recipe = replace(recipe, scorer=replace(recipe.scorer, meta_responses=shifted))
        work = partial(stages.run_scorer, recipe, objective, self.backbone, policy, cache=cache, split=split)
        sources = [*self.inputs, *([responses] if responses else [])]
        return self.run.stage(dependencies.SCORER.named(name), settings, work, sources)

    def selection(self, objective: str, scorer: Stage, variation: str | None = None) -> Stage:
        """``variation``: the first policy that is to rehearse this one, where it is not the run's own."""
        # The Advantage Model's keeps the plain name, so that older folders are found.
        plain = dependencies.SELECTION.name if objective == "am" else dependencies.SELECTION.named(objective)
        name = dependencies.SELECTION.named(variation) if variation else plain
        work = partial(stages.run_select, self.recipe, self.policy, str(scorer.folder), needed=True)
        return self.run.stage(name, self.depends.of(dependencies.SELECTION), work, [*self.inputs, scorer])

    def policy_of(
        self, variant: Variant, name: str, scorer: Stage | None, selection: Stage | None,
        *, before: Stage | None = None,
    ) -> Stage:  # fmt: skip
        """``before``: the policy of the round before, from which this one goes on."""
        rehearsal = selection.folder / "rehearsal.jsonl.gz" if selection else None
        policy, reference = (str(before.folder), self.policy) if before else (self.policy, None)
        folder = str(scorer.folder) if scorer else None
        work = partial(stages.run_ppo, self.recipe, variant, policy, folder, rehearsal, reference=reference)
        sources = [*self.inputs, *filter(None, (selection, before, scorer))]
        # A variant's name says how it is trained; a variation's does not.
        which = {"variant": variant.name} if round_of(name)[0] in self.recipe.variations else {}
        return self.run.stage(dependencies.PPO.named(name), self.depends.of(dependencies.PPO, **which), work, sources)


def _how(recipe: Recipe) -> str:
    """What tells one selection by a scorer from another."""
    return json_digest([asdict(recipe.select), recipe.data.rehearsal])


def world_data(data: DataArguments, folder: Path) -> DataArguments:
    """The data settings of a run in the skill world: its own files, the rest as given."""
    names = {
        "prompts": "prompts", "demonstrations": "sft", "eval_main": "eval_main", "eval_forget": "eval_forget"
    }  # fmt: skip
    files: dict[str, Any] = {field: [str((folder / f"{name}.jsonl.gz").resolve())] for field, name in names.items()}
    return replace(data, data_dir=None, **files)


def _with_pairs(recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe, to go on with the pairs that a stage has made."""
    return replace(recipe, data=replace(recipe.data, pairs=[str((stage.folder / "pairs.jsonl.gz").resolve())]))
