"""One call of each operation of an installed stable_rlhf beside its plain reference, on this machine's CPU."""

from __future__ import annotations

import importlib.metadata
import sys
import time

import torch

before = {name.partition(".")[0] for name in sys.modules}
started = time.perf_counter()
import stable_rlhf.ops as ops  # noqa: E402  the import is what is timed

seconds = time.perf_counter() - started
loaded = {name.partition(".")[0] for name in sys.modules} - before
assert loaded <= {"stable_rlhf", *sys.stdlib_module_names}, loaded  # torch is there, and nothing else was needed

torch.manual_seed(0)
starts = torch.tensor([0, 3, 5, 9])
kind = torch.tensor([1, 1, 1, 2, 2, 0, 1, 1, 1])
target = torch.randint(0, 50, (9,))
hidden, weight = torch.randn(9, 16), torch.randn(50, 16)


def policy() -> list[torch.Tensor]:
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    old, entropy = ops.linear_logprob(hidden, weight, target)
    loss = ops.linear_policy_loss(*inputs, target, kind, old_logprob=old - 0.1, advantage=torch.linspace(-1, 1, 9)).loss
    return [old, entropy, loss.detach(), *torch.autograd.grad(loss, inputs)]


def advantage() -> list[torch.Tensor]:
    reward = torch.linspace(-1, 1, 8).requires_grad_()
    loss = ops.advantage_loss(reward, torch.zeros(4), margin=2.5).loss
    return [loss.detach(), *torch.autograd.grad(loss, [reward])]


def sequence() -> list[torch.Tensor]:
    advantages, returns = ops.gae(torch.linspace(0, 1, 9), torch.linspace(1, 0, 9), cu_seqlens=starts)
    return [advantages, returns, ops.masked_whiten(advantages, kind == 1)]


def selection() -> list[torch.Tensor]:
    return [ops.topk_by_cluster(torch.linspace(1, 0, 9), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2]), 3, 2)]


def contrast() -> list[torch.Tensor]:
    a = hidden.clone().requires_grad_()
    loss = ops.info_nce(a, hidden.flip(0))
    return [loss.detach(), *torch.autograd.grad(loss, [a])]


for call in (policy, advantage, sequence, selection, contrast):
    ours = call()
    with ops.backend("torch"):
        truth = call()
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

backends = ops.backend_report("cpu")
if "--compiled" in sys.argv:  # a wheel brings its C++ module; an install without a compiler has PyTorch alone
    assert "cpu" in backends.values(), backends
print(
    f"stable_rlhf {importlib.metadata.version('stable-rlhf')} of {ops.__file__}: {len(backends)} operations, "
    f"{sum(name == 'cpu' for name in backends.values())} of them in C++; torch {torch.__version__}, "
    f"import {seconds:.2f} s beyond torch's"
)
