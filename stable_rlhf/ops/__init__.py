"""The operations of the method: losses, log-probabilities, advantages and selection, on PyTorch tensors.

Each works alone, in any trainer; `backend` forces an implementation where the default by device is not wanted.
"""

from __future__ import annotations

from stable_rlhf.ops.advantage.loss import AdvantageLoss, AdvantageLossOutput, advantage_loss, advantage_score
from stable_rlhf.ops.backends import backend, backend_report
from stable_rlhf.ops.contrastive.info_nce import info_nce
from stable_rlhf.ops.contrastive.swav import swav_loss
from stable_rlhf.ops.memory import release_workspace
from stable_rlhf.ops.policy.loss import (
    PolicyHead,
    linear_logprob,
    linear_policy_loss,
    logprob_policy_loss,
    policy_loss,
)
from stable_rlhf.ops.policy.types import PolicyLossConfig, PolicyLossOutput
from stable_rlhf.ops.sequence import gae, masked_whiten, token_rewards
from stable_rlhf.ops.topk import topk_by_cluster

__all__ = [
    "AdvantageLoss",
    "AdvantageLossOutput",
    "PolicyHead",
    "PolicyLossConfig",
    "PolicyLossOutput",
    "advantage_loss",
    "advantage_score",
    "backend",
    "backend_report",
    "gae",
    "info_nce",
    "linear_logprob",
    "linear_policy_loss",
    "logprob_policy_loss",
    "masked_whiten",
    "policy_loss",
    "release_workspace",
    "swav_loss",
    "token_rewards",
    "topk_by_cluster",
]
