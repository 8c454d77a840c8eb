"""What went wrong in other implementations of these losses, one test a trap, on every backend a CPU can run."""

from __future__ import annotations

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.policy_cases import naive_row
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.policy.formula import RowState

needs_cpp = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
BACKENDS = ["torch", pytest.param("cpu", marks=needs_cpp)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.backend(request.param):
        yield request.param


def rehearsal_gradient(logits, target, temperature=1.0, softcap=None):
    """Gradient of the mean NLL with respect to the logits, and the log-probs, by autograd in float64."""
    z = logits.double().requires_grad_()
    rows = [naive_row(z[i], int(target[i]), temperature, softcap)[0] for i in range(len(target))]
    (-torch.stack(rows).mean()).backward()
    return z.grad, torch.stack(rows).detach()


def loss_of(logits, target, **more):
    config = PolicyLossConfig(rehearsal_coef=1.0, softcap=more.pop("softcap", None))
    leaf = logits.clone().requires_grad_()
    out = ops.policy_loss(leaf, target, torch.full(target.shape, 2), config=config, **more)
    out.loss.backward()
    return out, leaf.grad


def test_scores_that_change_with_padding_side_or_batch_size(backend):
    """The log-probs of a sequence are the same alone, padded left or right, and beside other sequences."""
    g = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(50, 8, generator=g), torch.randn(5, 8, generator=g)
    target = torch.randint(0, 50, (5,), generator=g)
    alone, _ = ops.linear_logprob(hidden, weight, target)
    pad, nothing = torch.randn(3, 8, generator=g), torch.full((3,), -100)
    other, other_target = torch.randn(8, 8, generator=g), torch.randint(0, 50, (8,), generator=g)
    left, left_target = torch.cat([pad, hidden]), torch.cat([nothing, target])
    right, right_target = torch.cat([hidden, pad]), torch.cat([target, nothing])
    batch, batch_target = torch.stack([left, right, other]), torch.stack([left_target, right_target, other_target])
    many, _ = ops.linear_logprob(batch, weight, batch_target)
    torch.testing.assert_close(many[0, 3:], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(many[1, :5], alone, rtol=1e-6, atol=1e-6)


def test_means_that_count_padding(backend):
    """Whatever lies in ignored rows, and however many there are, the loss and its gradient are those of the rest."""
    g = torch.Generator().manual_seed(1)
    logits, target = torch.randn(6, 11, generator=g), torch.randint(0, 11, (6,), generator=g)
    want, _ = loss_of(logits, target)
    padded = torch.cat([logits, torch.full((10, 11), torch.nan)])
    got, gradient = loss_of(padded, torch.cat([target, torch.full((10,), -100)]))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
    assert not gradient[6:].any()


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 250, 1023, 1025, 50_257])
def test_vocabulary_sizes_not_divisible_by_the_block(backend, vocabulary):
    g = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(3, vocabulary, generator=g)
    target = torch.tensor([0, vocabulary // 2, vocabulary - 1])  # the first and the last column among them
    logits[2, -1] += 9.0  # the tail holds most of that row's sum
    gradient, logprob = rehearsal_gradient(logits, target)
    out, got = loss_of(logits, target)
    torch.testing.assert_close(out.logprob.double(), logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-7)


@needs_cpp
def test_int32_offsets_past_two_to_the_31_elements():
    """Row 8,560 of 250,880 columns starts at element 2,147,532,800. Pages that nobody touches cost no memory."""
    from stable_rlhf.ops.policy import cpu

    vocabulary, row = 250_880, torch.tensor([8_559, 8_560])
    everything = torch.empty(8_561, vocabulary, dtype=torch.bfloat16)
    assert everything[8_560].storage_offset() > 2**31
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, vocabulary, generator=g).bfloat16()
    everything[8_559:] = logits
    state, few = (RowState(torch.tensor([5, vocabulary - 1]), *(torch.ones(2) for _ in range(7))) for _ in range(2))
    cpu.statistics(everything, state, None, row=row)
    cpu.statistics(logits, few, None)
    assert torch.equal(state.logprob, few.logprob)
    cpu.given(everything, everything, state, None, row=row)
    cpu.given(logits, logits, few, None)
    assert torch.equal(everything[8_559:], logits)


def test_weight_gradients_summed_in_bf16(backend):
    """Sixty-four chunks: a bf16 sum of so many would be off by several of its steps, one rounding by half of one."""
    g = torch.Generator().manual_seed(3)
    hidden, target = torch.rand(64, 4, generator=g).bfloat16() + 1, torch.full((64,), 3)
    weight = (0.1 * torch.randn(9, 4, generator=g)).bfloat16()
    grads = {}
    for dtype, chunk in ((torch.float64, 256 << 20), (torch.bfloat16, 1)):
        leaf = weight.to(dtype).requires_grad_()
        out = ops.linear_policy_loss(
            hidden.to(dtype),
            leaf,
            target,
            torch.full((64,), 2),
            config=PolicyLossConfig(rehearsal_coef=1.0),
            workspace_bytes=chunk,
            **({} if dtype == torch.float64 else {"logits_dtype": torch.float32}),
        )
        out.loss.backward()
        grads[dtype] = leaf.grad.double()
    error = (grads[torch.bfloat16] - grads[torch.float64]).abs() / grads[torch.float64].abs()
    assert float(error.max()) < 1.5 * torch.finfo(torch.bfloat16).eps


@needs_cpp
def test_a_bf16_round_trip_of_the_targets_gradient():
    """p of a nearly sure target rounds to 1 in bf16, and its gradient p - 1 to 0; made in float32 it keeps its size."""
    logits = torch.full((1, 100), -7.0).bfloat16()
    logits[0, 4] = 4.0
    target = torch.tensor([4])
    want, _ = rehearsal_gradient(logits, target)
    with ops.backend("cpu"):
        _, got = loss_of(logits, target)
    assert 0 < -float(want[0, 4]) < 2**-9  # below bf16's half step at 1
    assert float(got[0, 4]) == pytest.approx(float(want[0, 4]), rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_negative_logits_with_a_running_max_started_at_0(backend, dtype):
    g = torch.Generator().manual_seed(4)
    logits = (torch.randn(4, 300, generator=g) - 1e4).to(dtype)
    target = torch.tensor([0, 7, 150, 299])
    want, logprob = rehearsal_gradient(logits, target)
    out, got = loss_of(logits, target)
    torch.testing.assert_close(out.logprob.double(), logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), want, rtol=1e-4 if dtype == torch.float32 else 2**-7, atol=1e-7)


def test_fp32_operands_silently_on_tf32(backend):
    """No operation changes the user's precision settings; on a GPU the products must also hold float32's error."""
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(16, 64, generator=g), torch.randn(200, 64, generator=g)
    target = torch.randint(0, 200, (16,), generator=g)
    got, _ = ops.linear_logprob(hidden, weight, target)
    with ops.backend("torch"):
        want, _ = ops.linear_logprob(hidden.double(), weight.double(), target)
    assert float((got.double() - want).norm() / want.norm()) < 1e-6
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)


@pytest.mark.gpu
def test_fp32_operands_silently_on_tf32_on_a_gpu():
    g = torch.Generator(device="cuda").manual_seed(5)
    hidden = torch.randn(64, 1024, generator=g, device="cuda")
    weight = torch.randn(2000, 1024, generator=g, device="cuda")
    target = torch.randint(0, 2000, (64,), generator=g, device="cuda")
    got, _ = ops.linear_logprob(hidden, weight, target)
    with ops.backend("torch"):
        want, _ = ops.linear_logprob(hidden.double(), weight.double(), target)
    assert float((got.double() - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_softcap_or_temperature_forgotten_in_one_of_the_passes(backend, softcap, temperature):
    """Values and gradients both, from logits and from hidden states."""
    g = torch.Generator().manual_seed(6)
    logits, target = 4 * torch.randn(5, 40, generator=g), torch.randint(0, 40, (5,), generator=g)
    want, logprob = rehearsal_gradient(logits, target, temperature, softcap)
    out, got = loss_of(logits, target, temperature=temperature, softcap=softcap)
    torch.testing.assert_close(out.logprob.double(), logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    hidden = logits.clone().requires_grad_()  # a head that is the identity: its logits are its hidden states
    lp, _ = ops.linear_logprob(hidden, torch.eye(40), target, temperature=temperature, softcap=softcap)
    torch.testing.assert_close(lp.detach().double(), logprob, rtol=1e-5, atol=1e-5)
    (-lp.mean()).backward()
    torch.testing.assert_close(hidden.grad.double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e12, 1e29])
@pytest.mark.parametrize("vocabulary", [1, 7, 9, 1025, 2051])
def test_fillers_that_count_at_any_size(backend, scale, vocabulary):
    """Rows are filled up to whole vectors: at 2^31, 100 less is the same number."""
    g = torch.Generator().manual_seed(7)
    for sign in (1.0, -1.0):
        logits = torch.randn(3, vocabulary, generator=g)
        logits = sign * (logits.abs() + 1) if sign < 0 else logits
        logits[0, -1] = 30.0  # the largest in a part of a vector, and elsewhere
        target = torch.full((3,), vocabulary - 1)
        out, gradient = loss_of(logits, target, temperature=1.0 / scale)
        want, logprob = rehearsal_gradient(logits, target, 1.0 / scale)
        torch.testing.assert_close(out.logprob.double(), logprob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(("near", "cap", "temperature"), [
    (50, 30, 1.0), (150, 30, 1.0), (300, 30, 1.0), (400, 30, 0.7), (8, 1, 1.0), (1, 1e-20, 1e20),
])  # fmt: skip
def test_a_softcap_s_slope_from_one_less_its_square(near, cap, temperature):
    """Saturated, 1 - tanh^2 is rounding alone, and may be of the wrong sign."""
    g = torch.Generator().manual_seed(8)
    logits, target = (0.05 * torch.randn(4, 200, generator=g) + 1) * near, torch.randint(0, 200, (4,), generator=g)
    leaf = logits.double().requires_grad_()
    tanh = torch.tanh(leaf / cap)
    z = cap * tanh / temperature
    slope = 1 / torch.cosh((leaf / cap).clamp(-350, 350)).detach() ** 2 / temperature  # by itself, of z by the logit
    logprob = torch.log_softmax(z.detach(), -1)
    want = (logprob.exp() - torch.nn.functional.one_hot(target, 200)) / 4 * slope
    with ops.backend("cpu"):
        _, gradient = loss_of(logits, target, temperature=temperature, softcap=float(cap))
    torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=max(1e-30, 1e-6 * float(want.abs().max())))
    assert ((gradient >= 0) | torch.nn.functional.one_hot(target, 200).bool()).all()


@pytest.mark.parametrize("clamp", [20.0, 1000.0, float("inf")])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_rehearsal_row_far_from_the_policy_s_terms(backend, clamp, level):
    """A gradient of 0 through something infinite is NaN."""
    config = PolicyLossConfig(kl_coef=0.1, log_ratio_clamp=clamp, importance_level=level, rehearsal_coef=0.5)
    logits = torch.zeros(2, 4)
    logits[1, 3] = -200.0
    leaf = logits.clone().requires_grad_()
    out = ops.policy_loss(
        leaf, torch.tensor([0, 3]), torch.tensor([1, 2]), old_logprob=torch.tensor([-1.4, 0.0]),
        advantage=torch.ones(2), ref_logprob=torch.tensor([-1.3, 0.0]), config=config,
        cu_seqlens=torch.tensor([0, 2]),
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(leaf.grad[1], 0.5 * torch.tensor([1 / 3, 1 / 3, 1 / 3, -1.0]))
    assert leaf.grad[0].isfinite().all() and leaf.grad[0].any()


@needs_cpp
def test_one_column_with_any_stride():
    with ops.backend("cpu"):
        out = ops.policy_loss(torch.randn(1, 4).t(), torch.zeros(4, dtype=torch.long), advantage=torch.ones(4))
    assert float(out.loss) == -1.0


def test_a_temperature_of_zero_in_16_bits(backend):
    with pytest.raises(ValueError, match=r"^temperature: has values that are not positive numbers"):
        ops.policy_loss(
            torch.randn(4, 9), torch.zeros(4, dtype=torch.long), advantage=torch.ones(4),
            temperature=torch.tensor([1.0, 0.0, 1.0, 1.0]).half(),
        )  # fmt: skip
