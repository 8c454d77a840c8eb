"""MetaRM in the trainer: its steps are those of plain autograd under every ZeRO stage, and the weights come back."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from helpers.files import metric_lines
from helpers.forks import run_ranks
from helpers.recipes import quiet
from stable_rlhf.data import read_responses, write_jsonl
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Comparison, DataError
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.run.bounds import check
from stable_rlhf.run.stages import run_scorer
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer import metarm as meta_module
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.metarm import MetaRM, encode_responses
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments, Recipe
from stable_rlhf.settings.stages import ScorerArguments

TRAINING = ScorerArguments(
    learning_rate=2e-3, num_train_epochs=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    warmup_ratio=0.0, meta_learning_rate=0.1, meta_batch_size=2,
)  # fmt: skip


ON_RANKS = [1, pytest.param(2, marks=pytest.mark.slow)]
LONG_STAGES = [pytest.param(stage, marks=pytest.mark.slow) for stage in "12"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[int, str], dict]:
    folder = tmp_path_factory.mktemp("meta")

    @functools.cache
    def of(ranks: int, stages: str) -> dict:
        path = folder / f"{ranks}-{stages}.json"
        run_ranks("meta_worker", path, 2 // ranks, stages, ranks=ranks)
        return json.loads(path.read_text(encoding="utf-8"))

    return lambda ranks, stage: of(ranks, "0,3" if stage in "03" else "1,2")


@pytest.mark.parametrize("stage", ["0", "3", *LONG_STAGES])
@pytest.mark.parametrize("ranks", ON_RANKS)
def test_two_steps_equal_an_explicit_version(found, stage, ranks):
    """θ and θ' of the first step, losses at θ' and J at θ of all steps, and Adam's mean of the gradients at θ'. (Not
    the later weights: where a gradient is next to nothing, Adam makes a whole step of its rounding.)"""
    part = found(ranks, stage)[stage]
    assert max(part["weights"]) < 1e-5
    for ours, theirs in zip(part["figures"], part["explicit"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert part["gradients"] < 1e-5 < 1e-2 < part["gradient"]
    assert min(part["moved"]) > 1e-2  # the ascent is no rounding error
    assert part["changed"] == 0


@pytest.mark.parametrize("stage", ["3", *LONG_STAGES])
@pytest.mark.parametrize("ranks", ON_RANKS)
def test_in_bfloat16_the_weights_move_and_come_back_to_the_bit(found, stage, ranks):
    """And the first step's loss, J and movement are as near to float32's as plain autograd's in bfloat16, its weights
    rounded in one way or another. (Not the later steps': rounding decides where they go.)"""
    part = found(ranks, stage)[f"bf16 {stage}"]
    assert part["changed"] == 0 and min(part["moved"]) > 1e-2
    for ours, *theirs in zip(part["deviation"], *part["roundings"], strict=True):
        assert ours <= 3 * max(theirs)


@pytest.fixture
def rows(tokenizer) -> list[EncodedComparison]:
    comparisons = [
        Comparison("Reverse the letters of abcd", ("dcba", "abcd"), ((0, 1),)),
        Comparison("Write backwards: xyz", ("zyx", "zy"), ((0, 1),)),
        Comparison("Count the letters of qq", ("2", "3"), ((0, 1),)),
        Comparison("Give the last letter of ab", ("a", "b"), ((1, 0),)),
    ]
    return [EncodedComparison(c, [encode(tokenizer, c.prompt, r) for r in c.responses]) for c in comparisons]


@pytest.fixture
def shifted(tokenizer) -> list:
    texts = {"Write backwards: op": ("po", "o", ""), "Count the letters of abc": ("3", "abc"), "Say a": ("a", "aa")}
    return [[encode(tokenizer, prompt, r) for r in responses] for prompt, responses in texts.items()]


@pytest.fixture
def make(tiny_model, tokenizer):
    def build(objective="am", **settings):
        return AdvantageModel(tiny_model().base_model, tokenizer, ScorerSettings(objective=objective), **settings)

    return build


@pytest.mark.parametrize(
    ("engine", "layers"),
    [
        ({}, None), ({}, 1), ({"lora_r": 2}, None), ({"packing": True}, None), ({"gradient_checkpointing": True}, None),
        pytest.param({"lora_r": 2, "zero_stage": 3}, None, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "zero_stage": 3}, None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_process")
def test_it_changes_what_is_learnt_and_is_logged(make, rows, shifted, tmp_path, engine, layers):
    if engine.get("lora_r"):
        pytest.importorskip("peft")
    weights = []
    for rate in (0.0, 0.1):
        folder, arguments = tmp_path / str(rate), replace(TRAINING, meta_learning_rate=rate)
        model = make(num_trainable_layers=layers)
        recipe = quiet(scorer=arguments, engine=EngineArguments(**engine))
        train_scorer(model, rows, recipe, folder, seed=0, meta_responses=shifted)
        weights.append((folder / "model.safetensors").read_bytes())
        for row in metric_lines(folder):
            assert 1 / 4 <= row["meta_difference"] <= 2 / 3 and row["meta_gradient_norm"] > 1e-4
    assert weights[0] != weights[1]
    plain = tmp_path / "plain"
    recipe = quiet(scorer=TRAINING, engine=EngineArguments(**engine))
    train_scorer(make(num_trainable_layers=layers), rows, recipe, plain, seed=0)
    assert (plain / "model.safetensors").read_bytes() == weights[0]  # a step of length 0 is none
    assert "meta_difference" not in metric_lines(plain)[0]


@pytest.mark.usefixtures("one_process")
def test_a_resumed_stage_goes_on_with_the_same_responses(make, rows, shifted, tmp_path, killed_after):
    def train(name: str, **extra) -> None:
        recipe = quiet(scorer=replace(TRAINING, contrastive="simcse"), **extra)
        train_scorer(make(), rows, recipe, tmp_path / name, seed=0, meta_responses=shifted)

    train("whole")
    often = CheckpointArguments(save_steps=1)
    with killed_after(3):
        train("cut", checkpoint=often)
    train("cut", checkpoint=often)
    assert metric_lines(tmp_path / "cut") == metric_lines(tmp_path / "whole")
    for name in ("model.safetensors", "heads.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.usefixtures("one_process")
def test_weights_come_back_from_a_loss_that_is_not_finite(make, shifted, monkeypatch, stage):
    model = make()
    engine = Engine(model, EngineArguments(zero_stage=stage), Schedule(1e-3, 3))
    engine.train()
    meta = MetaRM(engine, model, shifted, TRAINING, FeatureCache(), steps=3, seed=0)

    def weights() -> torch.Tensor:
        with gathered(list(engine.module.parameters())):
            return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

    before = weights()
    with pytest.raises(FloatingPointError, match="the loss is not finite"), meta.ascended(0):
        assert not torch.equal(weights(), before)
        engine.backward(engine(*model.prepare(shifted[0]))[0].sum() * float("nan"))
    assert torch.equal(weights(), before)
    monkeypatch.setattr(meta_module, "response_difference", lambda reward, counts: (reward * float("inf")).sum()[None])
    message = "gradient of MetaRM's objective .* is not finite"
    with pytest.raises(FloatingPointError, match=message), meta.ascended(1):
        pytest.fail("the weights must not move")
    assert torch.equal(weights(), before)
    engine.close()


def test_prompts_must_divide_over_the_ranks(make, shifted, monkeypatch):
    monkeypatch.setattr(meta_module, "world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"scorer\.meta_batch_size 2 must be a multiple of the 4 ranks"):
        MetaRM(None, make(), shifted, TRAINING, FeatureCache(), steps=3, seed=0)


def test_rows_that_are_too_long_are_left_out(tokenizer, tmp_path, capsys):
    path = tmp_path / "shifted.jsonl"
    rows = [{"prompt": "ab", "responses": ["b", "a"]}, {"prompt": "ab", "responses": ["b", "abcdefghij"]}]
    write_jsonl(path, [*rows, {"prompt": "abcdefgh", "responses": ["b", "a"], "task": "t"}])
    found = encode_responses(read_responses(path).rows, tokenizer, 10, 6)
    assert found == [[encode(tokenizer, "ab", r) for r in ("b", "a")]]
    assert "2 of 3 rows of unlabelled responses are too long" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"scorer\.meta_responses: none of 3 rows fits max_length 2 "):
        encode_responses(read_responses(path).rows, tokenizer, 2, 6)


def test_responses_that_were_cut_off_are_read_without_an_end(tokenizer, tmp_path):
    path, eos = tmp_path / "shifted.jsonl", tokenizer.eos_token_id
    row = {"prompt": "ab", "responses": ["b", "abc", ""]}
    write_jsonl(path, [row, row | {"finished": [True, False, False]}])
    *plain, told = encode_responses(read_responses(path).rows, tokenizer, 10, 6)
    assert plain == [[encode(tokenizer, "ab", r) for r in row["responses"]]]
    assert [e.ids[-1] == eos for e in told] == [True, False]  # the empty one has no token to be judged at
    assert told[1].ids == plain[0][1].ids[:-1] and told[0] == plain[0][0]
    write_jsonl(path, [row | {"finished": [True, False]}])
    with pytest.raises(DataError, match=r"shifted\.jsonl:1: 'finished' has 2 entries for 3 responses"):
        read_responses(path)


@pytest.mark.usefixtures("one_process")
def test_train_scorer_reads_the_file_and_names_a_bad_row(tiny_model, tokenizer, tmp_path):
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"Say {a}", "chosen": a, "rejected": a + a} for a in "abcdefghijkl"]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "shifted.jsonl", [{"prompt": "Say z", "responses": ["z", "zz", "a"]}])
    recipe = Recipe(report_to=[], scorer=replace(TRAINING, meta_responses="shifted.jsonl", num_train_epochs=1))
    recipe.data.data_dir, recipe.data.pairs = str(tmp_path), ["pairs.jsonl"]
    recipe.data.test_fraction = recipe.data.judge_fraction = 0.3
    for split in ("train", "judge"):
        run_scorer(recipe, "rm", str(tmp_path / "model"), None, tmp_path / split, split=split)
        assert ("meta_difference" in metric_lines(tmp_path / split)[0]) == (split == "train")  # the judge is left alone
    (tmp_path / "shifted.jsonl").write_text(
        '{"prompt": "Say z", "responses": ["z", "zz"]}\n{"prompt": "Say y"}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"shifted\.jsonl:2: 'responses' is missing"):
        run_scorer(recipe, "rm", str(tmp_path / "model"), None, tmp_path / "bad")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"meta_learning_rate": -1.0}, r"scorer\.meta_learning_rate must be at least 0"),
        ({"meta_batch_size": 0}, r"scorer\.meta_batch_size must be at least 1"),
    ],
)
def test_settings_that_no_stage_can_use(settings, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(scorer=ScorerArguments(**settings)))
