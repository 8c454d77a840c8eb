"""PPO with rollouts from elsewhere: weights go there before every step, and what the engine says is measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers.files import metric_lines
from helpers.recipes import quiet
from helpers.vllm_stub import serving
from stable_rlhf.data.encoding import encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.rollout.local import LocalRollouts
from stable_rlhf.rollout.vllm import VLLMRollouts
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import EngineArguments, Recipe
from stable_rlhf.settings.stages import PPOArguments

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count the letters of q")
ARGUMENTS = PPOArguments(
    learning_rate=1e-2, total_steps=3, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=6
)

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def prompts(tokenizer) -> list[EncodedPrompt]:
    return [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]


@pytest.fixture
def make(tiny_model, tokenizer):
    made = []

    def build(arguments=ARGUMENTS, stage=0, **settings) -> PPOTrainer:
        scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))
        policy = PolicyModel(tiny_model(), value_head=True)
        recipe = quiet(ppo=arguments, engine=EngineArguments(zero_stage=stage))
        made.append(PPOTrainer(policy, tokenizer, scorer, recipe, seed=7, **settings))
        return made[-1]

    yield build
    for trainer in made:
        trainer.engine.close()


@pytest.fixture
def server(tiny_model, tokenizer):
    with serving(tiny_model(seed=9), tokenizer) as made:  # other weights than the policy's, until it gets those
        yield made


class Shifted(LocalRollouts):
    """The policy itself, which reports every log-prob too low by ``shift``."""

    shift = 0.0

    def sample(self, prompts, settings, *, seeds=None):
        found = super().sample(prompts, settings, seeds=seeds)
        return [replace(r, logprobs=tuple(p - self.shift for p in r.logprobs)) for r in found]


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_server_gets_the_weights_before_every_step(stage, make, server, tokenizer, prompts, tmp_path):
    own = make(stage=stage).train(prompts, tmp_path / "own")["curve"]
    far = make(stage=stage, rollouts=VLLMRollouts(server.url, tokenizer)).train(prompts, tmp_path / "far")["curve"]
    assert len(server.loaded) == 3 == len(set(server.loaded)) and not (tmp_path / "far" / "rollout-weights").exists()
    for one, other in zip(own, far, strict=True):  # the same tokens, drawn from the same weights, in every step
        assert other["length"] == one["length"] and other["score"] == pytest.approx(one["score"], abs=1e-5)
        assert other["logprob_gap_max"] < 1e-4 and one["logprob_gap_max"] < 1e-4
    assert own[2]["kl"] > 1e-3  # and the weights did move


def test_a_server_that_keeps_its_old_weights_shows_as_a_gap(make, server, tokenizer, prompts, tmp_path, capsys):
    trainer = make(rollouts=VLLMRollouts(server.url, tokenizer))
    server.reloads = False
    curve = trainer.train(prompts, tmp_path)["curve"]
    assert curve[0]["logprob_gap"] > 0.05 and curve[0]["logprob_gap_max"] > curve[0]["logprob_gap"]
    assert "--logprobs-mode processed_logprobs" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["all", "its head"])
def test_a_server_that_does_not_take_up_new_weights_ends_the_run(
    kept, make, server, tiny_model, tokenizer, prompts, tmp_path
):
    """Its first step is right, and every later one would train on what the policy of the first step says."""
    trainer = make(rollouts=VLLMRollouts(server.url, tokenizer))
    server.model = tiny_model()  # the policy's weights
    server.reloads, server.keeps_head = kept != "all", True
    with pytest.raises(ValueError, match=r"differed by .*e-0[6-9] nats .*tie_word_embeddings"):
        trainer.train(prompts, tmp_path)
    assert len(metric_lines(tmp_path)) == 1


def test_a_tied_head_goes_to_a_server_under_both_of_its_names(make, tiny_model, tokenizer, prompts, tmp_path):
    trainer = make()
    trainer.policy.causal_lm.config.tie_word_embeddings = True
    trainer.policy.causal_lm.tie_weights()
    seen = []

    class Reader(LocalRollouts):
        holds_a_copy = True

        def load(self, folder):
            seen.append(load_file(folder / "model.safetensors"))

    trainer.rollouts = Reader(trainer.policy.causal_lm, tokenizer)
    trainer.publish(tmp_path, 0)
    (weights,) = seen
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_planted_gap_is_measured_and_corrected(make, tokenizer, prompts, tmp_path):
    def run(name: str, shift: float, clip: float | None) -> tuple[dict, torch.Tensor]:
        trainer = make(replace(ARGUMENTS, total_steps=1, rollout_importance_clip=clip))
        trainer.rollouts = Shifted(trainer.policy.causal_lm, tokenizer)
        trainer.rollouts.shift = shift
        seen = []
        with_advantages = trainer.with_advantages

        def watched(experiences):
            found = with_advantages(experiences)
            seen.extend(e.advantage for e in found)
            return found

        trainer.with_advantages = watched
        (row,) = trainer.train(prompts, tmp_path / name)["curve"]
        return row, torch.cat(seen)

    plain, advantages = run("plain", 0.0, None)
    assert plain["logprob_gap_max"] < 1e-4
    for shift in (0.5, -0.5):
        row, unchanged = run(f"measured{shift}", shift, None)
        assert row["logprob_gap"] == pytest.approx(0.5, abs=1e-4) and row["logprob_gap_max"] == pytest.approx(
            0.5, abs=1e-4
        )
        assert torch.equal(unchanged, advantages) and row["loss"] == plain["loss"]
    for shift, clip, weight in ((0.5, 4.0, math.exp(0.5)), (0.5, 1.2, 1.2), (-0.5, 1.2, math.exp(-0.5))):
        row, corrected = run(f"corrected{shift}{clip}", shift, clip)
        torch.testing.assert_close(corrected, weight * advantages, rtol=1e-4, atol=1e-5)
        # With the ratio 1 of a first update the policy loss is the mean advantage, so the weight is its factor.
        assert row["policy_loss"] == pytest.approx(weight * plain["policy_loss"], rel=1e-3, abs=1e-5)
        assert row["value_loss"] == pytest.approx(plain["value_loss"], rel=1e-5)


def test_the_nucleus_counts_as_a_gap(make, prompts, tmp_path):
    """With top_p below 1 tokens are drawn from another distribution than the one that is trained."""
    (row,) = make(replace(ARGUMENTS, total_steps=1, top_p=0.5)).train(prompts, tmp_path)["curve"]
    assert 0.1 < row["logprob_gap"] < row["logprob_gap_max"] < math.log(2) + 1e-4  # at most half of the mass is cut off


def test_a_response_cut_at_a_stop_string_is_finished_and_unpunished(make, tokenizer, prompts, tmp_path):
    arguments = replace(ARGUMENTS, missing_eos_penalty=100.0, total_steps=1)
    free = make(arguments).sample(prompts, 0)
    stop = next(r.text[0] for r in free if r.text)
    trainer = make(replace(arguments, stop=[stop]))
    rollouts = trainer.sample(prompts, 0)
    cut = [r for r, before in zip(rollouts, free, strict=True) if stop in before.text]
    assert cut and all(r.finished and r.encoded.response[-1] != tokenizer.eos_token_id for r in cut)
    rewarded, _ = trainer.rewarded(prompts, rollouts, trainer.observe(rollouts), 0)
    for rollout, experience in zip(rollouts, rewarded, strict=True):
        assert experience.encoded == rollout.encoded  # what was cut off is nothing that the trainer sees
        assert len(experience.old_logprob) == len(rollout.encoded.response) == len(rollout.logprobs)
        assert (experience.score > -50) == rollout.finished


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"stop": ["a", ""]}, r"ppo\.stop"),
     ({"rollout_importance_clip": 0.0}, r"rollout_importance_clip must be above 0"),
     ({"kl_target": 0.0}, r"ppo\.kl_target must be above 0")],
)  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(ppo=replace(ARGUMENTS, **settings)))


def test_a_server_is_an_address():
    recipe = Recipe()
    recipe.rollout.server = "localhost:8000"
    with pytest.raises(ValueError, match=r"rollout\.server must be an address .*, got 'localhost:8000'"):
        check(recipe)
