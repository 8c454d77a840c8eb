"""Held-out pairs scored while a scorer trains: the right figures at the right steps, and no trace in the training."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.files import metric_lines
from helpers.forks import run_ranks
from helpers.recipes import quiet
from stable_rlhf.data import write_jsonl
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Comparison
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.run.bounds import check
from stable_rlhf.run.stages import run_scorer
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison, score_pairs
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments, Recipe
from stable_rlhf.settings.stages import ScorerArguments

TRAINING = ScorerArguments(
    learning_rate=2e-3, num_train_epochs=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, bins=3,
    eval_steps=2,
)  # fmt: skip
EVAL = ("eval_accuracy", "eval_loss", "eval_ece")


@pytest.fixture
def rows(tokenizer) -> list[EncodedComparison]:
    found = []
    for i in range(9):
        row = Comparison(f"Say {'abc'[i % 3]}", ("abcd"[i % 4] * (1 + i), "z" * (1 + i % 3)), ((i % 2, 1 - i % 2),))
        found.append(EncodedComparison(row, [encode(tokenizer, row.prompt, r) for r in row.responses]))
    return found


@pytest.fixture
def train(tiny_model, tokenizer, rows):
    def run(folder: Path, settings: ScorerArguments = TRAINING, engine: dict | None = None, layers=None, **extra):
        model = AdvantageModel(tiny_model().base_model, tokenizer, ScorerSettings(), num_trainable_layers=layers)
        arguments = {"seed": 0, "test": rows[4:], **extra}
        if (look := arguments.pop("look", None)) is not None:
            arguments["on_step"] = lambda step: look(step, score_pairs(model, rows[4:]))
        sections = {name: arguments.pop(name) for name in ("checkpoint",) if name in arguments}
        recipe = quiet(scorer=settings, engine=EngineArguments(**engine or {}), **sections)
        train_scorer(model, rows[:4], recipe, folder, **arguments)

    return run


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "heads.safetensors")]


@pytest.mark.usefixtures("one_process")
def test_metrics_are_those_of_the_scores_after_their_step(train, rows, tmp_path):
    seen = {}
    train(tmp_path, look=lambda step, scores: seen.update({step: scores}))
    assert list(seen) == [1, 2, 3, 4, 5]
    for row in metric_lines(tmp_path):
        assert [name in row for name in EVAL] == [row["step"] in (2, 4, 5)] * 3
        if EVAL[0] not in row:
            continue
        gaps = [c - r for c, r in zip(seen[row["step"]]["chosen"], seen[row["step"]]["rejected"], strict=True)]
        assert row["eval_accuracy"] == sum(gap > 0 for gap in gaps) / 5
        assert row["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 5)
        bins: dict[int, list[float]] = {}
        for gap in gaps:  # three bins over [0.5, 1]
            confidence = 1 / (1 + math.exp(-abs(gap)))
            bins.setdefault(min(int(6 * (confidence - 0.5)), 2), []).append((gap > 0) - confidence)
        assert row["eval_ece"] == pytest.approx(sum(abs(sum(b)) for b in bins.values()) / 5)
    assert len({json.dumps(scores) for scores in seen.values()}) == 5
    assert score_pairs(AdvantageModel.from_pretrained(tmp_path), rows[4:]) == seen[5]


@pytest.mark.parametrize(
    ("engine", "layers"), [({}, None), ({}, 1), ({"lora_r": 2, "lora_dropout": 0.5}, None), ({"packing": True}, None)]
)
@pytest.mark.usefixtures("one_process")
def test_the_training_does_not_notice(train, rows, tmp_path, engine, layers):
    if engine.get("lora_r"):
        pytest.importorskip("peft")
    for every in (0, 1):
        torch.manual_seed(0)
        train(tmp_path / str(every), replace(TRAINING, eval_steps=every), engine, layers, cache=FeatureCache())
    assert files(tmp_path / "0") == files(tmp_path / "1")
    without = [{name: value for name, value in row.items() if name not in EVAL} for row in metric_lines(tmp_path / "1")]
    assert without == metric_lines(tmp_path / "0") and EVAL[0] in metric_lines(tmp_path / "1")[0]


@pytest.mark.usefixtures("one_process")
def test_a_resumed_stage_goes_on_to_the_bit(train, tmp_path, killed_after):
    train(tmp_path / "whole")
    often = CheckpointArguments(save_steps=1)
    with killed_after(3):
        train(tmp_path / "cut", checkpoint=often)
    train(tmp_path / "cut", checkpoint=often)
    assert metric_lines(tmp_path / "cut") == metric_lines(tmp_path / "whole")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[int, str], dict]:
    @functools.cache
    def of(ranks: int, stages: str) -> dict:
        folder = tmp_path_factory.mktemp("eval")
        run_ranks("eval_worker", folder, 4 // ranks, stages, ranks=ranks)
        return json.loads((folder / "found.json").read_text(encoding="utf-8"))

    return lambda ranks, stage: of(ranks, "0,3" if stage in "03" else "1,2")[stage]


@pytest.mark.parametrize("stage", ["0", "3", *(pytest.param(s, marks=pytest.mark.slow) for s in "12")])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_figures_under_every_zero_stage_and_on_ranks(found, stage, ranks):
    part, plain = found(ranks, stage), found(1, "0")
    assert part["same_weights"] and part["same_random_state"]
    assert part["seen"] == [[1, 2, 3, 4, 5]] * ranks
    for ours, theirs in zip(part["metrics"], plain["metrics"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert len({row["eval_loss"] for row in plain["metrics"] if "eval_loss" in row}) == 3


@pytest.mark.usefixtures("one_process")
def test_train_scorer_scores_the_pairs_that_it_holds_out(tiny_model, tokenizer, tmp_path):
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"Say {a}", "chosen": a, "rejected": a + a} for a in "abcdefghi"])
    recipe = Recipe(report_to=[], scorer=TRAINING)
    recipe.data.data_dir, recipe.data.pairs, recipe.data.test_fraction = str(tmp_path), ["pairs.jsonl"], 0.4
    result = run_scorer(recipe, "rm", str(tmp_path / "model"), None, tmp_path / "rm")
    assert metric_lines(tmp_path / "rm")[-1]["eval_accuracy"] == result["accuracy"]


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"scorer\.eval_steps must be at least 0, got -1"):
        check(Recipe(scorer=ScorerArguments(eval_steps=-1)))
