"""A whole run: what is refused before its first stage, and what its stages depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.recipes import quiet
from stable_rlhf.data import DataError, write_jsonl
from stable_rlhf.data.encoding import encode
from stable_rlhf.engine.run_folder import RunError
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.sft import train_sft
from stable_rlhf.run import evaluation, stages
from stable_rlhf.run import recipe as run
from stable_rlhf.run.bounds import check
from stable_rlhf.run.inputs import check_model
from stable_rlhf.scorer import metarm as meta
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.stages import SelectArguments, SFTArguments


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"evaluate.judge": "gold"},
            r"prompts\.jsonl:1: evaluate\.judge 'gold' knows prompts of the skill world alone",
        ),
        (
            {"evaluate.judge": "chat", "evaluate.judge_api_key_env": "NO_SUCH_KEY"},
            r"judge_api_key_env: .* 'NO_SUCH_KEY'",
        ),
        ({"data.test_fraction": 0.0}, r"data\.test_fraction must be above 0"),
        ({"scorer.num_policies": 1}, r"scorer\.num_policies must be at least the 2 alternate policies"),
        (
            {"scorer.num_policies": 2, "variants": ["am"]},
            r"scorer\.num_policies must be above the 2 alternate policies",
        ),
        ({"scorer.denoise": [{"below": 0.0, "flip": True}], "strength.check": "agreed"}, r"strength\.check 'agreed'"),
        ({"variants": ["am-sr"], "select.method": "gmm", "select.spherical": True}, "select: spherical: only KMeans"),
        ({"variants": ["am-sr"], "select.backend": "cpu", "select.devices": [0]}, r"select: devices \[0\]: the cpu"),
        (
            {"variants": ["am-sr"], "select.backend": "faiss", "select.devices": [999]},
            r"select: devices \[999\]: faiss",
        ),
    ],
)
def test_what_a_late_stage_would_stop_at_is_told_before_the_first(recipe, settings, message):
    recipe.select.embedding_model = "minilm"
    old = {"chosen": [-1.0], "rejected": [-1.0]}
    alternates = {side: [values] * 2 for side, values in old.items()}
    rows = [{"prompt": "Say a", "chosen": "a", "rejected": "b", "logprobs": old, "alt_logprobs": alternates}]
    write_jsonl(Path(recipe.data.data_dir or "") / "pairs.jsonl", rows)
    run.check_inputs(recipe)
    assign(recipe, settings)
    with pytest.raises(ValueError, match=message):
        run.check_inputs(recipe)


def test_without_the_scorer_among_the_rewards_no_pairs_are_asked_for(recipe):
    assert recipe.scorers == ["rm", "am"]
    recipe.rewards.functions, recipe.evaluate.judge, recipe.data.pairs = ["length"], "chat", []
    run.check_inputs(recipe)
    assert recipe.scorers == []
    recipe.variants, recipe.select.embedding_model = ["am-sr"], "minilm"
    assert recipe.scorers == ["am"]  # it selects
    with pytest.raises(DataError, match=r"data\.pairs: name at least one"):
        run.check_inputs(recipe)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (["exact_number"], "'exact_number' takes 'answer', which is no column of the prompts; they have task"),
        (["no.such:reward"], "'no.such:reward' cannot be imported: ModuleNotFoundError"),
        (["math:floor"], "'floor' gave no reward of row .*prompts.jsonl:1: TypeError"),
    ],
)
def test_rewards_that_are_not_there_are_told_before_the_first_stage(recipe, functions, message):
    recipe.rewards.functions = functions
    with pytest.raises(ValueError, match=f"rewards.functions: {message}"):
        run.check_inputs(recipe)


def assign(recipe: Recipe, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        section, _, last = name.rpartition(".")
        setattr(getattr(recipe, section) if section else recipe, last, value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ppo.rehearsal_target": 0.3, "ppo.rehearsal_coef": 0.0},
            r"ppo\.rehearsal_target needs a ppo\.rehearsal_coef above 0",
        ),
        ({"data.max_length": 16, "data.max_prompt_length": 17}, r"data\.max_length 16 .* data\.max_prompt_length 17"),
        (
            {"data.test_fraction": 0.5, "data.judge_fraction": 0.5},
            r"data\.judge_fraction 0\.5 must be below 1 together",
        ),
        ({"engine.offload_optimizer": True}, r"engine\.offload_optimizer needs engine\.zero_stage"),
        ({"world.hidden_size": 20}, r"world\.hidden_size 20 must be a multiple of twice world\.num_attention_heads 4"),
        ({"evaluate.judge_base_url": "localhost:8000/v1"}, r"evaluate\.judge_base_url must be an address"),
        ({"ppo.top_p": 0.0}, r"ppo\.top_p must be"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    recipe = Recipe()
    check(recipe)
    assign(recipe, settings)
    with pytest.raises(ValueError, match=message):
        check(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ppo.num_trainable_layers": 2},
            r"ppo\.num_trainable_layers must be between 1 and 1 for this model of 2 blocks, got 2",
        ),
        ({"scorer.num_trainable_layers": 3}, r"scorer\.num_trainable_layers must be between 1 and 1 for this model"),
        ({"ppo.max_new_tokens": 10**6}, r"a prompt of \d+ tokens and ppo\.max_new_tokens 1000000 do not fit"),
        ({"scorer_model_name_or_path": "other"}, "another tokenizer than the policy"),
    ],
)
def test_what_does_not_fit_the_policy_is_told_once_it_is_here(
    recipe, tiny_model, tokenizer, tmp_path, settings, message
):
    for name in ("m", "other"):
        tiny_model(layers=2).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    file = tmp_path / "other" / "tokenizer.json"
    other = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = other["model"]["vocab"]
    first, last = list(vocabulary)[10], list(vocabulary)[-10]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    file.write_text(json.dumps(other), encoding="utf-8")
    recipe.scorer_model_name_or_path, recipe.ppo.max_new_tokens = str(tmp_path / "m"), 8
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {a} {b}", "task": a} for a in "abcd" for b in "efgh"])
    check_model(recipe, str(tmp_path / "m"))
    if "scorer_model_name_or_path" in settings:
        settings = {"scorer_model_name_or_path": str(tmp_path / "other")}
    assign(recipe, settings)
    with pytest.raises(ValueError, match=message):
        check_model(recipe, str(tmp_path / "m"))


def test_a_scorer_that_trained_the_policy_is_no_held_out_judge(tmp_path):
    def stage(name: str, fingerprint: str, inputs: dict[str, str] | None = None, **settings: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        record = {"name": name, "fingerprint": fingerprint, "inputs": inputs or {}, "settings": settings}
        (folder / "stage.json").write_text(json.dumps(record), encoding="utf-8")
        return str(folder)

    # The scorers of a run have the same settings and inputs, so one fingerprint.
    rm, am, judge = (stage(f"scorer-{name}", "s") for name in ("rm", "am", "judge"))
    policy = stage("ppo-am", "p", {"sft": "f", "scorer-am": "s"})
    later = stage("ppo-am-round-2", "q", {"ppo-am": "p"})
    single = stage("ppo-rm", "r", made_from={"scorer_folder": "s", "rehearsal": None}, scorer_folder=rm)
    (tmp_path / "foreign").mkdir()
    trained, held_out, other = "the very scorer that the policy was trained with", "held-out reward model", "another"
    for scorer, of, words in (
        (am, policy, trained), (am, later, trained), (rm, single, trained), (judge, policy, held_out),
        (judge, single, held_out), (rm, policy, other), (am, single, other), (rm, str(tmp_path / "foreign"), other),
        (str(tmp_path / "foreign"), policy, other), (str(tmp_path / "none"), policy, other),
    ):  # fmt: skip
        assert words in evaluation.judge_of(scorer, of), (scorer, of)
    for broken in ("[]", "{}", '{"inputs": [1], "name": 1}', "no"):
        (tmp_path / "ppo-am" / "stage.json").write_text(broken, encoding="utf-8")
        assert other in evaluation.judge_of(am, policy)


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
    recipe = quiet(sft=SFTArguments(max_steps=2, per_device_train_batch_size=1))
    examples = [encode(tokenizer, "Say a", "a")] * 2
    policy = PolicyModel(tiny_model(layers=1))
    train_sft(policy, tokenizer, examples, recipe, tmp_path, seed=0, early_share=0.1)
    assert (tmp_path / "early" / "config.json").is_file()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_scorers_that_learnt_from_samples_depend_on_how_they_are_drawn(recipe, monkeypatch, coefficient):
    """What the stages do is left out."""
    monkeypatch.setattr(run, "check_model", lambda *_: None)
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


def test_the_encoder_gets_its_settings():
    settings = stages.select_settings(
        SelectArguments(embedding_batch_size=3, embedding_dtype="float16", normalize=False)
    )
    assert settings["embedding"] == {"normalize": False, "batch_size": 3, "dtype": "float16"}
