"""The C++ loops borrow torch's threads: also where those do not exist."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.contrastive.swav import kernels_of

CPP = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")

FORKED = """
import os, sys
import torch
import stable_rlhf.ops as ops

torch.set_num_threads(2)
reward, value = torch.randn(2, 1 << 20) + torch.zeros(2, 1 << 20)
cu_seqlens = torch.arange(0, (1 << 20) + 1, 512)
want = ops.gae(reward, value, cu_seqlens)[0].numpy() if OURS else None  # torch has started the worker
child = os.fork()
if child == 0:
    # torch would wait forever in operations of its own here
    found = ops.gae(reward, value, cu_seqlens)[0].numpy()
    os._exit(0 if want is None or (found == want).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

SEVERAL = """
import threading
import torch
import stable_rlhf.ops as ops

torch.set_num_threads(2)
reward, value = torch.randn(2, 1 << 20)
cu_seqlens = torch.arange(0, (1 << 20) + 1, 512)
want = ops.gae(reward, value, cu_seqlens)[0]
wrong = []

def many():
    for _ in range(20):
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
    """Within minutes: OpenMP without its threads waits for them forever."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=600, env=environment
    )


@CPP
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("ours", [True, False])
def test_a_forked_child_does_not_wait_for_the_threads_of_its_parent(ours):
    """Whether these have worked for us or for torch alone."""
    done = run(f"OURS = {ours}\n{FORKED}")
    assert done.returncode == 0, done.stderr


@CPP
def test_several_callers_at_once():
    done = run(SEVERAL)
    assert done.returncode == 0, done.stderr


def sequences(count: int, length: int):
    g = torch.Generator().manual_seed(0)
    return (*torch.randn(2, count * length, generator=g), torch.arange(0, count * length + 1, length))


def gae(size: int):
    return ops.gae(*sequences(8 * size, 128))[0]


def rewards(size: int):
    *log, limits = sequences(8 * size, 128)
    return ops.token_rewards(*log, torch.zeros(8 * size), limits, kl_coef=0.1, kl_estimator="k3")


def whiten(size: int):
    return ops.masked_whiten(sequences(8 * size, 128)[0])


def topk(size: int):
    g = torch.Generator().manual_seed(0)
    rows = 1000 * size
    return ops.topk_by_cluster(torch.randn(rows, generator=g), torch.randint(9, (rows,), generator=g), 9, 50)


def advantage(size: int):
    own, _, limits = sequences(8 * size, 128)
    made = ops.advantage_loss(
        torch.linspace(-1, 1, 8 * size), margin=None, logprob=own, alt_logprob=torch.stack([own + 0.01, own]),
        cu_seqlens=limits,
    )  # fmt: skip
    return made.loss


def rows(size: int):
    g = torch.Generator().manual_seed(0)
    logits, count = torch.randn(size, 5000, generator=g), torch.arange(size)
    config = PolicyLossConfig(rehearsal_coef=1.0)
    return ops.policy_loss(logits, count % 5000, torch.full((size,), 2), config=config).loss


def swav(size: int):
    scores = torch.randn(2, 4 * size, 50, generator=torch.Generator().manual_seed(0))
    return kernels_of("cpu").log_sums(scores, None, 20.0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@CPP
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("op", [gae, rewards, whiten, topk, advantage, rows, swav])
def test_only_work_of_a_millisecond_is_shared_out(op):
    """Beside a busy neighbour a small loop on two threads takes a time slice, a hundred times as long as on one. Of
    swav, which stands between products, a fifth of a millisecond is enough."""
    before = extension().shared_loops()
    op(100)
    assert extension().shared_loops() == before
    many = op(2000)
    assert extension().shared_loops() > before
    torch.set_num_threads(1)
    assert torch.equal(op(2000), many)
    torch.set_num_threads(5)
    assert torch.equal(op(2000), many)
