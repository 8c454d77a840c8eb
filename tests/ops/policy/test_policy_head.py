"""Statistics made in the product with the head: in the interpreter against float64, and which calls they are for."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import INTERPRETED, accesses_checked, bfloat16_of_a_gpu, interpreted, not_interpreted
from helpers.policy_rows import new_state
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.policy.types import PolicyCall

triton = pytest.importorskip("triton")
policy_head = pytest.importorskip("stable_rlhf.kernels.policy_head")

HALVES = (torch.bfloat16, torch.float16)
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=INTERPRETED)
def rounding_of_a_gpu():
    with bfloat16_of_a_gpu():
        yield


def make(rows, width, vocabulary, dtype, seed=0, spread=3.0):
    """Hidden states, a head, targets (one of them in no row of the head) and inverse temperatures."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    weight = (spread * torch.randn(vocabulary, width, generator=g) / math.sqrt(width)).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    target[0] = -1
    return hidden, weight, target, 0.5 + torch.rand(rows, generator=g)


def logits_of(hidden, weight, logits_dtype=torch.float32):
    """The product's own sum is near enough float64's to be rounded like it, but where it lies half-way."""
    return (hidden.double() @ weight.double().t()).float().to(logits_dtype).double()


def wanted(z, target, inverse):
    """Log-prob, entropy, maximum and the logarithm of the sum of exp(z - max), in float64."""
    z = z * inverse.double()[:, None]
    log_p = z.log_softmax(-1)
    top = z.amax(-1)
    picked = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(target >= 0, picked, 0.0), entropy, top, z.logsumexp(-1) - top


def made(hidden, weight, target, inverse, logits_dtype=torch.float32):
    state = new_state(target, inverse)
    policy_head.statistics(hidden, weight, logits_dtype, state)
    return state.logprob, state.entropy, state.max, state.log_sum


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "rows, width, vocabulary",
    [(1, 8, 1), (3, 16, 2), (5, 64, 256), (7, 72, 257), (130, 64, 515), (129, 136, 1030)],
)
def test_shapes(rows, width, vocabulary, dtype, monkeypatch):
    """One tile and many, whole ones and rests, in every direction; more tiles than are joined at a time."""
    monkeypatch.setattr(policy_head, "_JOINED_TILES", 2)
    hidden, weight, target, inverse = make(rows, width, vocabulary, dtype)
    with accesses_checked() as launched:
        got = made(hidden, weight, target, inverse)
    assert launched == ["head_kernel", "join_kernel"]
    for x, want in zip(got, wanted(logits_of(hidden, weight), target, inverse), strict=True):
        torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=2e-6)


@interpreted
@pytest.mark.parametrize("group", [1, 2, 3, 16])
def test_every_tile_is_made_whatever_the_order(group, monkeypatch):
    """Five blocks of rows in groups that divide them and in others, three blocks of columns."""
    monkeypatch.setattr(policy_head, "GROUP", group)
    hidden, weight, target, inverse = make(4 * policy_head.ROWS + 9, 8, 700, torch.float16)
    got = made(hidden, weight, target, inverse)
    for x, want in zip(got, wanted(logits_of(hidden, weight), target, inverse), strict=True):
        torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=2e-6)


@interpreted
@pytest.mark.parametrize("dtype", HALVES)
def test_logits_are_rounded_as_the_losses_round_them(dtype):
    """Else the ratios of the first step of PPO, to log-probs made here, would not be 1."""
    hidden, weight, target, inverse = make(6, 8, 600, dtype, spread=8.0)
    got = made(hidden, weight, target, inverse, dtype)
    rounded = wanted(logits_of(hidden, weight, dtype), target, inverse)
    unrounded = wanted(logits_of(hidden, weight), target, inverse)
    assert (rounded[0] - unrounded[0]).abs().max() > 1e-3
    for x, want in zip(got, rounded, strict=True):
        torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("place", [3, 300, 699])
def test_peaked_rows_keep_their_digits(place):
    """The maximum stands out by 12 to 30: what 1 is short of the sum is of the size of float32's last digits, or far
    below them. Its tile is the first, the second, or the last."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(700, 8, generator=g).to(torch.float16)
    weight[:, 0] = 0.0
    weight[place, 0] = 1.0
    hidden = torch.randn(3, 8, generator=g).to(torch.float16)
    hidden[:, 0] = torch.tensor([12.0, 20.0, 30.0])
    target, inverse = torch.full((3,), place), torch.ones(3)
    got = made(hidden, weight, target, inverse)
    want = wanted(logits_of(hidden, weight), target, inverse)
    assert want[0].abs().max() > 1e-8
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(got[3].double(), want[3], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=0.0)


@interpreted
@pytest.mark.parametrize("vocabulary", [1, 3, 256, 1000])
def test_the_maximum_may_be_there_many_times(vocabulary):
    hidden, weight = torch.zeros(2, 8, dtype=torch.float16), torch.ones(vocabulary, 8, dtype=torch.float16)
    logprob, entropy, top, log_sum = made(hidden, weight, torch.zeros(2, dtype=torch.int64), torch.ones(2))
    expected = torch.full((2,), math.log(vocabulary))
    torch.testing.assert_close(-logprob, expected)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(log_sum, expected)
    assert not top.any()


@interpreted
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 999])
def test_what_is_not_finite_spoils_its_row_alone(value, place):
    hidden, weight, target, inverse = make(3, 8, 1000, torch.float16)
    hidden[:, 0] = torch.tensor([0.0, 1.0, 0.0])
    assert all(x.isfinite().all() for x in made(hidden, weight, target, inverse))
    hidden[1, 0] = value
    weight[:, 0] = 0.0
    weight[place, 0] = 1.0
    got = made(hidden, weight, target, inverse)
    finite = torch.stack(got).isfinite().all(0)
    assert finite.tolist() == [True, False, True]


@interpreted
def test_the_operation_takes_this_way():
    """`linear_logprob` without gradient, with rows that are ignored, against the row kernel from float32 logits."""
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(3, 5, 16, generator=g).half(), torch.randn(300, 16, generator=g).half()
    target = torch.randint(0, 300, (3, 5), generator=g)
    target[1, :3] = -100
    given = {"temperature": 0.7, "entropy": True}
    with ops.backend("triton"), accesses_checked() as launched:
        got = ops.linear_logprob(hidden, weight, target, **given)
        assert "head_kernel" in launched and "row_kernel" not in launched
        launched.clear()
        ops.linear_logprob(hidden, weight, target, softcap=20.0, **given)
        assert "row_kernel" in launched and "head_kernel" not in launched
    with ops.backend("torch"):
        want = ops.linear_logprob(hidden.double(), weight.double(), target, **given)
    for x, y in zip(got, want, strict=True):
        assert not x[target == -100].any()
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("told", [11, 13])
def test_a_wrong_number_of_active_rows_is_told_by_the_next_call(told, monkeypatch):
    """Where the host reads no values, as on a GPU."""
    from stable_rlhf.kernels import policy_call

    hidden, weight = torch.ones(3, 5, 16).half(), torch.ones(300, 16).half()
    target = torch.zeros(3, 5, dtype=torch.int64)
    target[1, :3] = -100
    with ops.backend("triton"):
        with monkeypatch.context() as patch:
            patch.setattr(policy_call, "check_values", lambda device: False)
            ops.linear_logprob(hidden, weight, target, active_rows=12)
        ops.linear_logprob(hidden, weight, target)  # nothing was noted
        with monkeypatch.context() as patch:
            patch.setattr(policy_call, "check_values", lambda device: False)
            ops.linear_logprob(hidden, weight, target, active_rows=told)
        with pytest.raises(ValueError, match="active_rows: not the number"):
            ops.linear_logprob(hidden, weight, target)
        ops.linear_logprob(hidden, weight, target)  # told once


CASES = {
    "plain": ({}, True),
    "float32": ({"dtype": torch.float32}, False),
    "a softcap": ({"softcap": 30.0}, False),
    "a bias": ({"biased": True}, False),
    "a slice of the vocabulary": ({"group": "ranks"}, False),
    "no rows": ({"rows": 0}, False),
    "rows that begin anywhere": ({"width": 20}, False),
    "columns apart": ({"strided": True}, False),
    "Ampere": ({"capability": (8, 0)}, False),
    "Blackwell": ({"capability": (10, 0)}, False),
    "measured to be slower": ({"chosen": False}, False),
}


@not_interpreted
@pytest.mark.parametrize("name", CASES)
def test_which_calls_it_is_for(name, monkeypatch):
    given, want = CASES[name]
    hidden = torch.zeros(2, given.get("rows", 3), given.get("width", 16), dtype=given.get("dtype", torch.bfloat16))
    weight = torch.zeros(40, hidden.shape[2], dtype=hidden.dtype)
    if given.get("strided"):
        weight = torch.zeros(hidden.shape[2], 40, dtype=hidden.dtype).t()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: given.get("capability", (9, 0)))
    monkeypatch.setattr(policy_head, "statistics_in_product", lambda device, width: given.get("chosen", True))
    call = PolicyCall(
        hidden, _OnGpu(weight), torch.zeros(40) if given.get("biased") else None, torch.zeros(2, 3), 1.0,
        PolicyLossConfig(softcap=given.get("softcap")), group=given.get("group", ""), backend="triton",
    )  # fmt: skip
    assert policy_head.takes(call) is want


class _OnGpu:
    """A tensor that says it is on a GPU."""

    def __init__(self, x):
        self.x, self.device = x, torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self.x, name)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows, width, vocabulary", [(1, 64, 1000), (300, 576, 49_152), (1000, 1024, 50_257)])
def test_on_a_gpu(rows, width, vocabulary, dtype):
    """The same bits twice; beside float64; and the row kernel's log-probs, whose logits are rounded alike."""
    hidden, weight, target, inverse = (x.cuda() for x in make(rows, width, vocabulary, dtype))
    first, second = (made(hidden, weight, target, inverse, logits_dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = wanted(hidden.double() @ weight.double().t(), target, inverse)
    for x, want in zip(first, exact, strict=True):
        torch.testing.assert_close(x.double(), want, rtol=1e-4, atol=1e-4)
    rounded = made(hidden, weight, target, inverse, logits_dtype=dtype)
    state = new_state(target, inverse)
    from stable_rlhf.kernels import policy

    policy.statistics(hidden @ weight.t(), state, None)
    assert (
        rounded[0] - state.logprob
    ).abs().median() < 1e-4  # sums in another order are rounded otherwise now and then
