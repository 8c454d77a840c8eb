"""Iterated RLHF: what is sampled for MetaRM, from where PPO goes on, and what its KL penalty refers to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stable_rlhf.cli.arguments import parse
from stable_rlhf.data import read_responses, write_jsonl
from stable_rlhf.engine.run_folder import RunDirectory
from stable_rlhf.run import evaluation, stages
from stable_rlhf.run import recipe as run
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.metarm import encode_responses
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def folders(tiny_model, tokenizer, tmp_path) -> dict[str, str]:
    """Two policies and a scorer."""
    for seed, name in enumerate(("first", "second")):
        tiny_model(layers=2, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    scorer = AdvantageModel(tiny_model(layers=2, seed=2).base_model, tokenizer, ScorerSettings(objective="rm"))
    scorer.save_pretrained(tmp_path / "scorer")
    return {name: str(tmp_path / name) for name in ("first", "second", "scorer")}


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    rows = [{"prompt": f"Reverse the letters of {a}{b}", "task": a} for a in "abc" for b in "defghi"]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    found = Recipe(output_dir=str(tmp_path / "o"), report_to=[])
    found.data.prompts, found.data.forget_tasks = [str(tmp_path / "prompts.jsonl")], ["a"]
    found.data.eval_prompts = 2
    found.iterate.prompts, found.iterate.responses_per_prompt = 5, 3
    found.ppo.max_new_tokens, found.ppo.total_steps = 6, 1
    found.ppo.rollout_batch_size = found.ppo.per_device_train_batch_size = 4
    return found


def test_each_of_some_training_prompts_gets_its_responses(recipe, folders, tmp_path):
    assert stages.run_responses(recipe, folders["first"], tmp_path / "r") == {"prompts": 5, "responses": 15}
    rows = read_responses(tmp_path / "r" / stages.RESPONSES).rows
    assert len({row.prompt for row in rows}) == 5 and all(len(row.responses) == 3 for row in rows)
    assert len({text for row in rows for text in row.responses}) > 10  # each draw is one of its own
    assert all(row.task == row.prompt.split()[-1][0] for row in rows)
    for policy, same in (("first", True), ("second", False)):
        stages.run_responses(recipe, folders[policy], tmp_path / policy)
        again = read_responses(tmp_path / policy / stages.RESPONSES).rows
        assert [r.prompt for r in again] == [r.prompt for r in rows]
        assert ([r.responses for r in again] == [r.responses for r in rows]) == same
    recipe.iterate.prompts = 500
    assert stages.run_responses(recipe, folders["first"], tmp_path / "all")["prompts"] == 14  # all there are


def test_metarm_reads_no_end_where_a_response_was_cut_off(recipe, folders, tokenizer, tmp_path, monkeypatch):
    drawn, answer = [], stages.answer
    monkeypatch.setattr(stages, "answer", lambda *a: drawn.extend(answer(*a)) or drawn)
    stages.run_responses(recipe, folders["first"], tmp_path / "r")
    read = encode_responses(read_responses(tmp_path / "r" / stages.RESPONSES).rows, tokenizer, 99, 99)
    ends = [e.ids[-1] == tokenizer.eos_token_id for row in read for e in row]
    assert ends == [r.finished for r in drawn if r.text or r.finished] and 0 < sum(ends) < len(ends)


@pytest.mark.parametrize("settings", [{}, {"lora_r": 2}, pytest.param({"zero_stage": 3}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["rm", pytest.param("rejection", marks=pytest.mark.slow)])
def test_the_penalty_of_a_later_round_is_one_to_the_initial_policy(recipe, folders, tmp_path, variant, settings):
    if settings.get("lora_r"):
        pytest.importorskip("peft")
    recipe.engine = replace(recipe.engine, **settings)
    recipe.ppo.rejection_samples = 2
    kl = {}
    for initial in (None, "first", "second"):
        result = stages.run_ppo(
            recipe, VARIANTS[variant], folders["second"], folders["scorer"], None, tmp_path / f"to-{initial}",
            reference=folders[initial] if initial else None,
        )  # fmt: skip
        kl[initial] = result["curve"][0]["kl"]
    assert kl[None] == pytest.approx(0, abs=1e-5) and kl["second"] == pytest.approx(0, abs=1e-5)
    assert kl["first"] > 0.1


def test_rounds_go_on_from_the_last_policy_with_a_scorer_that_saw_its_responses(recipe, monkeypatch, tmp_path):
    """The order of the stages and what each gets; what they do is replaced by notes."""
    calls: list[tuple] = []

    def note(room, name):
        def stage(recipe_of_stage, *arguments, **named):
            folder = next(a for a in reversed(arguments) if isinstance(a, Path))
            where = [Path(a).name for a in arguments if isinstance(a, str)]
            told = [Path(named["reference"]).name] if named.get("reference") else []
            if shifted := recipe_of_stage.scorer.meta_responses:
                told.append(Path(shifted).parent.name)
            calls.append((folder.name.removesuffix(".tmp"), where, told))
            return {}

        monkeypatch.setattr(room, name, stage)

    for name in ("run_materialise", "run_scorer", "run_ppo", "run_responses"):
        note(stages, name)
    note(evaluation, "run_evaluate")
    monkeypatch.setattr(run, "check_inputs", lambda _: None)
    monkeypatch.setattr(run, "check_model", lambda *_: None)
    summaries = []
    monkeypatch.setattr(run, "summarise", lambda *a: summaries.append(a) or {})
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    recipe.model_name_or_path, recipe.variants, recipe.iterate.rounds = "some/model", ["am"], 3
    recipe.evaluate.judge = "gold"
    given = recipe.as_dict()
    run.run_recipe(recipe)
    assert recipe.as_dict() == given  # nobody's recipe is written over
    assert calls[3:] == [
        ("ppo-am", ["initial-policy", "scorer-am"], []),
        ("responses-am-round-2", ["ppo-am"], []),
        ("scorer-am-round-2", ["am", "initial-policy", "ppo-am"], ["responses-am-round-2"]),
        ("ppo-am-round-2", ["ppo-am", "scorer-am-round-2"], ["initial-policy"]),
        ("responses-am-round-3", ["ppo-am-round-2"], []),
        ("scorer-am-round-3", ["am", "initial-policy", "ppo-am-round-2"], ["responses-am-round-3"]),
        ("ppo-am-round-3", ["ppo-am-round-2", "scorer-am-round-3"], ["initial-policy"]),
        ("evaluation", ["initial-policy"], []),
    ]
    assert recipe.scorer.meta_responses is None
    *_, scorers, _, trained, _ = summaries[0]
    assert list(scorers) == ["rm", "am", "am-round-2", "am-round-3"]
    assert list(trained) == ["am", "am-round-2", "am-round-3"]
    done = len(calls)
    run.run_recipe(recipe)
    assert len(calls) == done  # finished stages are not redone
    assert RunDirectory(recipe.output_dir).root.joinpath("scorer-am-round-3").is_dir()


@pytest.mark.parametrize("name", ["iterated-skill-world", "scorer-options"])
def test_the_recipes_are_good(name):
    recipe, _ = parse("run", [str(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")])
    check(recipe)
    assert recipe.iterate.rounds == (3 if name == "iterated-skill-world" else 1)
    assert (recipe.scorer.contrastive == "swav") == (name == "scorer-options")


def test_settings_that_no_stage_can_use():
    for name, value in (("rounds", 0), ("prompts", 0), ("responses_per_prompt", 1)):
        recipe = Recipe()
        setattr(recipe.iterate, name, value)
        with pytest.raises(ValueError, match=rf"iterate\.{name} must be at least"):
            check(recipe)
