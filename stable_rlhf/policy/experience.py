"""From scored rollouts to per-token rewards, advantages and returns (Eq. 2 and GAE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stable_rlhf import ops
from stable_rlhf.data.encoding import Encoded
from stable_rlhf.policy import estimators
from stable_rlhf.ranks import sum_over_ranks

_GROWN, _ROUNDING = 10.0, 1e-5  # times that a gap may grow; the nats of float32's rounding, of many tokens


@dataclass(frozen=True)
class Experience:
    """One rollout with all that an update needs; per-token tensors are float32 [response tokens] on the CPU.

    ``score`` is the scorer's until advantages are made; then it is what they were made of, and ``raw_score`` the
    scorer's. ``old_logprob`` is the trainer's own, ``rollout_logprob`` what the rollout engine said when it drew the
    token. Where ``on_policy``, nobody asks for ``old_logprob`` before the one update that this rollout gets, whose own
    forward fills it in: not a number until then."""

    encoded: Encoded
    score: float
    old_logprob: Tensor
    ref_logprob: Tensor
    value: Tensor
    rollout_logprob: Tensor | None = None
    features: Tensor | None = None
    advantage: Tensor | None = None
    returns: Tensor | None = None
    raw_score: float = math.nan
    on_policy: bool = False


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


def with_advantages(
    experiences: Sequence[Experience],
    *,
    kl_coef: float,
    estimator: str = "gae",
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    group: Any = None,
    device: torch.device | str = "cpu",
) -> list[Experience]:
    """The same experiences, with ``advantage`` and ``returns`` of every token.

    Reward of a token: −β · (log π_old − log π_init); the score is added at the response's last token (EOS when the
    response has one), never after it. Advantages by GAE, or without a critic by `estimators.score` or
    `estimators.reinforce_plus_plus`, whitened over all ranks' valid tokens; returns are not.

    Args:
        estimator: ``gae``, ``score`` or ``reinforce_plus_plus``, which is whitened whatever ``whiten`` says.
        group: The ranks to whiten over; None: this process alone.
        device: Where to whiten; the group's backend has to serve it (NCCL sums on GPUs alone).
    """
    reward, cu_seqlens = _rewards(experiences, kl_coef, kl_estimator)
    if estimator == "reinforce_plus_plus":
        advantage, returns = estimators.reinforce_plus_plus(
            reward, cu_seqlens, gamma=gamma, group=group, device=device
        )  # fmt: skip
    else:
        if estimator == "score":
            advantage = returns = estimators.score(reward, cu_seqlens)
        else:
            value = torch.cat([e.value for e in experiences])
            advantage, returns = ops.gae(reward, value, cu_seqlens, gamma=gamma, lam=lam)
        if whiten:
            advantage = ops.masked_whiten(advantage.to(device), group=group).cpu()
    lengths = [len(e.encoded.response) for e in experiences]
    parts = zip(experiences, advantage.split(lengths), returns.split(lengths), strict=True)
    return [replace(experience, advantage=a, returns=r) for experience, a, r in parts]


def scores_less_kl(experiences: Sequence[Experience], kl_coef: float, kl_estimator: str = "k1") -> list[float]:
    """Each response's score, less the KL penalty of its tokens: the sum of their rewards."""
    if not kl_coef:
        return [e.score for e in experiences]
    penalties, _ = _rewards([replace(e, score=0.0) for e in experiences], kl_coef, kl_estimator)
    parts = penalties.double().split([len(e.encoded.response) for e in experiences])
    return [e.score + float(part.sum()) for e, part in zip(experiences, parts, strict=True)]


def with_one_advantage(experiences: Sequence[Experience], advantages: Sequence[float]) -> list[Experience]:
    """The same experiences, every token of a response with its response's advantage."""
    return [
        replace(e, advantage=torch.full_like(e.old_logprob, a), returns=torch.full_like(e.old_logprob, a))
        for e, a in zip(experiences, advantages, strict=True)
    ]


def _rewards(experiences: Sequence[Experience], kl_coef: float, kl_estimator: str) -> tuple[Tensor, Tensor]:
    """Every token's reward [T], and where responses begin and end in it [B + 1]."""
    lengths = [len(e.encoded.response) for e in experiences]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)
    reward = ops.token_rewards(
        torch.cat([e.old_logprob for e in experiences]),
        torch.cat([e.ref_logprob for e in experiences]),
        torch.tensor([e.score for e in experiences], dtype=torch.float32, device="cpu"),
        cu_seqlens, kl_coef=kl_coef, kl_estimator=kl_estimator,
    )  # fmt: skip
    return reward, cu_seqlens


def logprob_gap(experiences: Sequence[Experience]) -> Tensor:
    """log π_trainer − log π_rollout of every response token that both know: [tokens]. Zero but for rounding when the
    engine that sampled computes what the trainer computes."""
    known = [e.old_logprob - e.rollout_logprob for e in experiences if e.rollout_logprob is not None]
    return torch.cat(known) if known else torch.zeros(0, dtype=torch.float32, device="cpu")


def same_weights(experiences: Sequence[Experience], first: float | None) -> float:
    """The mean size of :func:`logprob_gap` over all ranks at the ``first`` step of a run, which is that of two kernels
    for the same weights (None: this is it).

    Raises:
        ValueError: it is more than ten times as much now: the engine that samples goes on with weights of the past. On
            every rank.
    """
    gap = logprob_gap(experiences).abs()
    total, tokens = sum_over_ranks([float(gap.sum()), len(gap)])
    mean = total / max(1.0, tokens)
    if first is None:
        return mean
    if not mean <= _GROWN * max(first, _ROUNDING):  # NaN neither
        raise ValueError(
            f"rollout.server: log-probs of trainer and server differed by {first:.2g} nats a token in the first step "
            f"and do by {mean:.2g} now, so the server has not taken up all of the new weights, whatever it answered. "
            "Where the model's head is tied, --hf-overrides '{\"tie_word_embeddings\": false}' may help a vLLM server. "
            "The same command goes on from the last snapshot"
        )
    return first


def corrected_for_rollouts(experiences: Sequence[Experience], clip: float) -> list[Experience]:
    """The same experiences, each token's advantage times min(π_trainer / π_rollout, ``clip``).

    Importance sampling, truncated (Ionides 2008): the tokens were drawn by the rollout engine, whose distribution is
    not quite the one that PPO's ratio starts from. The weights are constants; returns are left as they are."""

    def corrected(e: Experience) -> Experience:
        if e.rollout_logprob is None:
            return e
        assert e.advantage is not None
        return replace(e, advantage=e.advantage * (e.old_logprob - e.rollout_logprob).exp().clamp_max(clip))

    return [corrected(e) for e in experiences]
