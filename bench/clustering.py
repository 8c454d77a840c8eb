"""Rows to cluster, and other projects' KMeans on them: for `kmeans` and for the study of the selection.

python -m bench.clustering    # what an iteration of the cuda backend does, by count: no GPU, tensors without data
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of an H200, for counts: dense bfloat16 products, and a copy's reads and writes; both were measured on such a card.
FLOPS, BYTES = 790e12, 4.3e12
SHARE_OF_COPY = 0.85  # what is expected of everything that is not a product


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


@dataclass
class Counted:
    """What was asked of a device: operations that compute (a sort is several launches), their bytes and products."""

    operations: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0  # each at the rate that limits it
    largest: int = 0  # bytes of one tensor that was made
    reads: int = 0  # of two integers by the host, which waits for no more than those
    crossings: list[str] = field(default_factory=list)  # other copies between host and device, and other stops


_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "detach"}


class Recorder(TorchDispatchMode):
    """Counts operations on meta tensors, which stand for a device. What needs their values fails there by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.counted.largest = max(self.counted.largest, *(_stored(t) for t in made if not func.is_view), 0)
        if name in ("_local_scalar_dense", "nonzero") or len({t.device.type for t in (*given, *made)}) > 1:
            self.counted.crossings.append(name)
        elif not func.is_view and name not in _FREE and any(t.is_meta for t in made):
            self._add(name, given, made)
        return result

    def _add(self, name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        held = {id(t): t for t in (*given, *made)}  # what is written in place is there twice
        moved = sum(_stored(t) for t in held.values())
        if name == "mm":
            flops = 2.0 * given[0].shape[0] * given[0].shape[1] * given[1].shape[1]
            self.counted.flops += flops
            self.counted.seconds += max(flops / FLOPS, moved / BYTES)
        else:
            self.counted.seconds += moved / (SHARE_OF_COPY * BYTES)
        self.counted.moved += moved
        self.counted.operations[name] += 1


def _stored(t: torch.Tensor) -> int:
    """Bytes of a tensor's own values; what is broadcast is read once."""
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
    return int(np.prod(sizes, dtype=np.int64)) * t.element_size()


def count_iterations(n: int, d: int, c: int, *, niter: int = 1, empty: int = 0, spherical: bool = False) -> Counted:
    """Iterations of the cuda backend's own code, rows on the device, `empty` clusters left without rows in each."""
    from stable_rlhf.rehearsal import device_kmeans, device_rows

    recorder = Recorder()

    class Counting(device_rows.Inline):
        def read(self, values: torch.Tensor) -> Any:
            recorder.counted.reads += 1
            return lambda: [1, empty]

    device = torch.device("meta")
    with ExitStack() as held:
        held.enter_context(mock.patch.object(device_rows, "transfers", lambda device: Counting()))
        held.enter_context(mock.patch.object(device_kmeans, "has_matrix_units", lambda device: True))
        rows = device_rows.DeviceRows(np.broadcast_to(np.float32(0), (n, d)), device, resident=True)
        centroids = torch.empty(c, d, device=device)
        with recorder:
            device_kmeans.lloyd(rows, centroids, niter=niter, spherical=spherical)
    return recorder.counted


def main() -> None:
    n, d = 1_000_000, 768
    print(f"{n:,} x {d}, one iteration by count at {FLOPS / 1e12:.0f} TFLOP/s and {BYTES / 1e12:.1f} TB/s")
    print("| c | floor ms | predicted ms | share | Tflop | GB | operations | synchronisations |")
    print("|---|---|---|---|---|---|---|---|")
    for c in (100, 1000, 4096):
        found = count_iterations(n, d, c)
        # Float32's digits from 16-bit products take three of them, and every row has to be read.
        floor = max(3 * 2.0 * n * d * c / FLOPS, 4.0 * n * d / BYTES)
        print(
            f"| {c} | {1e3 * floor:.2f} | {1e3 * found.seconds:.2f} | {floor / found.seconds:.2f} "
            f"| {found.flops / 1e12:.2f} | {found.moved / 1e9:.1f} | {found.operations.total()} "
            f"| {found.reads + len(found.crossings)} |"
        )
        print("  ", ", ".join(f"{name} {times}" for name, times in found.operations.most_common()))


if __name__ == "__main__":
    main()
