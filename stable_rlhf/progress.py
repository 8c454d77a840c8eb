"""Progress bars for long work: on rank 0 only, and quiet when the output is not a terminal."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def is_main_process() -> bool:
    """True on global rank 0 (or without a launcher)."""
    return os.environ.get("RANK", "0") == "0"


def tolerant_output() -> None:
    """Characters that the terminal's encoding lacks become question marks, on standard output and standard error, in
    place of a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(message: str) -> None:
    """A line for the person who watches: standard error, rank 0 only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


class Bar:
    """Counts work done; draws a bar on a terminal, and a line every ten seconds in a log."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self.start = self._last = time.monotonic()
        self.note = ""
        self._rich = None
        if is_main_process() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._rich.add_task(description, total=total, note="")
            self._rich.start()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if self._rich is not None:
            self._rich.update(self._task, advance=count, note=self.note)
        elif is_main_process() and time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            say(f"  {self.description}: {self.done}/{self.total} {self.unit} {self.note}".rstrip())

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()


@contextmanager
def progress(description: str, *, total: int, unit: str = "") -> Iterator[Bar]:
    """``with progress("scoring", total=n) as bar: bar.advance()``"""
    bar = Bar(description, total, unit)
    try:
        yield bar
    finally:
        bar.close()
