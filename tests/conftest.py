"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Before torch is imported: tests are small, and several may run at once.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that spins for its neighbour takes that one's core
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "ATEN_CPU_CAPABILITY" in os.environ:  # torch.compile keeps code by what it computes, not by the processor's kind
    kept = Path(tempfile.gettempdir(), f"torchinductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))

import pytest

from helpers.launch import free_port
from helpers.pages import leave_out_curves


def pytest_report_header() -> list[str]:
    """The processor and what is made of it: which rounding and which kernels a failure belongs to."""
    import torch

    from bench.common import cpu_features, processor
    from stable_rlhf.ops.backends import extension

    module = extension()
    chosen = os.environ.get("STABLE_RLHF_CPU_ISA") or (module.isa_names()[0] if module is not None else "no module")
    limits = [
        f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if name in os.environ
    ]
    return [
        f"processor: {processor()}, {os.cpu_count()} cores, {' '.join(cpu_features()) or 'no vector instructions'}",
        f"kernels: C++ module {chosen}, torch {torch.backends.cpu.get_cpu_capability()}, "
        f"{' '.join(limits) or 'oneDNN and MKL unlimited'}; {torch.get_num_threads()} threads a process",
    ]


@pytest.fixture(scope="session", autouse=True)
def pages_without_curves() -> None:
    leave_out_curves()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real preference data, named by $STABLE_RLHF_DATA; tests that use it are skipped without it."""
    named = os.environ.get("STABLE_RLHF_DATA")
    if not named:
        pytest.skip("no real data: STABLE_RLHF_DATA is not set")
    folder = Path(named)
    if not (folder / "pairs.jsonl.gz").is_file():
        pytest.skip(f"no real data: {folder} has no pairs.jsonl.gz")
    return folder


@pytest.fixture(scope="session")
def server():
    """Calls of the command line without the seconds that its imports take: see helpers/forks.py."""
    from helpers.forks import shared_server

    return shared_server()


@pytest.fixture
def cli(server, tmp_path):
    """``cli("sft", "--seed", 3)`` in an empty folder."""

    def call(*arguments: object, **extra: str):
        return server(*arguments, cwd=tmp_path, **extra)

    return call


@pytest.fixture(scope="session")
def tokenizer():
    from stable_rlhf.world import build_tokenizer

    return build_tokenizer()


@pytest.fixture(params=["llama", "bloom"])
def architecture(request) -> str:
    return request.param


@pytest.fixture
def tiny_model(tokenizer):
    """Factory of small untrained models whose outputs are far from uniform."""

    def make(architecture: str = "llama", layers: int = 3, seed: int = 0):
        import torch

        from helpers.tiny_model import redraw
        from stable_rlhf.world import build_model

        model = build_model(
            tokenizer, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, architecture=architecture,
            seed=seed,
        )  # fmt: skip
        return redraw(model, 0.2, torch.Generator().manual_seed(seed)).eval()

    return make


class Killed(BaseException):
    """What stands for a kill in these tests: nothing in the package catches it."""


@pytest.fixture
def killed_after(monkeypatch) -> Callable[[int], AbstractContextManager[None]]:
    """``with killed_after(n):`` the training inside stops right after step n is logged, before its snapshot."""
    from stable_rlhf.engine.tracking import Tracker

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
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    start(0)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: a file is one process's, and what begins last should be short."""
    items.sort(key=lambda item: "/whole/" not in item.nodeid)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are called by their argument and a number: what is in them (a clock, in a gzip header) may differ between
    two processes of one run, which then refuse to share the tests."""
    return argname if isinstance(val, bytes) else None
