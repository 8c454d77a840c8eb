"""Rows to cluster, and other projects' KMeans on them: for `kmeans` and for the study of the selection."""

from __future__ import annotations

import warnings

import numpy as np
import torch


def mixture(rows: int, width: int, *, groups: int = 2000, seed: int = 0, start: int = 0) -> np.ndarray:
    """Unit rows of overlapping groups of uneven size with a falling spectrum, so that no run converges early."""
    shared = np.random.default_rng(seed)
    centres = shared.normal(size=(groups, width)).astype(np.float32)
    shares = shared.dirichlet(np.full(groups, 0.5))
    generator = np.random.default_rng([seed, start])
    noise = generator.standard_normal((rows, width), dtype=np.float32)
    x = (centres[generator.choice(groups, size=rows, p=shares)] + 1.5 * noise) / np.sqrt(1 + np.arange(width) / 20)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def mixture_on(device: torch.device, rows: int, width: int, *, groups: int = 2000, seed: int = 0) -> np.ndarray:
    """As `mixture`, drawn on a device: a processor takes most of a minute for a million rows."""
    g = torch.Generator(device=device).manual_seed(seed)
    centres = torch.randn(groups, width, device=device, generator=g)
    shares = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(groups, 0.5))).to(device)
    x = torch.randn(rows, width, device=device, generator=g).mul_(1.5)
    x += centres[torch.multinomial(shares, rows, replacement=True, generator=g)]
    x /= (1 + torch.arange(width, device=device) / 20).sqrt()
    unit_rows: np.ndarray = (x / x.norm(dim=1, keepdim=True)).cpu().numpy()
    return unit_rows


def faiss_kmeans(x: np.ndarray, c: int, niter: int, seed: int, gpu: bool = False) -> float:
    import faiss

    if gpu and not faiss.get_num_gpus():
        raise ImportError(f"not installed: faiss {faiss.__version__} has no GPU part or sees no GPU")
    # As many rows as there are; by itself faiss trains on 256 a centroid.
    model = faiss.Kmeans(
        x.shape[1],
        c,
        niter=niter,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
        gpu=1 if gpu else False,
    )
    model.train(x)
    distance, _ = model.assign(x)
    return float(distance.sum(dtype=np.float64))


def sklearn_kmeans(x: np.ndarray, c: int, niter: int, seed: int) -> float:
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return float(KMeans(c, init="random", n_init=1, max_iter=niter, tol=0, random_state=seed).fit(x).inertia_)
