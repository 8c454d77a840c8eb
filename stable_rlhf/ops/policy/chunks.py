"""How many rows' logits exist at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

WORKSPACE_BYTES = 256 << 20  # of a CPU, whose products gain nothing from more, and the least of a GPU
_WITHOUT_SUM_BYTES = 1 << 30  # of a GPU's call that makes no gradient of the weight
_SHARE = 0.04  # of a GPU's memory
TILE_ROWS = 128  # of a GPU's matrix products


def workspace_bytes(device: torch.device, logits_bytes: int, sum_bytes: int, *, ask: bool) -> int:
    """The room for logits where the caller names none: 256 MiB on a CPU.

    On a GPU every chunk but the only one costs a pass over the weight's gradient in float32, and small chunks make slow
    products. So the room there is what that sum would take, or 4 % of the GPU's memory if that is more (1 GiB where no
    weight's gradient is made), but not more than half of what is free.

    Args:
        logits_bytes: what all rows would take.
        sum_bytes: what the sum over chunks takes: a weight's gradient in float32; 0 where none is made.
        ask: whether to ask how much memory is free: ranks that split a vocabulary must agree without.
    """
    if device.type != "cuda" or logits_bytes <= WORKSPACE_BYTES:
        return WORKSPACE_BYTES
    share = int(_SHARE * torch.cuda.get_device_properties(device).total_memory)
    wanted = min(logits_bytes, max(sum_bytes, share) if sum_bytes else _WITHOUT_SUM_BYTES)
    if ask and not torch.cuda.is_current_stream_capturing():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        wanted = min(wanted, (torch.cuda.mem_get_info(device)[0] + cached) // 2)
    return max(wanted, WORKSPACE_BYTES)


def chunks(count: int, most: int, multiple: int = 1) -> Iterator[tuple[slice, bool]]:
    """Chunks of equal size, a multiple of `multiple` where they are more than one and `most` allows it, of at most
    `most` rows; each with whether it is the last."""
    if count == 0:
        return
    size = count
    if count > most:
        most = most // multiple * multiple or most
        size = math.ceil(count / math.ceil(count / most))
        size = min(math.ceil(size / multiple) * multiple, most)
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count)), begin + size >= count
