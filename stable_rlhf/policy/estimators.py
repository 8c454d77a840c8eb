"""From scores to advantages, by the estimators that need no critic: pure functions, each with its formula.

A group are the responses to one prompt. Scores are one a response, [B]; ``groups`` are its group's number, [B]. Results
are float64, and exactly 0 where a group's scores are all equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stable_rlhf import ops


def grpo(scores: Tensor, groups: Tensor, *, scale: str = "group", eps: float = 1e-6) -> Tensor:
    """A_i = (s_i − mean of its group) / (standard deviation + eps), of the group or of the whole batch (over n − 1);
    arXiv 2402.03300."""
    apart, of_row, sizes = _from_mean(scores, groups)
    if scale == "batch":
        return apart / (scores.double().std() + eps)
    squares = apart.new_zeros(len(sizes)).index_add(0, of_row, apart.square())
    return apart / ((squares / (sizes - 1)).sqrt()[of_row] + eps)


def dr_grpo(scores: Tensor, groups: Tensor) -> Tensor:
    """A_i = s_i − mean of its group; arXiv 2503.20783."""
    return _from_mean(scores, groups)[0]


def rloo(scores: Tensor, groups: Tensor) -> Tensor:
    """A_i = s_i − mean of the others of its group = (s_i − mean of all G) · G / (G − 1); arXiv 2402.14740."""
    apart, of_row, sizes = _from_mean(scores, groups)
    return apart * (sizes / (sizes - 1))[of_row]


def reinforce_plus_plus(
    rewards: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, group: Any = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of tokens [T], R_t = Σ_{k≥t} gamma^(k−t) r_k, and A = R whitened over all tokens of all
    ranks of ``group``; arXiv 2501.03262. ``rewards``: the KL penalty at each token, the score at the last."""
    returns = discounted(rewards, cu_seqlens, gamma)
    return ops.masked_whiten(returns.to(device), group=group).cpu(), returns


def score(rewards: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Advantages of tokens [T]: the score, less the KL penalty from each token on. An Advantage Model's score is an
    advantage already (Eq. 8), nothing is left to subtract."""
    return discounted(rewards, cu_seqlens, 1.0)


def discounted(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    """Σ_{k≥t} gamma^(k−t) r_k within each sequence: what GAE gives where every value is 0 and lambda is 1."""
    return ops.gae(rewards, torch.zeros_like(rewards), cu_seqlens, gamma=gamma, lam=1.0)[0]


def without_signal(scores: Tensor, groups: Tensor) -> Tensor:
    """The groups whose scores are all equal, so that no advantage of theirs is other than 0, in ascending order."""
    found, of_row = groups.unique(return_inverse=True)
    low, high = (
        scores.new_zeros(len(found)).scatter_reduce(0, of_row, scores, way, include_self=False)
        for way in ("amin", "amax")
    )
    return found[low == high]


def _from_mean(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each score less its group's mean [B]; the place of its group among all [B], and their sizes, both as float64."""
    found, of_row, counts = groups.unique(return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        lonely = int(found[counts < 2][0])
        raise ValueError(f"groups: group {lonely} has one response, and its advantage is relative to others")
    scores, sizes = scores.double(), counts.double()
    # From one of the group's own scores: equal ones then differ by exactly 0, whatever a mean of them is rounded to.
    origin = scores.new_zeros(len(found)).scatter_reduce(0, of_row, scores, "amin", include_self=False)
    apart = scores - origin[of_row]
    mean = apart.new_zeros(len(found)).index_add(0, of_row, apart) / sizes
    return apart - mean[of_row], of_row, sizes


# By the names of ``ppo.advantage_estimator``.
OF_GROUPS: dict[str, Callable[..., Tensor]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
