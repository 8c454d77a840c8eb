"""Estimators without a critic, in float64 against their formulas written out."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest
import torch

from stable_rlhf.policy import estimators
from stable_rlhf.policy.metrics import group_metrics
from stable_rlhf.settings.stages import GROUP_RELATIVE

SCORES = [0.3, -1.2, 2.5, 0.3, 7.0, 7.0, 7.0, -0.1, 0.0, 1e-3, 4.0, 4.5]
GROUPS = [2, 2, 0, 2, 1, 1, 1, 0, 0, 0, 3, 3]  # of several sizes, and not side by side


def of_groups(name: str, scores=SCORES, groups=GROUPS, **settings) -> list[float]:
    return estimators.OF_GROUPS[name](
        torch.tensor(scores, dtype=torch.float64), torch.tensor(groups), **settings
    ).tolist()


def written_out(name: str, i: int, eps: float = 1e-6, scale: str = "group") -> float:
    group = [s for s, g in zip(SCORES, GROUPS, strict=True) if g == GROUPS[i]]
    if name == "rloo":
        others = [s for j, (s, g) in enumerate(zip(SCORES, GROUPS, strict=True)) if g == GROUPS[i] and j != i]
        return SCORES[i] - sum(others) / len(others)
    apart = SCORES[i] - statistics.fmean(group)
    return apart / (statistics.stdev(group if scale == "group" else SCORES) + eps) if name == "grpo" else apart


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_each_is_its_formula(name):
    found = of_groups(name)
    assert found == pytest.approx([written_out(name, i) for i in range(12)], rel=1e-12, abs=1e-12)
    for other in {*GROUP_RELATIVE} - {name}:  # no two are the same formula
        assert found != pytest.approx([written_out(other, i) for i in range(12)], rel=1e-3)
    moved = of_groups(name, groups=[0, *GROUPS[1:]])
    assert moved != pytest.approx(found, rel=1e-3)
    assert of_groups(name, groups=[9 - g for g in GROUPS]) == found  # a number is a name only


def test_grpo_divides_by_what_it_is_told():
    for settings in ({"scale": "batch"}, {"eps": 0.3}, {"scale": "batch", "eps": 1e-4}):
        wanted = [written_out("grpo", i, **settings) for i in range(12)]
        assert of_groups("grpo", **settings) == pytest.approx(wanted, rel=1e-12)
        assert of_groups("grpo") != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", GROUP_RELATIVE)
@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e8 + 0.1, -7.7])
def test_equal_scores_are_advantages_of_exactly_nothing(name, score):
    """The mean of three 0.1 is not 0.1, and the rest over eps would be a signal made of rounding."""
    assert sum([0.1] * 3) / 3 != 0.1
    assert of_groups(name, scores=[score] * 3, groups=[0] * 3) == [0.0] * 3
    found = of_groups(name, scores=[score] * 3 + [1.0, 2.0], groups=[4] * 3 + [5] * 2)
    assert found[:3] == [0.0] * 3 and found[3] < 0 < found[4]


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_a_group_of_one_is_refused(name):
    with pytest.raises(ValueError, match="group 5 has one response"):
        of_groups(name, scores=[1.0, 2.0, 3.0], groups=[4, 4, 5])


def test_the_names_of_the_setting_are_those_of_the_functions():
    assert tuple(estimators.OF_GROUPS) == GROUP_RELATIVE


REWARDS, BOUNDS = [0.1, -0.4, 2.0, -0.3, 0.7, 0.2], [0, 3, 4, 6]


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_reinforce_plus_plus_whitens_discounted_returns(gamma):
    advantage, returns = estimators.reinforce_plus_plus(
        torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(BOUNDS), gamma=gamma
    )
    wanted = [
        sum(gamma ** (k - t) * REWARDS[k] for k in range(t, end))
        for start, end in pairwise(BOUNDS) for t in range(start, end)
    ]  # fmt: skip
    assert returns.tolist() == pytest.approx(wanted, rel=1e-12)
    mean, std = statistics.fmean(wanted), statistics.pstdev(wanted)
    assert advantage.tolist() == pytest.approx([(w - mean) / math.sqrt(std**2 + 1e-8) for w in wanted], rel=1e-6)
    assert advantage.tolist() != pytest.approx(wanted, rel=0.1)


def test_the_score_less_the_penalty_to_come():
    found = estimators.score(torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(BOUNDS))
    assert found.tolist() == pytest.approx([1.7, 1.6, 2.0, -0.3, 0.9, 0.2], rel=1e-12)


def test_groups_whose_scores_are_all_equal_are_found():
    assert estimators.without_signal(torch.tensor(SCORES), torch.tensor(GROUPS)).tolist() == [1]
    scores = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0 + 1e-6])
    assert estimators.without_signal(scores, torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == [0, 1]


def test_figures_of_groups():
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 2.0], dtype=torch.float64)
    lengths, groups = torch.tensor([10.0, 30, 7, 9, 4, 4]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = group_metrics(scores, lengths, groups)
    assert found["groups_without_signal"] == pytest.approx(1 / 3)
    assert found["group_score_std"] == pytest.approx((1 + 0 + 1) / 3)
    # Score less its group's mean: -1 1 0 0 -1 1; length -10 10 -1 1 0 0.
    assert found["group_length_correlation"] == pytest.approx(20 / math.sqrt(4 * 202))
    # Between groups longer prompts' answers may score higher without any of that.
    assert group_metrics(torch.tensor([1.0, 1, 2, 2]), torch.tensor([5.0, 5, 9, 9]), torch.tensor([0, 0, 1, 1])) == {
        "groups_without_signal": 1.0, "group_score_std": 0.0, "group_length_correlation": 0.0
    }  # fmt: skip
