"""Rewards per token, advantages and the moving average of scores, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.policy.dose import RehearsalController
from stable_rlhf.policy.experience import (
    Experience,
    RunningMoments,
    corrected_for_rollouts,
    logprob_gap,
    with_advantages,
)
from stable_rlhf.policy.kl import KLController

LENGTHS = (5, 1, 8, 3, 1)


def rollouts(lengths=LENGTHS, seed: int = 0) -> list[Experience]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        prompt = int(torch.randint(1, 5, (1,), generator=generator))
        old, ref, value = torch.randn(3, length, generator=generator)
        score = float(3 * torch.randn(1, generator=generator))
        found.append(Experience(Encoded(tuple(range(3, 3 + prompt + length)), prompt), score, old - 2, ref - 2, value))
    return found


def gae(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    advantage, after, following = [], 0.0, 0.0
    for r, v in zip(reversed(reward), reversed(value), strict=True):
        after = r + gamma * following - v + gamma * lam * after
        following = v
        advantage.insert(0, after)
    return advantage


def per_token(experience: Experience, kl_coef: float) -> list[float]:
    """Eq. 2 by hand."""
    reward = []
    for old, ref in zip(experience.old_logprob.tolist(), experience.ref_logprob.tolist(), strict=True):
        reward.append(-kl_coef * (old - ref))
    reward[-1] += experience.score
    return reward


def rewards_seen(experiences: list[Experience], **settings) -> list[list[float]]:
    """With V = 0 and lambda = 0 an advantage is its token's reward."""
    experiences = [replace(e, value=torch.zeros_like(e.value)) for e in experiences]
    return [e.advantage.tolist() for e in with_advantages(experiences, gamma=1.0, lam=0.0, whiten=False, **settings)]


def test_the_score_lands_on_the_last_response_token_and_nowhere_else():
    experiences = rollouts()
    for experience, reward in zip(experiences, rewards_seen(experiences, kl_coef=0.0), strict=True):
        assert len(reward) == len(experience.encoded.response)
        assert reward[-1] == pytest.approx(experience.score)
        assert all(r == 0 for r in reward[:-1])


def test_the_penalty_of_each_token_follows_equation_2():
    experiences = rollouts()
    for experience, reward in zip(experiences, rewards_seen(experiences, kl_coef=0.3), strict=True):
        assert reward == pytest.approx(per_token(experience, 0.3), abs=1e-6)


def test_a_token_the_policy_has_come_to_prefer_is_penalised():
    experience = Experience(
        Encoded((5, 6, 7), 1), 0.0, torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), torch.zeros(2)
    )
    (reward,) = rewards_seen([experience], kl_coef=0.5)
    assert reward == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_other_estimators_never_pay_for_divergence(estimator):
    experiences = [replace(e, score=0.0) for e in rollouts()]
    for experience, reward in zip(
        experiences, rewards_seen(experiences, kl_coef=0.3, kl_estimator=estimator), strict=True
    ):
        ratio = (experience.old_logprob - experience.ref_logprob).double()
        by_hand = 0.5 * ratio**2 if estimator == "k2" else (-ratio).exp() - 1 + ratio
        assert reward == pytest.approx((-0.3 * by_hand).tolist(), abs=1e-5)
        assert max(reward) < 0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_and_returns_equal_a_plain_loop_per_sequence(gamma, lam):
    experiences = with_advantages(rollouts(), kl_coef=0.2, gamma=gamma, lam=lam, whiten=False)
    for experience in experiences:
        value = experience.value.tolist()
        wanted = gae(per_token(experience, 0.2), value, gamma, lam)
        assert experience.advantage.tolist() == pytest.approx(wanted, abs=1e-5)
        returns = [a + v for a, v in zip(wanted, value, strict=True)]
        assert experience.returns.tolist() == pytest.approx(returns, abs=1e-5)


def test_advantages_are_whitened_over_all_sequences_together_and_returns_are_not():
    plain = with_advantages(rollouts(), kl_coef=0.2, whiten=False)
    white = with_advantages(rollouts(), kl_coef=0.2, whiten=True)
    before = torch.cat([e.advantage for e in plain]).double()
    after = torch.cat([e.advantage for e in white]).double()
    assert float(after.mean()) == pytest.approx(0, abs=1e-6)
    assert float(after.var(correction=0)) == pytest.approx(1, abs=1e-5)
    # One shift and one scale for every token: a sequence on its own is neither centred nor of unit variance.
    torch.testing.assert_close(after, (before - before.mean()) / before.std(correction=0), rtol=0, atol=1e-5)
    assert max(abs(float(e.advantage.mean())) for e in white) > 0.1
    for one, other in zip(plain, white, strict=True):
        assert torch.equal(one.returns, other.returns)


def test_a_response_of_one_token_gets_score_minus_penalty_minus_value():
    experiences = with_advantages(rollouts(lengths=(1, 1, 1)), kl_coef=0.4, gamma=0.9, lam=0.8, whiten=False)
    for e in experiences:
        reward = e.score - 0.4 * float(e.old_logprob[0] - e.ref_logprob[0])
        assert float(e.advantage) == pytest.approx(reward - float(e.value), abs=1e-5)
        assert float(e.returns) == pytest.approx(reward, abs=1e-5)


def test_a_single_token_in_the_whole_batch_is_whitened_to_zero():
    (experience,) = with_advantages(rollouts(lengths=(1,)), kl_coef=0.1)
    assert float(experience.advantage) == 0
    assert float(experience.returns) != 0


def test_results_keep_the_order_and_lengths_of_the_rollouts():
    experiences = with_advantages(rollouts(), kl_coef=0.1)
    assert [len(e.advantage) for e in experiences] == [len(e.returns) for e in experiences] == list(LENGTHS)
    backwards = with_advantages(rollouts()[::-1], kl_coef=0.1)
    for one, other in zip(experiences, reversed(backwards), strict=True):
        torch.testing.assert_close(one.advantage, other.advantage, rtol=0, atol=1e-6)


def feed(moments: RunningMoments, batch) -> None:
    batch = [float(x) for x in batch]
    moments.update(len(batch), sum(batch), sum(x * x for x in batch))


def test_running_moments_equal_numpy_over_unequal_batches():
    generator = np.random.default_rng(0)
    moments, seen = RunningMoments(), []
    for size, shift in [(3, 5.0), (0, 0.0), (1, -2.0), (17, 0.0), (0, 0.0), (40, 30.0)]:
        batch = generator.normal(shift, 2.0, size)
        seen += batch.tolist()
        feed(moments, batch)
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(np.mean(seen), rel=1e-12)
        assert moments.std == pytest.approx(np.std(seen), rel=1e-9)
    assert moments.normalise(12.0) == pytest.approx((12.0 - np.mean(seen)) / np.std(seen), rel=1e-9)


def test_before_any_score_moments_change_nothing():
    moments = RunningMoments()
    moments.update(0, 0.0, 0.0)
    assert (moments.count, moments.mean, moments.std) == (0, 0, 1)
    assert moments.normalise(1.5) == 1.5


@pytest.mark.parametrize("score", [0.1, -1234.5])
def test_a_constant_score_does_not_divide_by_zero(score):
    moments = RunningMoments()
    for size in (3, 7):
        feed(moments, [score] * size)
    assert moments.std == pytest.approx(0, abs=1e-5)
    assert moments.normalise(score) == pytest.approx(0, abs=1e-6)
    assert moments.normalise(score + 1e-3) == pytest.approx(10, rel=1e-3)  # the floor of the deviation is 1e-4


# -- KL controller -----------------------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_ziegler_et_al():
    controller = KLController(0.2, target=4.0)
    controller.update(4.4)  # error 0.1
    assert controller.value == pytest.approx(0.2 * 1.01)
    controller.update(400.0)  # clipped at 0.2
    assert controller.value == pytest.approx(0.2 * 1.01 * 1.02)
    controller.update(-3.0)
    assert controller.value == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    controller.lower_target()
    assert controller.target == 2.0
    for _ in range(500):  # a policy whose KL falls as the coefficient rises is led to the target
        controller.update(1.0 / controller.value)
    assert 1.0 / controller.value == pytest.approx(2.0, rel=1e-3)


def test_without_a_target_the_coefficient_stays():
    controller = KLController(0.3)
    controller.update(1e6)
    controller.lower_target()
    assert (controller.value, controller.target) == (0.3, None)


# -- the dose of rehearsal ---------------------------------------------------------------------------------------------


def share_at(coef: float, rehearsal: float, policy: float = 1.0) -> float:
    """The share of terms whose gradients have these norms."""
    return coef * rehearsal / (policy + coef * rehearsal)


@pytest.mark.parametrize("unit", [0.02, 0.9, 40.0])
def test_the_dose_is_led_to_its_share(unit):
    controller = RehearsalController(1.0, target=0.35)
    for _ in range(40):
        controller.update(share_at(controller.value, unit))
    assert share_at(controller.value, unit) == pytest.approx(0.35, abs=1e-3)


def test_one_step_of_the_dose():
    controller = RehearsalController(2.0, target=0.5)
    controller.update(0.4)  # odds of 2 / 3 where 1 is wanted
    assert controller.value == pytest.approx(2.0 * math.sqrt(1.5))
    for share, factor in ((0.01, 1.5), (0.0, 1.5), (0.999, 1 / 1.5), (1.0, 1 / 1.5), (0.5, 1.0)):
        before = controller.value
        controller.update(share)
        assert controller.value == pytest.approx(before * factor)


def test_a_dose_that_nothing_answers_stays_within_bounds():
    for share, bound in ((0.0, 300.0), (1.0, 0.03)):
        controller = RehearsalController(3.0, target=0.35)
        for _ in range(50):
            controller.update(share)
        assert controller.value == pytest.approx(bound)
        controller.update(math.nan)
        assert controller.value == pytest.approx(bound)


def test_without_a_share_to_hold_the_dose_stays():
    controller = RehearsalController(0.3)
    controller.update(0.9)
    assert controller.value == 0.3


# -- another engine's rollouts -----------------------------------------------------------------------------------------


def test_the_gap_is_the_trainers_logprob_less_the_engines():
    experiences = rollouts()
    known = [
        replace(e, rollout_logprob=e.old_logprob - torch.linspace(-1, 2, len(e.old_logprob))) for e in experiences[:-1]
    ]
    experiences = [*known, experiences[-1]]
    gap = logprob_gap(experiences)
    assert gap.shape == (sum(LENGTHS[:-1]),) and float(gap.min()) == pytest.approx(-1)
    assert float(gap[: LENGTHS[0]].max()) == pytest.approx(2)
    assert logprob_gap(experiences[-1:]).shape == (0,)


def test_advantages_are_weighted_by_the_truncated_ratio_and_returns_are_not():
    plain = with_advantages(rollouts(), kl_coef=0.1)
    known = [
        replace(e, rollout_logprob=e.old_logprob - torch.linspace(-1, 200, len(e.old_logprob))) for e in plain[:-1]
    ]
    corrected = corrected_for_rollouts([*known, plain[-1]], clip=2.0)
    for before, after in zip(plain[:-1], corrected[:-1], strict=True):
        gap = (after.old_logprob - after.rollout_logprob).double()
        assert after.advantage.tolist() == pytest.approx((before.advantage * gap.exp().clamp(max=2.0)).tolist())
        assert torch.equal(after.returns, before.returns)
    assert torch.equal(corrected[-1].advantage, plain[-1].advantage)  # not known: not touched
