"""The derivatives of the policy loss by log-prob and entropy, which split vocabularies take, against autograd's."""

from __future__ import annotations

import pytest
import torch

from helpers.policy_cases import CONFIGS as SHARED
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.policy import formula
from stable_rlhf.ops.policy.types import PolicyCall

CONFIGS = {
    "plain": PolicyLossConfig(),
    "dual clip": PolicyLossConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.2),
    "k1": PolicyLossConfig(kl_coef=0.2, kl_estimator="k1"),
    "k2": PolicyLossConfig(kl_coef=0.3, kl_estimator="k2"),
    **SHARED,
    "everything": PolicyLossConfig(0.15, 0.25, 1.3, 0.2, "k3", 0.1, 0.5, 2.0, 1.0),
}


@pytest.mark.filterwarnings("ignore:kl_estimator")
@pytest.mark.parametrize("entropy_denominator", [None, 3.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_coefficients_are_the_derivatives_of_the_loss(name, entropy_denominator):
    g = torch.Generator().manual_seed(2)
    kind, target = torch.randint(0, 3, (60,), generator=g), torch.randint(0, 9, (60,), generator=g)
    per_row = {
        key: torch.randn(60, generator=g, dtype=torch.float64)
        for key in ("old_logprob", "advantage", "ref_logprob", "row_weight")
    }
    call = PolicyCall(
        torch.zeros(60, 9), None, None, target, 1.0, CONFIGS[name], kind, **per_row, policy_denominator=7.0,
        entropy_denominator=entropy_denominator,
    )  # fmt: skip
    rows = formula.select_rows(call, 9)
    terms = formula.gather_terms(rows, call, torch.float64)
    logprob = terms.old_logprob + 0.5 * torch.randn(len(rows.kind), generator=g, dtype=torch.float64)
    logprob[:2] += torch.tensor([30.0, -30.0])  # past the clamp
    leaves = [logprob.requires_grad_(), torch.rand(len(rows.kind), dtype=torch.float64).requires_grad_()]
    loss = formula.total_loss(rows, *leaves, terms, CONFIGS[name]).loss
    want = torch.autograd.grad(loss, leaves, allow_unused=True)
    got = formula.coefficients(rows.kind, logprob.detach(), terms, CONFIGS[name])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)
