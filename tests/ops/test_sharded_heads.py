"""The head over several ranks: a split vocabulary, and weights that ZeRO-3 or FSDP2 shard."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyHead

WORKER = Path(__file__).with_name("split_worker.py")


@pytest.mark.parametrize("what", ["split", "fsdp", pytest.param("1", marks=pytest.mark.slow), "3"])
def test_two_ranks_equal_one(what):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | {"DS_ACCELERATOR": "cpu"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
        str(WORKER), what,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


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
