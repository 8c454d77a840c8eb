"""STABLE_RLHF_CPU_ISA reaches every operation whose kernels are compiled for several instruction sets."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="the C++ module is not installed")
ISAS = extension().isa_names() if extension() is not None else []


def numbers(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def rewards() -> torch.Tensor:
    logprob, limits = numbers(2, 61, scale=0.7), torch.tensor([0, 30, 61])
    return ops.token_rewards(*logprob, torch.ones(2), limits, kl_coef=0.1, kl_estimator="k3")


def selected_columns() -> torch.Tensor:
    weight = numbers(700, 48).div(48**0.5)
    hidden = (22 * weight[:40]).requires_grad_()
    config = PolicyLossConfig(rehearsal_coef=1.0)
    kind = torch.full((40,), 2)
    ops.linear_policy_loss(hidden, weight, torch.arange(40), kind, config=config, grad_tolerance=2**-8).loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def policy_rows() -> torch.Tensor:
    config = PolicyLossConfig(rehearsal_coef=1.0)
    return ops.policy_loss(numbers(9, 301), torch.arange(9), torch.full((9,), 2), config=config).logprob


def weights() -> torch.Tensor:
    logprob, limits = numbers(62, scale=0.1), torch.tensor([0, 10, 30, 40, 62])
    alternates = logprob + numbers(2, 62, scale=0.3)
    score = numbers(4).requires_grad_()
    ops.advantage_loss(score, margin=None, logprob=logprob, alt_logprob=alternates, cu_seqlens=limits).loss.backward()
    assert score.grad is not None
    return score.grad


def swav() -> torch.Tensor:
    return ops.swav_loss(*numbers(2, 24, 16), numbers(10, 16))


OPS = [rewards, selected_columns, policy_rows, weights, swav]


@pytest.mark.parametrize("op", OPS)
def test_every_set_of_this_processor_agrees(op, monkeypatch):
    found = []
    for isa in ISAS:
        monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
        found.append(op())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    assert not math.isnan(float(found[0].sum()))


@pytest.mark.parametrize("op", OPS)
def test_one_that_is_not_there_is_named_by_all(op, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match=r"STABLE_RLHF_CPU_ISA: no kernels for 'sse9' here, only for .*baseline"):
        op()
