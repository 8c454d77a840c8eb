"""Sampling the compared policies on the evaluation sets and judging them against SFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stable_rlhf.data.records import PromptRow
from stable_rlhf.evaluate.judge import Judge, PairJudge, compare
from stable_rlhf.models.features import share_lower
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import length_batches
from stable_rlhf.models.views import summed_log_ratio, view
from stable_rlhf.rollout.local import Rollout


@torch.no_grad()
def mean_kl(policy: PolicyModel, reference: PolicyModel, rollouts: Sequence[Rollout]) -> float:
    """Mean over responses of Σ_t log π(y_t) − log π_init(y_t), nats. For sampled responses this estimates the KL; for
    greedy ones it is the log-ratio along the mode."""
    total = 0.0
    shared = share_lower(policy.trunk, reference.trunk)
    for rows in length_batches([len(r.encoded) for r in rollouts], policy.trunk.batch_tokens):
        chunk = [rollouts[i].encoded for i in rows]
        by_reference = None if shared else view(reference.trunk, chunk)
        total += summed_log_ratio(policy, reference, view(policy.trunk, chunk), by_reference)
    return total / len(rollouts)


def against(
    judge: Judge | PairJudge,
    rows: Sequence[PromptRow],
    rollouts: Sequence[Rollout],
    reference: Sequence[Rollout],
    *,
    tie_margin: float,
    kl: float | None = None,
) -> dict[str, Any]:
    """Win, lose and tie of one policy against SFT on one evaluation set."""
    lengths = [len(r.encoded.response) for r in rollouts]
    return compare(
        judge, rows, [r.text for r in rollouts], [r.text for r in reference], tie_margin, kl=kl, lengths=lengths
    )
