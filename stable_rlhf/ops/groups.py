"""Process groups by name, as an operator is given them, and what their ranks tell each other without gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_name(group: object | None) -> str:
    """The name by which an operator finds the process group; "" for None."""
    return "" if group is None else str(group.group_name)  # type: ignore[attr-defined]


def resolve_group(name: str) -> dist.ProcessGroup | None:
    """The process group of a name that an operator was given; None for ""."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]


def stack_ranks(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: `mine` of every rank, without gradient."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.stack(parts)
