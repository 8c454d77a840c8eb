"""Collectives over the processes of a run; with one process they are plain functions."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from stable_rlhf.show.progress import mark


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
        mark()


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def sum_over_ranks(values: Iterable[float]) -> list[float]:
    """Element-wise float64 sums over all ranks."""
    values = list(values)
    if world_size() == 1:
        return [float(v) for v in values]
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    mark()
    return total.tolist()


def max_over_ranks(values: Iterable[float]) -> list[float]:
    """Element-wise maxima over all ranks."""
    return [max(column) for column in zip(*gather_objects([float(v) for v in values]), strict=True)]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    mark()
    return found
