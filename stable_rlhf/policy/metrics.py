"""What one PPO step's rollouts say, as means and extremes over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

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
    tokens.
    """
    scores = [e.raw_score for e in experiences]
    lengths = [len(e.encoded.response) for e in experiences]
    kl = [float((e.old_logprob - e.ref_logprob).sum()) for e in experiences]
    gap = logprob_gap(experiences).abs()
    n, score, squares, length, length_squares, both, kl_sum, finished, seen, gold, gaps, gap_sum = sum_over_ranks(
        [
            len(scores), sum(scores), sum(s * s for s in scores), sum(lengths), sum(k * k for k in lengths),
            sum(s * k for s, k in zip(scores, lengths, strict=True)), sum(kl), sum(r.finished for r in rollouts),
            sum(len(e.encoded) for e in experiences), sum(golds), len(gap), float(gap.sum()),
        ]
    )  # fmt: skip
    (largest,) = max_over_ranks([float(gap.max()) if len(gap) else 0.0])
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
        "logprob_gap_max": largest,
    }
    return metrics | ({"gold": gold / n} if golds else {}), seen
