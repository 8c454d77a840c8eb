"""What one PPO step's rollouts say, as means and extremes over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from stable_rlhf.policy.estimators import without_signal
from stable_rlhf.policy.experience import Experience, logprob_gap
from stable_rlhf.ranks import max_over_ranks, sum_over_ranks
from stable_rlhf.rollout.local import Rollout


def rollout_metrics(
    rollouts: Sequence[Rollout], experiences: Sequence[Experience], golds: Sequence[float] = ()
) -> tuple[dict[str, float], float]:
    """Figures of this step's responses, by the scorer's own scores, and the tokens of prompts and responses; ``golds``:
    the true scores, if known.

    ``kl``: mean over responses of Σ_t log π − log π_init, nats. ``score_length_correlation``: Pearson's, 0 where
    either is constant. ``logprob_gap`` and ``logprob_gap_max``: mean and largest |log π_trainer − log π_rollout| over
    tokens; ``rollout_ratio_max`` and ``rollout_ratio_min``: extremes of π_trainer / π_rollout.
    """
    scores = [e.raw_score for e in experiences]
    lengths = [len(e.encoded.response) for e in experiences]
    kl = [float((e.old_logprob - e.ref_logprob).sum()) for e in experiences]
    apart = logprob_gap(experiences)
    gap = apart.abs()
    n, score, squares, length, length_squares, both, kl_sum, finished, seen, gold, gaps, gap_sum = sum_over_ranks(
        [
            len(scores), sum(scores), sum(s * s for s in scores), sum(lengths), sum(k * k for k in lengths),
            sum(s * k for s, k in zip(scores, lengths, strict=True)), sum(kl), sum(r.finished for r in rollouts),
            sum(len(e.encoded) for e in experiences), sum(golds), len(gap), float(gap.sum()),
        ]
    )  # fmt: skip
    above, below = max_over_ranks([float(apart.max()), -float(apart.min())] if len(gap) else [-math.inf, -math.inf])
    above, below = (end if gaps else 0.0 for end in (above, below))
    score_std = max(0.0, squares / n - (score / n) ** 2) ** 0.5
    length_std = max(0.0, length_squares / n - (length / n) ** 2) ** 0.5
    together = both / n - score / n * length / n
    metrics = {
        "score": score / n,
        "score_std": score_std,
        "kl": kl_sum / n,
        "length": length / n,
        "finished": finished / n,
        "score_length_correlation": together / (score_std * length_std) if score_std * length_std > 1e-12 else 0.0,
        "logprob_gap": gap_sum / max(1.0, gaps),
        "logprob_gap_max": max(above, below),
        "rollout_ratio_max": _exp(above),
        "rollout_ratio_min": _exp(-below),
    }
    return metrics | ({"gold": gold / n} if golds else {}), seen


def group_metrics(scores: Tensor, lengths: Tensor, groups: Tensor) -> dict[str, float]:
    """Figures of groups, the responses to one prompt each; all three arguments are [B], of all ranks.

    ``groups_without_signal``: share of groups whose scores are all equal. ``group_score_std``: mean over groups of the
    scores' standard deviation. ``group_length_correlation``: Pearson's between score and length of the responses to
    one prompt, over all groups together (each less its group's mean), 0 where either is constant in every group.
    """
    score, length = _from_group_means(scores, groups), _from_group_means(lengths, groups)
    size = groups.bincount().double()
    spread = (score.new_zeros(len(size)).index_add(0, groups, score.square()) / size).sqrt()
    both = float(score.square().sum() * length.square().sum()) ** 0.5
    return {
        "groups_without_signal": len(without_signal(scores, groups)) / len(size),
        "group_score_std": float(spread.mean()),
        "group_length_correlation": float((score * length).sum()) / both if both > 1e-12 else 0.0,
    }


def _from_group_means(values: Tensor, groups: Tensor) -> Tensor:
    values = values.double()
    sums = values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)
    return values - (sums / groups.bincount())[groups]


def _exp(value: float) -> float:
    """e^value; infinite beyond what a float holds."""
    return math.inf if value >= 700 else math.exp(value)
