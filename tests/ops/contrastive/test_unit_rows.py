"""Rows over their lengths: the C++ form against float64, and against plain PyTorch where that is the rule."""

from __future__ import annotations

import pytest
import torch

from helpers.interpreter import ISAS
from stable_rlhf import ops
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.contrastive import unit_rows as module
from stable_rlhf.ops.contrastive.unit_rows import unit_rows

TYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ module was not built")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", request.param)


def with_gradient(x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    unit = unit_rows(leaf, "x")
    unit.backward(upstream.to(unit.dtype))
    assert leaf.grad is not None and leaf.grad.dtype == x.dtype
    return unit.detach(), leaf.grad


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (4, 33), (2, 1024), (7, 2500), (600, 96), (0, 5)], ids=str)
def test_no_further_from_float64_than_plain_pytorch(shape, dtype, isa):
    g = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=g) * torch.logspace(-4, 4, shape[0])[:, None]).to(dtype)
    upstream = torch.randn(shape, generator=g)
    exact = with_gradient(x.double(), upstream.double())
    own = with_gradient(x, upstream)
    with ops.backend("torch"):
        plain = with_gradient(x, upstream)
    for name, got, other, want in zip(("unit", "gradient"), own, plain, exact, strict=True):
        scale = want.abs().amax(1, keepdim=True).clamp(min=1e-300)
        error, allowed = (((y.double() - want) / scale).abs() for y in (got, other))
        # Several last digits, for rounding has its own luck element by element.
        rounding = torch.finfo(torch.float32 if name == "unit" else dtype).eps
        assert not got.numel() or error.max() <= 1.25 * allowed.max() + 2 * rounding, name


def test_rows_of_any_size_and_of_none(isa):
    largest, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    x = torch.zeros(6, 11)
    x[0, 3], x[1, 10], x[2], x[3, 0], x[4, 1] = largest, tiny, largest, tiny / 2, -1e-30
    unit, gradient = with_gradient(x, torch.ones_like(x))
    assert unit[0, 3] == 1 and unit[1, 10] == 1 and unit[4, 1] == -1
    torch.testing.assert_close(unit[2], torch.full((11,), 11**-0.5))
    assert not unit[3].any() and not unit[5].any() and not gradient[3].any() and not gradient[5].any()
    assert gradient[0, 3] == 0 and gradient.isfinite().all() and gradient[4, 0] == pytest.approx(1e30)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 9, 16, 19])
def test_what_is_not_finite_is_named(value, place, isa):
    x = torch.ones(3, 20)
    x[1, place] = value
    with pytest.raises(ValueError, match=f"rows: non-finite value .* at position {20 + place}$"):
        unit_rows(x, "rows")


def test_the_bits_do_not_depend_on_threads_and_strides():
    # Small loops, of less than 200,000 values, stay on one thread.
    x = torch.randn(16_384, 200, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(16_384, 200, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradient(x, upstream)
        torch.set_num_threads(3)
        shared = extension().shared_loops()
        three = with_gradient(x.T.contiguous().T, upstream.T.contiguous().T)
    finally:
        torch.set_num_threads(threads)
    assert extension().shared_loops() == shared + 2, "the rows and their gradient"
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_second_derivatives_stay_and_float64_is_pytorchs(monkeypatch):
    def refused(*_):
        raise AssertionError("C++ for what it cannot do")

    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    narrow = x.detach().float().requires_grad_()
    first = torch.autograd.grad(unit_rows(narrow, "x").pow(3).sum(), narrow, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), narrow)[0]
    monkeypatch.setattr(module, "_compiled", refused)
    monkeypatch.setattr(module, "_compiled_backward", refused)
    wide = torch.autograd.grad(unit_rows(x, "x").pow(3).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(second.double(), torch.autograd.grad(wide.square().sum(), x)[0], rtol=1e-4, atol=1e-5)
