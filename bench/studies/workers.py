"""Processes that train for a study."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from stable_rlhf.engine.process import start


def _begin(log: Path, threads: int | None) -> None:
    sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    if threads is not None:
        torch.set_num_threads(threads)
    start(0)


@contextmanager
def trainers(workers: int, folder: Path, *, threads: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of ``workers`` processes that can train; on the way out what has not begun is dropped.

    What trainers say goes to ``folder/log.txt``, so that one bar is left on the terminal. ``threads``: of each process,
    torch's own choice where it is None."""
    folder.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has loaded torch may hang
    pool = ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(folder / "log.txt", threads))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
