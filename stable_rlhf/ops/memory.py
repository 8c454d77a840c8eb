"""Fresh memory on a CPU.

Large tensors come from the system each time and go back to it. Their pages are given at the first touch, 4 KiB at a
time, which takes about twice as long as to fill them; a system that has pages of 2 MiB gives those to who asks.
"""

from __future__ import annotations

from torch import Tensor

from stable_rlhf.ops.backends import extension

LEAST_BYTES = 4 << 20  # a few pages of 2 MiB


def fresh(tensor: Tensor) -> Tensor:
    """`tensor` itself, whose memory is new and not yet written to, in large pages where it has room for some and the
    system gives them. That is advice (madvise): it changes no value, and takes no memory beyond the tensor's."""
    if tensor.device.type == "cpu" and (size := tensor.numel() * tensor.itemsize) >= LEAST_BYTES:
        module = extension()
        if module is not None:
            module.prefer_large_pages(tensor.data_ptr(), size)
    return tensor
