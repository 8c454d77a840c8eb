"""Bad input to the policy losses: one error each, which names the argument."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig


def arguments(**changes):
    base = {
        "hidden": torch.randn(4, 3),
        "weight": torch.randn(5, 3),
        "target": torch.tensor([0, 1, 4, -100]),
        "kind": torch.tensor([1, 2, 1, 0]),
        "old_logprob": torch.zeros(4),
        "advantage": torch.ones(4),
    }
    base.update(changes)
    return base


BAD = [
    ({"hidden": torch.randn(4, 2)}, ValueError, "weight: shape"),
    ({"hidden": [1.0]}, ValueError, "hidden: expected a tensor"),
    ({"hidden": torch.ones(4, 3, dtype=torch.int64)}, ValueError, "hidden: type int64"),
    ({"weight": torch.randn(5, 3, dtype=torch.float64)}, ValueError, "weight: type float64"),
    ({"weight": torch.randn(5)}, ValueError, "weight: shape"),
    ({"weight": torch.randn(5, 3, device="meta")}, ValueError, "weight: on device meta"),
    ({"bias": torch.randn(4)}, ValueError, "bias: shape"),
    ({"target": torch.tensor([0, 1, 4])}, ValueError, "target: shape"),
    ({"target": torch.tensor([0.0, 1.0, 4.0, 2.0])}, ValueError, "target: type float32"),
    ({"target": torch.tensor([0, 5, 4, -100])}, ValueError, "target: 5 at row 1"),
    ({"target": torch.tensor([-1, 1, 4, -100])}, ValueError, "target: -1 at row 0"),
    ({"kind": torch.tensor([1, 2, 3, 0])}, ValueError, "kind: 3 at row 2"),
    ({"kind": torch.tensor([1.0, 2.0, 1.0, 0.0])}, ValueError, "kind: 2.0 at row 1; a mask of floats"),
    ({"kind": torch.tensor([1, 2, 1])}, ValueError, "kind: shape"),
    ({"advantage": None}, ValueError, "advantage: required"),
    ({"advantage": torch.ones(3)}, ValueError, "advantage: shape"),
    ({"advantage": torch.tensor([1.0, 0.0, math.nan, 0.0])}, ValueError, "advantage: non-finite"),
    ({"old_logprob": torch.full((4,), -math.inf)}, ValueError, "old_logprob: non-finite"),
    ({"config": PolicyLossConfig(kl_coef=0.1)}, ValueError, "ref_logprob: required"),
    ({"row_weight": torch.full((4,), math.nan)}, ValueError, "row_weight: non-finite"),
    ({"temperature": 0.0}, ValueError, "temperature: 0.0"),
    ({"temperature": torch.tensor([1.0, 1.0, 0.0, 1.0])}, ValueError, "temperature: has values"),
    ({"temperature": torch.ones(3)}, ValueError, "temperature: shape"),
    ({"policy_denominator": 0.0}, ValueError, "policy_denominator: 0.0"),
    ({"rehearsal_denominator": torch.tensor([1.0, 2.0])}, ValueError, "rehearsal_denominator: shape"),
    ({"workspace_bytes": 0}, ValueError, "workspace_bytes: 0"),
    ({"hidden": torch.full((4, 3), math.inf)}, ValueError, "hidden, weight or bias: non-finite logits at row 0"),
    ({"grad_tolerance": 1.0}, ValueError, "grad_tolerance: 1.0 is outside"),
    ({"process_group": object()}, ValueError, "process_group: expected a torch.distributed process group"),
    ({"logits_dtype": torch.float64}, NotImplementedError, "logits_dtype=torch.float64: not yet"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        ops.linear_policy_loss(**arguments(**changes))


def test_one_infinite_logit_of_another_token_is_reported():
    logits = torch.zeros(2, 3)
    logits[1, 2] = -math.inf
    with pytest.raises(ValueError, match="logits: non-finite logits at row 1"):
        ops.policy_loss(logits, torch.tensor([0, 0]), torch.tensor([2, 2]))


@pytest.mark.parametrize(
    "field",
    ["clip_low", "clip_high", "dual_clip", "kl_coef", "kl_estimator", "entropy_coef", "rehearsal_coef", "softcap",
     "log_ratio_clamp"],
)  # fmt: skip
def test_bad_config(field):
    bad = {"kl_estimator": "k4", "clip_low": 1.5, "dual_clip": 1.0, "softcap": 0.0, "log_ratio_clamp": 0.0}
    with pytest.raises(ValueError, match=f"^{field}:"):
        PolicyLossConfig(**{field: bad.get(field, -math.inf)})
