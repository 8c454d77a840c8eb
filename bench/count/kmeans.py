"""What an iteration of k-means' cuda backend does: `python -m bench.count.kmeans`, without a GPU."""

from __future__ import annotations

import numpy as np
import torch

from bench.count.device import CUDA, MIB, Device
from bench.count.rates import Rates, timed
from bench.count.work import Ledger, Work, by_name
from stable_rlhf.rehearsal import device_kmeans, device_rows


def count_iterations(
    n: int, d: int, c: int, *, niter: int = 1, empty: int = 0, spherical: bool = False, resident: bool = True
) -> Ledger:
    """Iterations of the cuda backend's own code, `empty` clusters left without rows in each; rows lie on the device, or
    come from the host where they are not `resident`."""
    device = Device(limit=MIB)  # labels have no data
    with device.present():
        rows = device_rows.DeviceRows(np.broadcast_to(np.float32(0), (n, d)), CUDA, resident=resident)
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
