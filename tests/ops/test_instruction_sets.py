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


def whitened() -> torch.Tensor:
    return ops.masked_whiten(numbers(9, 301), torch.arange(9 * 301).view(9, 301) % 5 > 0)


OPS = [rewards, selected_columns, policy_rows, weights, swav, whitened]


@pytest.mark.parametrize("op", OPS)
def test_every_set_of_this_processor_agrees(op, monkeypatch):
    found = []
    for isa in ISAS:
        monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
        found.append(op())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    assert not math.isnan(float(found[0].sum()))


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.01}, {"softcap": 300.0}], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_whose_blocks_lie_far_apart(dtype, isa, options, monkeypatch):
    """The largest logit so far changes from block to block of 1,024 by more than exp can tell, up and down."""
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    up = torch.linspace(-400, 400, 5003) + numbers(5003)
    late, early = torch.full((2, 5003), -5.0).unbind()  # 25 below: float64 still tells 1 - p
    late[-1], early[0] = 20.0, 20.0
    peaked = numbers(5003)
    peaked[2047], peaked[2048] = 60.0, 60.0
    logits = torch.stack([up, up.flip(0), late, early, peaked, torch.zeros(5003)]).to(dtype)
    target = torch.tensor([5002, 4000, 5002, 1, 2048, 17])
    config = PolicyLossConfig(**options)
    given = {"advantage": torch.tensor([1.0, -1, 1, 0.1, 2, 1]), "config": config}

    def gradient(x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        ops.policy_loss(leaf, target, **given).loss.backward()
        assert leaf.grad is not None
        return leaf.grad.double()

    exact = gradient(logits.double())
    own = gradient(logits)
    with ops.backend("torch"):
        plain = gradient(logits)
    assert exact.abs().amax(1).min() > 0
    for row, (got, other, want) in enumerate(zip(own, plain, exact, strict=True)):
        error, allowed = ((x - want).norm() / want.norm() for x in (got, other))
        assert error <= 1.25 * allowed + 1e-6, (row, float(error), float(allowed))


@pytest.mark.parametrize("op", OPS)
def test_one_that_is_not_there_is_named_by_all(op, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match=r"STABLE_RLHF_CPU_ISA: no kernels for 'sse9' here, only for .*baseline"):
        op()
