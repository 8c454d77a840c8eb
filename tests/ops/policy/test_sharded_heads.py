"""The head over several ranks: a split vocabulary, and weights that ZeRO-3 or FSDP2 shard."""

from __future__ import annotations

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_ranks
from stable_rlhf.ops import PolicyHead


@pytest.mark.parametrize("what", ["split", "fsdp", *(pytest.param(stage, marks=pytest.mark.slow) for stage in "13")])
def test_two_ranks_equal_one(what):
    run_ranks("split_worker", what, ranks=2)


def test_the_head_shares_its_linear_layers_weight():
    linear = torch.nn.Linear(4, 9)
    head = PolicyHead.from_linear(linear)
    hidden, target = torch.randn(3, 4), torch.tensor([0, 8, -100])
    assert head.weight is linear.weight and torch.equal(head(hidden), linear(hidden))
    head(hidden, target, torch.tensor([2, 2, 0])).loss.backward()
    assert linear.weight.grad is not None and linear.bias.grad is not None
    logprob, _ = head(hidden, target, loss=False)
    want, _ = ops.linear_logprob(hidden, linear.weight, target, bias=linear.bias)
    assert torch.equal(logprob, want)
    with pytest.raises(ValueError, match="kind"):
        head(hidden, target, torch.ones(3), loss=False)
