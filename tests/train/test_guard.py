"""The stability guard: what it warns of, what it stops, and that a loss that is not finite never moves the weights."""

from __future__ import annotations

import math

import pytest
import torch

from stable_rlhf.data.packing import encode_prompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.models import PolicyModel
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.train.config import EngineArguments, GuardArguments, PPOArguments
from stable_rlhf.train.guard import KLTooHigh, StabilityGuard
from stable_rlhf.train.ppo import EncodedPrompt, PPOTrainer

CALM = {
    "kl": 0.5, "clip_fraction": 0.05, "approx_kl": 0.01, "entropy": 2.0, "length": 20.0, "score": 1.0, "finished": 0.9,
    "gradient_norm": 0.4,
}  # fmt: skip


def after(changes: dict[str, float], arguments: GuardArguments | None = None, calm_steps: int = 8) -> StabilityGuard:
    guard = StabilityGuard(arguments or GuardArguments())
    for step in range(1, calm_steps + 1):
        guard.look(step, CALM)
    guard.look(calm_steps + 1, {**CALM, **changes})
    return guard


def test_a_calm_run_is_left_in_peace(capsys):
    assert after({}).warnings == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "name", "advice"),
    [
        ({"clip_fraction": 0.6}, "clip_fraction", "lower learning_rate"),
        ({"approx_kl": 0.3}, "approx_kl", "raise rollout_batch_size"),
        ({"entropy": 0.2}, "entropy", "raise kl_coef or entropy_coef"),
        ({"length": 60.0, "score": 2.0}, "length", "the scorer may pay for length"),
        ({"finished": 0.3}, "finished", "raise max_new_tokens"),
        ({"gradient_norm": 40.0}, "gradient_norm", "max_grad_norm"),
    ],
)
def test_each_warning_says_what_to_try(changes, name, advice, capsys):
    ((step, found, text),) = after(changes).warnings
    assert (step, found) == (9, name) and advice in text and text in capsys.readouterr().err


def test_long_answers_that_score_less_are_no_reward_hacking():
    assert after({"length": 60.0, "score": 0.5}).warnings == []


def test_a_warning_is_not_repeated_at_every_step():
    guard = StabilityGuard(GuardArguments())
    for step in range(1, 42):
        guard.look(step, {**CALM, "finished": 0.1})
    assert [step for step, _, _ in guard.warnings] == [1, 21, 41]


def test_kl_above_its_limit_warns_or_stops():
    ((_, name, text),) = after({"kl": 30.0}, GuardArguments(max_kl=20.0)).warnings
    assert name == "kl" and "30.0 nats" in text
    with pytest.raises(KLTooHigh, match=r"stopped after step 9: KL .* 30\.0 nats a response, above guard\.max_kl 20"):
        after({"kl": 30.0}, GuardArguments(max_kl=20.0, on_kl="stop"))
    assert after({"kl": 19.0}, GuardArguments(max_kl=20.0, on_kl="stop")).warnings == []


@pytest.fixture
def trainer(tiny_model, tokenizer, one_process):
    arguments = PPOArguments(
        learning_rate=1e-2, total_steps=3, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=4
    )
    scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))
    made = PPOTrainer(PolicyModel(tiny_model(), value_head=True), tokenizer, scorer, arguments, EngineArguments())
    yield made
    made.engine.close()


@pytest.fixture
def prompts(tokenizer):
    texts = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count: q")
    return [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in texts]


def test_a_run_that_stops_keeps_the_policy_of_that_moment(trainer, prompts, tmp_path):
    with pytest.raises(KLTooHigh):
        trainer.train(prompts, tmp_path, guard_arguments=GuardArguments(max_kl=-1e9, on_kl="stop"))
    assert (tmp_path / "stopped" / "model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("planted", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(planted, trainer, prompts, tmp_path, monkeypatch):
    """Planted in the critic's returns, as a reward that went wrong would."""
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    estimate = trainer.estimate

    def plant(experiences):
        estimate(experiences)
        experiences[0].returns = torch.full_like(experiences[0].returns, planted)

    monkeypatch.setattr(trainer, "estimate", plant)
    with pytest.raises(FloatingPointError, match=r"loss is not finite \(rank 0: (nan|inf)\); the weights are those"):
        trainer.train(prompts, tmp_path)
    assert all(torch.equal(p, b) for p, b in zip(trainer.policy.parameters(), before, strict=True))
