"""The Triton kernels of the small operations: in the interpreter against the references, and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import (
    INTERPRETED,
    Synchronised,
    accesses_checked,
    interpreted,
    no_synchronisation,
    not_interpreted,
)

pytest.importorskip("triton")
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
# The same tests in both places.
anywhere = [pytest.param("here", marks=interpreted), pytest.param("gpu", marks=[pytest.mark.gpu, on_gpu])]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
LENGTHS = {
    "mixed": [3, 0, 1, 2050, 0, 1024, 1025, 1],
    "one token": [1],
    "no sequence": [],
    "only empty": [0, 0],
}


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.slow
def test_the_rest_in_the_interpreter():
    run_interpreted(__file__, "slow")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should fill holds NaN, so that what it leaves out is seen."""
    real = torch.empty_like

    def empty_like(x, **options):
        made = real(x, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty_like", empty_like)


def normal(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(op, *arguments, **options):
    """The results of Triton and, in float64 on the CPU, of the reference."""

    def moved(x, device, wide):
        if not isinstance(x, torch.Tensor):
            return x
        return (x.double() if wide and x.is_floating_point() else x).to(device)

    with ops.backend("triton"):
        got = op(
            *(moved(x, DEVICE, False) for x in arguments), **{n: moved(x, DEVICE, False) for n, x in options.items()}
        )
    with ops.backend("torch"):
        want = op(*(moved(x, "cpu", True) for x in arguments), **{n: moved(x, "cpu", True) for n, x in options.items()})
    return got, want


def close(got, want, dtype):
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), want, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("where", anywhere)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("gamma", "lam", "bootstrapped"),
    [
        (0.97, 0.9, True),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [(1.0, 0.95, False), (0.0, 1.0, True)]),
    ],
)
def test_gae(where, dtype, lengths, gamma, lam, bootstrapped):
    reward, value = (normal(sum(lengths), dtype=dtype, seed=seed) for seed in (0, 1))
    last = normal(len(lengths), dtype=dtype, seed=2) if bootstrapped else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    got, want = both(ops.gae, reward, value, cu_seqlens, gamma=gamma, lam=lam, bootstrap_value=last)
    for result, expected in zip(got, want, strict=True):
        close(result, expected, dtype)


@pytest.mark.parametrize("where", anywhere)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards(where, dtype, estimator):
    lengths = [3, 1, 2050, 1024]
    logprob = normal(sum(lengths), dtype=dtype, seed=3)
    apart = normal(sum(lengths), dtype=dtype, seed=4) * 10.0 ** -(torch.arange(sum(lengths)) % 6).to(dtype)
    cu_seqlens, score = torch.tensor([0, *lengths]).cumsum(0), normal(len(lengths), dtype=dtype, seed=5)
    options = {"kl_coef": 0.1, "kl_estimator": estimator, "clamp": 2.0}
    got, want = both(ops.token_rewards, logprob, logprob + apart, score, cu_seqlens, **options)
    close(got, want, dtype)
    empty = torch.zeros(0, dtype=dtype)
    assert both(ops.token_rewards, empty, empty, empty, torch.tensor([0]), **options)[0].shape == (0,)


@pytest.mark.parametrize("where", anywhere)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_k3_near_zero(where, dtype):
    d = torch.tensor([1e-3, -1e-4, 1e-6, -0.99, 1.01, 0.5], dtype=dtype)
    zeros, cu_seqlens = torch.zeros(6, dtype=dtype), torch.tensor([0, 6])
    with ops.backend("triton"):
        got = ops.token_rewards(
            *(x.to(DEVICE) for x in (d, zeros, zeros[:1], cu_seqlens)), kl_coef=1.0, kl_estimator="k3"
        )
    for found, x in zip(got.cpu().tolist(), d.double().tolist(), strict=True):
        series = math.fsum((-x) ** i / math.factorial(i) for i in range(2, 30))
        assert found == pytest.approx(-series, rel=5e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("where", anywhere)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 5000])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("mask_type", [None, torch.bool, torch.int64])
def test_whiten(where, dtype, n, shift_mean, mask_type, monkeypatch):
    from stable_rlhf.kernels import sequence

    monkeypatch.setattr(sequence, "_MOST_PARTS", 3)  # programs then have several blocks
    monkeypatch.setattr(sequence, "_MOST_SCALING", 2)
    x = 3 * normal(n, dtype=dtype, seed=6) + 100
    mask = None if mask_type is None else (normal(n, dtype=dtype, seed=7) < 0.3).to(mask_type)
    if mask is not None:
        x[mask == 0] = math.nan
    got, want = both(ops.masked_whiten, x, mask, shift_mean=shift_mean, eps=1e-3)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-6)
    assert got.dtype == dtype


@pytest.mark.parametrize("where", anywhere)
def test_whiten_of_nothing_and_of_constants(where):
    constant = torch.full((2500,), 0.1, device=DEVICE)
    with ops.backend("triton"):
        assert ops.masked_whiten(torch.zeros(0, device=DEVICE)).shape == (0,)
        assert not ops.masked_whiten(constant).any()
        assert not ops.masked_whiten(constant, torch.zeros(2500, device=DEVICE)).any()
        assert not ops.masked_whiten(constant, (torch.arange(2500, device=DEVICE) == 2000)).any()


def scores(n, ties=False):
    score = normal(n, dtype=torch.float32, seed=8)
    if ties:
        score = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1.0, math.inf])[(score.abs() * 1e4).long() % 6]
    return score


def clusters_of(n, clusters):
    return torch.randint(0, clusters, (n,), generator=torch.Generator().manual_seed(9), dtype=torch.int32)


@pytest.mark.parametrize("where", anywhere)
@pytest.mark.parametrize(
    ("n", "clusters", "k"),
    [
        (2500, 7, 9),
        pytest.param(1500, 12, 5, marks=pytest.mark.slow),
        (1100, 1, 2000),
        pytest.param(9000, 5, 3, marks=pytest.mark.slow),
        (1, 1, 1),
        (0, 3, 2),
        (5, 2, 0),
    ],
)
@pytest.mark.parametrize("candidates", [True, False])
@pytest.mark.parametrize(("bits", "ties"), [pytest.param(8, False, marks=pytest.mark.slow), (8, True), (4, True)])
def test_topk(where, bits, candidates, n, clusters, k, ties, monkeypatch):
    from stable_rlhf.kernels import topk

    plan = topk._plan(n, clusters + 1, k)
    monkeypatch.setattr(topk, "_MOST_COUNTS", 1 << 24 if bits == 8 else 1)
    monkeypatch.setattr(topk, "_plan", lambda *sizes: plan if candidates else (1, 0))
    score, cluster = scores(n, ties), clusters_of(n, clusters)
    got, want = both(ops.topk_by_cluster, score, cluster, clusters + 1, k)
    assert got.cpu().tolist() == want.tolist()


SMALL, LARGE = 3000, 20_000
HARD = {  # the last: where a bucket overflows, when one row in so many is sampled
    "equal scores": (torch.zeros(SMALL), clusters_of(SMALL, 3), 5, {1, 8}),
    "equal scores, small clusters": (torch.ones(SMALL), clusters_of(SMALL, 30), 5, {}),
    "one cluster": (scores(LARGE), torch.zeros(LARGE, dtype=torch.int64), 5, {}),
    "rising": (scores(LARGE).sort().values, clusters_of(LARGE, 4), 5, {}),
    "falling": (scores(LARGE).sort(descending=True).values, clusters_of(LARGE, 4), 5, {}),
    "cluster by cluster": (scores(LARGE), clusters_of(LARGE, 20).sort().values, 5, {}),
    "sampled rows are worse": (scores(LARGE) - 9 * (torch.arange(LARGE) % 256 < 32), clusters_of(LARGE, 2), 5, {8}),
    "sizes far apart": (scores(LARGE), (clusters_of(LARGE, 1 << 30).double().log2() / 3).int(), 3, {}),
    "low digits": (1 + torch.arange(SMALL).flip(0) * 2.0**-23, clusters_of(SMALL, 9), 4, {}),
    "huge and tiny": (scores(SMALL).double().mul(80).sinh().float(), clusters_of(SMALL, 9), 4, {}),
}


@pytest.mark.parametrize("where", anywhere)
@pytest.mark.parametrize("sampled", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("equal scores, small clusters", "rising"))) for n in HARD],
)
def test_topk_of_hard_rows(where, name, sampled, monkeypatch):
    from stable_rlhf.kernels import topk

    score, cluster, k, overflows = HARD[name]
    launches, launch = [], topk._launch

    def counted(*arguments):
        launches.append((arguments[4], arguments[5] > 0))
        return launch(*arguments)

    monkeypatch.setattr(topk, "_launch", counted)
    monkeypatch.setattr(topk, "_SAMPLED", sampled)
    got, want = both(ops.topk_by_cluster, score, cluster, int(cluster.max()) + 2, k)
    assert got.cpu().tolist() == want.tolist()
    assert launches == [(sampled, True), (1, False)][: 1 + (sampled in overflows)]


@pytest.mark.parametrize(
    ("n", "clusters", "k", "sampled", "places"),
    [(10_000_000, 1000, 10, 8, 512), (10_000_000, 100_000, 10, 1, 128), (10_000_000, 1000, 500, 8, 8192),
     (10_000_000, 1000, 600, 1, 2048), (100, 3, 10, 1, 128), (10_000_000, 100, 5000, 1, 0),
     (1 << 30, 1 << 24, 1, 1, 0)],
)  # fmt: skip
def test_topk_by_sizes(n, clusters, k, sampled, places):
    from stable_rlhf.kernels import topk

    assert topk._plan(n, clusters, k) == (sampled, places)


@interpreted
@pytest.mark.parametrize(("k", "launches"), [(5, 11), (2000, 11), (5000, 18)])
def test_topk_waits_once(k, launches):
    """Candidates: four digits of a sample or of all, a pass, one program a cluster, the order; else 8 digits."""
    score, cluster = scores(4000), clusters_of(4000, 3)
    with ops.backend("torch"):
        want = ops.topk_by_cluster(score, cluster, 3, k)
    from stable_rlhf.kernels.topk import topk_by_cluster

    with accesses_checked() as launched, no_synchronisation(allowed=1):
        got = topk_by_cluster(score, cluster, 3, k)
    assert torch.equal(got, want) and len(launched) == launches


@pytest.mark.parametrize("where", anywhere)
def test_topk_of_other_types_and_bad_values(where):
    score, cluster = torch.tensor([1.0, 3.0, 3.0], device=DEVICE), torch.tensor([0, 1, 1], device=DEVICE)
    with ops.backend("triton"):
        for dtype in (torch.float64, torch.bfloat16):
            assert ops.topk_by_cluster(score.to(dtype), cluster.to(torch.uint8), 2, 1).tolist() == [0, 1]
        with pytest.raises(ValueError, match=r"^cluster: -7 at index 1 is outside \[0, 2\)"):
            ops.topk_by_cluster(score, torch.tensor([0, -7, 1], device=DEVICE), 2, 1)
        with pytest.raises(ValueError, match=r"^cluster: 0 at index 0 is outside \[0, 0\)"):
            ops.topk_by_cluster(score, cluster, 0, 1)
        with pytest.raises(ValueError, match=r"^score: NaN at index 2"):
            ops.topk_by_cluster(torch.tensor([1.0, 2.0, math.nan], device=DEVICE), cluster, 2, 1)


@interpreted
def test_bad_values_are_named_on_the_cpu():
    bad, good, cu_seqlens = torch.tensor([0.0, math.inf]), torch.zeros(2), torch.tensor([0, 2])
    with ops.backend("triton"):
        with pytest.raises(ValueError, match=r"^value: non-finite value inf at position 1"):
            ops.gae(good, bad, cu_seqlens)
        with pytest.raises(ValueError, match=r"^ref_logprob: non-finite value inf at position 1"):
            ops.token_rewards(good, bad, good[:1], cu_seqlens, kl_coef=0.1)
        with pytest.raises(ValueError, match=r"^x: non-finite value inf at position 1"):
            ops.masked_whiten(bad)


SEQUENCE_OPS = {
    "gae": lambda x, score, cu: ops.gae(x, x, cu, bootstrap_value=score),
    "token_rewards": lambda x, score, cu: ops.token_rewards(x, -x, score, cu, kl_coef=0.1),
    "masked_whiten": lambda x, score, cu: ops.masked_whiten(x, x > 0),
}


@interpreted
@pytest.mark.parametrize("name", SEQUENCE_OPS)
def test_nothing_is_read_on_the_host(name, monkeypatch):
    """So a CUDA graph can capture it. Where values are checked, as here by default, they are read."""
    from stable_rlhf.ops import sequence

    x, score, cu_seqlens = normal(9, dtype=torch.float32, seed=1), torch.ones(2), torch.tensor([0, 4, 9])
    with ops.backend("triton"):
        with pytest.raises(Synchronised), no_synchronisation():
            SEQUENCE_OPS[name](x, score, cu_seqlens)
        monkeypatch.setattr(sequence, "check_values", lambda device: False)
        with no_synchronisation(), accesses_checked():
            SEQUENCE_OPS[name](x, score, cu_seqlens)


@interpreted
@pytest.mark.parametrize("name", ["gae", "token_rewards"])
@pytest.mark.parametrize(
    "bounds", [[0, 4, 5000], [-9, 4, 9], [0, 8, 4], [-(1 << 60), 1 << 60, 3], [20, 30, 40], [9, 4, 0]]
)
def test_wrong_bounds_touch_no_memory(name, bounds, monkeypatch):
    """On a GPU nobody reads them for a check; they are noted, and told where the host next reads the device."""
    from stable_rlhf.ops import sequence
    from stable_rlhf.ops.flags import notes, tell

    monkeypatch.setattr(sequence, "check_values", lambda device: False)
    x, score = normal(9, dtype=torch.float32, seed=1), torch.ones(2)
    with ops.backend("triton"), accesses_checked() as launched:
        SEQUENCE_OPS[name](x, score, torch.tensor([0, 4, 9]))
        assert not notes(x.device).any()
        SEQUENCE_OPS[name](x, score, torch.tensor(bounds))
    assert len(launched) == 2
    with pytest.raises(ValueError, match=r"^cu_seqlens: "):
        tell(x.device, notes(x.device).tolist())


@pytest.mark.gpu
@on_gpu
def test_a_graph_of_gae_on_a_gpu():
    lengths = [300, 1, 2000]
    reward, value = (normal(sum(lengths), dtype=torch.float32, seed=seed).cuda() for seed in (0, 1))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).cuda()
    want = ops.gae(reward, value, cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.gae(reward, value, cu_seqlens)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one():
    score, cluster, cu_seqlens = scores(4000), clusters_of(4000, 3), torch.tensor([0, 1000, 4000])
    there = [x.to("cuda:1") for x in (score, cluster, cu_seqlens)]
    with torch.cuda.device(0):
        kept, (advantage, _) = ops.topk_by_cluster(*there[:2], 3, 5), ops.gae(there[0], there[0], there[2])
        whitened = ops.masked_whiten(there[0])
    assert kept.cpu().tolist() == ops.topk_by_cluster(score, cluster, 3, 5).tolist()
    close(advantage, ops.gae(score, score, cu_seqlens)[0].double(), torch.float32)
    close(whitened, ops.masked_whiten(score).double(), torch.float32)


@pytest.mark.gpu
@on_gpu
def test_topk_of_many_rows_on_a_gpu():
    """Atomic operations of many programs at once, and the same rows each time."""
    score, cluster = scores(3_000_000), clusters_of(3_000_000, 300)
    want = ops.topk_by_cluster(score, cluster, 300, 10)
    for _ in range(5):
        assert torch.equal(ops.topk_by_cluster(score.cuda(), cluster.cuda(), 300, 10).cpu(), want)
