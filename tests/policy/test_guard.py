"""The stability guard: what it warns of, what it stops, and that a loss that is not finite never moves the weights."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.run_folder import RunDirectory
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.dose import RehearsalController
from stable_rlhf.policy.guard import KLTooHigh, StabilityGuard, TaskDrift
from stable_rlhf.policy.kl import KLController
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments, GuardArguments, Recipe, RolloutArguments
from stable_rlhf.settings.stages import PPOArguments

CALM = {
    "kl": 0.5, "clip_fraction": 0.05, "approx_kl": 0.01, "entropy": 2.0, "length": 20.0, "score": 1.0, "finished": 0.9,
    "gradient_norm": 0.4, "max_log_ratio": 0.3, "logprob_gap": 1e-6, "skipped_updates": 0.0, "score_std": 0.5,
    "score_length_correlation": 0.1, "groups_without_signal": 0.2, "group_score_std": 0.4,
    "group_length_correlation": 0.1, "rollout_ratio_max": 1.1, "rollout_ratio_min": 0.9,
    "rehearsal_share": 0.2,
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
        ({"max_log_ratio": 6.0}, "max_log_ratio", "over a hundred times more or less likely"),
        ({"entropy": 5.0}, "entropy", "turning into noise"),
        ({"logprob_gap": 0.2}, "logprob_gap", "ppo.rollout_importance_clip"),
        ({"skipped_updates": 1.0}, "skipped_updates", "weights untouched"),
        ({"group_score_std": 0.1}, "group_score_std", "dr_grpo or rloo"),
        ({"rollout_ratio_max": 11.0}, "rollout_ratio_max", "ppo.rollout_importance_clip"),
        ({"rollout_ratio_min": 0.05}, "rollout_ratio_min", "less than a tenth"),
    ],
)
def test_each_warning_says_what_to_try(changes, name, advice, capsys):
    ((step, found, text),) = after(changes).warnings
    assert (step, found) == (9, name) and advice in text and text in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*CALM, "a_metric_of_no_rule"])
def test_what_is_not_finite_is_a_warning_in_every_rule(name, value):
    guard = after({name: value})
    ((step, _, text),) = guard.warnings
    assert step == 9 and f"{name} is {value}" in text
    for later in range(10, 16):  # and it spoils no median of those that come after
        guard.look(later, CALM)
    assert len(guard.warnings) == 1
    guard.look(16, {**CALM, "entropy": 0.2})
    assert guard.warnings[-1][1] == "entropy"


@pytest.mark.parametrize("lacks", [{}, math.nan], ids=["missing", "nan"])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("kl", -2.0), ("score_length_correlation", 0.9), ("groups_without_signal", 0.95),
        ("group_length_correlation", 0.9), ("rehearsal_share", 0.001),
    ],
)  # fmt: skip
def test_a_step_without_a_metric_ends_no_run_in_which_that_has_been_bad_for_long(name, bad, lacks):
    """As a step has none of an update where every update was left out."""
    guard = StabilityGuard(GuardArguments())
    for step in range(1, 9):
        guard.look(step, {**CALM, name: bad})
    assert name in {found for _, found, _ in guard.warnings}
    guard.warnings.clear()
    row = {key: value for key, value in CALM.items() if key != name}
    guard.look(9, row if lacks == {} else {**row, name: lacks})
    assert [found for _, found, _ in guard.warnings] == ([] if lacks == {} else [f"{name}, not finite"])


def test_a_task_score_that_is_not_finite_is_told_and_forgotten():
    guard = StabilityGuard(GuardArguments())
    for step in range(1, 70):
        guard.look(step, CALM, [(task, math.nan if step == 5 and task == "a" else 1.0) for task in "abc"])
    assert [(step, "the score of task 'a' is nan" in text) for step, _, text in guard.warnings] == [(5, True)]
    assert all(math.isfinite(score) for kept in guard.drift.scores.values() for score in kept)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kl_that_is_no_number_is_above_its_limit(value):
    with pytest.raises(KLTooHigh, match=f"KL to the initial policy is {value} nats"):
        after({"kl": value}, GuardArguments(max_kl=20.0, on_kl="stop"))


def test_a_kl_that_is_no_number_moves_no_coefficient():
    controller = KLController(0.1, 5.0)
    for kl in (math.nan, math.inf, -math.inf):
        controller.update(kl)
    assert controller.value == 0.1


def test_long_answers_that_score_less_are_no_reward_hacking():
    assert after({"length": 60.0, "score": 0.5}).warnings == []


def test_a_warning_is_not_repeated_at_every_step():
    guard = StabilityGuard(GuardArguments())
    for step in range(1, 42):
        guard.look(step, {**CALM, "finished": 0.1})
    assert [step for step, _, _ in guard.warnings] == [1, 21, 41]


def test_kl_above_its_limit_warns_or_stops():
    ((_, name, text),) = after({"kl": 30.0}, GuardArguments(max_kl=20.0)).warnings
    assert name == "max_kl" and "30.0 nats" in text
    with pytest.raises(KLTooHigh, match=r"stopped after step 9: KL .* 30\.0 nats a response, above guard\.max_kl 20"):
        after({"kl": 30.0}, GuardArguments(max_kl=20.0, on_kl="stop"))
    assert after({"kl": 19.0}, GuardArguments(max_kl=20.0, on_kl="stop")).warnings == []


PPO = PPOArguments(
    learning_rate=1e-2, total_steps=3, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=4
)


@pytest.fixture
def make(tiny_model, tokenizer, one_process):
    made = []

    def build(arguments=PPO, stage=0, **sections) -> PPOTrainer:
        scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))
        policy = PolicyModel(tiny_model(), value_head=True)
        recipe = quiet(ppo=arguments, engine=EngineArguments(zero_stage=stage), **sections)
        made.append(PPOTrainer(policy, tokenizer, scorer, recipe))
        return made[-1]

    yield build
    for trainer in made:
        trainer.engine.close()


@pytest.fixture
def trainer(make):
    return make()


@pytest.fixture
def prompts(tokenizer):
    texts = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count: q")
    return [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in texts]


def test_a_run_that_stops_keeps_the_policy_of_that_moment_whatever_comes_after(make, prompts, tmp_path):
    root, kept = tmp_path / "run", tmp_path / "run" / "ppo-rm-stopped"

    def attempt(folder):
        return make(guard=GuardArguments(max_kl=-1e9, on_kl="stop")).train(prompts, folder)

    for _ in range(2):
        with pytest.raises(KLTooHigh, match=re.escape(f"The policy of that step is in {str(kept)!r}")):
            RunDirectory(root).stage("ppo-rm", {}, attempt)
        assert AutoModelForCausalLM.from_pretrained(kept) and not (kept / "of the one before").exists()
        (kept / "of the one before").touch()
    redone = RunDirectory(root).stage("ppo-rm", {}, lambda folder: {})
    assert not redone.skipped and (kept / "model.safetensors").is_file()
    assert sorted(p.name for p in root.iterdir()) == [".lock", "ppo-rm", "ppo-rm-stopped", "run.json"]


@pytest.mark.parametrize("planted", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(planted, trainer, prompts, tmp_path, monkeypatch):
    """Planted in the critic's returns, as a reward that went wrong would."""
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    with_advantages = trainer.with_advantages

    def plant(experiences):
        first, *others = with_advantages(experiences)
        return [replace(first, returns=torch.full_like(first.returns, planted)), *others]

    monkeypatch.setattr(trainer, "with_advantages", plant)
    with pytest.raises(FloatingPointError, match=r"loss is not finite \(rank 0: (nan|inf)\); the weights are those"):
        trainer.train(prompts, tmp_path)
    assert all(torch.equal(p, b) for p, b in zip(trainer.policy.parameters(), before, strict=True))


# -- what lasts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value", "advice"),
    [
        ("score_length_correlation", 0.8, "pay for length"),
        ("kl", -2.0, "it cannot be negative"),
        ("groups_without_signal", 0.75, "ppo.dynamic_sampling"),
        ("group_length_correlation", 0.8, "ppo.overlong_buffer"),
        ("rehearsal_share", 0.005, "raise ppo.rehearsal_coef"),
    ],
)
def test_what_one_batch_may_show_by_chance_must_last(metric, value, advice):
    guard = StabilityGuard(GuardArguments())
    for step in range(1, 15):
        guard.look(step, {**CALM, metric: value} if step in (3, 4, *range(8, 15)) else CALM)
    ((step, name, text),) = guard.warnings
    assert (step, name) == (10, metric) and advice in text  # three of the last five


def test_a_task_whose_score_moves_against_the_others_is_named():
    guard = StabilityGuard(GuardArguments())
    tasks = {"copy": 1.0, "count": 1.2, "math": -0.5, "new": 0.0}
    for step in range(1, 41):
        drift = (step - 20) / 20 if step > 20 else 0.0
        scores = [(task, at + (drift if task != "math" else 0.0)) for task, at in tasks.items() for _ in range(2)]
        guard.look(step, {**CALM, "score_std": 0.3}, [s for s in scores if s[0] != "new" or step == 1])
    ((step, name, text),) = guard.warnings
    assert name == "task_drift" and "task 'math'" in text and step > 32
    assert "moved -1.1 standard deviations" in text  # as soon as it is more than one


def test_tasks_that_move_together_or_are_few_say_nothing():
    drift = TaskDrift()
    for moved in (0.0, 5.0):
        drift.add((task, moved + i) for i, task in enumerate("abc") for _ in range(32))
    assert drift.worst(1.0) == ("a", 0.0)
    few = TaskDrift()
    few.add((task, score) for score in (0.0, 9.0) for task in "ab" for _ in range(32))
    assert few.worst(1.0) == ("", 0.0) and drift.worst(0.0) == ("", 0.0)


def test_a_guard_goes_on_from_what_a_snapshot_keeps():
    rows = [{**CALM, "finished": 0.1 if step == 3 else 0.9} for step in range(1, 13)]
    whole, first = StabilityGuard(GuardArguments()), StabilityGuard(GuardArguments())
    scores = [[(task, step * i) for i, task in enumerate("abc")] for step in range(12)]
    for step, (row, part) in enumerate(zip(rows, scores, strict=True), start=1):
        whole.look(step, row, part)
        if step <= 7:
            first.look(step, row, part)
    again = StabilityGuard(GuardArguments())
    again.restore(json.loads(json.dumps(first.state())), rows[:7])
    for step in range(8, 13):
        again.look(step, rows[step - 1], scores[step - 1])
    for guard in (whole, again):
        guard.look(13, {**CALM, "finished": 0.1, "gradient_norm": 40.0})
    assert again.warnings == whole.warnings and [w[1] for w in whole.warnings] == ["finished", "gradient_norm"]
    assert again.drift.scores == whole.drift.scores


# -- what it does ------------------------------------------------------------------------------------------------------


def test_what_is_led_to_a_target_has_somewhere_to_begin():
    recipe = quiet(variants=["rm"])
    recipe.ppo.kl_target, recipe.ppo.kl_coef = 2.0, 0.0
    with pytest.raises(ValueError, match=r"^ppo\.kl_target needs a ppo\.kl_coef above 0"):
        check(recipe)
    recipe.variants = ["rejection"]  # has no use for it
    check(recipe)
    with pytest.raises(ValueError, match="kl_target needs a kl_coef above 0"):
        KLController(0.0, 2.0)
    with pytest.raises(ValueError, match="rehearsal_target needs a rehearsal_coef above 0"):
        RehearsalController(0.0, 0.3)


def test_lowering_the_kl_target_needs_one_and_a_limit():
    recipe = Recipe(guard=GuardArguments(on_kl="lower_target", max_kl=5.0))
    with pytest.raises(ValueError, match=r"guard\.on_kl 'lower_target' needs guard\.max_kl and ppo\.kl_target"):
        check(recipe)
    recipe.ppo.kl_target = 2.0
    check(recipe)


def test_the_target_is_lowered_with_each_warning_and_no_more():
    lowered = []
    guard = StabilityGuard(GuardArguments(on_kl="lower_target", max_kl=5.0), lambda: lowered.append(True))
    for step in range(1, 42):
        guard.look(step, {**CALM, "kl": 9.0})
    assert len(lowered) == len(guard.warnings) == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_updates_that_are_not_finite_can_be_skipped(stage, make, prompts, tmp_path, monkeypatch, capsys):
    """The second of three steps has an infinite return: its updates are left out, those of the others are made."""
    trainer = make(stage=stage, guard=GuardArguments(on_nonfinite="skip"))
    with_advantages, calls, seen = trainer.with_advantages, [], []

    def plant(experiences):
        first, *others = with_advantages(experiences)
        calls.append(1)
        with gathered(list(trainer.engine.module.parameters())):
            seen.append([p.detach().clone() for p in trainer.policy.parameters()])
        if len(calls) == 2:
            first = replace(first, returns=torch.full_like(first.returns, math.inf))
        return [first, *others]

    monkeypatch.setattr(trainer, "with_advantages", plant)
    curve = trainer.train(prompts, tmp_path)["curve"]
    assert [row["skipped_updates"] for row in curve] == [0, 1, 0] and "loss" not in curve[1]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert all(math.isfinite(value) for row in curve for value in row.values())
    assert "left out, the weights untouched" in capsys.readouterr().err
    assert "skipped_updates" in (tmp_path / "training.html").read_text(encoding="utf-8")


def test_a_policy_that_runs_away_within_a_step_leaves_out_the_rest_of_it(make, prompts, tmp_path):
    arguments = replace(PPO, total_steps=1, num_ppo_epochs=6, num_mini_batches=2)
    free = make(arguments).train(prompts, tmp_path / "free")["curve"][0]
    held = make(arguments, guard=GuardArguments(max_update_kl=1e-3))
    steps = []
    step = held.engine.step
    held.engine.step = lambda: steps.append(step()) or steps[-1]
    row = held.train(prompts, tmp_path / "held")["curve"][0]
    assert free["skipped_updates"] == 0 and free["approx_kl"] > 1e-3  # so that there is something to hold
    assert row["skipped_updates"] == 1 and steps[-1] is False and all(steps[:-1]) and len(steps) < 12
    assert row["approx_kl"] <= 1e-3 and row["max_log_ratio"] < free["max_log_ratio"]


def test_the_kl_controller_leads_the_penalty_and_survives_a_resume(make, prompts, tmp_path, killed_after):
    arguments = replace(PPO, total_steps=4, kl_coef=0.2, kl_target=1e-3)
    limits = GuardArguments(max_kl=0.01, on_kl="lower_target")
    every = CheckpointArguments(save_steps=1)
    shown = prompts[:2]

    def run(folder):
        trainer = make(arguments, guard=limits, checkpoint=every, rollout=RolloutArguments(sample_steps=2))
        return trainer.train(prompts, folder, samples=shown)["curve"]

    whole = run(tmp_path / "whole")
    assert len({row["kl_coef"] for row in whole}) > 2 and whole[0]["kl_coef"] == 0.2
    with killed_after(3):
        run(tmp_path / "killed")
    again = run(tmp_path / "killed")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in whole]
    samples = [(tmp_path / name / "samples.jsonl").read_text(encoding="utf-8") for name in ("whole", "killed")]
    assert samples[0] == samples[1] and [json.loads(s)["step"] for s in samples[0].splitlines()] == [0, 0, 2, 2, 4, 4]
