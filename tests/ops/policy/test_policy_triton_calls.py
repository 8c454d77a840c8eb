"""Calls that a GPU's path of the policy losses has to take as the others do, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import interpreted, not_interpreted

pytest.importorskip("triton")
TARGET = torch.tensor([-100, 2, 3])


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


def both(call, **named):
    """The results of a call on the GPU's path and on the reference's."""
    found = []
    for name in ("triton", "torch"):
        with ops.backend(name):
            found.append(call(**named))
    return found


def from_logits(logits=None, target=TARGET, **options):
    logits = torch.linspace(-1, 1, 24).reshape(3, 8) if logits is None else logits
    leaf = logits.detach().requires_grad_()
    out = ops.policy_loss(leaf, target, advantage=torch.ones(len(logits)), **options)
    out.loss.backward()
    return out.loss.detach(), leaf.grad


@interpreted
def test_no_row_takes_part():
    hidden, weight = torch.randn(3, 16).half(), torch.randn(8, 16).half()
    with torch.no_grad():
        for out in both(
            ops.linear_policy_loss, hidden=hidden, weight=weight, target=torch.full((3,), -100), advantage=torch.ones(3)
        ):
            assert float(out.loss) == 0 and not out.logprob.any()


@interpreted
@pytest.mark.parametrize("begin", [0, 1, 3])
def test_hidden_states_that_begin_anywhere(begin):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(begin + 48, generator=g).half()[begin:].view(3, 16)
    weight = torch.randn(8, 16, generator=g).half()
    with torch.no_grad():
        got, want = both(ops.linear_policy_loss, hidden=hidden, weight=weight, target=TARGET, advantage=torch.ones(3))
    torch.testing.assert_close(got.logprob, want.logprob, rtol=2e-3, atol=2e-3)


@interpreted
def test_a_number_of_the_callers_default_type():
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = torch.linspace(-1, 1, 24, dtype=torch.float32).reshape(3, 8)
        ones = torch.ones(3, dtype=torch.float32)
        with ops.backend("triton"):
            out = ops.policy_loss(logits.requires_grad_(), TARGET, advantage=ones, policy_denominator=1001.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(out.loss.detach()) == pytest.approx(-2 / 1001, rel=1e-6)


@interpreted
def test_denominators_that_are_not_positive():
    for name, kind in (("policy_denominator", 1), ("rehearsal_denominator", 2)):
        with ops.backend("triton"), pytest.raises(ValueError, match=f"^{name}: 0.0 is not positive, and there are 2"):
            from_logits(kind=torch.full((3,), kind), **{name: 0.0})
        with ops.backend("triton"):  # of no row
            from_logits(kind=torch.full((3,), 3 - kind), **{name: 0.0})
    with ops.backend("triton"):  # of entropies that nobody asked for
        from_logits(entropy_denominator=0.0)


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"row_weight": torch.tensor([torch.nan, 1.0, 2.0])}, {"temperature": torch.tensor([0.0, 1.0, 0.5])},
        {"row_weight": torch.tensor([torch.inf, 1.0, 2.0]), "temperature": torch.tensor([torch.nan, 2.0, 1.0])},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_what_ignored_rows_hold_is_not_looked_at(options):
    (loss, gradient), (want, want_gradient) = both(from_logits, **options)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, want_gradient)
    bad = {name: value.flip(0) for name, value in options.items()}  # of rows that are not
    with ops.backend("triton"), pytest.raises(ValueError, match=f"^({'|'.join(options)}): "):
        from_logits(target=torch.tensor([1, 2, 3]), **bad)


@interpreted
def test_temperatures_of_ignored_rows_in_log_probs():
    hidden, weight = torch.randn(3, 16).half(), torch.randn(8, 16).half()
    with torch.no_grad():
        (got, _), (want, _) = both(
            ops.linear_logprob, hidden=hidden, weight=weight, target=TARGET, temperature=torch.tensor([0.0, 1.0, 0.5])
        )
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


@interpreted
def test_one_column_with_any_stride():
    (loss, _), (want, _) = both(from_logits, logits=torch.randn(1, 3).t(), target=torch.zeros(3, dtype=torch.long))
    assert float(loss) == float(want) == -1.0


@interpreted
def test_a_masked_logit_over_its_temperature():
    """The largest negative number there is, halved again: its gradient is 0."""
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(3, 16, generator=g).requires_grad_(), torch.randn(8, 16, generator=g)
    bias = torch.zeros(8)
    bias[7] = torch.finfo(torch.float32).min
    bias.requires_grad_()
    with ops.backend("triton"):
        logprob, entropy = ops.linear_logprob(hidden, weight, TARGET, bias=bias, temperature=0.5, entropy=True)
    (logprob.sum() + entropy.sum()).backward()
    leaf = hidden.detach().double().requires_grad_()
    all_log = torch.log_softmax(leaf @ weight.double().T[:, :7] / 0.5, -1)
    want = all_log[[1, 2], [2, 3]].sum() - (all_log[1:].exp() * all_log[1:]).sum()
    want.backward()
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert bias.grad.isfinite().all() and bias.grad[7] == 0
