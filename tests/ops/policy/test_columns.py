"""grad_tolerance: the bound holds for every row, and much is dropped where the softmax is peaked."""

from __future__ import annotations

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.policy import products

pytestmark = pytest.mark.skipif(extension() is None, reason="the C++ module is not installed")


def peaked(rows=300, vocabulary=4001, width=48, dtype=torch.float32, seed=0):
    """Hidden states whose softmax over a random head has most of its mass on few tokens, but not the same for each."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=g) / width**0.5
    target = torch.randint(0, 400, (rows,), generator=g)
    hidden = 22 * weight[target] + torch.randn(rows, width, generator=g)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "target": target,
        "kind": torch.randint(0, 3, (rows,), generator=g),
        "old_logprob": torch.full((rows,), -2.0),
        "advantage": torch.randn(rows, generator=g),
        "temperature": 0.7 + 0.6 * torch.rand(rows, generator=g),
        "config": PolicyLossConfig(rehearsal_coef=0.3, clip_high=2.0, clip_low=0.9),
    }


def gradients(call, **extra):
    call = dict(call)
    leaves = [call.pop(n).clone().requires_grad_() for n in ("hidden", "weight")]
    out = ops.linear_policy_loss(*leaves, call.pop("target"), **call, **extra)
    out.loss.backward()
    return out, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("tolerance", [2.0**-8, 1e-3, 0.05])
@pytest.mark.parametrize("softcap", [None, 60.0])
def test_the_documented_bound_holds_for_every_row(tolerance, softcap, monkeypatch):
    call = peaked()
    call["config"] = PolicyLossConfig(rehearsal_coef=0.3, clip_high=2.0, clip_low=0.9, softcap=softcap)
    exact, exact_hidden, _ = gradients(call)
    kept = []
    select = products.select_columns

    def spy(*args):
        found = select(*args)
        kept.append((found.columns.numel() * found.bounded.numel() + 4001 * found.dense.numel(), args[1].numel()))
        return found

    monkeypatch.setattr("stable_rlhf.ops.policy.fused.select_columns", spy)
    out, hidden, _ = gradients(call, grad_tolerance=tolerance)
    assert torch.equal(out.loss, exact.loss) and torch.equal(out.logprob, exact.logprob)
    # |c|: from the exact loss by autograd, row by row
    policy = call["kind"] == 1
    ratio = (exact.logprob - call["old_logprob"]).exp()
    free = policy & ~((call["advantage"] > 0) & (ratio > 3.0)) & ~((call["advantage"] < 0) & (ratio < 0.1))
    c = torch.where(free, call["advantage"].abs() * ratio / policy.sum(), 0.0)
    c = torch.where(call["kind"] == 2, 0.3 / (call["kind"] == 2).sum(), c)
    bound = tolerance * c / call["temperature"] * call["weight"].norm(dim=1).max()
    error = (hidden - exact_hidden).norm(dim=1)
    assert (error <= bound * 1.001 + 1e-6).all()
    assert error.max() > 0  # something was dropped
    assert sum(k for k, _ in kept) < 0.8 * 4001 * sum(m for _, m in kept)


@pytest.mark.parametrize("advantage", [0.0, 1e-45, 1e-40, 1e-37, 1e-30])
def test_a_row_of_next_to_no_weight_takes_no_columns_from_others(advantage):
    logits = torch.full((3, 64), -30.0)
    for row, (top, second, gap) in enumerate([(0, 5, -2.2), (1, 6, -2.2), (2, 3, 0.0)]):
        logits[row, top], logits[row, second] = 0.0, gap
    found = []
    for tolerance in (0.0, 1e-3):
        hidden, weight = logits.clone().requires_grad_(), torch.eye(64).requires_grad_()
        ops.linear_policy_loss(
            hidden, weight, torch.tensor([0, 1, 2]), advantage=torch.tensor([1.0, 1.0, advantage]),
            policy_denominator=1.0, grad_tolerance=tolerance,
        ).loss.backward()  # fmt: skip
        found.append(hidden.grad)
    assert ((found[0] - found[1]).abs().sum(1) <= 1e-3 * torch.tensor([1.0, 1.0, advantage]) + 1e-12).all()


def test_a_flat_softmax_drops_nothing():
    call = peaked()
    call["hidden"] = 0.01 * call["hidden"]
    _, hidden, weight = gradients(call)
    _, same_hidden, same_weight = gradients(call, grad_tolerance=2.0**-8)
    torch.testing.assert_close(hidden, same_hidden)
    torch.testing.assert_close(weight, same_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_gradient_at_a_time(dtype, needs):
    call = peaked(dtype=dtype)
    _, *both = gradients(call, grad_tolerance=0.01)
    leaves = [call.pop(n).requires_grad_(need) for n, need in zip(("hidden", "weight"), needs, strict=True)]
    ops.linear_policy_loss(*leaves, call.pop("target"), **call, grad_tolerance=0.01).loss.backward()
    for leaf, want, need in zip(leaves, both, needs, strict=True):
        assert torch.equal(leaf.grad, want) if need else leaf.grad is None


def test_entropy_bonus_is_measured_by_its_own_gradient():
    call = peaked()
    call["config"] = PolicyLossConfig(entropy_coef=0.5, rehearsal_coef=0.3)
    _, exact_hidden, _ = gradients(call)
    _, hidden, _ = gradients(call, grad_tolerance=2.0**-8)
    assert float((hidden - exact_hidden).norm() / exact_hidden.norm()) < 2 * 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpp_selection_is_what_it_says(dtype):
    g = torch.Generator().manual_seed(3)
    gradient = (torch.randn(17, 2053, generator=g) * 10 ** (-6 * torch.rand(2053, generator=g))).to(dtype)[:, :2051]
    scale, target = torch.rand(17, generator=g), torch.randint(0, 3000, (17,), generator=g)
    inverse = 1 / scale
    thresholds = torch.tensor([0.1, 1e-3, 1e-4])
    rows = torch.randperm(17, generator=g)
    share = gradient[rows].float().abs() * inverse[:, None]
    peaks = products._peaks(gradient, rows, inverse)
    torch.testing.assert_close(peaks, share.amax(0), rtol=1e-6, atol=0)
    masses = products._masses(gradient, rows, inverse, peaks, thresholds)
    torch.testing.assert_close(masses, share @ (peaks[:, None] < thresholds).float(), rtol=1e-5, atol=1e-7)
    selection = products.select_columns(gradient, rows, scale, target, 0.05)
    few = products.gather_columns(gradient, selection)
    assert torch.equal(few, gradient[selection.bounded][:, selection.columns]) and 0 < few.numel() < gradient.numel()


def test_a_workspace_of_one_row():
    call = peaked(rows=20, vocabulary=500)
    _, exact_hidden, exact_weight = gradients(call)
    _, hidden, weight = gradients(call, grad_tolerance=1e-9, workspace_bytes=1)
    for got, want in ((hidden, exact_hidden), (weight, exact_weight)):
        assert float((got - want).norm() / want.norm()) < 1e-5
