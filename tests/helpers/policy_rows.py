"""Rows for the Triton row kernel: logits, their state, what they are to become, and how near that results must come."""

from __future__ import annotations

import math

import torch

from helpers.policy_cases import naive_loss, relative
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.policy.formula import RowState, Terms


def make_rows(rows: int, vocabulary: int, config: PolicyLossConfig, dtype=torch.float32, seed=0, spread=3.0):
    """Logits [rows, vocabulary], an untouched state, kinds and terms."""
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary, generator=g)).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    inverse = 0.5 + torch.rand(rows, generator=g)
    here = torch.log_softmax(logits.float() * inverse[:, None], -1).gather(1, target[:, None])[:, 0]
    terms = Terms(
        old_logprob=here + 0.4 * torch.randn(rows, generator=g),
        advantage=torch.randn(rows, generator=g),
        ref_logprob=here + 0.4 * torch.randn(rows, generator=g) if config.kl_coef else None,
        row_weight=0.2 + torch.rand(rows, generator=g),
        policy_denominator=torch.tensor(3.7),
        rehearsal_denominator=torch.tensor(5.3),
    )
    kind = torch.randint(1, 3, (rows,), generator=g, dtype=torch.int8) if rows > 1 else torch.ones(1, dtype=torch.int8)
    return logits, new_state(target, inverse), kind, terms


def new_state(target, inverse):
    return RowState(target.clone(), inverse.clone(), *(torch.full_like(inverse, math.nan) for _ in range(6)))


def fresh(state: RowState) -> RowState:
    return new_state(state.target, state.inverse_temperature)


def exact(logits, state, kind, terms, config):
    """Log-probs, entropies and the gradient of the loss with respect to the logits, in float64."""
    leaf = logits.double().requires_grad_()
    zeros = torch.zeros(len(kind))
    loss, logprob, entropy, _ = naive_loss(
        leaf, state.target, kind, old=terms.old_logprob.double(), adv=terms.advantage.double(),
        ref=(zeros if terms.ref_logprob is None else terms.ref_logprob).double(), row_weight=terms.row_weight.double(),
        temperature=1.0 / state.inverse_temperature.double(), config=config,
        denominators=(float(terms.policy_denominator), float(terms.rehearsal_denominator)),
    )  # fmt: skip
    loss.backward()
    return torch.tensor(logprob).double(), torch.tensor(entropy).double(), leaf.grad


def check(state, gradient, want, order=None):
    """float32 results are right to 1e-5; 16-bit gradients as near as the exact one rounded, times 1.25."""
    logprob, entropy, exact_gradient = want
    torch.testing.assert_close(state.logprob.double(), logprob, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    if order is not None:
        dropped = torch.ones(len(logprob), dtype=torch.bool)
        dropped[order] = False
        assert order.unique().numel() == order.numel() and not exact_gradient[dropped].any()
        exact_gradient, gradient = exact_gradient[order], gradient[: order.numel()]
    rounding = relative(exact_gradient.to(gradient.dtype), exact_gradient)
    assert relative(gradient, exact_gradient) <= 1.25 * rounding + 1e-5
