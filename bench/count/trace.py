"""What one program of a Triton kernel touches, recorded while the interpreter runs it, and what a whole launch moves by
the traces of a few of its programs."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.count.work import Programs

SECTOR = 32  # bytes, what memory and caches are read by
_OUTERMOST = "_run_program"  # the function below which a kernel's own frames begin

Sectors = np.ndarray[Any, np.dtype[np.int64]]  # numbers of sectors, ascending and each once
_MOST_OF_A_TURN = 1000  # operations
_NONE: Sectors = np.empty(0, dtype=np.int64)


def _distinct(parts: Sequence[Sectors]) -> Sectors:
    """All of them in order, each once. (`numpy.unique` is many times slower on so many.)"""
    if not parts:
        return _NONE
    every = np.concatenate(parts)
    every.sort()
    return every[np.insert(every[1:] != every[:-1], 0, True)] if len(every) else every


class IrregularLoop(Exception):
    """A loop did not go on as its first turns did."""


@dataclass
class Trace:
    """The memory operations of one program, in their order.

    A load begins a new round where its address or mask needs a value of the round under way, behind a barrier, and in
    the next turn of a loop: a program is stopped at the first use of what it loads, and a turn uses what it has loaded.
    """

    reads: list[Sectors] = field(default_factory=list)
    order: list[Sectors] = field(default_factory=list)  # of all operations
    first: list[int] = field(default_factory=list)  # the first address of each
    stays: list[bool] = field(default_factory=list)  # whether it asks the cache to keep what it touched
    continues: bool = False  # whether the turns of a regular loop are continued, and most of them not run
    alike: Callable[[], bool] = lambda: False  # whether the values that were read are the same for all rows: a loop in
    # which they decided something goes on as it began only then
    looks: int = 0  # how often something was decided by a value that was loaded
    first_read: Sectors = field(default_factory=lambda: _NONE)
    written: Sectors = field(default_factory=lambda: _NONE)
    rereads: list[tuple[float, float]] = field(default_factory=list)  # (distance in bytes, bytes)
    rounds: int = 0
    _place: tuple[int, ...] = ()
    _after: int = 0  # the next load is in a later round than this

    def sectors(self, addresses: np.ndarray[Any, Any], itemsize: int) -> Sectors:
        numbers = addresses.astype(np.uint64).ravel()
        first = (numbers // SECTOR).astype(np.int64)
        last = ((numbers + np.uint64(itemsize - 1)) // SECTOR).astype(np.int64)
        every = first if (first == last).all() else np.concatenate([first, last])
        return _distinct([every])

    def load(self, sectors: Sectors, first: int, needs: int, stays: bool = True) -> int:
        """Records a load that needs values of round `needs`; the round that its own value comes from."""
        place = _place()
        now = max(needs + 1, self._after + 1, self.rounds + (place <= self._place), 1)
        self._place, self.rounds = place, max(self.rounds, now)
        self._add(sectors, first, True, stays)
        return now

    def store(self, sectors: Sectors, first: int, stays: bool = True) -> None:
        self._add(sectors, first, False, stays)

    def _add(self, sectors: Sectors, first: int, read: bool, stays: bool) -> None:
        self.order.append(sectors)
        self.first.append(first)
        self.stays.append(stays)
        self.reads.append(sectors if read else _NONE)

    def atomic(self, sectors: Sectors, first: int, needs: int) -> int:
        """Nobody waits for an atomic operation unless its value is used."""
        self.store(sectors, first)
        return max(needs + 1, self.rounds, 1)

    def fence(self, value_of: int | None = None) -> None:
        """What follows waits for all loads so far, or for those of one round: something was decided by a value."""
        self.looks += value_of is not None
        self._after = max(self._after, self.rounds if value_of is None else value_of)

    def turns(self, numbers: range) -> Iterator[int]:
        """The turns of a loop. Where the third touches what the second did, each operation a fixed distance further,
        the others are taken to go on like that, and are not run but for the last three: the first of these for what a
        turn leaves to the next one, the second has to be where it was expected, and the last is often another one."""
        count = len(numbers)
        if not self.continues or count < 8:
            yield from numbers
            return
        yield numbers[0]
        begin, looks, rounds = [len(self.order)], self.looks, 0
        for turn in (1, 2):
            rounds = self.rounds
            yield numbers[turn]
            begin.append(len(self.order))
        shifts = self._shifts(*begin)
        if shifts is None or (looks != self.looks and not self.alike()):
            yield from numbers[3:]
            return
        for turn in range(3, count - 2):
            for operation, shift in enumerate(shifts, begin[1]):
                self._again(operation, (turn - 2) * shift)
        self.rounds += (count - 5) * (self.rounds - rounds)
        here, rounds = len(self.order), self.rounds
        yield numbers[count - 3]
        del self.order[here:], self.first[here:], self.reads[here:], self.stays[here:]
        self.rounds = rounds
        yield numbers[count - 2]
        expected = [first + (count - 4) * shift for first, shift in zip(self.first[begin[1] :], shifts, strict=False)]
        if self.first[here:] != expected:
            raise IrregularLoop
        yield numbers[count - 1]

    def _shifts(self, begin: int, middle: int, end: int) -> list[int] | None:
        """How far each operation of a turn is from the same one in the turn before; None where they are not the same,
        or so many that the turn is better run."""
        if not 0 < middle - begin == end - middle <= _MOST_OF_A_TURN:
            return None
        shifts = []
        for a, b in zip(range(begin, middle), range(middle, end), strict=True):
            shift = self.first[b] - self.first[a]
            alike = len(self.order[a]) == len(self.order[b]) and len(self.reads[a]) == len(self.reads[b])
            if not alike or (shift % SECTOR and len(self.order[a]) > 1):
                return None
            shifts.append(shift)
        return shifts

    def _again(self, operation: int, shift: int) -> None:
        """The operation once more, that far from where it was."""
        first, sectors = self.first[operation] + shift, self.order[operation]
        moved = sectors + shift // SECTOR if len(sectors) != 1 else np.array([first // SECTOR], dtype=np.int64)
        self._add(moved, first, len(self.reads[operation]) > 0, self.stays[operation])

    def finish(self) -> None:
        """First reads, and of every later one how much the program has touched in between, without what it let go."""
        if not self.order:
            return
        every = _distinct(self.order)
        last = np.full(len(every), -1)  # the operation that touched each sector last
        held = np.zeros(len(self.order) + 1, dtype=np.int64)  # sectors whose last operation is this one
        stays = np.array(self.stays, dtype=np.int64)
        first = []
        for at, (sectors, read) in enumerate(zip(self.order, self.reads, strict=True)):
            where = np.searchsorted(every, sectors)
            before = last[where]
            if len(read):
                first.append(sectors[before < 0])
                again = before[before >= 0]
                if len(again):
                    behind = np.cumsum(held[::-1])[::-1]  # sectors touched at this operation or later
                    counts = np.bincount(again)
                    for operation in np.flatnonzero(counts):
                        distance = SECTOR * float(behind[operation]) if stays[operation] else math.inf
                        self.rereads.append((distance, SECTOR * float(counts[operation])))
            leaving = before[before >= 0]
            if len(leaving):
                counts = np.bincount(leaving)
                held[: len(counts)] -= counts * stays[: len(counts)]
            last[where] = at
            held[at] += len(sectors) * stays[at]
        self.first_read = _distinct(first)
        stores = [x for x, read in zip(self.order, self.reads, strict=True) if not len(read)]
        self.written = _distinct(stores)
        self.order, self.reads, self.first, self.stays = [], [], [], []

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
    traces: Mapping[int, Trace],
    programs: int,
    warps: int,
    registers: int,
    ranges: Sequence[tuple[int, int]],
    cache_bytes: float,
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
        sectors = {p: getattr(traces[p], kind) for p in sample}
        common = sectors[sample[0]]
        for p in sample[1:]:
            common = np.intersect1d(common, sectors[p], assume_unique=True)
        if len(sample) == 1:
            common = _NONE
        total = float(SECTOR * len(common))
        shared += SECTOR * float(len(common)) * (programs - 1 if len(sample) > 1 else 0)
        for address, size in ranges:
            low, high = address // SECTOR, -(-(address + size) // SECTOR)
            inside = common[(common >= low) & (common < high)]
            part = 0.0
            for p, weight in weights.items():
                own = sectors[p]
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
        programs, warps, registers, moved["first_read"], moved["written"], tuple(sorted(rereads.items())), shared,
        max((traces[p].bytes for p in sample), default=0) / mean if mean else 1.0,
        rounds[(len(rounds) - 1) // 2], rounds[-1],
    )  # fmt: skip
