"""MetaRM's objective against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from stable_rlhf.scorer.metarm import response_difference


def by_hand(rewards: list[float]) -> float:
    k = len(rewards)
    total = sum(1 / (1 + math.exp(-abs(rewards[i] - rewards[j]))) for i in range(k) for j in range(i + 1, k))
    return 2 / k**2 * total


@pytest.mark.parametrize("counts", [[2], [4], [2, 5, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_prompt_by_the_formula(counts, dtype):
    reward = torch.randn(sum(counts), dtype=torch.float64, generator=torch.Generator().manual_seed(sum(counts)))
    parts = reward.split(counts)
    found = response_difference(reward.to(dtype), counts)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx([by_hand(p.tolist()) for p in parts], rel=1e-6)


def test_gradient():
    reward = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: response_difference(r, [3, 2]), reward)


def test_equal_rewards_have_the_least_value_and_no_gradient():
    reward = torch.full((4,), 1.5, requires_grad=True)
    value = response_difference(reward, [4])
    assert float(value.detach()) == pytest.approx(3 / 8)
    assert not torch.autograd.grad(value, reward)[0].any()
    far = response_difference(torch.tensor([0.0, 100.0, 200.0, 300.0]), [4])
    assert float(far) == pytest.approx(3 / 4)
