"""topk_by_cluster against a loop over clusters, on every backend of the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stable_rlhf.ops as ops
from stable_rlhf.ops.backends import extension

BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(extension() is None, reason="no C++ module"))]


def naive_topk(score: list[float], cluster: list[int], num_clusters: int, k: int) -> list[int]:
    kept = []
    for c in range(num_clusters):
        members = [i for i, own in enumerate(cluster) if own == c]
        kept += sorted(members, key=lambda i: (-score[i], i))[:k]
    return sorted(kept)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 1.5, math.inf]), st.integers(0, 4)), max_size=40
    ),
    k=st.integers(0, 6),
)
def test_against_naive_with_many_ties(name, rows, k):
    score, cluster = [r[0] for r in rows], [r[1] for r in rows]
    with ops.backend(name):
        got = ops.topk_by_cluster(torch.tensor(score), torch.tensor(cluster, dtype=torch.int64), 6, k)
    assert got.dtype == torch.int64 and got.tolist() == naive_topk(score, cluster, 6, k)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
def test_larger_inputs_of_every_type(name, dtype, threads):
    g = torch.Generator().manual_seed(0)
    score = torch.randn(5000, generator=g, dtype=torch.float64).to(dtype)
    cluster = torch.randint(0, 300, (5000,), generator=g, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ops.backend(name):
            got = ops.topk_by_cluster(score, cluster, 300, 9)
    finally:
        torch.set_num_threads(before)
    assert got.tolist() == naive_topk(score.tolist(), cluster.tolist(), 300, 9)


@pytest.mark.parametrize("name", BACKENDS)
def test_small_and_empty_clusters(name):
    with ops.backend(name):
        assert ops.topk_by_cluster(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2, 0, 2]), 4, 5).tolist() == [0, 1, 2]
        assert ops.topk_by_cluster(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3, 2).tolist() == []
        assert ops.topk_by_cluster(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0, 2).tolist() == []


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_input(name):
    score, cluster = torch.arange(12.0).reshape(6, 2)[:, 0], torch.zeros(6, 2, dtype=torch.int64)[:, 1]
    with ops.backend(name):
        assert ops.topk_by_cluster(score, cluster, 1, 2).tolist() == [4, 5]


@pytest.mark.skipif(extension() is None, reason="no C++ module")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("order", "clusters", "k"),
    [("random", 300, 9), ("rising", 300, 9), ("falling", 300, 9), ("few values", 11, 500), ("random", 1, 1 << 40),
     ("random", 40_000, 2), ("few values", 300, 0), ("few values", 1, 1)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranges_of_threads_are_merged(order, clusters, k, dtype, threads):
    """Enough rows that every thread has a range; buffers that fill, and thresholds that rise."""
    n, g = 400_003, torch.Generator().manual_seed(1)
    score = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
    if order == "few values":
        score = score.round()
    elif order != "random":
        score = score.sort(descending=order == "falling").values
    cluster = torch.randint(0, clusters, (n,), generator=g)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = ops.topk_by_cluster(score, cluster, clusters, k)
    finally:
        torch.set_num_threads(before)
    with ops.backend("torch"):
        assert torch.equal(got, ops.topk_by_cluster(score, cluster, clusters, k))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
def test_bad_rows_anywhere(name, k, place):
    score, cluster = torch.arange(200_000.0).flip(0), torch.zeros(200_000, dtype=torch.int32)
    with ops.backend(name):
        score[place] = math.nan
        with pytest.raises(ValueError, match=f"^score: NaN at index {place}$"):
            ops.topk_by_cluster(score, cluster, 1, k)
        score[place], cluster[place] = 0.0, 1
        with pytest.raises(ValueError, match=f"^cluster: 1 at index {place} is outside"):
            ops.topk_by_cluster(score, cluster, 1, k)


S, C = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1])
BAD = [
    ((torch.tensor([1.0, math.nan, math.nan]), C, 2, 1), "score: NaN at index 1"),
    ((torch.zeros(3, 1), C, 2, 1), "score: shape"),
    ((torch.tensor([1, 2, 3]), C, 2, 1), "score: type int64"),
    ((S, torch.tensor([0, 1]), 2, 1), "cluster: shape"),
    ((S, torch.tensor([0.0, 1.0, 1.0]), 2, 1), "cluster: type float32"),
    ((S, torch.tensor([0, 1, 2]), 2, 1), r"cluster: 2 at index 2 is outside \[0, 2\)"),
    ((S, torch.tensor([0, -1, 1]), 2, 1), "cluster: -1 at index 1"),
    ((S, C.to("meta"), 2, 1), "cluster: on device meta"),
    ((S, C, -1, 1), "num_clusters: -1"),
    ((S, C, 2, -1), "k: -1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.topk_by_cluster(*arguments)
