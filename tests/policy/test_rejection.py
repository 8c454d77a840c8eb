"""Rejection sampling: what is kept, and which sizes are refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from helpers.recipes import quiet
from stable_rlhf import ranks
from stable_rlhf.data.encoding import Encoded, encode, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy import rejection
from stable_rlhf.policy.rejection import keep, train_rejection
from stable_rlhf.rollout.local import Rollout
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import EngineArguments
from stable_rlhf.settings.stages import PPOArguments

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc")


def test_the_best_response_of_each_prompt_is_kept():
    assert keep([0.1, 0.9, 0.5, -3.0, -1.0, -2.0], 3, None) == [1, 4]
    assert keep([0.1, 0.9, 0.5, -3.0], 1, None) == [0, 1, 2, 3]
    assert keep([0.1, 0.9], 2, None) == [1]
    assert keep([], 4, None) == []


def test_the_first_of_equal_responses_is_kept():
    assert keep([1.0, 1.0, 0.0, 2.0, 5.0, 5.0], 3, None) == [0, 4]
    assert keep([0.0] * 4, 2, None) == [0, 2]


def test_a_threshold_keeps_every_response_at_or_above_it():
    scores = [0.1, 0.9, 0.5, -3.0, 0.5, 0.49]
    assert keep(scores, 3, 0.5) == [1, 2, 4]
    assert keep(scores, 2, 0.5) == [1, 2, 4]  # whatever prompt they belong to
    assert keep(scores, 3, 0.0) == [0, 1, 2, 4, 5]
    assert keep(scores, 3, -5.0) == [0, 1, 2, 3, 4, 5]


def test_a_threshold_above_all_keeps_nothing():
    assert keep([0.1, 0.9], 2, 1.0) == []
    assert keep([math.nan], 1, 0.0) == []


@pytest.fixture
def train(tiny_model, tokenizer, tmp_path):
    def run(policy=None, **settings):
        arguments = {
            "learning_rate": 1e-2, "total_steps": 2, "rollout_batch_size": 4, "per_device_train_batch_size": 2,
            "max_new_tokens": 4, "rejection_samples": 2,
        }  # fmt: skip
        prompts = [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]
        scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer)
        recipe = quiet(ppo=PPOArguments(**{**arguments, **settings}))
        policy = policy or PolicyModel(tiny_model())
        return train_rejection(policy, tokenizer, scorer, prompts, recipe, tmp_path / "out", seed=1)

    return run


@pytest.mark.parametrize(("rollouts", "samples"), [(5, 2), (4, 3), (2, 4), (0, 2)])
def test_a_rollout_batch_that_does_not_divide_is_an_error_that_names_the_numbers(train, rollouts, samples):
    message = rf"ppo\.rollout_batch_size {rollouts} must be a multiple of rejection_samples {samples} x 1 ranks"
    with pytest.raises(ValueError, match=message):
        train(rollout_batch_size=rollouts, rejection_samples=samples)


def weights(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_rounds_imitate_the_best_response_of_each_prompt(train, tiny_model, one_process, monkeypatch):
    policy = PolicyModel(tiny_model())
    before, judged, imitated = weights(copy.deepcopy(policy)), [], []
    score, imitate = rejection._scores, rejection._imitate

    def watch_scores(scorer, rollouts, per_device):
        judged.append(([r.encoded for r in rollouts], score(scorer, rollouts, per_device)))
        return judged[-1][1]

    def watch_imitation(engine, policy, kept, per_device):
        imitated.append(list(kept))
        return imitate(engine, policy, kept, per_device)

    monkeypatch.setattr(rejection, "_scores", watch_scores)
    monkeypatch.setattr(rejection, "_imitate", watch_imitation)
    result = train(policy)
    assert len(judged) == len(imitated) == 2
    for (examples, scores), kept in zip(judged, imitated, strict=True):
        assert len(examples) == 4 and all(isinstance(e, Encoded) for e in examples)
        assert kept == [max(zip(scores[s : s + 2], examples[s : s + 2], strict=True), key=lambda x: x[0])[1]
                        for s in (0, 2)]  # fmt: skip
        assert examples[0].ids[: examples[0].prompt_length] == examples[1].ids[: examples[1].prompt_length]
    assert not torch.equal(weights(policy), before)
    assert result["steps"] == 2 and [row["kept"] for row in result["curve"]] == [0.5, 0.5]
    assert result["tokens_seen"] == sum(len(e) for examples, _ in judged for e in examples)


def test_a_round_in_which_nothing_is_kept_changes_nothing(train, tiny_model, one_process, tmp_path):
    policy = PolicyModel(tiny_model())
    before = weights(copy.deepcopy(policy))
    result = train(policy, rejection_threshold=1e9, total_steps=1)
    assert torch.equal(weights(policy), before)
    assert result["curve"][0]["kept"] == 0 and math.isnan(result["curve"][0]["loss"])
    assert (tmp_path / "out" / "config.json").is_file()
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8"))["step"] == 1


def steps(tiny_model, tokenizer, per_device, accumulation, counts=(1, 5, 8)):
    """Losses of one step on as many kept responses as each of ``counts``, the weights after them, and the widths of the
    micro-batches."""
    policy, widths = PolicyModel(tiny_model(layers=2)), []
    engine = Engine(
        policy, EngineArguments(), Schedule(1e-2, len(counts)), micro_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    engine.train()
    hook = policy.trunk.register_forward_pre_hook(
        lambda *call: widths.append(len(call[2]["input_ids"])), with_kwargs=True
    )
    rows = [encode(tokenizer, TEXTS[i % 3], "abcdefgh"[: i + 1]) for i in range(8)]
    losses = [rejection._imitate(engine, policy, rows[:count], per_device) for count in counts]
    hook.remove()
    engine.close()
    return losses, weights(policy), widths


def test_a_step_on_what_was_kept_is_the_same_however_it_is_cut(tiny_model, tokenizer, one_process):
    losses, moved, widths = steps(tiny_model, tokenizer, per_device=8, accumulation=1)
    assert widths == [8] * 3 and len(set(losses)) == 3
    for per_device, accumulation in ((1, 8), (3, 3), (4, 2)):
        again, moved_too, widths = steps(tiny_model, tokenizer, per_device, accumulation)
        assert again == pytest.approx(losses, rel=1e-5) and widths == [per_device] * 3 * accumulation
        # As a whole: where a gradient is next to nothing, Adam's first steps follow its rounding.
        # Measured: 3e-8 of the weights, 1.4e-6 with AVX2's products; they moved by 9e-2.
        assert float((moved_too - moved).norm()) < 1e-5 * float(moved.norm())


@pytest.mark.parametrize("settings", [{}, {"rejection_threshold": -1e9}])
def test_no_micro_batch_is_wider_than_the_device_can_take(train, tiny_model, one_process, settings, monkeypatch):
    widths, step = [], rejection.nll_step

    def watch(engine, policy, micros):
        widths.append([len(micro) for micro in micros])
        return step(engine, policy, micros)

    monkeypatch.setattr(rejection, "nll_step", watch)
    result = train(rollout_batch_size=12, total_steps=1, **settings)
    assert widths == [[2] * (6 if settings else 3)] and result["curve"][0]["kept"] == (1 if settings else 0.5)


@pytest.mark.parametrize("objective", ["am", "rm"])
def test_a_score_that_is_not_finite_stops_every_rank(tiny_model, tokenizer, monkeypatch, objective):
    scorer = AdvantageModel(tiny_model().base_model, tokenizer, ScorerSettings(objective=objective))
    rollouts = [Rollout(encode(tokenizer, t, t[:3]), t[:3], True) for t in TEXTS]
    good = scorer.score_encoded([r.encoded for r in rollouts]).tolist()
    assert rejection._scores(scorer, rollouts, 2) == pytest.approx(good, abs=1e-5)
    told = []
    monkeypatch.setattr(ranks, "gather_objects", lambda value: told.append(value) or [value, "not finite elsewhere"])
    with pytest.raises(ValueError, match="not finite elsewhere"):
        rejection._scores(scorer, rollouts, 2)
    with torch.no_grad():
        (scorer.reward_head if objective == "rm" else scorer.expected_head).bias.fill_(math.inf)
    with pytest.raises(ValueError, match="not finite to the response 'Rev'"):
        rejection._scores(scorer, rollouts, 2)
    assert told[0] is None and "'Rev'" in told[1]


def test_a_response_that_was_cut_off_is_chosen_and_logged_by_its_score_less_the_penalty(
    train, tokenizer, one_process, monkeypatch
):
    rollouts = [
        Rollout(encode(tokenizer, TEXTS[0], text), text, finished)
        for text, finished in (("ab", False), ("cd", True), ("ef", True), ("gh", False))
    ]
    imitated = []
    monkeypatch.setattr(rejection, "generate", lambda *_, **__: rollouts)
    monkeypatch.setattr(rejection, "_scores", lambda *_: [3.0, 2.0, 1.0, 4.0])
    monkeypatch.setattr(rejection, "_imitate", lambda _, __, kept, ___: imitated.append(list(kept)) or 0.0)
    for penalty, best, score in ((0.0, (0, 3), 2.5), (1.5, (1, 3), 1.75), (5.0, (1, 2), 0.0)):
        (row,) = train(total_steps=1, missing_eos_penalty=penalty)["curve"]
        assert imitated.pop() == [rollouts[i].encoded for i in best] and row["score"] == score
    train(total_steps=1, missing_eos_penalty=1.5, rejection_threshold=1.75)
    assert imitated.pop() == [rollouts[i].encoded for i in (1, 3)]
