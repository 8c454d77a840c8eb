"""Collectives over the processes of a run; with one process they are plain functions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stable_rlhf.show.progress import is_main_process, mark

_T = TypeVar("_T")

# What gloo, NCCL and the store say where another process has gone.
_LOST = re.compile(
    r"closed by (remote )?peer|onnection reset|Broken pipe|remote process exited|Socket Timeout|Timed out wait"
)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


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
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    mark()
    return values


@contextmanager
def together(
    *errors: type[Exception], told_as: type[Exception] | None = None, words: Callable[[Exception], str] = str
) -> Iterator[None]:
    """A block that all ranks leave together: none waits for a rank that has gone.

    Where one of ``errors`` is raised in it, that rank raises it, and every rank without one raises the text of the
    first, as ``words`` puts it, as ``told_as`` (unset: the first of ``errors``). Other errors are this rank's alone.
    """
    problem: Exception | None = None
    try:
        yield
    except errors as error:
        problem = error
    texts = [text for text in gather_objects(None if problem is None else words(problem)) if text is not None]
    if problem is not None:
        raise problem
    if texts:
        raise (told_as or errors[0])(texts[0])


def on_first_rank(work: Callable[[], _T], *errors: type[Exception]) -> _T:
    """What ``work`` returns on rank 0, on every rank; one of ``errors`` there is one everywhere."""
    value: Any = None
    with together(*errors):
        if is_main_process():
            value = work()
    result: _T = gather_objects(value)[0]
    return result
