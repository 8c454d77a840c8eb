"""The best k rows of each cluster: how Selective Rehearsal picks what to rehearse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from stable_rlhf.ops.backends import choice, extension, implementation, register
from stable_rlhf.ops.checks import FLOATS, INTEGERS, check_integer, check_tensor, first_true
from stable_rlhf.ops.operators import needs_operator

_MOST_ROWS = 1 << 31  # the kernels' row numbers have 32 bits; more rows go to PyTorch


def topk_by_cluster(score: Tensor, cluster: Tensor, num_clusters: int, k: int) -> Tensor:
    """Indices of the k highest scores of each cluster (arXiv 2309.10202, section 3.2).

    Row i is kept when fewer than k rows j of its cluster are better: score_j > score_i, or score_j = score_i and j < i.
    The result is the same for any number of threads and on every backend.

    Args:
        score: [n] floating point; infinities are allowed, NaN is not.
        cluster: [n] integer in [0, num_clusters).
        num_clusters: number of clusters, some may be empty.
        k: how many rows to keep of each cluster; a smaller cluster is kept whole.

    Returns:
        The kept indices into `score`, int64, ascending. Equal scores are kept in the order of their indices.

    Raises:
        ValueError: names the argument (shape, type, device, a NaN score, a cluster out of range, a negative k).
    """
    check_tensor("score", score, dtypes=FLOATS)
    if score.ndim != 1:
        raise ValueError(f"score: shape {tuple(score.shape)} instead of [n]")
    check_tensor("cluster", cluster, shape=tuple(score.shape), device=score.device, dtypes=INTEGERS)
    k = check_integer("k", k)
    num_clusters = check_integer("num_clusters", num_clusters, 0, 2**31)
    if score.dtype in (torch.bfloat16, torch.float16):
        score = score.float()  # exact
    k = min(k, score.numel())
    backend = choice("topk_by_cluster", score.device)
    if needs_operator(score, backend):
        return _operator(score.detach(), cluster, num_clusters, k, backend)
    with torch.no_grad():
        kept: Tensor = implementation("topk_by_cluster", backend)(score, cluster, num_clusters, k)
    return kept


@torch.library.custom_op("stable_rlhf::topk_by_cluster", mutates_args=())
def _operator(score: Tensor, cluster: Tensor, num_clusters: int, k: int, backend: str) -> Tensor:
    kept: Tensor = implementation("topk_by_cluster", backend)(score, cluster, num_clusters, k)
    return kept


@_operator.register_fake
def _(score, cluster, num_clusters, k, backend):
    context = torch.library.get_ctx()
    shapes = context._shape_env
    # The number of kept rows is data. `new_dynamic_size` alone would ask every caller of torch.compile for
    # torch._dynamo.config.capture_dynamic_output_shape_ops, which is there for operators that torch could leave out.
    kept = context.new_dynamic_size() if shapes is None else allocate_size(shapes)
    return score.new_empty(kept, dtype=torch.int64)


def _check_rows(score: Tensor, cluster: Tensor, num_clusters: int) -> None:
    """The number of kept rows is data: a synchronisation is due anyway, so values are checked on every device."""
    if bool(score.isnan().any()):
        raise ValueError(f"score: NaN at index {first_true(score.isnan())}")
    outside = (cluster < 0) | (cluster >= num_clusters)
    if bool(outside.any()):
        index = first_true(outside)
        raise ValueError(f"cluster: {int(cluster[index])} at index {index} is outside [0, {num_clusters})")


def _topk_torch(score: Tensor, cluster: Tensor, num_clusters: int, k: int) -> Tensor:
    cluster = cluster.to(torch.int64)
    _check_rows(score, cluster, num_clusters)
    # Two stable sorts, the less important key first: by score, then by cluster. Adding 0 turns -0.0 into 0.0, which
    # a radix sort would tell apart.
    by_score = torch.sort(score + 0.0, descending=True, stable=True).indices
    by_both = by_score[torch.sort(cluster[by_score], stable=True).indices]
    size = torch.bincount(cluster, minlength=num_clusters)
    start = size.cumsum(0) - size
    rank = torch.arange(score.numel(), device=score.device, dtype=torch.int64) - start[cluster[by_both]]
    return by_both[rank < k].sort().values


def _topk_cpu(score: Tensor, cluster: Tensor, num_clusters: int, k: int) -> Tensor:
    module = extension()
    assert module is not None
    if score.numel() >= _MOST_ROWS:
        return _topk_torch(score, cluster, num_clusters, k)
    kernel = module.topk_by_cluster_f64 if score.dtype == torch.float64 else module.topk_by_cluster_f32
    narrow = cluster.dtype == torch.int32
    score, cluster = score.contiguous(), (cluster if narrow else cluster.to(torch.int64)).contiguous()
    # Never more than this: memory that is not written costs nothing.
    kept = torch.empty(min(score.numel(), k * num_clusters), dtype=torch.int64, device="cpu")
    count = kernel(
        score.data_ptr(),
        cluster.data_ptr(),
        narrow,
        score.numel(),
        num_clusters,
        k,
        torch.get_num_threads(),
        kept.data_ptr(),
    )
    if count < 0:  # the reference says what is wrong
        return _topk_torch(score, cluster, num_clusters, k)
    return kept if count == kept.numel() else kept[:count].clone()


def _topk_triton(score: Tensor, cluster: Tensor, num_clusters: int, k: int) -> Tensor:
    from stable_rlhf.kernels.topk import topk_by_cluster as kernel

    kept = None
    # The kernel's keys hold 32 bits of a score.
    if score.dtype == torch.float32 and score.numel() < _MOST_ROWS and k > 0:
        kept = kernel(score.contiguous(), cluster.contiguous(), num_clusters, k)
    # The reference says what is wrong.
    return _topk_torch(score, cluster, num_clusters, k) if kept is None else kept


register("topk_by_cluster", {"torch": _topk_torch, "cpu": _topk_cpu, "triton": _topk_triton})
