"""How far a policy has moved from SFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
