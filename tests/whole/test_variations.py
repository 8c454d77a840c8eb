"""Further policies of a run: a variant with other settings, from the same beginnings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from helpers.files import metric_lines
from stable_rlhf.cli.arguments import parse
from stable_rlhf.run.bounds import check
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.variants import VARIANTS

SMALL = """
    --seed 3 --variants am-sr --world.hidden_size 32 --world.num_hidden_layers 2 --world.num_attention_heads 2
    --world.comparisons 200 --sft.max_steps 20 --sft.per_device_train_batch_size 32 --scorer.num_train_epochs 1
    --ppo.total_steps 2 --ppo.rollout_batch_size 32 --ppo.per_device_train_batch_size 16
    --ppo.per_device_rehearsal_batch_size 8 --select.num_clusters 4 --select.top_k 3 --select.max_candidates 64
"""
CHANCE = {"select.criteria": {"random": 1}, "select.num_clusters": 1, "select.top_k": 12}
VARIATIONS = {
    "again": {"variant": "am-sr"},
    "by-chance": {"variant": "am-sr", **CHANCE},
    "no-dose": {"variant": "am-sr", **CHANCE, "ppo.rehearsal_coef": 0.0, "ppo.temperature": 0.9},
    "sft-data": {"variant": "rm-sr", "select.candidates": "demonstrations", "select.max_candidates": 40},
}


def rehearsed(folder: Path) -> list[dict]:
    with gzip.open(folder / "rehearsal.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.slow
def test_a_run_with_variations(server, tmp_path):
    call = ["quickstart", "--output-dir", "run", *SMALL.split(), "--variations", json.dumps(VARIATIONS)]
    server(*call, cwd=tmp_path).worked()
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    names = [stage["name"] for stage in summary["stages"]]
    assert names[:5] == ["world", "sft", "pairs", "scorer-rm", "scorer-am"]
    selections = ["selection", "selection-by-chance", "selection-sft-data"]
    assert names[5:] == [*selections, *(f"ppo-{name}" for name in ("am-sr", *VARIATIONS)), "evaluation"]
    assert set(summary["policies"]) == {"am-sr", *VARIATIONS}
    labels = {name: part["label"] for name, part in summary["policies"].items()}
    assert labels == {"am-sr": "AM-PPO-SR", **{name: name for name in VARIATIONS}}

    curves = {name: metric_lines(run / f"ppo-{name}") for name in summary["policies"]}
    for key in ("score", "kl", "rehearsal_loss", "policy_loss", "gradient_norm"):
        assert [row[key] for row in curves["again"]] == [row[key] for row in curves["am-sr"]]
    assert curves["no-dose"][1]["kl"] != curves["by-chance"][1]["kl"]

    chosen = {name: rehearsed(run / name) for name in selections}
    with gzip.open(run / "world" / "sft.jsonl.gz", "rt", encoding="utf-8") as file:
        demonstrations = {(row["prompt"], row["response"]) for row in map(json.loads, file)}
    assert len(chosen["selection-by-chance"]) == 12
    best, by_chance = ({row["prompt"] for row in chosen[name]} for name in selections[:2])
    assert best != by_chance
    assert all((row["prompt"], row["response"]) in demonstrations for row in chosen["selection-sft-data"])
    assert 0 < len(chosen["selection-sft-data"]) <= 12

    again = server(*call, cwd=tmp_path).worked()
    assert again.err.count("finished before") == len(names)
    other = VARIATIONS | {"no-dose": {"variant": "am-sr", **CHANCE, "ppo.rehearsal_coef": 0.5}}
    server(*call[:-1], json.dumps(other), cwd=tmp_path).refused("ppo-no-dose")
    other = VARIATIONS | {"again": {"variant": "am"}}
    server(*call[:-1], json.dumps(other), cwd=tmp_path).refused("ppo-again")


@pytest.mark.parametrize(
    ("variations", "words"),
    [
        ({"a b": {"variant": "rm"}}, r"variations\.a b: a name is of letters, digits"),
        ({"x-round-2": {"variant": "rm"}}, r"variations\.x-round-2: a name"),
        ({"am": {"variant": "rm"}}, r"variations\.am: is a name already"),
        ({"rm-stopped": {"variant": "rm"}}, r"variations\.rm-stopped: is a name already"),
        (
            {"a": {"variant": "rm"}, "b": {"variant": "rm", "ppo.kl_coef": -1}, "c": {}},
            r"variations\.b: ppo\.kl_coef",
        ),
        ({"a": {}}, r"variations\.a\.variant: one of rejection, rm, .*, got None"),
        ({"a": {"variant": "dpo"}}, r"variations\.a\.variant: one of .*, got 'dpo'"),
        (
            {"a": {"variant": "rm", "ppo.klcoef": 1}},
            r"variations\.a: 'ppo\.klcoef' is no .*did you mean 'ppo\.kl_coef'",
        ),
        ({"a": {"variant": "rm", "sft.max_steps": 1}}, r"variations\.a: 'sft\.max_steps' is no setting of one policy"),
        ({"a": {"variant": "rm", "ppo.max_new_tokens": 9}}, r"'ppo\.max_new_tokens' .*: it is the same for all"),
        ({"a": {"variant": "rm", "ppo.kl_coef": "much"}}, r"variations\.a: ppo\.kl_coef: expected a number, got 'm"),
        ({"a": {"variant": "rm", "ppo.kl_coef": -1}}, r"variations\.a: ppo\.kl_coef must be"),
        ({"a": {"variant": "rm", "ppo.advantage_estimator": "grpo"}}, r"variations\.a: .*num_generations"),
        ({"a": {"variant": "am-sr", "select.criteria": {"chance": 1}}}, r"variations\.a: .*unknown criterion 'chance'"),
        ({"a": {"variant": "rm", "ppo.gamma": float("nan")}}, r"variations\.a\.ppo\.gamma must be a finite number"),
        ({"a": "rm"}, r"variations\.a: expected a mapping"),
    ],
)
def test_variations_that_make_no_sense_are_refused(variations, words):
    with pytest.raises(ValueError, match=words):
        check(Recipe(variations=variations))


@pytest.mark.parametrize("pair", [["a", "am"], ["a"], ["a", "a"], ["a", "rm", "rm"]])
def test_a_study_compares_two_policies_that_it_has(pair):
    recipe = Recipe(variants=["rm"], variations={"a": {"variant": "am", "ppo.kl_coef": 0.5}})
    recipe.study.compare = [["a", "rm"], ["rm", "sft"]]
    check(recipe)
    recipe.study.compare.append(pair)
    with pytest.raises(ValueError, match=r"study\.compare: pairs of two policies of sft, rm, a, got \['a'"):
        check(recipe)


def test_policies_of_a_recipe():
    recipe = Recipe(variants=["rm"], variations={"a": {"variant": "am-sr", "ppo.kl_coef": 0.5}})
    check(recipe)
    assert [variant.name for variant in recipe.variant_rows] == ["rm", "am-sr"]
    (_, plain), (variant, changed) = recipe.policies.values()
    assert plain.ppo.kl_coef == 0.05 and changed.ppo.kl_coef == 0.5 and variant is VARIANTS["am-sr"]
    assert changed.ppo.total_steps == plain.ppo.total_steps and recipe.scorers == ["rm", "am"]
    given, _ = parse("sft", ["--variants", "[]", "--variations", "{a: {variant: rm, ppo.learning_rate: 1e-3}}"])
    check(given)
    assert given.policies["a"][1].ppo.learning_rate == 1e-3
