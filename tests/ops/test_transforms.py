"""Second derivatives, forward mode, torch.func: right, or one clear error; never a silent 0."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import stable_rlhf.ops as ops
from helpers.every_op import CASES, run
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.contrastive.unit_rows import unit_rows

cpp = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
LOSSES = [name for name, case in CASES.items() if case.losses]
DATA = [name for name, case in CASES.items() if not case.losses]


class Subclass(torch.Tensor):
    """A type of its own, as libraries make them."""


def total(name):
    """The sum of a case's differentiable outputs, in float64."""
    case = CASES[name]
    return lambda *leaves: sum(x.double().sum() for x in case.call(*leaves)[: max(case.losses, 1)])


def penalty(name, kind=torch.Tensor):
    """Gradients of a gradient penalty, which are second derivatives."""
    leaves = [leaf.clone().as_subclass(kind).requires_grad_() for leaf in CASES[name].leaves]
    first = torch.autograd.grad(total(name)(*leaves) ** 2, leaves, create_graph=True)
    sum(x.square().sum() for x in first).backward()
    return [leaf.grad for leaf in leaves]


IN_PYTORCH = ("linear_logprob in float64", "logprob_policy_loss")  # on every backend


@cpp
@pytest.mark.parametrize("kind", [torch.Tensor, Subclass])
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives(name, kind):
    with ops.backend("torch"):
        want = penalty(name)
    with ops.backend("cpu"):
        if name not in ("advantage_score", *IN_PYTORCH):  # a score is linear
            with pytest.raises(RuntimeError, match=f"{CASES[name].op}: no second derivatives; call backward without"):
                penalty(name, kind)
            return
        for got, expected in zip(penalty(name, kind), want, strict=True):
            torch.testing.assert_close(torch.Tensor(got.detach()), expected)


def test_second_derivatives_of_rows_over_their_lengths():
    g = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(3, 4, generator=g, dtype=torch.float64, device="cpu", requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: unit_rows(x, "x"), (x,))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=cpp)])
@pytest.mark.parametrize("name", LOSSES)
def test_many_upstream_gradients_at_once(name, backend):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them: by vmap over the backward pass."""
    with ops.backend(backend):
        leaves = [leaf.clone().requires_grad_() for leaf in CASES[name].leaves]
        loss = total(name)(*leaves)
        upstream = torch.tensor([1.0, -3.0], dtype=loss.dtype, device="cpu")
        both = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
        one = torch.autograd.grad(loss, leaves)
    for got, want in zip(both, one, strict=True):
        torch.testing.assert_close(got, torch.stack([want, -3.0 * want]))


@pytest.fixture(autouse=True)
def pytorch_alone(monkeypatch):
    """ZeRO-3 puts a function of its own, without a forward mode, in the place of F.linear for the rest of a process:
    that of a test that ran before, it may be."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_reverse_mode_agree(name):
    leaves, g = CASES[name].leaves, torch.Generator(device="cpu").manual_seed(1)
    tangents = [torch.randn(x.shape, generator=g, dtype=torch.float32, device="cpu").to(x.dtype) for x in leaves]
    with ops.backend("torch"):
        gradients = run(CASES[name])[-len(leaves) :]  # of twice the sum
    want = sum((0.5 * gradient.double() * t.double()).sum() for gradient, t in zip(gradients, tangents, strict=True))
    half = leaves[0].dtype == torch.bfloat16
    tolerance = {"rtol": 0.02, "atol": 1e-3} if half else {"rtol": 1e-4, "atol": 1e-5}
    f = total(name)
    torch.testing.assert_close(torch.func.jvp(f, leaves, tuple(tangents))[1], want, **tolerance)
    with forward_ad.dual_level():
        dual = f(*map(forward_ad.make_dual, leaves, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want, **tolerance)
    for got, gradient in zip(torch.func.grad(f, tuple(range(len(leaves))))(*leaves), gradients, strict=True):
        torch.testing.assert_close(2.0 * got, gradient, **tolerance)


@pytest.mark.parametrize("name", DATA)
def test_results_that_are_data_have_no_derivative(name):
    f, leaves = total(name), CASES[name].leaves
    if name != "topk_by_cluster":  # indices
        assert not torch.func.grad(f)(*leaves).any()
    value, tangent = torch.func.jvp(f, leaves, tuple(map(torch.ones_like, leaves)))
    assert not tangent.any()
    torch.testing.assert_close(value, f(*leaves))


@cpp
@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PYTORCH])
def test_a_backend_without_transforms_says_so(name):
    with (
        ops.backend("cpu"),
        pytest.raises(RuntimeError, match=f"{CASES[name].op}: backend 'cpu' cannot run: it has no"),
    ):
        torch.func.grad(total(name))(*CASES[name].leaves)


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_refused_by_name(name):
    leaves = [torch.stack([leaf, leaf]) for leaf in CASES[name].leaves]
    for f in (total(name), torch.func.grad(total(name))):
        with pytest.raises(ValueError, match=r"^\w+: inside torch.vmap, which the operations do not take"):
            torch.vmap(f)(*leaves)
