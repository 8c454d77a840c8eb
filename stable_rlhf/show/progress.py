"""What a person sees while work goes on: bars and lines on rank 0, and no control characters out of anybody's text."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Escape sequences of terminals whole; then what is left of them, other control characters, and the marks that turn the
# direction of text. A terminal obeys them all, wherever the text came from.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x9d\x90])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def printable(text: str, *, lines: bool = True) -> str:
    """``text`` as it may stand on a terminal: without control characters and escape sequences, without half surrogates
    (which no file takes). ``lines``: line ends and tabs stay; else each becomes a space."""
    line = _CONTROL.sub("", _SEQUENCE.sub("", text.replace("\r\n", "\n")))
    if not lines:
        line = re.sub("[\n\t\u2028\u2029]+", " ", line)
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


def console(**settings: Any) -> Any:
    """A console of rich that prints what any table or text holds as `printable` has it."""
    from rich.console import Console
    from rich.segment import Segment

    class Printable(Console):
        def render(self, *args: Any, **options: Any) -> Any:
            for segment in super().render(*args, **options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return Printable(**settings)


_marks = 0
_stage = ""
_bar: Bar | None = None


def mark() -> None:
    """This process has got on: a row, a step, a phase."""
    global _marks
    _marks += 1


def marks() -> int:
    """How often it has."""
    return _marks


def begin(stage: str) -> None:
    """What follows belongs to this stage."""
    global _stage, _bar
    _stage, _bar = stage, None
    mark()


def doing() -> str:
    """Where this process is, for a person: stage, and the last thing that it counted."""
    counted = f"{_bar.description} {_bar.done}/{_bar.total} {_bar.unit}" if _bar is not None else ""
    return ", ".join(part.strip() for part in (f"stage {_stage}" if _stage else "", counted) if part)


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
    mark()
    if is_main_process():
        print(printable(message), file=sys.stderr, flush=True)


class Bar:
    """Counts work done; draws a bar on a terminal, and a line every ten seconds in a log."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self.start = self._last = time.monotonic()
        self.note = ""
        self._rich = None
        if is_main_process() and sys.stderr.isatty():
            from rich.markup import escape
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(), console=console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._rich.add_task(escape(description), total=total, note="")
            self._rich.start()

    def advance(self, count: int = 1, note: str = "") -> None:
        global _bar
        _bar = self
        mark()
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
