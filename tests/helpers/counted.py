"""A device without hardware for tests of the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.count.device import CUDA, Device
from bench.count.launches import Launches
from bench.count.rates import Rates

RATES = Rates()


@contextmanager
def counted(capturing: bool = False) -> Iterator[Device]:
    """A device whose tensors have data up to 64 KiB; everything in the block happens on it."""
    made = Device(limit=64 << 10, capturing=capturing)
    with made.present(), Launches(made, RATES.cache_bytes).caught():
        yield made


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA)
