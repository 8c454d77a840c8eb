"""Triton kernels for the k best scores of each cluster.

A row's key is its score's bits, made to grow with the score, above the complement of its index: the larger key is the
better row, ties included, and no two rows share one. Counts are integers and sets are put in order at the end: the
order of atomic operations changes nothing.

By candidates: a radix selection on the 32 bits of score in the keys of every eighth row (of all, where clusters are too
small for that) finds the k-th best of these, a bound that at least k rows of the cluster reach, so the k best are among
the rows that do. One pass collects these, in a bucket for each cluster; one program a cluster selects from its bucket,
by score first, by index where scores tie. What was kept is a bit a row, from which the ascending indices are written.

By all digits, where buckets would be large or one has overflown (many equal scores): the radix selection over all 64
bits of all rows, 8 passes, or 16 of half the digits where counters for 8 bits would be too many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_WARPS = 4
_MOST_COUNTS = 1 << 24  # 64 MiB of counters: above it digits are shorter and passes more
_SAMPLED = 8  # one row in so many is sampled
_MOST_CANDIDATES = 8192  # of a cluster: what a program holds in registers
_RUN = tl.constexpr(32)  # sampled rows lie in runs of 32: 128 bytes of scores
_GROUP = tl.constexpr(1 << 15)  # rows whose kept ones are counted together: 1,024 words of 32 bits


@triton.jit
def _key(score, index):
    """The key of a row, 64 bits, to be compared as an unsigned number."""
    return ((_rising(score).to(tl.int64) + 0x80000000) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _rising(score):
    """A score's bits as a signed number that grows with it."""
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 is 0.0
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _row(score_ptr, cluster_ptr, index, n, num_clusters):
    """Score and cluster of rows, and which of them there are and are sound."""
    inside = index < n
    score = tl.load(score_ptr + index, mask=inside, other=0.0)
    cluster = tl.load(cluster_ptr + index, mask=inside, other=0).to(tl.int64)
    return score, cluster, inside & (cluster >= 0) & (cluster < num_clusters) & (score == score)


@triton.jit
def _count_kernel(
    score_ptr, cluster_ptr, prefix_ptr, counts_ptr, n, num_clusters,
    SAMPLED: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows by their next digit, of those whose key begins like their cluster's prefix."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = index // _RUN * (_RUN * SAMPLED) + index % _RUN
    # A cluster out of range must not address anything: its row is left out.
    score, cluster, fit = _row(score_ptr, cluster_ptr, index, n, num_clusters)
    key = _key(score, index)
    if SHIFT + BITS < 64:
        prefix = tl.load(prefix_ptr + cluster, mask=fit, other=0)
        fit = fit & (((key ^ prefix) >> (SHIFT + BITS)) == 0)
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    tl.atomic_add(counts_ptr + (cluster << BITS) + digit, 1, mask=fit)


@triton.jit
def _digit_kernel(counts_ptr, prefix_ptr, wanted_ptr, k, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The digit in which the key of rank `wanted` among the counted rows lies; leaves the counters at 0."""
    cluster = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, 1 << BITS)
    own = counts_ptr + (cluster << BITS) + digit
    counts = tl.load(own)
    tl.store(own, tl.zeros_like(counts))
    if SHIFT + BITS == 64:  # fewer than k rows: all reach the bound, 0
        wanted = tl.where(tl.sum(counts, 0).to(tl.int64) >= k, tl.cast(k, tl.int64), 0)
        prefix = tl.zeros((), tl.int64)
    else:
        wanted = tl.load(wanted_ptr + cluster)
        prefix = tl.load(prefix_ptr + cluster)
    up_to = tl.cumsum(counts, 0)
    larger = (tl.sum(counts, 0) - up_to).to(tl.int64)  # rows whose digit is larger
    here = (larger < wanted) & (wanted <= larger + counts)
    chosen = tl.sum(tl.where(here, digit, 0), 0).to(tl.int64)
    tl.store(prefix_ptr + cluster, prefix | (chosen << SHIFT))
    tl.store(wanted_ptr + cluster, wanted - tl.sum(tl.where(here, larger, 0), 0))


@triton.jit
def _reaches(key, bound):
    return key.to(tl.uint64, bitcast=True) >= bound.to(tl.uint64, bitcast=True)


@triton.jit
def _check(status_ptr, index, fit, n):
    wrong = tl.max(((index < n) & (fit == 0)).to(tl.int32), 0)
    tl.atomic_max(status_ptr, wrong, mask=wrong > 0)


@triton.jit
def _collect_kernel(
    score_ptr, cluster_ptr, prefix_ptr, candidates_ptr, bucket_ptr, status_ptr, n, num_clusters,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the rows that reach their cluster's bound into its bucket. Their order there is of no consequence."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score, cluster, fit = _row(score_ptr, cluster_ptr, index, n, num_clusters)
    _check(status_ptr, index, fit, n)
    bound = tl.load(prefix_ptr + cluster, mask=fit, other=0)
    candidate = fit & _reaches(_key(score, index), bound)
    place = tl.atomic_add(candidates_ptr + cluster, 1, mask=candidate)
    tl.store(bucket_ptr + cluster * CAPACITY + place, index.to(tl.int32), mask=candidate & (place < CAPACITY))


@triton.jit
def _select_kernel(
    score_ptr, candidates_ptr, bucket_ptr, kept_ptr, groups_ptr, status_ptr, k, CAPACITY: tl.constexpr
):  # fmt: skip
    """Sets the bits of the best k rows of a bucket, or says that there was no place for all candidates."""
    cluster = tl.program_id(0).to(tl.int64)
    candidates = tl.load(candidates_ptr + cluster)
    if candidates > CAPACITY:
        tl.store(status_ptr + 1, 1)
    elif candidates > 0:
        lane = tl.arange(0, CAPACITY)
        mine = lane < candidates
        index = tl.load(bucket_ptr + cluster * CAPACITY + lane, mask=mine, other=0)
        # No score, nor minus infinity, is as low as what stands in the other places.
        score = tl.where(mine, _rising(tl.load(score_ptr + index, mask=mine, other=0.0)), -0x80000000)
        wanted = tl.minimum(candidates, k)
        # The largest bound that `wanted` scores reach: from the lowest number upwards, bit by bit.
        bound = tl.full((), -0x80000000, tl.int64)
        for step in range(0, 32):
            higher = bound + (tl.full((), 0x80000000, tl.int64) >> step)
            reach = tl.sum((score >= higher.to(tl.int32)).to(tl.int32), 0)
            bound = tl.where(reach >= wanted, higher, bound)
        better = score > bound.to(tl.int32)
        equal = score == bound.to(tl.int32)
        wanted -= tl.sum(better.to(tl.int32), 0)
        if tl.sum(equal.to(tl.int32), 0) > wanted:  # of these the lowest indices: as many as lie below `last`
            last = tl.full((), 0x7FFFFFFF, tl.int32)
            for step in range(1, 32):
                lower = last ^ (tl.full((), 1, tl.int32) << (31 - step))
                last = tl.where(tl.sum((equal & (index <= lower)).to(tl.int32), 0) >= wanted, lower, last)
            equal &= index <= last
        keep = better | equal
        tl.atomic_or(kept_ptr + (index >> 5), tl.full((CAPACITY,), 1, tl.int32) << (index & 31), mask=keep)
        tl.atomic_add(groups_ptr + index // _GROUP, 1, mask=keep)


@triton.jit
def _keep_kernel(
    score_ptr, cluster_ptr, prefix_ptr, kept_ptr, groups_ptr, status_ptr, n, num_clusters, BLOCK: tl.constexpr
):  # fmt: skip
    """Sets the bits of the rows that reach their cluster's bound."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score, cluster, fit = _row(score_ptr, cluster_ptr, index, n, num_clusters)
    _check(status_ptr, index, fit, n)
    worst = tl.load(prefix_ptr + cluster, mask=fit, other=0)
    keep = tl.reshape((fit & _reaches(_key(score, index), worst)).to(tl.int32), (BLOCK // 32, 32))
    words = tl.sum(keep << tl.arange(0, 32)[None, :], 1)
    word = tl.program_id(0).to(tl.int64) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    tl.store(kept_ptr + word, words, mask=word * 32 < n)
    number = tl.sum(tl.sum(keep, 1), 0)
    tl.atomic_add(groups_ptr + tl.program_id(0).to(tl.int64) * BLOCK // _GROUP, number, mask=number > 0)


@triton.jit
def _ones(word):
    """How many bits of an unsigned number of 32 bits are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) & 0xFFFFFFFF) >> 24


@triton.jit
def _order_kernel(kept_ptr, groups_ptr, rows_ptr, status_ptr, words, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """The indices of the bits that are set, ascending; each program those of one group."""
    group = tl.program_id(0).to(tl.int64)
    before = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, group, BLOCK):
        other = first + tl.arange(0, BLOCK)
        before += tl.load(groups_ptr + other, mask=other < group, other=0)
    start = tl.sum(before, 0)
    own = group * WORDS + tl.arange(0, WORDS)
    word = tl.load(kept_ptr + own, mask=own < words, other=0).to(tl.int64) & 0xFFFFFFFF
    number = _ones(word)
    place = start + tl.cumsum(number, 0) - number
    for _ in range(0, tl.max(number, 0)):
        lowest = word & -word
        tl.store(rows_ptr + place, own * 32 + _ones(lowest - 1), mask=word != 0)
        place += (word != 0).to(tl.int64)
        word ^= lowest
    if group == tl.num_programs(0) - 1:
        tl.store(status_ptr + 2, start + tl.sum(number, 0))


def _bound(
    score: Tensor, cluster: Tensor, counts: Tensor, num_clusters: int, k: int, bits: int, sampled: int, digits: int
) -> Tensor:
    """[num_clusters] the key of rank k by its upper `digits` bits, of one row in `sampled`; 0 for fewer than k."""
    n = score.numel()
    rows = triton.cdiv(n, _RUN.value * sampled) * _RUN.value
    prefix, wanted = torch.empty(2, num_clusters, dtype=torch.int64, device=score.device)
    for shift in range(64 - bits, 63 - digits, -bits):
        _count_kernel[(triton.cdiv(rows, _BLOCK),)](
            score, cluster, prefix, counts, n, num_clusters, SAMPLED=sampled, SHIFT=shift, BITS=bits, BLOCK=_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
        _digit_kernel[(num_clusters,)](counts, prefix, wanted, k, SHIFT=shift, BITS=bits, num_warps=1)
    return prefix


def _plan(n: int, num_clusters: int, k: int) -> tuple[int, int]:
    """One row in how many is sampled, and the places of a bucket: about twice the candidates to be expected, or 0 where
    buckets would be too large. Where all rows are sampled, candidates are the k best and what ties with the last."""
    for sampled, spare in ((_SAMPLED, 128), (1, 64)):
        places = triton.next_power_of_2(2 * sampled * k + spare)
        enough = sampled == 1 or n >= 2 * sampled * k * num_clusters  # of a cluster, most have 2 k in their sample
        if enough and places <= _MOST_CANDIDATES and num_clusters * places <= _MOST_COUNTS:
            return sampled, places
    return 1, 0


def topk_by_cluster(score: Tensor, cluster: Tensor, num_clusters: int, k: int) -> Tensor | None:
    """Ascending indices of the k best rows of each cluster; None where a score is NaN or a cluster out of range.

    The host waits once, for the number of kept rows; once more where a bucket has overflown.

    Args:
        score: [n] contiguous float32, n below 2^31.
        cluster: [n] contiguous integers.
        k: at least 1.
    """
    n = score.numel()
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=score.device)
    if num_clusters == 0:
        return None
    with torch.cuda.device_of(score):
        kept, (bad, overflown) = _launch(score, cluster, num_clusters, k, *_plan(n, num_clusters, k))
        if overflown and not bad:
            kept, _ = _launch(score, cluster, num_clusters, k, 1, 0)
    return None if bad else kept


def _launch(
    score: Tensor, cluster: Tensor, num_clusters: int, k: int, sampled: int, capacity: int
) -> tuple[Tensor, tuple[int, int]]:
    """The kept rows, and whether rows are wrong or a bucket has overflown; `capacity` 0: by all digits."""
    n, device = score.numel(), score.device
    bits = 8 if num_clusters << 8 <= _MOST_COUNTS else 4
    blocks, words, groups = triton.cdiv(n, _BLOCK), triton.cdiv(n, 32), triton.cdiv(n, _GROUP.value)
    sizes = (num_clusters << bits, num_clusters if capacity else 0, words, groups, 3)
    sizes = tuple(triton.cdiv(size, 4) * 4 for size in sizes)  # each begins at a multiple of 16 bytes
    counts, candidates, kept, per_group, status = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    rows = torch.empty(min(n, k * num_clusters), dtype=torch.int64, device=device)
    if capacity:
        # A cluster whose sample has fewer than k rows has all of its rows in its bucket.
        bound = _bound(score, cluster, counts, num_clusters, k, bits, sampled, 32)
        bucket = torch.empty(num_clusters * capacity, dtype=torch.int32, device=device)
        _collect_kernel[(blocks,)](
            score, cluster, bound, candidates, bucket, status, n, num_clusters, CAPACITY=capacity, BLOCK=_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
        _select_kernel[(num_clusters,)](
            score, candidates, bucket, kept, per_group, status, k, CAPACITY=capacity,
            num_warps=max(1, min(8, capacity // 256)),
        )  # fmt: skip
    else:
        bound = _bound(score, cluster, counts, num_clusters, k, bits, sampled, 64)
        _keep_kernel[(blocks,)](
            score, cluster, bound, kept, per_group, status, n, num_clusters, BLOCK=_BLOCK, num_warps=2 * _WARPS
        )  # fmt: skip
    _order_kernel[(groups,)](
        kept, per_group, rows, status, words, WORDS=_GROUP.value // 32, BLOCK=_BLOCK, num_warps=2 * _WARPS
    )  # fmt: skip
    bad, overflown, number, _ = status.tolist()
    return rows if number == rows.numel() else rows[:number].clone(), (bad, overflown)
