"""Which implementation runs, and what is said when the one asked for cannot."""

from __future__ import annotations

import threading

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops import backends

CU = torch.tensor([0, 2])


@pytest.fixture
def calls(monkeypatch):
    """Records which implementation of gae runs."""
    seen: list[str] = []
    table = backends._implementations["gae"]
    for name, original in dict(table).items():
        monkeypatch.setitem(table, name, lambda *a, _name=name, _run=original: (seen.append(_name), _run(*a))[1])
    return seen


def run_gae():
    return ops.gae(torch.ones(2), torch.zeros(2), CU)


@pytest.mark.skipif(backends.extension() is None, reason="installed without the C++ module")
def test_cpu_tensors_take_the_cpp_module_by_default(calls):
    run_gae()
    with ops.backend("torch"):
        run_gae()
        with ops.backend("cpu"):
            run_gae()
        run_gae()
    run_gae()
    assert calls == ["cpu", "torch", "cpu", "torch", "cpu"]


def test_without_the_cpp_module_torch_serves_and_cpu_is_an_error(calls, monkeypatch):
    monkeypatch.setattr(backends, "extension", lambda: None)
    run_gae()
    assert calls == ["torch"]
    with ops.backend("cpu"), pytest.raises(RuntimeError, match=r"gae: backend 'cpu' cannot run: .*_C is not installed"):
        run_gae()


def test_the_block_ends_also_after_an_error(calls):
    with pytest.raises(KeyError), ops.backend("torch"):
        raise KeyError
    run_gae()
    assert calls == ["cpu" if backends.extension() is not None else "torch"]


def test_a_block_binds_its_own_thread_only(calls):
    with ops.backend("torch"):
        thread = threading.Thread(target=run_gae)
        thread.start()
        thread.join()
    assert calls == ["cpu" if backends.extension() is not None else "torch"]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"backend: unknown name 'cuda', expected one of 'triton', 'cpu', 'torch'"):
        ops.backend("cuda").__enter__()


def test_a_backend_that_an_operation_lacks(monkeypatch):
    monkeypatch.setitem(backends._implementations, "gae", {"torch": print})
    with ops.backend("cpu"), pytest.raises(RuntimeError, match="gae has no backend 'cpu'; it has 'torch'"):
        run_gae()


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="gae: backend 'triton' cannot run: it needs CUDA"):
        run_gae()


def test_default_by_device(monkeypatch):
    for device, op, expected in (
        ("meta", "gae", "torch"),
        ("cuda", "topk_by_cluster", "triton"),
        ("cuda", "gae", "triton"),
    ):
        assert backends.selected(op, torch.device(device)) == expected
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert backends.selected("gae", torch.device("cuda")) == "torch"
    with ops.backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        run_gae()
    with ops.backend("cpu"), pytest.raises(RuntimeError, match="it needs CPU tensors, not cuda"):
        backends.selected("gae", torch.device("cuda"))


def test_report(monkeypatch):
    with ops.backend("triton"):  # the report is about the defaults
        report = ops.backend_report("cpu")
    fast = "cpu" if backends.extension() is not None else "torch"
    assert set(report.values()) == {fast}
    assert set(report) == {name for name in ops.__all__ if name.islower()} - {
        "backend", "backend_report", "release_workspace", "logprob_policy_loss",  # PyTorch's everywhere
    }  # fmt: skip
    monkeypatch.setattr(backends, "extension", lambda: None)
    assert set(ops.backend_report("cpu").values()) == {"torch"}


def test_every_operation_has_a_reference():
    assert all("torch" in table for table in backends._implementations.values())
