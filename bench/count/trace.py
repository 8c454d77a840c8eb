"""What one program of a Triton kernel touches, recorded while the interpreter runs it, and what a whole launch moves by
the traces of a few of its programs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.count.work import Programs

SECTOR = 32  # bytes, what memory and caches are read by
_OUTERMOST = "_run_program"  # the function below which a kernel's own frames begin

Sectors = np.ndarray[Any, np.dtype[np.int64]]  # numbers of sectors, ascending and each once
_NONE: Sectors = np.empty(0, dtype=np.int64)


@dataclass
class Trace:
    """The memory operations of one program, in their order.

    A load begins a new round where its address or mask needs a value of the round under way, behind a barrier, and in
    the next turn of a loop: a program is stopped at the first use of what it loads, and a turn uses what it has loaded.
    """

    reads: list[Sectors] = field(default_factory=list)
    order: list[Sectors] = field(default_factory=list)  # of all operations
    first_read: Sectors = field(default_factory=lambda: _NONE)
    written: Sectors = field(default_factory=lambda: _NONE)
    rereads: list[tuple[float, float]] = field(default_factory=list)  # (distance in bytes, bytes)
    rounds: int = 0
    _place: tuple[int, ...] = ()
    _after: int = 0  # the next load is in a later round than this
    _stores: list[Sectors] = field(default_factory=list)

    def sectors(self, addresses: np.ndarray[Any, Any], itemsize: int) -> Sectors:
        numbers = addresses.astype(np.uint64).ravel()
        first = (numbers // SECTOR).astype(np.int64)
        last = ((numbers + np.uint64(itemsize - 1)) // SECTOR).astype(np.int64)
        return np.unique(first if (first == last).all() else np.concatenate([first, last]))

    def load(self, sectors: Sectors, needs: int) -> int:
        """Records a load that needs values of round `needs`; the round that its own value comes from."""
        place = _place()
        now = max(needs + 1, self._after + 1, self.rounds + (place <= self._place), 1)
        self._place, self.rounds = place, max(self.rounds, now)
        self.order.append(sectors)
        self.reads.append(sectors)
        return now

    def store(self, sectors: Sectors) -> None:
        self.order.append(sectors)
        self._stores.append(sectors)
        self.reads.append(_NONE)

    def atomic(self, sectors: Sectors, needs: int) -> int:
        """Nobody waits for an atomic operation unless its value is used."""
        self.store(sectors)
        return max(needs + 1, self.rounds, 1)

    def fence(self, value_of: int | None = None) -> None:
        """What follows waits for all loads so far, or for those of one round: the host's language looked at a value."""
        self._after = max(self._after, self.rounds if value_of is None else value_of)

    def finish(self) -> None:
        """First reads, and of every later one how much the program has touched in between."""
        if not self.order:
            return
        every = np.unique(np.concatenate(self.order))
        last = np.full(len(every), -1)  # the operation that touched each sector last
        held = np.zeros(len(self.order) + 1, dtype=np.int64)  # sectors whose last operation is this one
        first = []
        for at, (sectors, read) in enumerate(zip(self.order, self.reads, strict=True)):
            where = np.searchsorted(every, sectors)
            before = last[where]
            if len(read):
                first.append(sectors[before < 0])
                again = before[before >= 0]
                if len(again):
                    behind = np.cumsum(held[::-1])[::-1]  # sectors touched at this operation or later
                    for operation, count in zip(*np.unique(again, return_counts=True), strict=True):
                        self.rereads.append((SECTOR * float(behind[operation]), SECTOR * float(count)))
            np.subtract.at(held, before[before >= 0], 1)
            last[where] = at
            held[at] += len(sectors)
        self.first_read = np.unique(np.concatenate(first)) if first else _NONE
        self.written = np.unique(np.concatenate(self._stores)) if self._stores else _NONE
        self.order, self.reads, self._stores = [], [], []

    @property
    def bytes(self) -> int:
        return SECTOR * (len(self.first_read) + len(self.written))


def _place() -> tuple[int, ...]:
    """Lines of the kernel and of what it calls, outermost first, where the interpreter is at."""
    frame, lines = sys._getframe(2), []
    while frame is not None and frame.f_code.co_name != _OUTERMOST:
        if "/triton/" not in frame.f_code.co_filename and "bench/count" not in frame.f_code.co_filename:
            lines.append(frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(reversed(lines))


def _weights(sample: Sequence[int], programs: int) -> dict[int, float]:
    """How many programs each one of the sample stands for: those between it and its neighbours, half and half; the
    first and the last, which often differ, for themselves alone where there are others."""
    if len(sample) <= 2 or len(sample) == programs:
        return dict.fromkeys(sample, programs / len(sample))
    weights = {sample[0]: 1.0, sample[-1]: 1.0}
    inner = list(sample[1:-1])
    edges = [1.0, *((a + b + 1) / 2 for a, b in itertools.pairwise(inner)), programs - 1.0]
    weights |= {p: high - low for p, (low, high) in zip(inner, itertools.pairwise(edges), strict=True)}
    return weights


def summed(
    traces: Mapping[int, Trace], programs: int, warps: int, ranges: Sequence[tuple[int, int]], cache_bytes: float
) -> Programs:
    """The launch by the traces of some of its programs.

    Args:
        ranges: address and bytes of every storage among the arguments. More than a storage holds cannot be touched
            for the first time; where it fits the cache what is more comes from there.
    """
    sample = sorted(traces)
    weights = _weights(sample, programs)
    mean = sum(traces[p].bytes * w for p, w in weights.items()) / programs
    moved, shared = {}, 0.0
    for kind in ("first_read", "written"):
        found = {p: getattr(traces[p], kind) for p in sample}
        common = found[sample[0]]
        for p in sample[1:]:
            common = np.intersect1d(common, found[p], assume_unique=True)
        if len(sample) == 1:
            common = _NONE
        total = float(SECTOR * len(common))
        shared += SECTOR * float(len(common)) * (programs - 1 if len(sample) > 1 else 0)
        for address, size in ranges:
            low, high = address // SECTOR, -(-(address + size) // SECTOR)
            inside = common[(common >= low) & (common < high)]
            part = 0.0
            for p, weight in weights.items():
                own = found[p]
                part += weight * (int(np.count_nonzero((own >= low) & (own < high))) - len(inside))
            most = SECTOR * float(high - low - len(inside))
            over = max(0.0, SECTOR * part - most)
            if size <= cache_bytes and over:
                shared += over
                total += most
            else:
                total += SECTOR * part
        moved[kind] = total
    rereads: dict[float, float] = {}
    for p, weight in weights.items():
        for distance, amount in traces[p].rereads:
            rereads[distance] = rereads.get(distance, 0.0) + weight * amount
    rounds = sorted(trace.rounds for trace in traces.values())
    return Programs(
        programs, warps, moved["first_read"], moved["written"], tuple(sorted(rereads.items())), shared,
        max((traces[p].bytes for p in sample), default=0) / mean if mean else 1.0,
        rounds[(len(rounds) - 1) // 2], rounds[-1],
    )  # fmt: skip
