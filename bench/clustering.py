"""Rows to cluster, and other projects' KMeans on them: for `kmeans` and for the study of the selection.

python -m bench.clustering    # what an iteration of the cuda backend does, by count: no GPU, tensors without data
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from bench.count.device import CUDA, MIB, Device
from bench.count.rates import Rates, timed
from bench.count.work import Ledger, Work, by_name


def mixture(rows: int, width: int, *, groups: int = 2000, seed: int = 0, start: int = 0) -> np.ndarray:
    """Unit rows of overlapping groups of uneven size with a falling spectrum, so that no run converges early."""
    shared = np.random.default_rng(seed)
    centres = shared.normal(size=(groups, width)).astype(np.float32)
    shares = shared.dirichlet(np.full(groups, 0.5))
    generator = np.random.default_rng([seed, start])
    noise = generator.standard_normal((rows, width), dtype=np.float32)
    x = (centres[generator.choice(groups, size=rows, p=shares)] + 1.5 * noise) / np.sqrt(1 + np.arange(width) / 20)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


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


# -- by count ----------------------------------------------------------------------------------------------------------


def count_iterations(n: int, d: int, c: int, *, niter: int = 1, empty: int = 0, spherical: bool = False) -> Ledger:
    """Iterations of the cuda backend's own code, rows on the device, `empty` clusters left without rows in each."""
    from stable_rlhf.rehearsal import device_kmeans, device_rows

    device = Device(limit=MIB)  # labels have no data
    with device.present():
        rows = device_rows.DeviceRows(np.broadcast_to(np.float32(0), (n, d)), CUDA, resident=True)
        centroids = torch.empty(c, d, device=CUDA)
        # What the host is told of each iteration; nobody knows it of rows without data.
        told, read = torch.tensor([1, empty]).to(CUDA), rows.transfers.read
        rows.transfers.read = lambda values: read(told)  # type: ignore[method-assign]
        with device.counting() as ledger:
            device_kmeans.lloyd(rows, centroids, niter=niter, spherical=spherical)
    return ledger


def main() -> None:
    n, d, niter, rates = 1_000_000, 768, 10, Rates()
    print(f"one of {niter} iterations over {n:,} x {d}, by count: no GPU was used, every rate is an assumption")
    print(
        "| c | floor, ms | predicted, ms | idle, ms | share | Tflop | GB | launches | late reads | stops | MiB added |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for c in (100, 1000, 4096):
        ledger = count_iterations(n, d, c, niter=niter)
        time = timed(ledger, rates)
        # Float32's digits from 16-bit products take three of them, and every row has to be read.
        floor = max(rates.floor_of_products(3 * 2.0 * n * d * c), rates.floor_of_bytes(4.0 * n * d))
        works = {at: entry for at, entry in enumerate(ledger.entries) if isinstance(entry, Work)}
        memory = {at: rates.memory(work) for at, work in works.items()}
        print(
            f"| {c} | {1e3 * floor:.2f} | {1e3 * time.total / niter:.2f} | {1e3 * time.idle / niter:.2f} "
            f"| {floor * niter / time.total:.2f} | {ledger.flops / niter / 1e12:.2f} "
            f"| {sum(memory.values()) / niter / 1e9:.1f} | {ledger.launches // niter} | {ledger.late_reads // niter} "
            f"| {len(ledger.stops)} | {ledger.peak_bytes / 2**20:.0f} |"
        )
        for line in by_name(ledger, time.by_entry, memory)[:6]:
            print(f"    {1e3 * line['seconds'] / niter:.2f} ms  {line['launches'] // niter} x {line['name']}")


if __name__ == "__main__":
    main()
