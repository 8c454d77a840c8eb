"""Triton's interpreter: a process of its own, since triton reads TRITON_INTERPRET when kernels are defined."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="is that process")


def run_interpreted(file: str) -> None:
    """The tests of a file once more, interpreted; fails as they fail, or when none ran."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", file]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
