"""`grad_scale`: the loss scale of float16 training is in the gradients before float16 rounds them."""

from __future__ import annotations

import pytest
import torch

import stable_rlhf.ops as ops

SCALE = 65536.0


def call(
    dtype: torch.dtype, backend: str, weighted: bool, **options
) -> tuple[ops.PolicyLossOutput, list[torch.Tensor]]:
    """The loss of 96 mixed rows, each worth a ten-millionth of it, and its gradients times SCALE."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(96, 32, generator=g).half(), (0.3 * torch.randn(700, 32, generator=g)).half()
    target, kind = torch.randint(700, (96,), generator=g), torch.randint(3, (96,), generator=g)
    old, advantage = torch.randn(2, 96, generator=g)
    row_weight = torch.rand(96, generator=g) if weighted else None
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    with ops.backend(backend):
        output = ops.linear_policy_loss(
            *leaves, target, kind, old_logprob=old - 8, advantage=advantage, row_weight=row_weight,
            policy_denominator=1e7, rehearsal_denominator=torch.tensor(1e7), **options,
        )  # fmt: skip
    (output.loss * SCALE).backward()
    return output, [x.grad for x in leaves]


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_small_gradients_survive_float16(backend, weighted):
    exact, want = call(torch.float64, "torch", weighted)
    scaled, found = call(torch.float16, backend, weighted, grad_scale=SCALE)
    assert max(map(error, found, want)) < 2e-3
    for name, value in exact.metrics.items():  # are as without a scale
        torch.testing.assert_close(scaled.metrics[name].double(), value.double(), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(scaled.loss.double(), exact.loss, rtol=2e-3, atol=1e-9)
    if backend == "cpu":  # which makes gradients along with the loss
        assert max(map(error, call(torch.float16, backend, weighted)[1], want)) > 0.1


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "given",
    [
        {"row_weight": torch.tensor([2.0, 5.0])}, {"row_weight": torch.tensor([[2.0], [5.0]])},
        {"policy_denominator": torch.tensor([2.0, 5.0])}, {"rehearsal_denominator": torch.tensor([[2], [5]])},
        {"row_weight": torch.ones(2, 3, dtype=torch.float16)},
    ],
    ids=["weights", "column", "denominators", "rehearsal", "16 bits"],
)  # fmt: skip
def test_one_number_a_sequence_is_scaled_with_its_rows(backend, given):
    g = torch.Generator().manual_seed(8)
    hidden, weight = torch.randn(2, 3, 8, generator=g), torch.randn(20, 8, generator=g)
    target, kind = torch.randint(0, 20, (2, 3), generator=g), torch.tensor([[1, 2, 1], [2, 1, 0]])
    advantage, old = torch.randn(2, 3, generator=g), -3 + 0.1 * torch.randn(2, 3, generator=g)
    found = []
    for scale in (1.0, 2.0**17):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with ops.backend(backend):
            out = ops.linear_policy_loss(
                *leaves, target, kind, advantage=advantage, old_logprob=old, grad_scale=scale, **given
            )
        (out.loss * scale).backward()
        found.append([out.loss.detach(), *(x.grad / scale for x in leaves), *out.metrics.values()])
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)


def test_a_power_of_two_changes_no_bit_of_float32():
    plain, gradients = call(torch.float32, "cpu", False)
    scaled, found = call(torch.float32, "cpu", False, grad_scale=SCALE)
    assert torch.equal(plain.loss, scaled.loss) and all(map(torch.equal, gradients, found))
    assert all(torch.equal(value, scaled.metrics[name]) for name, value in plain.metrics.items())


@pytest.mark.parametrize("scale", [0.0, -2.0, float("inf"), float("nan")])
def test_a_scale_must_be_a_positive_number(scale):
    with pytest.raises(ValueError, match=r"grad_scale: .* is not a positive number"):
        call(torch.float32, "cpu", False, grad_scale=scale)
