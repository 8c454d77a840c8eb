"""Fresh memory: advice to the system that changes no value."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import memory
from stable_rlhf.ops.backends import extension


def test_large_cpu_tensors_are_asked_for_and_nothing_else(monkeypatch):
    asked: list[tuple[int, int]] = []
    module = SimpleNamespace(prefer_large_pages=lambda at, size: asked.append((at, size)))
    monkeypatch.setattr(memory, "extension", lambda: module)
    large = torch.empty(memory.LEAST_BYTES // 4)
    assert memory.fresh(large) is large and asked == [(large.data_ptr(), memory.LEAST_BYTES)]
    memory.fresh(torch.empty(memory.LEAST_BYTES // 4 - 1))
    memory.fresh(torch.empty(2**40, device="meta"))
    monkeypatch.setattr(memory, "extension", lambda: None)
    memory.fresh(large)
    assert len(asked) == 1


@pytest.mark.skipif(extension() is None, reason="the C++ module is not built")
@pytest.mark.parametrize(("begin", "size"), [(0, 8 << 20), (1, (8 << 20) - 3), (4096, 4096), (5, 100), (0, 0)])
def test_advice_changes_no_byte(begin, size):
    data = torch.arange(8 << 20, dtype=torch.int64).to(torch.uint8)
    before = data.clone()
    extension().prefer_large_pages(data.data_ptr() + begin, size)
    assert torch.equal(data, before)


def test_results_that_are_large_are_those_of_small_ones():
    """Sequences in one call of 8 MiB and one at a time."""
    tokens, count = 1 << 18, 8
    generator = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(count * tokens, generator=generator) for _ in range(2))
    limits = torch.arange(0, count * tokens + 1, tokens)
    whole = ops.gae(reward, value, limits, gamma=0.99, lam=0.95)
    for s in range(0, count, 3):
        part = slice(s * tokens, (s + 1) * tokens)
        alone = ops.gae(reward[part], value[part], limits[:2], gamma=0.99, lam=0.95)
        assert all(torch.equal(a[part], b) for a, b in zip(whole, alone, strict=True))
