"""Every backward pass reads what was saved for it once: some hooks hand a saved tensor out a single time."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_debug_enabled,
)

import stable_rlhf.ops as ops
from helpers.every_op import CASES, run
from stable_rlhf.ops.backends import extension

needs_cpp = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
pytestmark = [
    pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_cpp)]),
    pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.losses]),
]


def once():
    """Hooks that hand out what they keep a single time."""

    def unpack(kept: list[torch.Tensor]) -> torch.Tensor:
        assert kept, "a saved tensor is read twice"
        return kept.pop()

    return saved_tensors_hooks(lambda x: [x], unpack)


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("hooks", [once, save_on_cpu])
def test_hooks(name, backend, hooks):
    def with_hooks(*leaves):
        with hooks():
            return CASES[name].call(*leaves)

    with ops.backend(backend):
        assert_same(run(CASES[name], with_hooks), run(CASES[name]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(name, backend, use_reentrant):
    case = CASES[name]
    again = functools.partial(checkpoint, lambda *x: case.call(*x)[: case.losses], use_reentrant=use_reentrant)
    with ops.backend(backend):
        want = run(case)
        assert_same(run(case, again), want[: case.losses] + want[-len(case.leaves) :])


@pytest.mark.parametrize("policy", ["PREFER_RECOMPUTE", "MUST_SAVE"])
def test_selective_checkpoint(name, backend, policy):
    """Modes under which operators stand for the operations, in a region whose saved tensors are recomputed."""
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy[policy])
    _test_region(name, backend, functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))


def test_checkpoint_in_debug_mode(name, backend, monkeypatch):
    # The mode leaves this logger as pytest hooks into one, which then cannot format the mode's own records.
    monkeypatch.setattr(logging.getLogger("LoggingTensor"), "propagate", True)
    with set_checkpoint_debug_enabled(True):
        _test_region(name, backend, functools.partial(checkpoint, use_reentrant=False))


def _test_region(name, backend, region):
    case = CASES[name]
    with ops.backend(backend):
        want = run(case)
        got = run(case, functools.partial(region, lambda *x: case.call(*x)[: case.losses]))
        for x, y in zip(got, want[: case.losses] + want[-len(case.leaves) :], strict=True):
            torch.testing.assert_close(x, y)
