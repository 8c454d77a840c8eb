"""Joining and leaving the process group."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from stable_rlhf.engine import watchdog
from stable_rlhf.engine.signals import ASKS, received
from stable_rlhf.ranks import barrier, device, sum_over_ranks, world_size

# The others wait while rank 0 asks a judge, embeds candidates or reads its files again. A rank that hangs is found long
# before, by watchdog.py.
_TIMEOUT_MINUTES = 6 * 60
# Nobody works yet while ranks come together: one that does not come will not.
_MEETING_MINUTES = 30
_LET_GO = 0.3  # seconds


def stop_asked() -> int:
    """The signal that ends this run, the same on every rank whichever of them got it; 0 without one."""
    own = received()
    counts = sum_over_ranks([float(own == number) for number in ASKS])
    return next((int(number) for number, ranks in zip(ASKS, counts, strict=True) if ranks), 0)


def start(seed: int) -> None:
    """Join the process group (one process without a launcher), quieten the libraries, and seed torch."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import deepspeed
    from deepspeed.utils import logger
    from transformers.utils import logging as transformers_logging

    logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # of loading and saving weights: seconds, between our own lines
    if not torch.cuda.is_available():
        # On the CPU DeepSpeed would compile a shared-memory collective on first use (minutes); gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            import socket

            with socket.socket() as free:  # any free port: several single-process runs may share a machine
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ |= {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(minutes=_minutes("DEEPSPEED_TIMEOUT", _TIMEOUT_MINUTES))
        _meet(backend, timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    torch.manual_seed(seed)


def _minutes(name: str, default: float) -> float:
    """A time from the environment."""
    value = os.environ.get(name, "")
    try:
        minutes = float(value) if value else float(default)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ValueError(f"{name}: {value!r} is no number of minutes")
    return minutes


def _meet(backend: str, timeout: timedelta) -> None:
    """The process group, whose collectives wait for `timeout`, of ranks that come together in less."""
    minutes = _minutes("STABLE_RLHF_MEETING_MINUTES", _MEETING_MINUTES)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"rendezvous port {os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']} is taken, perhaps by "
                "another run; give the launcher another --master_port"
            ) from error
        if "timed out" not in str(error).lower():
            raise
        raise ValueError(
            f"rank {os.environ['RANK']}: another rank has ended or was not started: waited {minutes:g} minutes at "
            f"{place} for all {os.environ['WORLD_SIZE']} (STABLE_RLHF_MEETING_MINUTES says how long)"
        ) from error


def finish() -> None:
    """Leave the process group, all ranks together: one that ends while others still talk to it can take them down."""
    if dist.is_initialized():
        several = world_size() > 1
        barrier()
        watchdog.stop()
        dist.destroy_process_group()
        if several:
            # The group outlives this where something still refers to it (DeepSpeed does), and a thread of gloo may hold
            # the tensors of its last work for a moment more: let go of when Python has ended, they abort the process.
            time.sleep(_LET_GO)
