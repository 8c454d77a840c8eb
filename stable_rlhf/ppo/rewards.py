"""From scored rollouts to per-token rewards, advantages and returns (Eq. 2 and GAE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_rlhf import ops
from stable_rlhf.data.packing import Encoded


@dataclass
class Experience:
    """One rollout with all that an update needs; per-token tensors are float32 [response tokens] on the CPU."""

    encoded: Encoded
    score: float
    old_logprob: Tensor
    ref_logprob: Tensor
    value: Tensor
    features: Tensor | None = None
    advantage: Tensor | None = None
    returns: Tensor | None = None


class RunningMoments:
    """Mean and standard deviation of every score seen so far (Chan's parallel update), over all ranks.

    "RM with moving average" normalises scores with these before PPO sees them."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0.0, 0.0, 0.0

    def update(self, count: float, total: float, squares: float) -> None:
        """Add a batch given by its count, sum and sum of squares."""
        if count == 0:
            return
        mean = total / count
        m2 = max(0.0, squares - count * mean * mean)
        delta, together = mean - self.mean, self.count + count
        self.m2 += m2 + delta * delta * self.count * count / together
        self.mean += delta * count / together
        self.count = together

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count) if self.count else 1.0

    def normalise(self, score: float) -> float:
        return (score - self.mean) / max(self.std, 1e-4)


def add_advantages(
    experiences: Sequence[Experience],
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    group: Any = None,
) -> None:
    """Fill in ``advantage`` and ``returns``.

    Reward of a token: −β · (log π_old − log π_init); the score is added at the response's last token (EOS when the
    response has one), never after it. Advantages by GAE, whitened over all ranks' valid tokens; returns are not.
    """
    lengths = [len(e.encoded.response) for e in experiences]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    value = torch.cat([e.value for e in experiences])
    reward = ops.token_rewards(
        torch.cat([e.old_logprob for e in experiences]),
        torch.cat([e.ref_logprob for e in experiences]),
        torch.tensor([e.score for e in experiences]),
        cu_seqlens, kl_coef=kl_coef, kl_estimator=kl_estimator,
    )  # fmt: skip
    advantage, returns = ops.gae(reward, value, cu_seqlens, gamma=gamma, lam=lam)
    if whiten:
        advantage = ops.masked_whiten(advantage, group=group)
    for experience, a, r in zip(experiences, advantage.split(lengths), returns.split(lengths), strict=True):
        experience.advantage, experience.returns = a, r
