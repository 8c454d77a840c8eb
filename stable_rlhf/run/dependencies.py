"""What the result of each stage depends on, said once: for whole runs, and for commands that run one stage alone.

A run's records hold it, and a finished stage is found again only where it is the same: a line changed here makes every
folder written before one "made with other settings". Not recorded are `guard`, `rollout` and a variant's row: a
finished policy stays when they change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stable_rlhf.data.digest import file_digest
from stable_rlhf.data.jsonl import read_json
from stable_rlhf.data.records import DataError
from stable_rlhf.run.datasets import contents, digests
from stable_rlhf.settings.recipe import Recipe, decisive
from stable_rlhf.settings.stages import RewardArguments
from stable_rlhf.system import plugins

# Settings that came when there were folders already: at their defaults they do what was done before, and no record
# holds them.
LATER = (
    "ppo.num_generations", "ppo.advantage_estimator", "ppo.advantage_scale", "ppo.dynamic_sampling",
    "ppo.overlong_buffer", "ppo.overlong_penalty", "ppo.kl_in", "ppo.kl_unbiased", "ppo.objective",
    "ppo.importance_level", "ppo.loss_aggregation", "ppo.dual_clip", "data.columns", "data.max_prompts",
    "data.forget_prompts", "select.candidates", "select.group_by", "world.forget_set", "ppo.rehearsal_target",
)  # fmt: skip


@dataclass(frozen=True)
class StageKind:
    """A kind of stage. Settings and sections stand by their dotted names, ``record=setting`` where a record has another
    name for one.

    Args:
        name: Its folder; several of a kind are called by what tells them apart (`named`).
        settings: What its result depends on, beside its inputs.
        in_run: What else in a run, where an input stage stands for its own settings.
        alone: What else where a command runs it, on folders that may be from anywhere.
        also: What else, by what the recipe asks for.
        policy: Whether it has a policy, and needs DeepSpeed.
    """

    name: str
    settings: str
    in_run: str = ""
    alone: str = ""
    also: Callable[[Recipe], str] = lambda recipe: ""
    policy: bool = True

    def named(self, which: str) -> str:
        return f"{self.name}-{which}"


def _rewards(recipe: Recipe) -> str:
    return "rewards" if recipe.rewards != RewardArguments() else ""  # as folders of before have it


WORLD = StageKind("world", "seed world")
INITIAL_POLICY = StageKind("initial-policy", "model=model_name_or_path bf16=engine.bf16 fp16=engine.fp16")
SFT = StageKind("sft", "seed engine data sft")
PAIRS = StageKind("pairs", "seed engine world max_new_tokens=ppo.max_new_tokens")
STRENGTH = StageKind(  # `measure_strength` adds its own section, and leaves out what is made of the strengths
    "strength", "seed engine data scorer", in_run="backbone=scorer_model_name_or_path",
    alone="scorer_model_name_or_path",
)  # fmt: skip
SCORER = StageKind(
    "scorer", "seed engine data scorer", in_run="backbone=scorer_model_name_or_path", alone="scorer_model_name_or_path",
    also=lambda recipe: "ppo" if recipe.scorer.expected_coef else "",  # it learns from samples, drawn as PPO draws them
)  # fmt: skip
SELECTION = StageKind("selection", "seed engine data ppo select")
SELECTION_OF_FILES = StageKind("selection", "seed data select", policy=False)
# Of rejection sampling too, whose folder is `ppo-rejection`.
PPO = StageKind(
    "ppo", "seed engine data ppo", alone="scorer evaluate",
    also=_rewards,
)  # fmt: skip
RESPONSES = StageKind("responses", "seed engine data ppo iterate")
EVALUATION = StageKind(
    "evaluation", "seed data evaluate", in_run="variants", alone="engine scorer ppo", also=_rewards
)  # fmt: skip


class Dependencies:
    """What the stages of one recipe, as it was given, depend on.

    ``alone``: for a command that runs one of them; its records also say what its inputs were made with.
    """

    def __init__(self, recipe: Recipe, *, alone: bool = False) -> None:
        self.recipe, self.alone = recipe, alone

    @cached_property
    def _values(self) -> dict[str, Any]:
        values = self.recipe.as_dict()
        values["evaluate"] = decisive(values["evaluate"])
        values["iterate"]["rounds"] = None  # a round is the same whether or not others follow it
        if values["engine"]["loss_workspace_mib"] is None:
            values["engine"]["loss_workspace_mib"] = 256  # as folders say that were made when this was the default
        values["rewards"] |= {"timeout": None, "contents": own_contents(self.recipe.rewards)}
        defaults = Recipe().as_dict()
        for section, _, name in (setting.partition(".") for setting in LATER):
            if values[section][name] == defaults[section][name]:
                del values[section][name]
        if self.alone or self.recipe.model_name_or_path is not None:  # the world's own files follow from its stage
            values["data"]["contents"] = contents(self.recipe.data)
        return values

    def of(self, kind: StageKind, **inputs: Any) -> dict[str, Any]:
        """What a stage depends on, with ``inputs`` of its own: folders and files, digests, what it is asked to do."""
        names = [kind.settings, kind.alone if self.alone else kind.in_run, kind.also(self.recipe)]
        if self.alone:
            names.append("model_name_or_path")
        record = dict(map(self._setting, " ".join(names).split())) | inputs
        if self.alone:
            folders = {name: value for name, value in inputs.items() if isinstance(value, str)}
            if kind.policy and self.recipe.model_name_or_path is not None:
                folders["model_name_or_path"] = self.recipe.model_name_or_path
            record["made_from"] = {name: _made_with(folder) for name, folder in folders.items()}
        return record

    def _setting(self, name: str) -> tuple[str, Any]:
        record, _, setting = name.rpartition("=")
        section, _, last = setting.rpartition(".")
        return record or setting, (self._values[section] if section else self._values)[last]


def shifted_responses(recipe: Recipe) -> dict[str, Any]:
    """MetaRM's file, an input of a scorer where there is one."""
    name = recipe.scorer.meta_responses
    return {"meta_responses": digests(recipe.data, [name])} if name else {}


def own_contents(rewards: RewardArguments) -> dict[str, str]:
    """A digest of each file that reward functions are written in: with other functions it is another stage."""
    files = {spec: plugins.source(spec) for spec in rewards.functions}
    return {spec: file_digest(path, "sha256")[:16] for spec, path in files.items() if path is not None}


def _made_with(path: str) -> str | None:
    """Which settings an input folder (or the folder of an input file) was made with, when a stage of ours made it; of
    any other file a digest."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        return str(read_json(folder / "stage.json", "fingerprint")["fingerprint"])
    except DataError:
        return file_digest(Path(path), "sha256")[:16] if Path(path).is_file() else None
