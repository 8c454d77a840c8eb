"""Groups of responses to one prompt: their advantages in the trainer, the loss's sums, sampling anew, resume."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import chain

import pytest
import torch

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.cli.arguments import parse
from stable_rlhf.data.encoding import Encoded
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.scores import less_overlong
from stable_rlhf.rollout.local import Rollout
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import CheckpointArguments, Recipe
from stable_rlhf.settings.stages import GROUP_RELATIVE, PPOArguments

pytestmark = pytest.mark.usefixtures("one_process")

ARGUMENTS = PPOArguments(
    learning_rate=1e-3, total_steps=2, rollout_batch_size=8, num_generations=4, per_device_train_batch_size=2,
    max_new_tokens=5, per_device_rehearsal_batch_size=1, rehearsal_coef=0.5, advantage_estimator="grpo", kl_coef=0.0,
)  # fmt: skip
WITHOUT_CRITIC = (*GROUP_RELATIVE, "reinforce_plus_plus", "score")


@pytest.fixture
def make(tiny_model, tokenizer):
    made = []

    def build(rehearsal=(), save_steps=0, **changes) -> PPOTrainer:
        arguments = replace(ARGUMENTS, **changes)
        scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))
        policy = PolicyModel(tiny_model(), value_head=arguments.advantage_estimator == "gae")
        recipe = quiet(ppo=arguments, checkpoint=CheckpointArguments(save_steps=save_steps))
        made.append(PPOTrainer(policy, tokenizer, scorer, recipe, rehearsal=rehearsal, seed=7))
        return made[-1]

    yield build
    for trainer in made:
        trainer.engine.close()


def observed(trainer: PPOTrainer, prompts, moved: bool = True):
    """Two groups of four, as after some updates where the policy has ``moved``, so that there is a KL penalty."""
    trainer.on_policy = False  # the log-probs are wanted here
    rollouts = trainer.sample([prompts[place // 4] for place in trainer.places], 0)
    experiences = trainer.observe(rollouts)
    assert len({e.score for e in experiences}) == 8 and len({len(e.encoded.response) for e in experiences}) > 1
    shift = 0.3 if moved else 0.0
    return [
        replace(e, ref_logprob=e.ref_logprob - shift * torch.sin(torch.arange(len(e.ref_logprob)) + i))
        for i, e in enumerate(experiences)
    ]


# -- advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", GROUP_RELATIVE)
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_advantages_are_relative_to_the_responses_to_the_same_prompt(make, prompts, estimator, kl_in):
    trainer = make(advantage_estimator=estimator, kl_coef=0.7, kl_in=kl_in, kl_estimator="k2")
    before = observed(trainer, prompts)
    penalty = [0.7 * float(((e.old_logprob - e.ref_logprob) ** 2).sum()) / 2 for e in before]
    if kl_in == "loss":
        penalty = [0.0] * 8
    scores = [e.score - p for e, p in zip(before, penalty, strict=True)]
    for i, e in enumerate(trainer.with_advantages(before)):
        group = scores[i // 4 * 4 : i // 4 * 4 + 4]
        wanted = scores[i] - statistics.fmean(group)
        wanted *= {"grpo": 1 / (statistics.stdev(group) + 1e-6), "dr_grpo": 1, "rloo": 4 / 3}[estimator]
        assert e.advantage.tolist() == pytest.approx([wanted] * len(e.encoded.response), abs=1e-5)
        assert e.raw_score == before[i].score
    # Over both groups together they are other ones.
    trainer.groups = torch.zeros_like(trainer.groups)
    assert float(trainer.with_advantages(before)[0].advantage[0]) != pytest.approx(wanted, rel=1e-2)


def test_reinforce_plus_plus_is_whitened_over_tokens(make, prompts):
    trainer = make(advantage_estimator="reinforce_plus_plus", kl_coef=0.7, gamma=0.9)
    found = trainer.with_advantages(observed(trainer, prompts))
    everything = torch.cat([e.advantage for e in found])
    assert float(everything.mean()) == pytest.approx(0, abs=1e-6)
    assert float(everything.std(correction=0)) == pytest.approx(1, abs=1e-4)
    e = found[0]
    kl = (e.old_logprob - e.ref_logprob).tolist()
    n = len(kl)
    wanted = [0.9 ** (n - 1 - t) * e.score - sum(0.9 ** (k - t) * 0.7 * kl[k] for k in range(t, n)) for t in range(n)]
    assert e.returns.tolist() == pytest.approx(wanted, abs=1e-5)


# -- the loss ------------------------------------------------------------------------------------------------------


def loss_by_hand(trainer: PPOTrainer, experiences, aggregation: str) -> float:
    """Before the first update every ratio is 1, and so each token's loss its advantage's negative, and k3 of the KL."""
    a = trainer.arguments
    total, tokens = 0.0, sum(len(e.encoded.response) for e in experiences)
    for e in experiences:
        apart = (e.ref_logprob - e.old_logprob).double()
        kl = apart.exp() - 1 - apart if a.kl_in == "loss" else 0 * apart
        loss = a.kl_coef * kl - e.advantage.double()
        total += float(loss.mean() if aggregation == "sequence_mean" else loss.sum())
    return total / {"token_mean": tokens, "sequence_mean": 8, "sequence_sum": 8 * a.max_new_tokens}[aggregation]


AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_losses_are_summed_as_the_setting_says(make, prompts, rehearsal, aggregation, kl_in):
    trainer = make(
        rehearsal, loss_aggregation=aggregation, advantage_estimator="score", whiten_advantages=False, kl_coef=0.7,
        kl_in=kl_in, kl_estimator="k3",
    )  # fmt: skip
    experiences = trainer.with_advantages(observed(trainer, prompts))
    drawn = trainer._rehearsal(0, 0, 0)
    wanted = {name: loss_by_hand(trainer, experiences, name) for name in AGGREGATIONS}
    trainer.engine.eval()
    nll = -sum(float(trainer.reference(*seen)["logprob"].sum()) for seen in views(trainer, drawn))
    metrics = trainer.update(experiences, 0)
    assert metrics["policy_loss"] == pytest.approx(wanted[aggregation], abs=1e-5)
    assert len({round(value, 3) for value in wanted.values()}) == 3
    assert metrics["rehearsal_loss"] == pytest.approx(nll / sum(len(e.response) for e in drawn), abs=1e-4)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6) and metrics["clip_fraction"] == 0


def views(trainer: PPOTrainer, examples):
    from stable_rlhf.models.views import view

    return [view(trainer.policy.trunk, [e]) for e in examples]


def test_the_settings_reach_the_loss(make):
    config = make(
        objective="ppo", dual_clip=3.0, importance_level="sequence", kl_in="loss", kl_estimator="k2", kl_coef=0.3,
        kl_unbiased=True, cliprange=0.1, cliprange_high=0.28,
    ).loss_config  # fmt: skip
    assert (config.dual_clip, config.importance_level, config.clip_low, config.clip_high) == (3, "sequence", 0.1, 0.28)
    assert (config.kl_coef, config.kl_estimator, config.kl_unbiased) == (0.3, "k2", True)
    assert make(objective="cispo").loss_config.objective == "cispo"


def test_at_their_defaults_new_settings_add_nothing_to_the_call(make, prompts, monkeypatch):
    """Runs from before them are the same bits: the operation gets what it got."""
    trainer = make(**{
        name: getattr(PPOArguments(), name)
        for name in ("advantage_estimator", "num_generations", "kl_coef", "loss_aggregation")
    })  # fmt: skip
    calls, forward = [], trainer.policy.forward

    def watched(*given, loss=None, **named):
        calls.extend([loss] if loss else [])
        return forward(*given, loss=loss, **named)

    monkeypatch.setattr(trainer.policy, "forward", watched)
    rollouts = trainer.sample([prompts[place % 5] for place in trainer.places], 0)
    trainer.update(trainer.with_advantages(trainer.observe(rollouts)), 0)
    names = "advantage config grad_scale kind old_logprob policy_denominator rehearsal_denominator"
    assert len(calls) == 4 and all(sorted(call) == names.split() for call in calls)
    tokens = sum(len(r.encoded.response) for r in rollouts)
    assert all(call["policy_denominator"] == tokens and call["config"].kl_coef == 0 for call in calls)


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_rehearsal_is_in_the_one_backward_of_every_estimator(make, prompts, rehearsal, tmp_path, estimator):
    trainer = make(rehearsal, advantage_estimator=estimator, total_steps=1)
    calls, backward, forward = [], trainer.engine.backward, trainer.policy.forward

    def counted(loss, **named):
        calls.append("backward")
        return backward(loss, **named)

    def seen(*given, loss=None, **named):
        if loss:
            calls.append(sorted(set(loss["kind"].flatten().tolist())))
        return forward(*given, loss=loss, **named)

    trainer.engine.backward, trainer.policy.forward = counted, seen
    (row,) = trainer.train(prompts, tmp_path)["curve"]
    assert calls == [[0, 1, 2], "backward"] * 4  # 8 rollouts, 2 a micro-step
    assert row["rehearsal_loss"] > 0.5 and row["value_loss"] == 0 and row["gradient_norm"] > 0
    assert not (tmp_path / "value_head.safetensors").exists()
    assert row["group_score_std"] > 0 and row["groups_without_signal"] == 0 == row["resampled_groups"]


# -- a step's prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [True, False])
@pytest.mark.parametrize("estimator", GROUP_RELATIVE)
def test_one_update_a_rollout_reads_the_policy_once(make, prompts, rehearsal, tmp_path, estimator, accumulated):
    """The same figures and weights as with the log-probs read beforehand, and as many forwards less."""
    outcomes = []
    for on_policy in (True, False):
        trainer = make(
            rehearsal, advantage_estimator=estimator, kl_coef=0.3, kl_in="loss", kl_estimator="k3",
            per_device_train_batch_size=2 if accumulated else 8,
        )  # fmt: skip
        assert trainer.on_policy
        trainer.on_policy = on_policy
        before = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
        forwards = []
        trainer.policy.register_forward_hook(lambda module, *_: forwards.append(module.training))  # noqa: B023
        folder = tmp_path / str(on_policy)
        trainer.train(prompts, folder)
        weights = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
        outcomes.append((metric_lines(folder), weights, [forwards.count(mode) for mode in (True, False)]))
    (rows, weights, passes), (rows_read, weights_read, passes_read) = outcomes
    steps = 2 * (4 if accumulated else 1)
    assert passes == [steps, 0] and passes_read == [steps, steps]
    for row, read in zip(rows, rows_read, strict=True):
        assert row.keys() == read.keys()
        for name in row.keys() - {"seconds", "time"}:
            assert row[name] == pytest.approx(read[name], rel=1e-4, abs=1e-5), name
    assert rows[1]["kl"] != 0 and rows[0]["logprob_gap"] < 1e-5
    # In norm: Adam makes steps of one size out of gradients that are next to nothing but rounding.
    moved = sum(float((w - w0).square().sum()) for w, w0 in zip(weights, before, strict=True))
    apart = sum(float((w - read).square().sum()) for w, read in zip(weights, weights_read, strict=True))
    assert moved > 0 and apart**0.5 <= 1e-3 * moved**0.5


def test_log_probs_are_read_beforehand_wherever_something_asks_for_them(make, tiny_model, tokenizer):
    assert make().on_policy and make(kl_coef=0.1, kl_in="loss", kl_estimator="k3").on_policy
    for changes in (
        {"kl_coef": 0.1}, {"kl_coef": 0.1, "kl_target": 1.0}, {"num_mini_batches": 2}, {"num_ppo_epochs": 2},
        {"rollout_importance_clip": 2.0}, {"advantage_estimator": "score", "num_generations": 1},
        {"advantage_estimator": "reinforce_plus_plus", "num_generations": 1}, {"advantage_estimator": "gae"},
    ):  # fmt: skip
        assert not make(**changes).on_policy, changes
    model = tiny_model()
    assert not PolicyModel(model).draws
    model.base_model.layers[1].self_attn.attention_dropout = 0.1  # a functional one, as most models have it
    assert PolicyModel(model).draws
    model = tiny_model()
    model.base_model.norm = torch.nn.Sequential(model.base_model.norm, torch.nn.Dropout(0.1))
    assert PolicyModel(model).draws


def asked_of(trainer: PPOTrainer, prompts, folder, score=None) -> list[list[tuple]]:
    """The prompts of each call for responses; ``score``: what a response scores instead."""
    calls, sample, observe = [], trainer.rollouts.sample, trainer.observe

    def sampled(asked, *given, **named):
        calls.append([tuple(ids) for ids in asked])
        return sample(asked, *given, **named)

    def scored(rollouts, *given):
        found = observe(rollouts, *given)
        return [replace(e, score=score(e)) for e in found] if score else found

    trainer.rollouts.sample, trainer.observe = sampled, scored
    trainer.train(prompts, folder)
    return calls


def test_each_prompt_of_a_step_is_answered_so_often(make, prompts, tmp_path):
    calls = asked_of(make(), prompts, tmp_path)
    assert len(calls) == 2
    for asked in calls:
        assert len(set(asked)) == 2 and asked == [asked[0]] * 4 + [asked[4]] * 4
    assert len(set(chain(*calls))) == 4  # of five prompts, none twice in a pass


def test_groups_of_equal_scores_are_taken_from_other_prompts_and_no_further_than_the_bound(make, prompts, tmp_path):
    first = asked_of(make(total_steps=1), prompts, tmp_path / "plain")[0]
    flat = first[0]  # the step's first group scores 1, whatever is answered; the second one's are its own

    def score(e):
        return 1.0 if e.encoded.ids[: e.encoded.prompt_length] == flat else float(e.ref_logprob.sum())

    calls = asked_of(make(total_steps=1, dynamic_sampling=5), prompts, tmp_path / "again", score)
    (row,) = metric_lines(tmp_path / "again")
    assert calls[0] == first and [len(call) for call in calls[1:]] == [4] * int(row["resampled_groups"])
    assert row["resampled_groups"] >= 1 and row["groups_without_signal"] == 0 and calls[-1][0] != flat
    # Where no prompt helps, it ends, and the figures say so.
    calls = asked_of(make(total_steps=1, dynamic_sampling=3), prompts, tmp_path / "never", lambda e: 2.5)
    (row,) = metric_lines(tmp_path / "never")
    assert [len(call) for call in calls] == [8] * 4
    assert row["resampled_groups"] == 6 and row["groups_without_signal"] == 1 and row["policy_loss"] == 0
    # Without the setting they stay.
    calls = asked_of(make(total_steps=1), prompts, tmp_path / "off", lambda e: 2.5)
    assert len(calls) == 1 and metric_lines(tmp_path / "off")[0]["resampled_groups"] == 0


def test_the_penalty_of_length_rises_over_the_last_tokens():
    rollouts = [Rollout(Encoded(tuple(range(3 + n)), 3), "", True) for n in (1, 6, 7, 8, 10)]
    assert less_overlong([1.0] * 5, rollouts, 10, 4, 0.5) == pytest.approx([1, 1, 1 - 0.125, 1 - 0.25, 0.5])
    assert less_overlong([1.0] * 5, rollouts, 10, 0, 0.5) == [1.0] * 5


def test_scores_of_long_responses_are_lowered_before_groups_are_made(make, prompts):
    plain, shaped = make(), make(overlong_buffer=5, overlong_penalty=2.0)
    asked = [prompts[place // 4] for place in plain.places]
    rollouts = plain.sample(asked, 0)
    before, after = (t.rewarded(asked, rollouts, t.observe(rollouts), 0)[0] for t in (plain, shaped))
    for a, b, r in zip(before, after, rollouts, strict=True):
        assert a.score - b.score == pytest.approx(2.0 * len(r.encoded.response) / 5, abs=1e-5)


# -- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_grpo_run_goes_on_to_the_same_bits(make, prompts, rehearsal, tmp_path, killed_after):
    settings = {
        "rehearsal": rehearsal, "save_steps": 1, "total_steps": 3, "dynamic_sampling": 1, "kl_coef": 0.05,
        "kl_target": 1.0, "kl_in": "loss", "kl_estimator": "k3", "num_mini_batches": 2,
    }  # fmt: skip
    whole = make(**settings)
    whole.train(prompts, tmp_path / "whole")
    with killed_after(2):
        make(**settings).train(prompts, tmp_path / "cut")
    resumed = make(**settings)
    resumed.train(prompts, tmp_path / "cut")
    first, second = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in metric_lines(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert first == second and len(first) == 3 and len({row["kl_coef"] for row in first}) == 3
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


# -- settings ------------------------------------------------------------------------------------------------------

GRPO = {"advantage_estimator": "grpo", "num_generations": 4}


@pytest.mark.parametrize(
    ("ppo", "words"),
    [
        ({"advantage_estimator": "rloo"}, r"num_generations must be at least 2 for ppo.advantage_estimator 'rloo'"),
        ({**GRPO, "num_generations": 3}, r"rollout_batch_size 256 must be a multiple of num_generations 3 x"),
        ({**GRPO, "num_generations": 64, "num_mini_batches": 8}, r"64 x num_mini_batches 8 = 512: a mini-batch has wh"),
        ({**GRPO, "vf_coef": 0.5}, r"ppo.vf_coef 0.5 says nothing to ppo.advantage_estimator 'grpo': leave it out"),
        ({**GRPO, "gamma": 0.9}, r"ppo.gamma 0.9 says nothing to"),
        ({**GRPO, "head_learning_rate": 0.1}, r"ppo.head_learning_rate 0.1 says nothing to"),
        ({"advantage_estimator": "reinforce_plus_plus", "whiten_advantages": False}, r"'score' can do without"),
        ({"advantage_scale": "batch"}, r"advantage_scale 'batch' needs ppo.advantage_estimator 'grpo', got 'gae'"),
        ({"dynamic_sampling": 2}, r"ppo.dynamic_sampling needs groups: set ppo.num_generations to 2 or more"),
        ({"overlong_buffer": 200}, r"ppo.overlong_buffer must be at most ppo.max_new_tokens 128, got 200"),
        ({"kl_in": "loss"}, r"ppo.kl_in 'loss' needs ppo.kl_estimator 'k2' or 'k3'"),
        ({"kl_unbiased": True}, r"ppo.kl_unbiased true needs ppo.kl_in 'loss'"),
        ({"objective": "cispo", "dual_clip": 3}, r"ppo.dual_clip needs ppo.objective 'ppo', got 'cispo'"),
        ({"dual_clip": 1}, r"ppo.dual_clip must be above 1, got 1"),
    ],
)
def test_settings_that_do_not_go_together_are_told_at_once(ppo, words):
    with pytest.raises(ValueError, match=words):
        check(Recipe(ppo=PPOArguments(**ppo)))


def test_settings_that_go_together_are_taken():
    flags = ["--ppo.advantage_estimator", "grpo", "--ppo.num_generations", "8", "--ppo.kl_in", "loss"]
    recipe, _ = parse("sft", [*flags, "--ppo.kl_estimator", "k3", "--ppo.dynamic_sampling", "3"])
    check(recipe)
    assert recipe.ppo.num_generations == 8 and recipe.ppo.kl_in == "loss"


@pytest.mark.parametrize(("estimator", "head"), [("gae", False), ("grpo", True)])
def test_a_critic_is_there_where_the_estimator_needs_one_and_nowhere_else(tiny_model, tokenizer, estimator, head):
    scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))
    recipe = quiet(ppo=replace(ARGUMENTS, advantage_estimator=estimator))
    with pytest.raises(ValueError, match=f"estimator '{estimator}' needs a policy with"):
        PPOTrainer(PolicyModel(tiny_model(), value_head=head), tokenizer, scorer, recipe)
