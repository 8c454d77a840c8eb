"""Triton kernels for the k best scores of each cluster: a radix selection on keys that no two rows share.

A row's key is its score's bits, made to grow with the score, above the complement of its index: the larger key is the
better row, ties included. Digit by digit from the highest, rows whose key begins like their cluster's k-th best are
counted by digit, and one program a cluster finds the next digit. The counts are integers: the order of the atomic
additions changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_WARPS = 4
_MOST_COUNTS = 1 << 24  # 64 MiB of counters: above it digits are shorter and passes more


@triton.jit
def _key(score, index):
    """The key of a row, 64 bits, to be compared as an unsigned number."""
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 is 0.0
    bits = score.to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return (rising << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _count_kernel(
    score_ptr,
    cluster_ptr,
    bad_ptr,
    prefix_ptr,
    counts_ptr,
    n,
    num_clusters,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    score = tl.load(score_ptr + index, mask=inside, other=0.0)
    cluster = tl.load(cluster_ptr + index, mask=inside, other=0).to(tl.int64)
    fit = (cluster >= 0) & (cluster < num_clusters) & (score == score)
    if SHIFT + BITS == 64:
        wrong = tl.max((inside & (fit == 0)).to(tl.int32), 0)
        tl.atomic_max(bad_ptr, wrong, mask=wrong > 0)
    # A cluster out of range must not address anything: its row is left out, and the caller told.
    inside = inside & fit
    key = _key(score, index)
    if SHIFT + BITS < 64:
        prefix = tl.load(prefix_ptr + cluster, mask=inside, other=0)
        inside = inside & (((key ^ prefix) >> (SHIFT + BITS)) == 0)
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    tl.atomic_add(counts_ptr + (cluster << BITS) + digit, 1, mask=inside)


@triton.jit
def _digit_kernel(counts_ptr, prefix_ptr, wanted_ptr, k, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The digit in which the key of rank `wanted` among the counted rows lies; leaves the counters at 0."""
    cluster = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, 1 << BITS)
    own = counts_ptr + (cluster << BITS) + digit
    counts = tl.load(own)
    tl.store(own, tl.zeros_like(counts))
    if SHIFT + BITS == 64:  # a smaller cluster is kept whole: down to its worst row
        wanted = tl.minimum(tl.sum(counts, 0).to(tl.int64), k)
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
def _keep_kernel(score_ptr, cluster_ptr, prefix_ptr, kept_ptr, n, num_clusters, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    score = tl.load(score_ptr + index, mask=inside, other=0.0)
    cluster = tl.load(cluster_ptr + index, mask=inside, other=0).to(tl.int64)
    fit = inside & (cluster >= 0) & (cluster < num_clusters)
    worst = tl.load(prefix_ptr + cluster, mask=fit, other=0)
    keep = _key(score, index).to(tl.uint64, bitcast=True) >= worst.to(tl.uint64, bitcast=True)
    tl.store(kept_ptr + index, keep & fit, mask=inside)


def topk_by_cluster(score: Tensor, cluster: Tensor, num_clusters: int, k: int) -> Tensor | None:
    """Ascending indices of the k best rows of each cluster; None where a score is NaN or a cluster out of range.

    Args:
        score: [n] contiguous float32, n below 2^31.
        cluster: [n] contiguous integers.
        k: at least 1.
    """
    n, device = score.numel(), score.device
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    bits = 8 if num_clusters << 8 <= _MOST_COUNTS else 4
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    counts = torch.zeros(max(num_clusters, 1) << bits, dtype=torch.int32, device=device)
    prefix, wanted = (torch.empty(max(num_clusters, 1), dtype=torch.int64, device=device) for _ in range(2))
    kept = torch.empty(n, dtype=torch.bool, device=device)
    blocks = (triton.cdiv(n, _BLOCK),)
    for shift in range(64 - bits, -1, -bits):
        _count_kernel[blocks](
            score, cluster, bad, prefix, counts, n, num_clusters, SHIFT=shift, BITS=bits, BLOCK=_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
        if num_clusters > 0:
            _digit_kernel[(num_clusters,)](counts, prefix, wanted, k, SHIFT=shift, BITS=bits, num_warps=1)
    if bool(bad):
        return None
    _keep_kernel[blocks](score, cluster, prefix, kept, n, num_clusters, BLOCK=_BLOCK, num_warps=_WARPS)
    return torch.nonzero(kept).squeeze(1)
