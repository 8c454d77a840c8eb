"""Which rows meet in which micro-step, the same for every number of ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

Row = TypeVar("Row")


def count_steps(rows: int, global_batch: int, epochs: float, max_steps: int = 0) -> int:
    """Optimiser steps of ``epochs`` passes, at least one."""
    # Rounded first: 100 rows x 1.1 epochs is 110.00000000000001, which is no twelfth step of ten.
    steps = max(1, math.ceil(round(rows * epochs / global_batch, 9)))
    return min(steps, max_steps) if max_steps else steps


def shuffled_steps(rows: int, global_batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` lists of ``global_batch`` row indices. Every pass is a new permutation; a step that reaches the end of
    a pass goes on with the next one, so every step is full and no row is left out."""
    if rows < 1:
        raise ValueError("no rows to train on")
    queue: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(queue) < global_batch:
            generator = torch.Generator(device="cpu").manual_seed(stream_seed(seed, "epoch", epoch))
            queue += torch.randperm(rows, generator=generator, dtype=torch.int64, device="cpu").tolist()
            epoch += 1
        yield queue[:global_batch]
        queue = queue[global_batch:]


def micro_steps(rows: Sequence[Row], per_device: int, rank: int, world_size: int) -> list[Sequence[Row]]:
    """This rank's share of each micro-step. Two ranks with b rows see the same micro-steps as one rank with 2b."""
    width = per_device * world_size
    if len(rows) % width:
        raise ValueError(f"{len(rows)} rows do not divide into micro-steps of {per_device} x {world_size} ranks")
    starts = range(rank * per_device, len(rows), width)
    return [rows[s : s + per_device] for s in starts]


def stream_seed(seed: int, *names: object) -> int:
    """An independent 63-bit seed for each use of a run's seed."""
    text = ":".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
