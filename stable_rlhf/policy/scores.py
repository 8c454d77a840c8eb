"""The scorer's scores of rollouts, and what happens where one is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stable_rlhf.ranks import together
from stable_rlhf.rollout.local import Rollout
from stable_rlhf.scorer.model import AdvantageModel


def scores_or_nan(scorer: AdvantageModel, reward: Tensor, expected: Tensor | None) -> list[float]:
    """Scores from the scorer's rewards and expectations. Where one of these is not finite, which the operation would
    refuse on this rank alone, they are the rewards, and NaN in its place."""
    finite = torch.isfinite(reward) if expected is None else torch.isfinite(reward) & torch.isfinite(expected)
    if not finite.all():
        return torch.where(finite, reward, math.nan).tolist()
    return scorer.advantage(reward, expected).tolist()


def refuse_nonfinite(scores: Sequence[float], rollouts: Sequence[Rollout]) -> None:
    """Stop every rank where a score is not finite on one."""
    with together(ValueError):
        for score, rollout in zip(scores, rollouts, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"the scorer gave a score that is not finite to the response {rollout.text[:60]!r}; the policy's "
                    "weights are those of the step before. Are the scorer's own weights finite?"
                )


def less_penalty(scores: Sequence[float], rollouts: Sequence[Rollout], penalty: float) -> list[float]:
    """Scores, those of responses that did not end by themselves less ``penalty``."""
    return [s - (0.0 if r.finished else penalty) for s, r in zip(scores, rollouts, strict=True)]


def less_overlong(
    scores: Sequence[float], rollouts: Sequence[Rollout], longest: int, buffer: int, penalty: float
) -> list[float]:
    """Scores less DAPO's penalty of length (arXiv 2503.14476, eq. 13): 0 up to ``buffer`` tokens below ``longest``,
    from there in proportion up to ``penalty`` at ``longest``. No ``buffer``: the scores as they are."""
    if not buffer:
        return list(scores)
    beyond = [max(0, len(r.encoded.response) - (longest - buffer)) / buffer for r in rollouts]
    return [s - penalty * min(1.0, over) for s, over in zip(scores, beyond, strict=True)]
