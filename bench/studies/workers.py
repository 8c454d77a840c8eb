"""What studies of many scorers share: processes that train, and jobs of which each is a line of the results."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.case import Line
from stable_rlhf.engine.process import start
from stable_rlhf.show.progress import progress

Job = TypeVar("Job")


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


def as_they_come(
    pool: ProcessPoolExecutor, title: str, unit: str, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]],
    note: Callable[[Any], str] = lambda result: "",
) -> Iterator[Any]:  # fmt: skip
    """What ``work`` returns for each of the ``calls``, in the order in which they finish, under a bar."""
    with progress(title, total=len(calls), unit=unit) as bar:
        for future in as_completed([pool.submit(work, *call) for call in calls]):
            yield future.result()
            bar.advance(note=note(future.result()))


def without_line(
    jobs: Sequence[Job], done: Mapping[Job, Line], settings_of: Callable[[Job], Mapping[str, Any]]
) -> list[Job]:
    """Jobs without a line; ``done``: lines by job.

    Raises:
        SystemExit: a line was made with other settings than its job has now."""
    for job, line in done.items():
        was, now = line["settings"], settings_of(job)
        if changed := [name for name in sorted({*was, *now}) if name not in was or was[name] != now.get(name)]:
            told = ", ".join(f"{name} {was.get(name, 'unset')}" for name in changed)
            sys.exit(f"{job}: measured with other settings, {told}; delete its lines or use another --output")
    return [job for job in jobs if job not in done]
