"""Clusters of prompt embeddings: KMeans by faiss, or a Gaussian mixture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METHODS = ("kmeans", "gmm")
INITS = ("kmeans++", "afkmc2", "random")
_ROWS_PER_CHECK = 65_536

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clusters:
    """What `cluster_embeddings` found.

    assignment: int64 [n], the cluster of every row, in [0, c).
    centroids: float32 [c, d] (unit length when spherical, component means for a mixture).
    sizes: int64 [c], rows in each cluster; 0 is possible.
    inertia: sum over all n rows of the squared Euclidean distance to the centroid of their cluster (of the rows scaled
        to unit length when spherical), whatever the method.
    trained_on: rows the centroids were computed from; n unless `max_points_per_centroid` cut it.
    method: "kmeans" or "gmm".
    notes: what the caller did not ask for but got (fewer clusters, a subsample, no convergence), one sentence each.
    """

    assignment: np.ndarray
    centroids: np.ndarray
    sizes: np.ndarray
    inertia: float
    trained_on: int
    method: str
    notes: tuple[str, ...] = ()

    @property
    def num_clusters(self) -> int:
        return len(self.sizes)


def _checked(embeddings: np.ndarray) -> np.ndarray:
    """The rows as contiguous float32 [n, d], or a ValueError that names what is wrong."""
    if not isinstance(embeddings, np.ndarray):
        raise ValueError(f"embeddings must be a numpy array [n, d], got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(f"embeddings must be floating point [n, d], got {embeddings.dtype} {list(embeddings.shape)}")
    if 0 in embeddings.shape:
        raise ValueError(f"embeddings: nothing to cluster, shape {embeddings.shape}")
    for start in range(0, len(embeddings), _ROWS_PER_CHECK):
        finite = np.isfinite(embeddings[start : start + _ROWS_PER_CHECK]).all(axis=1)
        if not finite.all():
            raise ValueError(f"embeddings: row {start + int(np.argmin(finite))} holds NaN or infinite values")
    return np.ascontiguousarray(embeddings, dtype=np.float32)


def _count_distinct(rows: np.ndarray, up_to: int) -> int:
    """min(number of distinct rows, up_to); stops as soon as it knows, which is early unless rows repeat a lot."""
    seen: set[bytes] = set()
    for row in rows:
        seen.add((row + 0.0).tobytes())  # + 0.0 makes -0.0 and 0.0 the same bytes
        if len(seen) == up_to:
            break
    return len(seen)


def _faiss_index(d: int, spherical: bool, devices: Sequence[int] | None) -> Any:
    import faiss

    index = faiss.IndexFlatIP(d) if spherical else faiss.IndexFlatL2(d)
    if devices is None:
        return index
    present = faiss.get_num_gpus()
    if len(devices) == 0 or any(not 0 <= device < present for device in devices):
        raise ValueError(f"devices {list(devices)}: faiss {faiss.__version__} sees {present} GPUs; None is the CPU")
    return faiss.index_cpu_to_gpus_list(index, gpus=list(devices))


def _kmeans(
    rows: np.ndarray,
    train: np.ndarray,
    num_clusters: int,
    *,
    niter: int,
    seed: int,
    spherical: bool,
    init: str,
    devices: Sequence[int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    start = {
        "kmeans++": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        "afkmc2": faiss.ClusteringInitMethod_AFK_MC2,
        "random": faiss.ClusteringInitMethod_RANDOM,
    }[init]
    kmeans = faiss.Kmeans(
        train.shape[1],
        num_clusters,
        niter=niter,
        seed=seed,
        spherical=spherical,
        init_method=start,
        min_points_per_centroid=1,
        max_points_per_centroid=len(train),  # the caller subsampled already; faiss must not do it again
    )
    # Kmeans(gpu=...) counts devices and takes the first ones; a list of devices needs the index itself.
    kmeans.index = _faiss_index(train.shape[1], spherical, devices)
    kmeans.train(train)
    _, assignment = kmeans.assign(rows)
    return assignment.astype(np.int64), np.asarray(kmeans.centroids, dtype=np.float32)


def _mixture(
    rows: np.ndarray, train: np.ndarray, means: np.ndarray, labels: np.ndarray, *, niter: int, seed: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Diagonal Gaussian mixture by EM, started from a KMeans solution (means, labels of the training rows)."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    x = train.astype(np.float64)
    overall = x.var(axis=0)
    # A variance floor relative to the data: sklearn's absolute 1e-6 is nothing for one encoder and all for another.
    floor = max(1e-3 * float(overall.mean()), 1e-12)
    sizes = np.bincount(labels, minlength=len(means))
    variances = np.stack([x[labels == k].var(axis=0) if size > 1 else overall for k, size in enumerate(sizes)])
    weights = np.maximum(sizes, 1) / np.maximum(sizes, 1).sum()
    model = GaussianMixture(
        len(means),
        covariance_type="diag",
        max_iter=niter,
        reg_covar=floor,
        random_state=seed,
        # All three together, so that sklearn does not run its own KMeans first.
        means_init=means.astype(np.float64),
        weights_init=weights,
        precisions_init=1.0 / (variances + floor),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported in Clusters.notes instead
        model.fit(x)
    return model.predict(rows.astype(np.float64)).astype(np.int64), model.means_.astype(np.float32), model.converged_


def _inertia(rows: np.ndarray, centroids: np.ndarray, assignment: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(rows), _ROWS_PER_CHECK):
        part = slice(start, start + _ROWS_PER_CHECK)
        difference = rows[part] - centroids[assignment[part]]
        total += float(np.einsum("nd,nd->", difference, difference, dtype=np.float64))
    return total


def cluster_embeddings(
    embeddings: np.ndarray,
    num_clusters: int,
    *,
    method: str = "kmeans",
    niter: int = 25,
    seed: int = 0,
    spherical: bool = False,
    init: str = "kmeans++",
    max_points_per_centroid: int | None = None,
    devices: Sequence[int] | None = None,
) -> Clusters:
    """Partition n embeddings [n, d] into `num_clusters` groups (arXiv 2309.10202, section on Selective Rehearsal).

    method: "kmeans" (Lloyd's algorithm by faiss) or "gmm" (diagonal Gaussian mixture by scikit-learn in float64, begun
        at the KMeans solution with the same `niter`; a row goes to its most probable component; variances are floored
        at 1e-3 of the data's mean variance).
    niter: most iterations of Lloyd and of EM. Both stop earlier when nothing changes any more.
    spherical: scale rows to unit length (zero rows stay zero) and keep centroids on the unit sphere. KMeans only.
    init: "kmeans++" (one pass over the data for each centroid), "afkmc2" (its sampled approximation, for thousands of
        centroids) or "random" (rows drawn uniformly, faiss's own default, prone to poor minima).
    max_points_per_centroid: None trains on every row. An integer trains on a seeded sample of at most num_clusters
        times as many rows; all rows are assigned either way.
    devices: GPU numbers for KMeans; None is the CPU. No other GPU is touched.

    The same seed gives the same clusters, also with another number of threads (tested). Rows may repeat or be zero.
    Where there are fewer distinct rows than clusters, as many clusters as distinct rows are made; that is logged as a
    warning and stands in `Clusters.notes`. Raises ValueError for the wrong shape or type, NaN or infinite values (the
    first such row is named), and arguments out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    limit = 1 if max_points_per_centroid is None else max_points_per_centroid
    for name, value in (("num_clusters", num_clusters), ("niter", niter), ("max_points_per_centroid", limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if method == "gmm" and (spherical or devices is not None):
        raise ValueError(f"{'spherical' if spherical else 'devices'}: only KMeans has this option, method is 'gmm'")
    rows = _checked(embeddings)
    if spherical:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.where(norms > 0, norms, 1)

    notes: list[str] = []
    train = rows
    chosen: np.ndarray | slice = slice(None)  # the training rows' places in `rows`
    if max_points_per_centroid is not None and num_clusters * max_points_per_centroid < len(rows):
        generator = np.random.default_rng(seed)
        chosen = np.sort(generator.choice(len(rows), num_clusters * max_points_per_centroid, replace=False))
        train = rows[chosen]
        notes.append(f"trained on a sample of {len(train)} of {len(rows)} rows")
    distinct = _count_distinct(train, num_clusters)
    if distinct < num_clusters:
        notes.append(f"{num_clusters} clusters asked for, but only {distinct} distinct rows: {distinct} clusters made")
        logger.warning(notes[-1])
        num_clusters = distinct

    assignment, centroids = _kmeans(
        rows, train, num_clusters, niter=niter, seed=seed, spherical=spherical, init=init, devices=devices
    )
    if method == "gmm":
        assignment, centroids, converged = _mixture(rows, train, centroids, assignment[chosen], niter=niter, seed=seed)
        if not converged:
            notes.append(f"the mixture had not converged after {niter} iterations")
            logger.warning(notes[-1])
    return Clusters(
        assignment=assignment,
        centroids=centroids,
        sizes=np.bincount(assignment, minlength=num_clusters).astype(np.int64),
        inertia=_inertia(rows, centroids, assignment),
        trained_on=len(train),
        method=method,
        notes=tuple(notes),
    )
