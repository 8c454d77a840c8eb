"""What a run ran on and with. Knows torch alone, so that `stable-rlhf env` can tell it of the lightest install."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import Any

import torch

from stable_rlhf.ranks import world_size
from stable_rlhf.system.machine import installed, processor


def circumstances() -> dict[str, Any]:
    """What was called, on what."""
    return {
        "command": shlex.join(["stable-rlhf", *sys.argv[1:]]), "versions": versions(), "device": device_name()
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that can change a figure."""
    names = (
        "stable-rlhf", "torch", "triton", "transformers", "deepspeed", "faiss-cpu", "sentence-transformers", "numpy",
        "scikit-learn",
    )  # fmt: skip
    return {"python": platform.python_version(), **installed(names)}


def device_name() -> str:
    """What the run ran on, in words."""
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}{ranks}"
    return f"CPU {processor()}, {torch.get_num_threads()} threads{ranks}"
