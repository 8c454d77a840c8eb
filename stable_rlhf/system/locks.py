"""A folder for one process alone: who comes second ends at once, and is told who came first."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from stable_rlhf.show.progress import say
from stable_rlhf.system.http import without_credentials

LOCK = ".lock"  # no content: what lists a folder leaves it out
_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)


class FolderInUse(ValueError):
    """Another process works in the folder."""


class FolderLock:
    """Holds ``folder`` until it is forgotten, or until the process ends: the system takes the lock back, however that
    comes about, so nothing has to be cleaned up. The file that carries it stays, with a line on its last holder.

    A process does not lock itself out: whoever asks for the same folder in it gets the same lock (:func:`lock_folder`).
    Where a file system cannot lock or cannot be written there is a warning, and no lock.
    """

    def __init__(self, folder: Path) -> None:
        self._file, path = -1, folder / LOCK
        try:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError:  # another user's, or a file system that is read-only by now: to lock it, reading will do
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = self._file >= 0 and error.errno in _BUSY
            self.release()
            if held:
                raise FolderInUse(f"{str(folder)!r} is in use by {_holder(path)}") from None
            say(f"  WARNING: {str(folder)!r} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
            return
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, (json.dumps(_myself()) + "\n").encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds, only nobody can be told whose it is

    def release(self) -> None:
        """Give the folder back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


_held: weakref.WeakValueDictionary[tuple[int, int], FolderLock] = weakref.WeakValueDictionary()


def lock_folder(folder: Path) -> FolderLock:
    """The lock of a folder that exists; keep what is returned for as long as the folder is worked in.

    Raises:
        FolderInUse: another process holds it; the message names that process.
    """
    at = os.stat(folder)
    lock = _held.get((at.st_dev, at.st_ino))
    if lock is None:
        lock = _held[at.st_dev, at.st_ino] = FolderLock(folder)
    return lock


def _myself() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": without_credentials(command)[:300],
    }


def _holder(path: Path) -> str:
    """The process that wrote its line to a lock's file, in words."""
    try:
        known = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return f"process {known['pid']} on {known['host']}, since {known['since']}: {known['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
