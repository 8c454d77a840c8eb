"""Starting other processes: their environment, free ports, and worker scripts on one rank or several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).with_name("workers")
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a launcher (or a training test in this process) put there.

    One thread: models this small gain nothing from more, and lose much where the cores are shared."""
    kept = {k: v for k, v in os.environ.items() if k not in (*_LAUNCHER, "STABLE_RLHF_DEBUG")}
    fixed = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**kept, **fixed, **extra}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def command(worker: str, *arguments: object) -> list[str]:
    """What runs ``workers/<worker>.py`` in a process of its own; give it :func:`worker_environment`."""
    return [sys.executable, str(WORKERS / f"{worker}.py"), *map(str, arguments)]


def worker_environment(**extra: str) -> dict[str, str]:
    """:func:`environment`, in which a worker finds ``bench`` and ``helpers`` wherever it is started."""
    return environment(**{"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), **extra})


def run_worker(worker: str, *arguments: object, ranks: int = 0, **extra: str) -> str:
    """What ``workers/<worker>.py`` prints, once it has ended well, in a process of its own; ``ranks``: in as many, of
    torchrun. Where nothing depends on a process that has done nothing before, :func:`helpers.forks.run_ranks` is
    quicker by all imports."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    python, *script = command(worker, *arguments)
    done = subprocess.run(
        [python, *(launcher if ranks else ()), *script], env=worker_environment(**extra), capture_output=True,
        encoding="utf-8", timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
