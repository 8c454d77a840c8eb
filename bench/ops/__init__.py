"""What prepares a case, by operation. A new one is a file here, a line of the table and its cases in presets.py."""

from __future__ import annotations

from bench.case import Prepare
from bench.ops import advantage, contrastive, kmeans, policy, sequence, update

OPERATIONS: dict[str, Prepare] = {
    "policy": policy.prepare_linear,
    "logprob": policy.prepare_linear,
    "logprob-grad": policy.prepare_linear,
    "logits": policy.prepare_logits,
    "advantage": advantage.prepare,
    "info-nce": contrastive.prepare,
    "swav": contrastive.prepare,
    "gae": sequence.prepare,
    "token_rewards": sequence.prepare,
    "masked_whiten": sequence.prepare,
    "topk": sequence.prepare,
    "kmeans": kmeans.prepare,
    "ppo-update": update.prepare,
    "scorer-update": update.prepare,
}
