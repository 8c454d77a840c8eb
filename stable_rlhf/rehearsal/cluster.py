"""Clusters of prompt embeddings: KMeans on the CPU or on GPUs, or a Gaussian mixture; the rows may lie on disk."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stable_rlhf.rehearsal import kmeans
from stable_rlhf.show.progress import progress
from stable_rlhf.system.extras import require

METHODS = ("kmeans", "gmm")
BACKENDS = ("auto", "cpu", "cuda", "faiss", "flash-kmeans")
INITS = ("kmeans++", "random")
_ROWS_PER_SEARCH = 65_536

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clusters:
    """What `cluster_embeddings` found, or groups that were known (`known_groups`).

    assignment: int64 [n], the cluster of every row, in [0, c).
    centroids: float32 [c, d] (unit length when spherical, component means for a mixture).
    sizes: int64 [c], rows in each cluster; 0 is possible.
    inertia: sum over all n rows of the squared Euclidean distance to the centroid of their cluster (of the rows scaled
        to unit length when spherical), whatever the method; NaN where the rows have no embeddings.
    trained_on: rows the centroids were computed from; n unless `train_rows` cut it.
    method: "kmeans" or "gmm"; "task" or "none" for known groups, whose centroids are [c, 0].
    notes: what the caller did not ask for but got (fewer clusters, a subsample, no convergence), one sentence each.
    backend: "cpu", "cuda", "faiss" or "flash-kmeans".
    iterations: of Lloyd's algorithm, with our own backends (cpu, cuda) until nothing changed.
    """

    assignment: np.ndarray
    centroids: np.ndarray
    sizes: np.ndarray
    inertia: float
    trained_on: int
    method: str
    notes: tuple[str, ...] = ()
    backend: str = "cpu"
    iterations: int = 0

    @property
    def num_clusters(self) -> int:
        return len(self.sizes)


def known_groups(names: Sequence[str], method: str) -> Clusters:
    """Rows grouped by a name each, no embeddings needed; groups stand in the order of their names."""
    found, assignment, sizes = np.unique(np.asarray(names), return_inverse=True, return_counts=True)
    none = np.zeros((len(found), 0), dtype=np.float32)
    return Clusters(assignment.astype(np.int64), none, sizes.astype(np.int64), np.nan, len(names), method)


def _check_shape(embeddings: np.ndarray) -> None:
    if not isinstance(embeddings, np.ndarray):
        raise ValueError(f"embeddings must be a numpy array [n, d], got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(f"embeddings must be floating point [n, d], got {embeddings.dtype} {list(embeddings.shape)}")
    if 0 in embeddings.shape:
        raise ValueError(f"embeddings: nothing to cluster, shape {embeddings.shape}")


def _check_finite(embeddings: np.ndarray, squared: np.ndarray) -> None:
    """Raise for the first row whose squared length is not finite."""
    bad = np.flatnonzero(~np.isfinite(squared))
    if not len(bad):
        return
    if not np.isfinite(embeddings[bad[0]]).all():
        raise ValueError(f"embeddings: row {bad[0]} holds NaN or infinite values")
    raise ValueError(f"embeddings: row {bad[0]} is too long, its squared length overflows float32")


class _Blocks(Protocol):
    """Rows in blocks of `kmeans.BLOCK_ROWS`, float32 on the host."""

    def __len__(self) -> int: ...

    def scaled(self, start: int, /) -> np.ndarray: ...


def _first_distinct(rows: _Blocks, most: int) -> np.ndarray:
    """Places of the first rows of which no two are equal, at most `most`; early, unless rows repeat a lot."""
    seen: set[bytes] = set()
    places: list[int] = []
    for start in range(0, len(rows), kmeans.BLOCK_ROWS):
        block = rows.scaled(start)
        # The first few are enough unless rows repeat, and to sort a whole block takes as long as a product with it.
        for low, high in ((0, most), (most, len(block))):
            part = np.ascontiguousarray(block[low:high] + np.float32(0))  # -0.0 and 0.0 become the same bytes
            # One unique over many rows first: a million equal ones must not go through Python one by one.
            keys = part.view(np.dtype((np.void, part.shape[1] * part.itemsize)))[:, 0]
            _, firsts = np.unique(keys, return_index=True)
            for index in np.sort(firsts).tolist():
                key = keys[index].tobytes()
                if key not in seen:
                    seen.add(key)
                    places.append(start + low + index)
                    if len(places) == most:
                        return np.array(places)
    return np.array(places)


def _note(notes: list[str], text: str) -> None:
    notes.append(text)
    logger.warning(text)


def _distinct(train: _Blocks, num_clusters: int, notes: list[str]) -> tuple[np.ndarray, int]:
    """Places of distinct rows, one a cluster, and as many clusters as there are of them."""
    distinct = _first_distinct(train, num_clusters)
    if len(distinct) < num_clusters:
        made = f"{len(distinct)} clusters made"
        _note(notes, f"{num_clusters} clusters asked for, but only {len(distinct)} distinct rows: {made}")
    return distinct, len(distinct)


def check_clustering(method: str, backend: str, devices: Sequence[int] | None, spherical: bool) -> str:
    """The backend that serves these options.

    Raises:
        ValueError: options that do not go together, a package or a GPU that is not here.
    """
    if method == "gmm" and (spherical or devices is not None):
        raise ValueError(f"{'spherical' if spherical else 'devices'}: only KMeans has this option, method is 'gmm'")
    chosen = _choose_backend(backend, devices, spherical)
    if chosen == "faiss" and devices is not None:
        _check_devices(devices)
    if chosen == "cuda" and devices is not None:
        _cuda_device(devices[0])
    return chosen


def _choose_backend(backend: str, devices: Sequence[int] | None, spherical: bool) -> str:
    """The backend that "auto" stands for, or the one asked for; a ValueError where it cannot serve."""
    if backend == "auto":
        if devices is None:
            return "cpu"
        return "cuda" if len(devices) == 1 and _cuda_devices() else "faiss"
    if backend == "cpu" and devices is not None:
        raise ValueError(
            f"devices {list(devices)}: the cpu backend uses none; choose 'auto', 'cuda', 'faiss' or 'flash-kmeans'"
        )
    if backend == "flash-kmeans" and importlib.util.find_spec("flash_kmeans") is None:
        raise ValueError("backend 'flash-kmeans' needs the package flash-kmeans: pip install flash-kmeans")
    if backend in ("cuda", "flash-kmeans") and (devices is None or len(devices) != 1):
        raise ValueError(f"backend {backend!r} runs on one CUDA device, as in devices=[0], got {devices}")
    if backend == "flash-kmeans" and spherical:
        raise ValueError("spherical: backend 'flash-kmeans' has no spherical k-means; choose 'cuda' or 'faiss'")
    return backend


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cuda_device(number: int) -> Any:
    import torch

    present = _cuda_devices()
    if not 0 <= number < present:
        raise ValueError(f"devices [{number}]: torch {torch.__version__} sees {present} CUDA devices; None is the CPU")
    return torch.device("cuda", number)


def _check_devices(devices: Sequence[int]) -> None:
    import faiss

    present = faiss.get_num_gpus()
    if len(devices) == 0 or any(not 0 <= device < present for device in devices):
        raise ValueError(f"devices {list(devices)}: faiss {faiss.__version__} sees {present} GPUs; None is the CPU")


def _faiss_index(d: int, spherical: bool, devices: Sequence[int] | None) -> Any:
    import faiss

    index = faiss.IndexFlatIP(d) if spherical else faiss.IndexFlatL2(d)
    if devices is None:
        return index
    _check_devices(devices)
    return faiss.index_cpu_to_gpus_list(index, gpus=list(devices))


def _faiss(
    train: np.ndarray, start: np.ndarray, *, niter: int, seed: int, spherical: bool, devices: Sequence[int] | None
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Centroids by faiss from the given start, and what finds the nearest of them for each row of a block."""
    import faiss

    c, d = start.shape
    trainer = faiss.Kmeans(
        d, c, niter=niter, seed=seed, spherical=spherical, min_points_per_centroid=1,
        max_points_per_centroid=len(train),  # the caller subsampled already; faiss must not do it again
    )  # fmt: skip
    # Kmeans(gpu=...) counts devices and takes the first ones; a list of devices needs the index itself.
    trainer.index = index = _faiss_index(d, spherical, devices)
    trainer.train(train, init_centroids=start)
    centroids = np.ascontiguousarray(trainer.centroids, dtype=np.float32)
    index.reset()
    index.add(centroids)
    return centroids, lambda block: index.search(block, 1)[1][:, 0]


def _flash(
    train: np.ndarray, start: np.ndarray, *, niter: int, device: int
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Centroids by flash-kmeans on one CUDA device from the given start, and what finds the nearest of them."""
    import torch
    from flash_kmeans import batch_kmeans_Euclid

    where = torch.device("cuda", device)
    _, batched, *_ = batch_kmeans_Euclid(
        torch.from_numpy(train).to(where)[None], len(start), max_iters=niter, tol=0.0,
        init_centroids=torch.from_numpy(start).to(where)[None],
    )  # fmt: skip
    centroids = batched[0].float()
    half = centroids.square().sum(1) / 2

    def nearest(block: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(block).to(where) @ centroids.T - half).argmax(1).cpu().numpy()

    return centroids.cpu().numpy(), nearest


def _mixture(
    train: np.ndarray, means: np.ndarray, labels: np.ndarray, *, niter: int, seed: int
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray], bool]:
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
    return model.means_.astype(np.float32), lambda block: model.predict(block.astype(np.float64)), model.converged_


def _stream(rows: kmeans.Rows, nearest: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """int64 [n], what `nearest` says of every row, in blocks large enough for a GPU."""
    assignment = np.empty(len(rows), dtype=np.int64)
    with progress("assigning", total=len(rows), unit="rows") as bar:
        for start in range(0, len(rows), _ROWS_PER_SEARCH):
            places = np.arange(start, min(start + _ROWS_PER_SEARCH, len(rows)))
            assignment[places] = nearest(rows.take(places))
            bar.advance(len(places))
    return assignment


def _on_device(
    embeddings: np.ndarray,
    num_clusters: int,
    device: Any,
    generator: np.random.Generator,
    *,
    niter: int,
    spherical: bool,
    init: str,
    train_rows: int | None,
    resident: bool | None = None,
) -> Clusters:
    """`cluster_embeddings` by the cuda backend; `resident`: whether rows stay on the device, None: where they fit."""
    import torch

    from stable_rlhf.rehearsal import device_kmeans
    from stable_rlhf.rehearsal.device_rows import DeviceRows

    notes: list[str] = []
    n = len(embeddings)
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        rows = DeviceRows(embeddings, device, resident=resident)
        _check_finite(embeddings, rows.measure())
        rows.settle(spherical)
        train = rows
        if train_rows is not None and max(train_rows, num_clusters) < n:
            train = rows.subset(np.sort(generator.choice(n, max(train_rows, num_clusters), replace=False)))
            _note(notes, f"trained on a sample of {len(train)} of {n} rows")
        distinct, num_clusters = _distinct(train, num_clusters, notes)
        if init == "random":
            places = np.sort(generator.choice(len(train), num_clusters, replace=False))
        else:
            places = device_kmeans.plus_plus(train, num_clusters, distinct, generator)
        fit = device_kmeans.lloyd(train, train.take(places), niter=niter, spherical=spherical)
        labels = fit.labels
        if train is not rows or not fit.converged:
            labels = device_kmeans.assign(rows, fit.centroids, spherical=spherical)
        inertia = float(device_kmeans.distances(rows, fit.centroids, labels).sum(dtype=torch.float64))
        centroids = fit.centroids if rows.offset is None else fit.centroids + rows.offset
        assignment = labels.cpu().numpy()
        return Clusters(
            assignment=assignment,
            centroids=centroids.cpu().numpy(),
            sizes=np.bincount(assignment, minlength=num_clusters).astype(np.int64),
            inertia=inertia,
            trained_on=len(train),
            method="kmeans",
            notes=tuple(notes),
            backend="cuda",
            iterations=fit.iterations,
        )


def cluster_embeddings(
    embeddings: np.ndarray,
    num_clusters: int,
    *,
    method: str = "kmeans",
    niter: int = 25,
    seed: int = 0,
    spherical: bool = False,
    init: str = "kmeans++",
    train_rows: int | None = None,
    backend: str = "auto",
    devices: Sequence[int] | None = None,
    threads: int | None = None,
) -> Clusters:
    """Partition n embeddings [n, d] into `num_clusters` groups (arXiv 2309.10202, section on Selective Rehearsal).

    embeddings: floating point, in memory or a memory map (`open_embeddings(folder).array`).
    method: "kmeans" (Lloyd's algorithm) or "gmm" (diagonal Gaussian mixture by scikit-learn in float64, begun
        at the KMeans solution with the same `niter`; a row goes to its most probable component; variances are floored
        at 1e-3 of the data's mean variance).
    niter: most iterations of Lloyd and of EM. Both stop earlier when nothing changes any more (not by faiss nor
        flash-kmeans).
    spherical: scale rows to unit length (zero rows stay zero) and keep centroids on the unit sphere. KMeans only.
    init: "kmeans++" (drawn from at most max(16,384, 32 c) of the training rows, for the price of about one iteration)
        or "random" (rows drawn uniformly, faiss's own default, prone to poor minima).
    train_rows: None trains on every row. An integer trains on a seeded sample of at most that many (at least one a
        cluster); all rows are assigned either way, and `Clusters.trained_on` says what it was.
    backend: "cpu" is the package's own Lloyd over blocks of rows; it holds no more than blocks of rows in memory,
        however many there are. "cuda" is the same algorithm on one CUDA device: rows stay there where 10 bytes a value
        and 5 GiB are within nine tenths of its free memory, and are streamed through pinned memory every pass where
        not, within those 5 GiB (and 12 bytes a value of the rows that k-means++ draws from, while it does).
        "faiss" runs on the CPU or on the `devices`, "flash-kmeans" on one CUDA device; they hold the training rows in
        memory as float32, and a mixture holds them as float64: give `train_rows` for large n. "auto" is "cpu"
        without `devices`, "cuda" with one that torch sees, else faiss.
    devices: GPU numbers for KMeans; None is the CPU. No other GPU is touched.
    threads: of the cpu backend; None takes as many as BLAS may use.

    The same seed gives the same clusters, also with another number of threads: bit by bit on the cpu backend, and on
    the cuda backend with the same device and libraries, whether rows stay there or are streamed. Rows may repeat or be
    zero. Where there are fewer distinct rows than clusters, as many clusters as distinct rows are made;
    that is logged as a warning and stands in `Clusters.notes`. Raises ValueError for the wrong shape or type, NaN or
    infinite values (the first such row is named), and arguments out of range.
    """
    require("cluster_embeddings", "threadpoolctl", "scipy", "sklearn")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    limits = {"num_clusters": num_clusters, "niter": niter, "train_rows": train_rows, "threads": threads}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    backend = check_clustering(method, backend, devices, spherical)
    _check_shape(embeddings)

    generator = np.random.default_rng(seed)
    if backend == "cuda":
        assert devices is not None
        return _on_device(
            embeddings, num_clusters, _cuda_device(devices[0]), generator, niter=niter, spherical=spherical, init=init,
            train_rows=train_rows,
        )  # fmt: skip
    notes: list[str] = []
    n = len(embeddings)
    scale: np.ndarray | None = None
    with kmeans.open_rows(embeddings, threads=threads) as rows:
        squared = kmeans.squared_lengths(rows)
        _check_finite(embeddings, squared)
        if spherical:
            scale = np.where(squared > 0, 1 / np.sqrt(np.maximum(squared, np.float32(1e-38))), 0).astype(np.float32)
        rows.scale = scale
        offset = rows.offset = None if spherical else kmeans.common_offset(rows, squared)
        train = rows
        if train_rows is not None and max(train_rows, num_clusters) < n:
            chosen = np.sort(generator.choice(n, max(train_rows, num_clusters), replace=False))
            train = rows.of(rows.take(chosen))
            _note(notes, f"trained on a sample of {len(train)} of {n} rows")
        distinct, num_clusters = _distinct(train, num_clusters, notes)
        if init == "random":
            places = np.sort(generator.choice(len(train), num_clusters, replace=False))
        else:
            places = kmeans.plus_plus(train, num_clusters, distinct, generator)
        start = train.take(places)
        iterations = niter
        if backend == "cpu":
            result = kmeans.lloyd(train, start, niter=niter, spherical=spherical)
            centroids, iterations = result.centroids, result.iterations
            wanted = train if method == "gmm" else rows
            if result.converged and wanted is train:
                assignment = result.labels.astype(np.int64)
            else:
                assignment = kmeans.assign(wanted, centroids, spherical=spherical)
            if method == "kmeans":
                inertia = float(kmeans.distances(rows, centroids, assignment).sum(dtype=np.float64))
    # What follows is other libraries' code, with as many BLAS threads as they like.
    if backend != "cpu" or method == "gmm":
        held = train.whole()
        if backend == "faiss":
            centroids, nearest = _faiss(
                held, start, niter=niter, seed=seed, spherical=spherical, devices=devices
            )  # fmt: skip
        elif backend == "flash-kmeans":
            assert devices is not None
            centroids, nearest = _flash(held, start, niter=niter, device=devices[0])
        if method == "gmm":
            labels = assignment if backend == "cpu" else nearest(held)
            centroids, nearest, converged = _mixture(held, centroids, labels, niter=niter, seed=seed)
            if not converged:
                _note(notes, f"the mixture had not converged after {niter} iterations")
        assignment = _stream(rows, nearest)
        with kmeans.open_rows(embeddings, scale=scale, threads=threads) as rows:
            rows.offset = offset
            inertia = float(kmeans.distances(rows, centroids, assignment).sum(dtype=np.float64))
    if offset is not None:
        centroids = centroids + offset
    return Clusters(
        assignment=assignment,
        centroids=centroids,
        sizes=np.bincount(assignment, minlength=num_clusters).astype(np.int64),
        inertia=inertia,
        trained_on=len(train),
        method=method,
        notes=tuple(notes),
        backend=backend,
        iterations=iterations,
    )
