"""Fixtures of the trainers' tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from stable_rlhf.engine.tracking import Tracker


class Killed(BaseException):
    """What stands for a kill in these tests: nothing in the package catches it."""


@pytest.fixture
def killed_after(monkeypatch) -> Callable[[int], AbstractContextManager[None]]:
    """``with killed_after(n):`` the training inside stops right after step n is logged, before its snapshot."""
    log = Tracker.log

    @contextmanager
    def kill(step: int) -> Iterator[None]:
        def logged(self, at, metrics):
            log(self, at, metrics)
            if at == step:
                raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Tracker, "log", logged)
            yield

    return kill


@pytest.fixture(scope="module")
def one_process():
    """A process group of this process alone, with what a launcher would set while a module's tests run.

    The group itself stays until the tests end: DeepSpeed keeps references to it and cannot start a second one.
    """
    from stable_rlhf.engine.process import start

    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start(0)
    yield
    os.environ.clear()
    os.environ.update(before)
