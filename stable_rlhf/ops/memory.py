"""Memory on a CPU: fresh, and kept from call to call.

Large tensors come from the system each time and go back to it. Their pages are given at the first touch, 4 KiB at a
time, which takes about twice as long as to fill them; a system that has pages of 2 MiB gives those to who asks.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from stable_rlhf.ops.backends import extension

LEAST_BYTES = 4 << 20  # a few pages of 2 MiB

_held = threading.local()  # by name: a buffer, and the view of it that was asked for last


def fresh(tensor: Tensor) -> Tensor:
    """`tensor` itself, whose memory is new and not yet written to, in large pages where it has room for some and the
    system gives them. That is advice (madvise): it changes no value, and takes no memory beyond the tensor's."""
    if tensor.device.type == "cpu" and (size := tensor.numel() * tensor.itemsize) >= LEAST_BYTES:
        module = extension()
        if module is not None:
            module.prefer_large_pages(tensor.data_ptr(), size)
    return tensor


def workspace(rows: int, columns: int, dtype: torch.dtype, device: torch.device, kept: str = "logits") -> Tensor:
    """An uninitialised [rows, columns] buffer, one of each name `kept`.

    On the CPU it is kept from call to call: fresh memory there costs a page fault every 4 KiB, about a fifth of a whole
    loss. CUDA's allocator keeps memory by itself.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    held: dict[str, tuple[Tensor, Tensor]] = vars(_held)
    buffer, last = held.get(kept, (None, None))
    # That of the call before saves two views, which a loss on few rows feels. One made under inference_mode stays so.
    if last is not None and last.shape == (rows, columns) and last.dtype == dtype and not last.is_inference():
        return last
    wanted = rows * columns * dtype.itemsize
    if buffer is None or buffer.numel() < wanted:
        buffer = last = None
        held.pop(kept, None)  # the old one goes before the new one comes
        buffer = torch.empty(wanted, dtype=torch.uint8, device="cpu")
    view = buffer[:wanted].view(dtype).view(rows, columns)
    held[kept] = buffer, view
    return view


def release_workspace() -> None:
    """Give back the memory that the losses keep between calls in this thread (CPU; at most `workspace_bytes`,
    32 MiB for inputs of 16 bits, as much for a `grad_tolerance`, and 60 bytes a row of a loss on few rows). The threads
    that work on rows each keep 4 bytes a word of the vocabulary, and one that multiplies in the C++ module 8 MiB, or
    1 KiB a row where that is more, and half a MiB of a sum or 64 of its rows."""
    vars(_held).clear()
