"""KMeans of the rehearsal selection, beside scikit-learn, faiss and flash-kmeans.

The floor is the matrix products of Lloyd's algorithm: all rows with all centroids once an iteration, and once more to
assign, blocks of rows reusing one buffer. On CUDA they are products of bfloat16 parts, three of which have float32's
digits. Ours ends early once nothing changes any more, and can be below it; flash-kmeans takes one product with TF32's
digits.

All begin with the rows in the host's memory and end with an inertia there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from bench.case import OURS, Case, Contender, Prepared, Settings
from bench.clustering import faiss_kmeans, mixture, mixture_on, sklearn_kmeans
from bench.common import Step, describe

BLOCK = 2048  # rows of a product of the floor on a CPU, and the fewest on CUDA
SCORES = 64 << 20  # results of a product of the floor on CUDA
# Further than this share above the best, a result is another one. Random starts differ by about 1 %, on a few dozen
# rows by much more.
INERTIA, INERTIA_OF_FEW = 0.03, 0.5


def ours(x: np.ndarray, c: int, niter: int, seed: int, init: str, device: torch.device | None = None) -> float:
    from stable_rlhf.rehearsal import cluster_embeddings

    devices = [device.index or 0] if device is not None and device.type == "cuda" else None
    return cluster_embeddings(x, c, niter=niter, seed=seed, init=init, devices=devices).inertia


def _flash_kmeans(x: np.ndarray, c: int, niter: int, seed: int, device: torch.device) -> Step:
    from flash_kmeans import batch_kmeans_Euclid

    if device.type != "cuda":
        raise ImportError("not installed: flash-kmeans runs on CUDA only")
    places = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:c].to(device)

    def step() -> float:
        rows = torch.from_numpy(x).to(device)
        labels, centroids, *_ = batch_kmeans_Euclid(
            rows[None], c, max_iters=niter, tol=0.0, init_centroids=rows[None, places]
        )
        return float((rows - centroids[0, labels[0].long()]).square().sum(1).sum(dtype=torch.float64))

    return step


def _products(x: np.ndarray, c: int, niter: int, device: torch.device) -> Step:
    rows, wide, block = torch.from_numpy(x).to(device), {}, BLOCK
    centroids = rows[:c].t().contiguous()
    if device.type == "cuda":
        rows = torch.cat([rows.bfloat16()] * 3, 1)
        centroids, wide, block = rows[:c].t(), {"out_dtype": torch.float32}, max(BLOCK, SCORES // c)
    out = torch.empty(block, c, device=device)

    def step() -> torch.Tensor:
        for _ in range(niter + 1):
            for begin in range(0, len(rows), block):
                part = rows[begin : begin + block]
                torch.mm(part, centroids, out=out[: len(part)], **wide)
        return out

    return step


def prepare(case: Case, settings: Settings) -> Prepared:
    device, shape = torch.device(settings.device), case.shape
    n, width, c, niter = (shape[key] for key in ("rows", "width", "clusters", "iterations"))
    groups, seed = max(2, min(2000, 2 * c)), settings.seed
    on_card = device.type == "cuda"
    x = mixture_on(device, n, width, groups=groups) if on_card else mixture(n, width, groups=groups)
    makers: dict[str, Callable[[], Step]] = {
        OURS: lambda: lambda: ours(x, c, niter, seed, "kmeans++", device),
        f"{OURS}, random start": lambda: lambda: ours(x, c, niter, seed, "random", device),
        "faiss": lambda: lambda: faiss_kmeans(x, c, niter, seed, device.type == "cuda"),
        "scikit-learn": lambda: lambda: sklearn_kmeans(x, c, niter, seed),
        "flash-kmeans": lambda: _flash_kmeans(x, c, niter, seed, device),
    }

    if device.type == "cuda":
        del makers["scikit-learn"]  # on the CPU, for minutes

    def checked(wanted: list[Contender]) -> Mapping[str, Mapping[str, Any]]:
        report: dict[str, dict[str, Any]] = {}
        inertia: dict[str, float] = {}
        for contender in wanted:
            if contender.role == "floor":
                continue
            try:
                inertia[contender.name] = contender.make()()
            except Exception as error:
                report[contender.name] = {"failure": describe(error)}
        best, allowed = min(inertia.values(), default=0.0), INERTIA if n >= 4096 else INERTIA_OF_FEW
        for name, value in inertia.items():
            above = value / best - 1.0
            report[name] = {"errors": {"inertia": above}, "verdict": "right" if above < allowed else "WRONG"}
        return report

    contenders = [Contender(name, make, "ours" if name.startswith(OURS) else "peer") for name, make in makers.items()]
    floor = Contender(f"{niter + 1} products", lambda: _products(x, c, niter, device), "floor", "rows with centroids")
    terms = 3 if device.type == "cuda" else 1
    return Prepared(
        [*contenders, floor],
        checked,
        flops=terms * 2.0 * n * width * c * (niter + 1),
        moved=float(x.nbytes) * (niter + 1),
    )
