"""What was measured to be fastest on a device, by the device's name: rows of a chunk, launches of the row kernel, and
up to which width of hidden states statistics are made in the product.

`tuned.json` beside this file is the table; `bench/gpu.sh run1` proposes one on the card that it runs on, and
STABLE_RLHF_TUNED names a file to read in its place. A device that no entry names, and a vocabulary far from any that
was measured, get None: the caller's own rule holds. Nothing here imports triton.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tuned.json")
VARIABLE = "STABLE_RLHF_TUNED"
_FAR = 2.0  # a vocabulary more than so many times as large, or as small, as the nearest measured one is another case


class RowLaunch(NamedTuple):
    """How the row kernel is launched: elements a block, warps a program, programs on a multiprocessor at a time."""

    block: int
    warps: int
    residency: int


@functools.lru_cache(maxsize=8)
def _read(path: str) -> dict[str, dict[str, Any]]:
    """The table, each device's entry checked once, so that a mistake in it is told and not launched."""
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    for device, entry in table.items():
        rows = entry.get("chunk_rows")
        if rows is not None and (not isinstance(rows, int) or rows < 128 or rows % 128):
            raise ValueError(f"{path}: {device}: chunk_rows takes a multiple of 128 or null, got {rows!r}")
        width = entry.get("product_width")
        if width is not None and (not isinstance(width, int) or width < 0):
            raise ValueError(f"{path}: {device}: product_width takes a number of elements or null, got {width!r}")
        for launch in entry.get("row_launches", ()):
            block, warps, residency = (launch.get(name) for name in RowLaunch._fields)
            right = all(isinstance(x, int) and x > 0 and x & (x - 1) == 0 for x in (block, warps))
            if not right or warps > 32 or not isinstance(residency, int) or not 1 <= residency <= 32:
                raise ValueError(f"{path}: {device}: powers of 2 for block and warps, and a residency, got {launch!r}")
    return dict(table)


@functools.lru_cache(maxsize=64)
def _name(index: int | None) -> str | None:
    """A CUDA device's name; None where there is no such device, as when calls are counted over tensors without data."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(index)


def _entry(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or (name := _name(device.index)) is None:
        return {}
    return _read(os.environ.get(VARIABLE) or str(TABLE)).get(name, {})


def chunk_rows(device: torch.device) -> int | None:
    """The most rows of a chunk of logits that paid on this device, or None where nobody measured."""
    rows: int | None = _entry(device).get("chunk_rows")
    return rows


def statistics_in_product(device: torch.device, width: int) -> bool:
    """Whether softmax statistics without a gradient are made in a product of our own and no logits are written: where
    hidden states are no wider than it paid for, which is any width where nobody measured."""
    widest: int | None = _entry(device).get("product_width")
    return widest is None or width <= widest


def programs(device: torch.device, each: int) -> int:
    """Programs that run at once on a device, `each` on a multiprocessor."""
    if device.type != "cuda":
        return 3  # interpreted, one after the other
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * each


def row_launch(device: torch.device, vocabulary: int, dtype: torch.dtype) -> RowLaunch | None:
    """The fastest measured launch for rows of about `vocabulary` logits of `dtype`, or None where nobody measured."""
    kind = str(dtype).removeprefix("torch.")
    launches = [launch for launch in _entry(device).get("row_launches", ()) if launch["dtype"] == kind]

    def apart(launch: dict[str, Any]) -> float:
        ratio = launch["vocabulary"] / max(1, vocabulary)
        return max(ratio, 1.0 / ratio)

    nearest = min(launches, key=apart, default=None)
    if nearest is None or apart(nearest) > _FAR:
        return None
    return RowLaunch(*(nearest[name] for name in RowLaunch._fields))
