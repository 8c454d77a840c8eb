"""How a command ends before its end: SIGTERM, SIGHUP, SIGUSR1 (a scheduler's warning) and Ctrl-C.

The first of them ends a command with one line, and status 128 + its number. Where a stage trains it first finishes the
step and writes a snapshot (snapshots.py asks :func:`received` after each step, so that all ranks stop after the same
one); elsewhere it ends where it is, for nothing there is lost that the same command would not find again. A thread sees
to it that the process ends though its main thread does not get to it, in a collective for example: after the seconds
of ``checkpoint.grace_seconds``, or at a second signal.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

ASKS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_ONE = 2.0  # launchers pass on what their processes have got themselves: within so many seconds that is one signal
_UNWIND = 15.0  # seconds to end where no step is to be finished


class Stopped(BaseException):
    """A signal ends this command. ``kept``: what was saved for it, on all ranks alike; empty: it ends where it is."""

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(f"{signal.Signals(number).name}{': ' if kept else ''}{kept}")
        self.number, self.kept = number, kept


class StoppedByCallback(Exception):
    """A user's callback ends this command (hooks.py); what was done is saved, on all ranks alike."""


class _State:
    """What this process has got, and how it may end."""

    def __init__(self) -> None:
        self.received = 0
        self.deferring = False
        self.grace = 0.0
        self.unwind = _UNWIND
        self.before: dict[int, Any] = {}  # the handlers that were there


_state = _State()


def received() -> int:
    """The signal that asks this process to end, 0 without one."""
    return _state.received


def line(number: int, kept: str = "") -> str:
    """What a command that a signal ends says."""
    if number == signal.SIGINT:
        return "stable-rlhf: interrupted; the same command goes on where it stopped"
    return f"stable-rlhf: {signal.Signals(number).name}: {kept or 'ended'}; the same command goes on where it stopped"


def set_limits(grace: float, *, unwind: float | None = None) -> None:
    """How many seconds a signal leaves for the end of a step and a snapshot (0: none), and elsewhere for an orderly end
    (processes that wait for children of their own need more than ``_UNWIND``)."""
    _state.grace, _state.unwind = grace, unwind if unwind is not None else min(grace, _UNWIND)


def defer(yes: bool) -> None:
    """From now on a signal waits until the end of a step (or no longer)."""
    _state.deferring = yes


@contextmanager
def whole() -> Iterator[None]:
    """What happens inside happens whole: a signal ends the process after it."""
    before, _state.deferring = _state.deferring, True
    try:
        yield
    finally:
        _state.deferring = before
    if _state.received and not before:
        raise Stopped(_state.received)


@contextmanager
def handled(grace: float = _UNWIND) -> Iterator[None]:
    """Inside, signals are handled as above. One that was ignored before (nohup) stays ignored.

    Raises:
        Stopped: a signal came.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():  # Python has no handlers there
        yield
        return
    _state = _State()
    set_limits(grace)
    numbers = [s for s in ASKS if signal.getsignal(s) is not signal.SIG_IGN]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = _state.before = {number: signal.signal(number, _handle) for number in numbers}
    waker = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading, frozenset(numbers), _state), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(waker)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")  # no signal has this number
        thread.join()
        os.close(reading)
        os.close(writing)
        _state = _State()


@contextmanager
def ended_by_one_line(grace: float = _UNWIND) -> Iterator[None]:
    """:func:`handled`, and what is left to do for a process of its own: the line, and the status."""
    rank = os.environ.get("RANK", "0")
    try:
        with handled(grace):
            try:
                yield
            except Stopped as stop:
                if stop.kept:  # every rank is here
                    from stable_rlhf.engine.process import finish

                    finish()
                raise
    except Stopped as stop:
        if rank == "0" or not stop.kept:
            _write(line(stop.number, stop.kept))
        raise SystemExit(128 + stop.number) from None
    except KeyboardInterrupt:
        _write(line(signal.SIGINT))
        raise SystemExit(128 + signal.SIGINT) from None


def _forked() -> None:
    """A child without a program of its own meets signals as ever: what it gets is not its parent's."""
    global _state
    if _state.before:
        signal.set_wakeup_fd(-1)  # the pipe is the parent's
        for number, handler in _state.before.items():
            signal.signal(number, handler)
        _state = _State()


os.register_at_fork(after_in_child=_forked)


def _handle(number: int, frame: object) -> None:
    """In the main thread, between two of Python's instructions."""
    if _state.received or _state.grace == 0:  # the thread ends the process
        return
    _state.received = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if not _state.deferring:
        raise Stopped(number)


def _watch(reading: int, numbers: frozenset[int], state: _State) -> None:
    """End the process when it does not end by itself. Signals come as bytes here the moment they arrive, whatever the
    main thread does."""
    first, began, limit = 0, 0.0, 0.0
    while True:
        left = max(0.0, began + limit - time.monotonic()) if first else None
        if not select.select([reading], [], [], left)[0]:
            _end(first, f"not done after {limit:g} s, ended without a snapshot of the last steps")
        for number in os.read(reading, 64):
            if number == 0:
                return
            if number not in numbers:
                continue
            now = time.monotonic()
            if not first:
                first, began = number, now
                waits = state.deferring and number != signal.SIGINT
                limit = state.grace if waits else state.unwind
                if state.grace == 0:
                    _end(first, "ended at once")
                if waits and os.environ.get("RANK", "0") == "0":
                    name = signal.Signals(number).name
                    _write(f"  {name}: ending after this step, in {limit:g} s at most; a second signal ends at once")
            elif now - began > _ONE:
                _end(number, "ended at once")


def _end(number: int, how: str) -> None:
    _write(line(number, how))
    os._exit(128 + number)


def _write(text: str) -> None:
    with suppress(OSError):  # not print: the main thread may be in the middle of one
        os.write(2, f"{text}\n".encode())
