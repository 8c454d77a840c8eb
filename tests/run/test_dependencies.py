"""What the records of stages hold: folders written before must be found again, so none of it may change."""

from __future__ import annotations

import json

import pytest

from stable_rlhf.data import write_jsonl
from stable_rlhf.run import dependencies as kinds
from stable_rlhf.run.dependencies import Dependencies, shifted_responses
from stable_rlhf.settings.recipe import Recipe, with_settings

# As folders of November 2026 have it: in a run, and where a command runs the stage alone.
RECORDED = {
    "WORLD": ("seed world", None),
    "INITIAL_POLICY": ("bf16 fp16 model", None),
    "SFT": ("data engine seed sft", "data engine made_from model_name_or_path seed sft"),
    "PAIRS": ("engine max_new_tokens seed world", None),
    "STRENGTH": (
        "backbone data engine scorer seed",
        "data engine made_from model_name_or_path scorer scorer_model_name_or_path seed",
    ),
    "SCORER": (
        "backbone data engine scorer seed",
        "data engine made_from model_name_or_path scorer scorer_model_name_or_path seed",
    ),
    "SELECTION": ("data engine ppo seed select", "data engine made_from model_name_or_path ppo seed select"),
    "SELECTION_OF_FILES": (None, "data made_from model_name_or_path seed select"),
    "PPO": ("data engine ppo seed", "data engine evaluate made_from model_name_or_path ppo scorer seed"),
    "RESPONSES": ("data engine iterate ppo seed", None),
    "EVALUATION": (
        "data evaluate seed variants",
        "data engine evaluate made_from model_name_or_path ppo scorer seed",
    ),
}

OF_PPO = """
    cliprange cliprange_high cliprange_value entropy_coef gamma head_learning_rate kl_coef kl_estimator kl_target lam
    learning_rate max_new_tokens missing_eos_penalty num_mini_batches num_ppo_epochs num_trainable_layers
    per_device_rehearsal_batch_size per_device_train_batch_size rehearsal_coef rehearsal_prompts_in_ppo
    rehearsal_reduction rejection_samples rejection_threshold rollout_batch_size rollout_importance_clip stop
    temperature top_p total_steps vf_coef warmup_ratio whiten_advantages
"""


def test_settings_that_are_gone_stay_in_records():
    assert (
        Recipe().as_dict()["world"]["hot_temperature"] == 1.1 and Recipe().as_dict()["rollout"]["sample_prompts"] == 4
    )


def test_every_kind_of_stage_is_here():
    assert {name for name, value in vars(kinds).items() if isinstance(value, kinds.StageKind)} == RECORDED.keys()


@pytest.mark.parametrize("name", RECORDED)
def test_records_hold_what_they_held(name):
    recipe = Recipe(model_name_or_path="m", scorer_model_name_or_path="s", seed=3)
    sections, kind = recipe.as_dict(), getattr(kinds, name)
    assert sections["engine"]["loss_workspace_mib"] is None
    sections["engine"]["loss_workspace_mib"] = 256  # the default of then, which folders hold
    for section, _, setting in (setting.partition(".") for setting in kinds.LATER):
        del sections[section][setting]  # there was none
    for alone, names in zip((False, True), RECORDED[name], strict=True):
        if names is None:
            continue
        found = Dependencies(recipe, alone=alone).of(kind)
        assert sorted(found) == names.split()
        for key in ("seed", "engine", "scorer", "ppo", "world", "select", "sft", "variants"):
            assert found.get(key, sections[key]) == sections[key]
        assert found.get("data", {"contents": {}}) in ({**sections["data"], "contents": {}}, {"contents": {}})
        assert "judge_timeout" not in found.get("evaluate", {}) and found.get("iterate", {}).get("rounds") is None
        if alone:
            assert found["made_from"] == ({"model_name_or_path": None} if kind.policy else {})


def test_settings_that_came_later_are_in_records_where_they_change_something():
    """PPO's of November 2026, name for name: a setting since then must not be among them as long as it says nothing."""
    plain = Dependencies(Recipe()).of(kinds.PPO)["ppo"]
    assert sorted(plain) == sorted(OF_PPO.split()) and not {f"ppo.{name}" for name in plain} & set(kinds.LATER)
    for name, value in (("advantage_estimator", "grpo"), ("num_generations", 4), ("dual_clip", 3.0)):
        found = Dependencies(with_settings(Recipe(), {f"ppo.{name}": value})).of(kinds.PPO)["ppo"]
        assert found == {**plain, name: value}


def test_what_stages_depend_on_by_what_is_asked_for(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    plain = Recipe()
    assert "contents" not in Dependencies(plain).of(kinds.SFT)["data"]  # of the skill world
    own = with_settings(plain, {"data.data_dir": str(tmp_path), "data.prompts": ["a.jsonl"], "model_name_or_path": "m"})
    assert own.data.prompts == ["a.jsonl"] and plain.data.prompts == []
    own = with_settings(own, {"scorer.expected_coef": 0.5, "scorer.meta_responses": "a.jsonl"})
    digest = Dependencies(own).of(kinds.SFT)["data"]["contents"]["a.jsonl"]
    found = Dependencies(own).of(kinds.SCORER, **shifted_responses(own))
    assert found["ppo"] == Dependencies(own).of(kinds.PPO)["ppo"] and found["meta_responses"] == {"a.jsonl": digest}
    assert shifted_responses(plain) == {}
    (tmp_path / "stage.json").write_text(json.dumps({"fingerprint": "f"}), encoding="utf-8")
    inputs = {"scorer_folder": str(tmp_path), "rehearsal": str(tmp_path / "a.jsonl"), "variant": "rm", "other": None}
    found = Dependencies(own, alone=True).of(kinds.PPO, **inputs)
    assert {name: found[name] for name in inputs} == inputs
    wanted = {"scorer_folder": "f", "rehearsal": "f", "variant": None, "model_name_or_path": None}
    assert found["made_from"] == wanted
    file = tmp_path / "elsewhere" / "rehearsal.jsonl"  # nobody's stage: what is in it counts
    file.parent.mkdir()
    digests = []
    for text in ("a", "b", "a"):
        write_jsonl(file, [{"prompt": text}])
        digests.append(Dependencies(own, alone=True).of(kinds.PPO, rehearsal=str(file))["made_from"]["rehearsal"])
    assert digests[0] == digests[2] != digests[1] and len(digests[0]) == 16
