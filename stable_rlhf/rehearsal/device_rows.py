"""Rows to cluster on one device: there once where they fit, else streamed through two buffers a pass.

Either way they come in slabs of one fixed size, made by the same operations: what is computed from a slab has the same
bits whether its rows stayed on the device or came again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from stable_rlhf.rehearsal.kmeans import BLOCK_ROWS

SLAB_BYTES = 512 << 20  # of float32 rows; a slab costs some 20 launches beside its products
PIECE_BYTES = 32 << 20  # of pinned memory: large enough for a link's full rate, and pinning costs a second for 4 GB
WORKSPACE_BYTES = 5 << 30  # what a pass needs beside rows that stay: two slabs on their way, their parts, sums, scores
ONES = 3  # columns of a row's parts that hold 1: a centroid's half square is added by the product itself


class Inline:
    """Copies where host and device are one: nothing to wait for."""

    def buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device="cpu")

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        target.copy_(source)
        return lambda: None

    def sent(self) -> None:
        """What is computed from here on finds everything that was sent."""

    def used(self) -> Any:
        """A mark after all that is computed so far."""

    def send_after(self, mark: Any) -> None:
        """What is sent from here on waits for that mark."""

    def read(self, values: torch.Tensor) -> Callable[[], list[int]]:
        """Integers on their way to the host; the call that is returned waits for them."""
        return values.tolist

    def move(self, values: np.ndarray) -> torch.Tensor:
        """An array of the host on its way to the device, for what is computed from here on; nobody waits."""
        return torch.from_numpy(values)


class Streamed(Inline):
    """Copies to a CUDA device on a stream of their own, from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)

    def buffer(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device="cpu", pin_memory=True)

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            return self._copies.record_event().synchronize

    def sent(self) -> None:
        torch.cuda.current_stream().wait_stream(self._copies)

    def used(self) -> Any:
        return torch.cuda.current_stream().record_event()

    def send_after(self, mark: Any) -> None:
        self._copies.wait_event(mark)

    def read(self, values: torch.Tensor) -> Callable[[], list[int]]:
        there = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        there.copy_(values, non_blocking=True)
        event = torch.cuda.current_stream().record_event()

        def wait() -> list[int]:
            event.synchronize()
            return there.tolist()

        return wait

    def move(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)


def transfers(device: torch.device) -> Inline:
    return Streamed(device) if device.type == "cuda" else Inline()


def parts_width(d: int) -> int:
    """Columns of one of a row's three parts: d, three for constants, and zeros up to what wide loads want."""
    return -(-(d + ONES) // 8) * 8


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 `high` and `low` with high + low = x to 2^-18 of x; their sum is exact in float32."""
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def fill_parts(parts: torch.Tensor, x: torch.Tensor) -> None:
    """[m, 3 w] from rows [m, d]: high, low and high again, with 1 in three spare columns of the first.

    Beside the centroids' (high, high, low) that is one product of 16-bit matrices that adds up all but low x low."""
    d, w = x.shape[1], parts.shape[1] // 3
    high, low = split(x)
    parts.zero_()
    for part, values in enumerate((high, low, high)):
        parts[:, part * w : part * w + d].copy_(values)
    parts[:, d : d + ONES].fill_(1)


def _fits(n: int, d: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return n * (4 * d + 6 * parts_width(d) + 64) + WORKSPACE_BYTES <= 0.9 * free


class DeviceRows:
    """Rows [n, d] of an array or memory map (or those of its rows at `places`) for one device.

    Where 10 bytes a value and 5 GiB are within nine tenths of the device's free memory, rows stay there: as float32 and
    as bfloat16 parts for the products. Else every pass streams them from the host, as they are stored, through two
    buffers of 32 MiB of pinned memory into two slabs of at most 512 MiB on the device, one computed on while the next
    one arrives. A pass then takes at most 5 GiB beside labels and centroids, however many rows there are.

    `measure` first, then `settle`: unit length if spherical, else the mean of all rows is subtracted, for distances
    come from products and a shared offset would drown them in rounding.
    """

    def __init__(
        self, array: np.ndarray, device: torch.device, *, places: np.ndarray | None = None, resident: bool | None = None
    ) -> None:
        self.array, self.device, self._places, self._asked = array, device, places, resident
        self.n, self.d = len(array) if places is None else len(places), array.shape[1]
        self.transfers = transfers(device)
        # Multiples of 128: every slab then begins where wide loads may, as a buffer of its own does.
        self.slab_rows = min(self.n, max(128, SLAB_BYTES // (4 * self.d) // 128 * 128))
        self.resident = _fits(self.n, self.d, device) if resident is None else resident
        self.offset: torch.Tensor | None = None  # float32 [d]
        self.scale: torch.Tensor | None = None  # float32 [n]
        if self.resident:
            self._x = torch.empty(self.n, self.d, dtype=torch.float32, device=device)
            self._parts = torch.empty(self.n, 3 * parts_width(self.d), dtype=torch.bfloat16, device=device)

    def __len__(self) -> int:
        return self.n

    # -- from the host ---------------------------------------------------------------------------------------------

    @property
    def _stored(self) -> np.dtype[Any]:
        return np.dtype(np.float16 if self.array.dtype == np.float16 else np.float32)

    def _host(self, first: int, last: int) -> torch.Tensor:
        rows = self.array[first:last] if self._places is None else self.array[self._places[first:last]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a memory map cannot be written to, which nobody does
            return torch.from_numpy(np.ascontiguousarray(rows, dtype=self._stored))

    def _arriving(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(start, rows as stored, on the device) of every slab; valid until the next one is asked for."""
        link, dtype = self.transfers, torch.float16 if self._stored == np.float16 else torch.float32
        piece = min(self.slab_rows, max(1, PIECE_BYTES // (self.d * dtype.itemsize)))
        pinned = [link.buffer(piece, self.d, dtype) for _ in range(2)]
        free: list[Callable[[], None]] = [lambda: None, lambda: None]
        slabs = [torch.empty(self.slab_rows, self.d, dtype=dtype, device=self.device) for _ in range(2)]
        marks = [link.used(), link.used()]  # their memory may still be read by what was computed before
        turn = 0
        for number, start in enumerate(range(0, self.n, self.slab_rows)):
            slab, stop = slabs[number % 2], min(start + self.slab_rows, self.n)
            link.send_after(marks[number % 2])
            for first in range(start, stop, piece):
                last = min(first + piece, stop)
                free[turn]()
                staged = pinned[turn][: last - first]
                staged.copy_(self._host(first, last))
                free[turn] = link.send(slab[first - start : last - start], staged)
                turn = 1 - turn
            link.sent()
            yield start, slab[: stop - start]
            marks[number % 2] = link.used()  # the caller has asked for all it computes from this slab

    # -- before the first pass -------------------------------------------------------------------------------------

    def measure(self) -> np.ndarray:
        """float32 [n] on the host: the squared length of every row, not finite where the row is not (or is too large).

        Keeps the sums of the columns and, where rows stay, the rows."""
        self._lengths = torch.empty(self.n, dtype=torch.float32, device=self.device)
        self._total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for start, stored in self._arriving():
            x = stored.float()
            self._lengths[start : start + len(x)] = x.square().sum(1)
            self._total += x.sum(0, dtype=torch.float64)
            if self.resident:
                self._x[start : start + len(x)] = x
        return self._lengths.cpu().numpy()

    def settle(self, spherical: bool) -> None:
        """Decide what rows are clustered as, once they have been found finite."""
        if spherical:
            inverse = self._lengths.clamp(min=1e-38).sqrt().reciprocal()
            self.scale = torch.where(self._lengths > 0, inverse, torch.zeros_like(inverse))
        else:
            self.offset = (self._total / self.n).float()
        if self.resident:
            for first in range(0, self.n, self.slab_rows):
                places = slice(first, min(first + self.slab_rows, self.n))
                self._shape(self._x[places], places)
                fill_parts(self._parts[places], self._x[places])

    def _shape(self, x: torch.Tensor, places: Any) -> None:
        """Rows of the array, float32, become rows to cluster, in place."""
        if self.scale is not None:
            x.mul_(self.scale[places, None])
        elif self.offset is not None:
            x.sub_(self.offset)

    # -- afterwards ------------------------------------------------------------------------------------------------

    def slabs(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(places, float32 rows [m, d], their parts [m, 3 w]) of every slab, valid until the next one is asked for."""
        if not self.resident:
            yield from self._streamed()
            return
        for first in range(0, self.n, self.slab_rows):
            places = slice(first, min(first + self.slab_rows, self.n))
            yield places, self._x[places], self._parts[places]

    def _streamed(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        x = torch.empty(self.slab_rows, self.d, dtype=torch.float32, device=self.device)
        parts = torch.empty(self.slab_rows, 3 * parts_width(self.d), dtype=torch.bfloat16, device=self.device)
        for first, stored in self._arriving():
            places = slice(first, first + len(stored))
            rows, their_parts = x[: len(stored)], parts[: len(stored)]
            rows.copy_(stored)
            self._shape(rows, places)
            fill_parts(their_parts, rows)
            yield places, rows, their_parts

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """float32 [m, d], the rows at places that the device knows; from the host, one synchronisation."""
        return self._x.index_select(0, places) if self.resident else self.take(places.cpu().numpy())

    def take(self, places: np.ndarray) -> torch.Tensor:
        """float32 [m, d] on the device, the rows at places that the host knows."""
        there = self.transfers.move(places)
        if self.resident:
            return self._x.index_select(0, there)
        rows = self.array[places if self._places is None else self._places[places]]
        x = self.transfers.move(np.array(rows, dtype=np.float32))
        self._shape(x, there)
        return x

    def scaled(self, start: int) -> np.ndarray:
        """Rows [start, start + BLOCK_ROWS), float32, on the host."""
        return self.take(np.arange(start, min(start + BLOCK_ROWS, self.n))).cpu().numpy()

    def subset(self, places: np.ndarray) -> DeviceRows:
        """The settled rows at `places`, which stay on the device where they fit."""
        where = places if self._places is None else self._places[places]
        some = DeviceRows(self.array, self.device, places=where, resident=self._asked)
        there = self.transfers.move(places)
        some.offset = self.offset
        some.scale = None if self.scale is None else self.scale[there]
        if some.resident and self.resident:
            torch.index_select(self._x, 0, there, out=some._x)
            torch.index_select(self._parts, 0, there, out=some._parts)
        elif some.resident:
            for part, x, parts in some._streamed():
                some._x[part], some._parts[part] = x, parts
        return some
