"""The C++ loops borrow torch's threads: also where those do not exist."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stable_rlhf.ops._backend import extension

CPP = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")

FORKED = """
import os, sys
import torch
import stable_rlhf.ops as ops

torch.set_num_threads(2)
reward, value = torch.randn(2, 1 << 20)
cu_seqlens = torch.arange(0, (1 << 20) + 1, 512)
want = ops.gae(reward, value, cu_seqlens)[0].numpy()  # starts the worker
child = os.fork()
if child == 0:
    # torch would wait forever in operations of its own here
    os._exit(0 if (ops.gae(reward, value, cu_seqlens)[0].numpy() == want).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

SEVERAL = """
import threading
import torch
import stable_rlhf.ops as ops

torch.set_num_threads(2)
reward, value = torch.randn(2, 1 << 18)
cu_seqlens = torch.arange(0, (1 << 18) + 1, 512)
want = ops.gae(reward, value, cu_seqlens)[0]
wrong = []

def many():
    for _ in range(50):
        if not torch.equal(ops.gae(reward, value, cu_seqlens)[0], want):
            wrong.append(1)

callers = [threading.Thread(target=many) for _ in range(4)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
raise SystemExit(len(wrong))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Within a minute: OpenMP without its threads waits for them forever."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=60, env=environment
    )


@CPP
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_wait_for_the_threads_of_its_parent():
    done = run(FORKED)
    assert done.returncode == 0, done.stderr


@CPP
def test_several_callers_at_once():
    done = run(SEVERAL)
    assert done.returncode == 0, done.stderr
