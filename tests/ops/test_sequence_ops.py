"""gae, masked_whiten and token_rewards: loops over tokens, every backend, several processes."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

import stable_rlhf.ops as ops
from stable_rlhf.ops.backends import extension

CPP = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
LENGTHS = {
    "mixed": [3, 1, 0, 7, 40, 1],
    "one token": [1],
    "no sequence": [],
    "only empty": [0, 0],
    "many": [5] * 70 + [0, 130],
}


def make_case(lengths, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    reward, value = (torch.randn(tokens, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return reward, value, cu_seqlens, torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)


def naive_gae(reward, value, cu_seqlens, gamma, lam, bootstrap):
    """A_t as the explicit sum over later deltas, not the recurrence."""
    advantage = [0.0] * len(reward)
    for s in range(len(cu_seqlens) - 1):
        begin, end = cu_seqlens[s], cu_seqlens[s + 1]
        after = [*value[begin + 1 : end], bootstrap[s]] if end > begin else []
        delta = [reward[t] + gamma * after[t - begin] - value[t] for t in range(begin, end)]
        for t in range(begin, end):
            advantage[t] = math.fsum((gamma * lam) ** (u - t) * delta[u - begin] for u in range(t, end))
    return advantage, [a + v for a, v in zip(advantage, value, strict=True)]


@pytest.mark.parametrize("name", ["torch", pytest.param("cpu", marks=CPP)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.95), (0.99, 0.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_gae_against_naive(name, lengths, gamma, lam, bootstrapped):
    reward, value, cu_seqlens, bootstrap = make_case(lengths)
    last = bootstrap if bootstrapped else torch.zeros_like(bootstrap)
    want = naive_gae(reward.tolist(), value.tolist(), cu_seqlens.tolist(), gamma, lam, last.tolist())
    given = {"bootstrap_value": bootstrap} if bootstrapped else {}
    with ops.backend(name):
        got = ops.gae(reward, value, cu_seqlens, gamma=gamma, lam=lam, **given)
    for result, expected in zip(got, want, strict=True):
        assert result.dtype == torch.float64
        assert result.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_cpp_gives_the_bits_of_torch(dtype, threads):
    reward, value, cu_seqlens, bootstrap = make_case(LENGTHS["many"], dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ops.backend("cpu"):
            cpp = ops.gae(reward, value, cu_seqlens, gamma=0.97, bootstrap_value=bootstrap)
    finally:
        torch.set_num_threads(before)
    with ops.backend("torch"):
        reference = ops.gae(reward, value, cu_seqlens, gamma=0.97, bootstrap_value=bootstrap)
    assert torch.equal(cpp[0], reference[0]) and torch.equal(cpp[1], reference[1])


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel should fill holds NaN, so that what it leaves out is seen."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: real(x).fill_(math.nan))


@contextmanager
def threads_of_torch(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@CPP
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "lengths",
    [[70_000, *[1] * 3000, 0, *[2, 5] * 4000, 40_000, 0], [512] * 200, [100_001], [0, 0, 90_000, 0, 0, 3]],
    ids=["long beside short", "equal", "one", "empty ones around"],
)
def test_gae_of_many_blocks_has_the_bits_of_torch(lengths, threads, poisoned):
    """Enough tokens for several pieces of work, groups and lanes that end at different times."""
    reward, value, cu_seqlens, bootstrap = make_case(lengths, torch.float32)
    with threads_of_torch(threads):
        got = ops.gae(reward, value, cu_seqlens, gamma=0.97, bootstrap_value=bootstrap)
    # The reference's loop over 10^5 steps takes seconds: its sums in numbers of the same type.
    import numpy as np

    gamma, decay = np.float32(0.97), np.float32(0.97 * 0.95)
    rewards, values, lasts = reward.numpy(), value.numpy(), bootstrap.numpy()
    limits, following = cu_seqlens.numpy(), np.zeros(len(values), np.float32)
    following[:-1] = values[1:]
    filled = limits[1:] > limits[:-1]
    following[limits[1:][filled] - 1] = lasts[filled]
    delta = (rewards + gamma * following) - values
    want = np.empty_like(delta)
    for s in range(len(lengths)):
        running = np.float32(0)
        for t in range(limits[s + 1] - 1, limits[s] - 1, -1):
            running = delta[t] + decay * running
            want[t] = running
    assert torch.equal(got[0], torch.from_numpy(want)) and torch.equal(got[1], torch.from_numpy(want) + value)


@CPP
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), max_size=40), seed=st.integers(0, 99), threads=st.integers(1, 2))
def test_packed_operations_on_the_cpu_are_those_of_torch(lengths, seed, threads):
    reward, value, cu_seqlens, bootstrap = make_case(lengths, torch.float32, seed)
    filled = torch.tensor([n for n in lengths if n], dtype=torch.int64)
    limits = torch.cat([torch.zeros(1, dtype=torch.int64), filled.cumsum(0)])
    results = []
    for name in ("cpu", "torch"):
        with ops.backend(name), threads_of_torch(threads):
            results.append(
                [
                    *ops.gae(reward, value, cu_seqlens, gamma=0.9, bootstrap_value=bootstrap),
                    *(
                        ops.token_rewards(reward, value, bootstrap[: len(filled)], limits, kl_coef=0.3, kl_estimator=k)
                        for k in ("k1", "k2")
                    ),
                ]
            )
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@CPP
@pytest.mark.parametrize("position", [0, 3, 4, 9])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["reward", "value"])
def test_gae_sees_a_bad_value_anywhere_even_without_discount(name, bad, position):
    inputs = {"reward": torch.ones(10), "value": torch.ones(10)}
    inputs[name][position] = bad
    with pytest.raises(ValueError, match=f"^{name}: non-finite value {bad} at position {position}"):
        ops.gae(**inputs, cu_seqlens=torch.tensor([0, 4, 4, 10]), gamma=0.0, lam=0.0)


@pytest.mark.parametrize("name", ["torch", pytest.param("cpu", marks=CPP)])
def test_overflow_is_no_error_and_bootstraps_of_empty_sequences_are_checked(name):
    with ops.backend(name):
        huge = torch.full((3,), 3e38)
        advantage, _ = ops.gae(huge, torch.zeros(3), torch.tensor([0, 3]), lam=1.0)
        assert advantage.tolist() == [math.inf, math.inf, float(huge[0])]
        apart = ops.token_rewards(huge, -huge, torch.zeros(1), torch.tensor([0, 3]), kl_coef=1.0)
        assert apart.tolist() == [-20.0] * 3
        with pytest.raises(ValueError, match=r"^bootstrap_value: non-finite value nan at position 1"):
            bootstrap = torch.tensor([0.0, math.nan])
            ops.gae(huge, huge, torch.tensor([0, 3, 3]), bootstrap_value=bootstrap)


def test_gae_takes_strided_and_low_precision_input():
    reward, value, cu_seqlens, _ = make_case(LENGTHS["mixed"], torch.bfloat16)
    wide = torch.stack([reward, torch.full_like(reward, 99)], dim=1)[:, 0]
    got = ops.gae(wide, value.requires_grad_(), cu_seqlens.int())
    want = ops.gae(reward.float(), value.detach().float(), cu_seqlens)
    assert got[0].dtype == torch.float32 and not got[1].requires_grad
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


T4 = torch.zeros(4)
BAD_GAE = [
    ({"reward": torch.zeros(2, 2)}, "reward: shape"),
    ({"value": torch.zeros(3)}, "value: shape"),
    ({"value": torch.zeros(4, device="meta")}, "value: on device meta"),
    ({"reward": torch.tensor([0.0, math.nan, 0.0, 0.0])}, "reward: non-finite value nan at position 1"),
    ({"value": torch.full((4,), math.inf)}, "value: non-finite"),
    ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens: type float32"),
    ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens: runs from 0 to 3 instead of 0 to the 4"),
    ({"cu_seqlens": torch.tensor([1, 4])}, "cu_seqlens: runs from 1"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens: decreases after entry 1"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "cu_seqlens: shape"),
    ({"bootstrap_value": torch.zeros(3)}, "bootstrap_value: shape"),
    ({"gamma": 1.1}, "gamma: 1.1"),
    ({"lam": -0.1}, "lam: -0.1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_GAE, ids=[b[1] for b in BAD_GAE])
def test_bad_gae_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.gae(**{"reward": T4, "value": T4, "cu_seqlens": torch.tensor([0, 1, 4]), **changes})


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_whiten_against_naive(shift_mean, masked):
    g = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(5, 7, generator=g) + 100
    mask = torch.rand(5, 7, generator=g) < 0.6 if masked else torch.ones(5, 7, dtype=torch.bool)
    values = x[mask].tolist()
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values) + 1e-8)
    dirty = x.clone()
    dirty[~mask] = math.nan
    got = ops.masked_whiten(dirty, mask if masked else None, shift_mean=shift_mean)
    want = torch.where(mask, (x.double() - mean) / deviation + (0.0 if shift_mean else mean), 0.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert not got[~mask].any() and got.dtype == torch.float32


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 0], [1, 1, 1]])
def test_whiten_is_safe_for_few_or_constant_tokens(mask):
    got = ops.masked_whiten(torch.full((3,), 4.0), torch.tensor(mask))
    assert got.tolist() == [0.0, 0.0, 0.0]
    kept = ops.masked_whiten(torch.full((3,), 4.0), torch.tensor(mask), shift_mean=False)
    assert kept.tolist() == [4.0 * m for m in mask]
    assert ops.masked_whiten(torch.zeros(0)).shape == (0,)


def test_bad_whiten_arguments():
    with pytest.raises(ValueError, match="mask: shape"):
        ops.masked_whiten(torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match="x: non-finite value nan at position 1"):
        ops.masked_whiten(torch.tensor([0.0, math.nan]))


@CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask_type", [None, torch.bool, torch.int8, torch.int64, torch.float32])
@pytest.mark.parametrize("n", [1, 7, 4095, 4097, 100_003])
def test_whiten_on_the_cpu_is_that_of_torch(n, mask_type, dtype, poisoned):
    x, _, _, _ = make_case([n], torch.float64)
    x = (x + 50).to(dtype)
    mask = None
    if mask_type is not None:
        mask = (torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.4).to(mask_type)
        x[mask == 0] = math.nan
    with ops.backend("torch"):
        want = ops.masked_whiten(x, mask)
    results = []
    for threads in (1, 2):
        with threads_of_torch(threads):
            results.append(ops.masked_whiten(x, mask))
    assert torch.equal(*results) and want.dtype == results[0].dtype
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(results[0], want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["torch", pytest.param("cpu", marks=CPP)])
def test_whiten_of_a_constant_is_zero_and_a_far_value_costs_no_digits(name):
    with ops.backend(name):
        assert not ops.masked_whiten(torch.full((10_001,), 0.1)).any()
        x = torch.tensor([1e8] + [0.0, 1.0] * 500, dtype=torch.float64)
        got = ops.masked_whiten(x, torch.arange(1001) > 0, eps=0.0)
        assert got[1:].tolist() == pytest.approx([-1.0, 1.0] * 500, rel=1e-12)
        far = ops.masked_whiten(x + 1e6, torch.arange(1001) > 0, eps=0.0)
        assert far[1:].tolist() == pytest.approx([-1.0, 1.0] * 500, rel=1e-9)


def _whiten_rank(rank: int, store: str, cuts: list[int], result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(cuts) - 1)
    x = _shared_values()[cuts[rank] : cuts[rank + 1]]
    torch.save(ops.masked_whiten(x, x > -1.0, group=dist.group.WORLD), f"{result}.{rank}")
    dist.destroy_process_group()


def _whiten_bad_rank(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, mask = [torch.tensor([1.0, math.inf]), torch.full((5,), math.nan)][rank], [None, torch.zeros(5)][rank]
    said, made = [], []
    for name in ("torch", "cpu") if extension() is not None else ("torch",):
        with ops.backend(name):
            try:
                ops.masked_whiten(x, mask, group=dist.group.WORLD)
            except ValueError as error:
                said.append(str(error))
            made.append(ops.masked_whiten(x if rank else torch.arange(4.0), mask, group=dist.group.WORLD))
    torch.save((said, made), f"{result}.{rank}")
    dist.destroy_process_group()


CUTS = [0, 11, 11, 30]  # of three ranks, one of them without a token


def _rank(rank: int, folder: str) -> None:
    _whiten_rank(rank, f"{folder}/three", CUTS, f"{folder}/good")
    if rank < 2:
        _whiten_bad_rank(rank, f"{folder}/two", f"{folder}/bad")


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory) -> Path:
    """What processes left there that were ranks of a group: of three, then two of them of another one."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=3)
    return folder


def test_a_bad_value_of_one_rank_is_an_error_on_all(by_ranks):
    """And a rank without a valid token takes part and gets zeros."""
    (first, whitened), (second, zeros) = (torch.load(by_ranks / f"bad.{rank}") for rank in range(2))
    assert len(whitened) == len(zeros) == 1 + (extension() is not None)
    assert first == ["x: non-finite value inf at position 1"] * len(whitened)
    assert second == ["x: a valid value of rank 0 of the group is not finite"] * len(whitened)
    assert all(torch.allclose(x, ops.masked_whiten(torch.arange(4.0)), atol=1e-7) for x in whitened)
    assert all(x.tolist() == [0.0] * 5 for x in zeros)


def _shared_values() -> torch.Tensor:
    return torch.randn(30, generator=torch.Generator().manual_seed(2))


def test_whiten_over_ranks_equals_one_process(by_ranks):
    got = torch.cat([torch.load(by_ranks / f"good.{rank}") for rank in range(3)])
    x = _shared_values()
    torch.testing.assert_close(got, ops.masked_whiten(x, x > -1.0), rtol=1e-6, atol=1e-7)
    alone = torch.cat([ops.masked_whiten(part, part > -1.0) for part in (x[:11], x[11:])])
    assert not torch.allclose(got, alone, atol=1e-2)  # each rank alone is a different answer


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards_against_naive(estimator):
    g = torch.Generator().manual_seed(3)
    lengths = [3, 1, 5]
    logprob, ref = -torch.rand(9, generator=g), -torch.rand(9, generator=g)
    ref[4], ref[5] = 1e4, -1e4
    score, cu_seqlens = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0, 3, 4, 9])
    got = ops.token_rewards(logprob, ref, score, cu_seqlens, kl_coef=0.3, kl_estimator=estimator)
    want = []
    for s, length in enumerate(lengths):
        for t in range(int(cu_seqlens[s]), int(cu_seqlens[s + 1])):
            d = min(max(float(logprob[t]) - float(ref[t]), -20.0), 20.0)
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
            last = t == int(cu_seqlens[s]) + length - 1
            want.append(-0.3 * kl + (float(score[s]) if last else 0.0))
    assert got.tolist() == pytest.approx(want, rel=1e-5, abs=1e-6)
    tighter = ops.token_rewards(logprob, ref, score, cu_seqlens, kl_coef=1.0, clamp=0.01)
    assert float(tighter[5]) == pytest.approx(-0.01)


def test_token_rewards_without_kl_put_the_score_on_the_last_token():
    zeros = torch.zeros(4)
    got = ops.token_rewards(zeros, zeros, torch.tensor([5.0, 7.0]), torch.tensor([0, 3, 4]), kl_coef=0.0)
    assert got.tolist() == [0.0, 0.0, 5.0, 7.0]


@CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 255, 70_001])
def test_k3_keeps_its_digits(dtype, n, poisoned):
    """From log-ratios of 1e-7, where 1 cancels twice, to far beyond where the exponential overflows."""
    g = torch.Generator().manual_seed(5)
    d = torch.randn(n, generator=g, dtype=torch.float64).sign()
    d = (d * 10 ** (10 * torch.rand(n, generator=g, dtype=torch.float64) - 7)).to(dtype)
    options = {"kl_coef": 1.0, "kl_estimator": "k3", "clamp": 1000.0}
    score = torch.tensor([0.0], dtype=dtype)
    got = ops.token_rewards(d, torch.zeros_like(d), score, torch.tensor([0, n]), **options)
    x = -d.double()
    series = sum(x**i / float(math.factorial(i)) for i in range(2, 30))
    want = -torch.where(x.abs() < 1, series, torch.expm1(x) - x)
    want = want.to(dtype)
    torch.testing.assert_close(got, want, rtol=1.5e-6 if dtype == torch.float32 else 1e-13, atol=0)
    with threads_of_torch(2):
        again = ops.token_rewards(d, torch.zeros_like(d), score, torch.tensor([0, n]), **options)
    assert torch.equal(got, again)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=CPP)])
@pytest.mark.parametrize("x", [[3.0] * 4, [0.1] * 100_003, [7.0]], ids=["constant", "inexact", "one"])
def test_nothing_to_whiten_is_zero_without_an_epsilon_too(backend, x):
    with ops.backend(backend):
        assert not ops.masked_whiten(torch.tensor(x), eps=0.0).any()
        assert torch.equal(ops.masked_whiten(torch.tensor(x), eps=0.0, shift_mean=False), torch.tensor(x))


BAD_REWARDS = [
    ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens: no sequence for the 4 tokens given"),
    ({"cu_seqlens": torch.tensor([0, 5, 4])}, "cu_seqlens: decreases after entry 1"),
    ({"cu_seqlens": torch.tensor([0, 1, 3])}, "cu_seqlens: runs from 0 to 3"),
    ({"logprob": torch.tensor([0.0, 0.0, math.inf, 0.0])}, "logprob: non-finite value inf at position 2"),
    ({"score": torch.tensor([0.0, math.inf])}, "score: non-finite value inf at position 1"),
    ({"cu_seqlens": torch.tensor([0, 4, 4])}, "cu_seqlens: sequence 1 is empty"),
    ({"score": torch.zeros(3)}, "score: shape"),
    ({"score": torch.tensor([math.nan, 0.0])}, "score: non-finite"),
    ({"ref_logprob": torch.zeros(3)}, "ref_logprob: shape"),
    ({"logprob": torch.full((4,), -math.inf)}, "logprob: non-finite"),
    ({"kl_estimator": "k4"}, "kl_estimator: 'k4'"),
    ({"kl_coef": -0.1}, "kl_coef: -0.1"),
    ({"clamp": 0.0}, "clamp: 0.0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_REWARDS, ids=[b[1] for b in BAD_REWARDS])
def test_bad_token_rewards_arguments(changes, message):
    good = {"logprob": T4, "ref_logprob": T4, "score": torch.zeros(2), "cu_seqlens": torch.tensor([0, 1, 4])}
    with pytest.raises(ValueError, match=message):
        ops.token_rewards(**{**good, "kl_coef": 0.1, **changes})
