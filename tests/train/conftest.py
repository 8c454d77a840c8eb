"""Fixtures of the trainers' tests."""

from __future__ import annotations

import os
import socket

import pytest


@pytest.fixture(scope="module")
def one_process():
    """A process group of this process alone, with what a launcher would set while a module's tests run.

    The group itself stays until the tests end: DeepSpeed keeps references to it and cannot start a second one.
    """
    from stable_rlhf.train.engine import start

    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start(0)
    yield
    os.environ.clear()
    os.environ.update(before)
