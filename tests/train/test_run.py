"""A whole run: what is refused before its first stage, and what its stages depend on."""

from __future__ import annotations

import pytest

from stable_rlhf.data import DataError, write_jsonl
from stable_rlhf.data.packing import encode
from stable_rlhf.models import PolicyModel
from stable_rlhf.train import evaluation, meta, run, stages
from stable_rlhf.train.checkpoint import RunError
from stable_rlhf.train.config import EngineArguments, Recipe, SFTArguments
from stable_rlhf.train.sft import train_sft


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """Of a run with files of its own, in which nothing is wrong."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {a}", "task": a} for a in "abcd"])
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Say a", "chosen": "a", "rejected": "b"}])
    write_jsonl(tmp_path / "responses.jsonl", [{"prompt": "Say a", "responses": ["a", "b"]}])
    found = Recipe(model_name_or_path="m", output_dir=str(tmp_path / "o"), variants=["rm"], report_to=[])
    found.data.data_dir, found.data.pairs, found.data.prompts = str(tmp_path), ["pairs.jsonl"], ["prompts.jsonl"]
    found.data.forget_tasks, found.data.judge_fraction = ["a"], 0.2
    run.check_inputs(found)
    return found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_main": ["prompts.jsonl"]}, r"data\.eval_main and data\.eval_forget: give both"),
        ({"eval_forget": ["prompts.jsonl"]}, r"data\.eval_main and data\.eval_forget: give both"),
        ({"forget_tasks": ["a", "maht"]}, r"data\.forget_tasks \['maht'\]: no prompt"),
        ({"forget_tasks": list("abcd")}, r"the prompts have 4 of these tasks and 0 others"),
    ],
)
def test_evaluation_sets_that_cannot_be_made_are_refused_before_the_first_stage(recipe, settings, message):
    for name, value in settings.items():
        setattr(recipe.data, name, value)
    with pytest.raises(DataError, match=message):
        run.check_inputs(recipe)


@pytest.mark.parametrize(("rounds", "responses"), [(2, None), (1, "responses.jsonl")])
def test_metarm_prompts_that_do_not_divide_are_refused_before_the_first_stage(recipe, monkeypatch, rounds, responses):
    monkeypatch.setattr(meta, "world_size", lambda: 3)
    recipe.scorer.meta_batch_size = 4
    run.check_inputs(recipe)  # without MetaRM it does not matter
    recipe.iterate.rounds, recipe.scorer.meta_responses = rounds, responses
    with pytest.raises(ValueError, match=r"scorer\.meta_batch_size 4 must be a multiple of the 3 ranks"):
        run.check_inputs(recipe)


@pytest.mark.usefixtures("one_process")
def test_a_policy_stopped_early_has_made_a_step_at_least(tiny_model, tokenizer, tmp_path):
    arguments = SFTArguments(max_steps=2, per_device_train_batch_size=1)
    examples = [encode(tokenizer, "Say a", "a")] * 2
    train_sft(
        PolicyModel(tiny_model(layers=1)), tokenizer, examples, arguments, EngineArguments(), tmp_path, seed=0,
        early_share=0.1,
    )  # fmt: skip
    assert (tmp_path / "early" / "config.json").is_file()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_scorers_that_learnt_from_samples_depend_on_how_they_are_drawn(recipe, monkeypatch, coefficient):
    """What the stages do is left out."""
    for name in ("run_materialise", "run_scorer", "run_ppo"):
        monkeypatch.setattr(stages, name, lambda *_, **__: {})
    monkeypatch.setattr(evaluation, "run_evaluate", lambda *_: {})
    monkeypatch.setattr(run, "summarise", lambda *_: {})
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    recipe.scorer.expected_coef = coefficient
    run.run_recipe(recipe)
    recipe.ppo.temperature = 0.7
    refused = "scorer-rm" if coefficient else "ppo-rm"
    with pytest.raises(
        RunError, match=rf"stage {refused} was made with other settings \(ppo\.temperature: 1\.0 -> 0\.7\)"
    ):
        run.run_recipe(recipe)
