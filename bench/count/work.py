"""What a call does, in its order: pieces of device work, copies, events and the points where the host stops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Sort(Enum):
    """What a piece of device work is, which decides the rate it is given."""

    PRODUCT = "product"
    KERNEL = "kernel"  # of Triton
    OPERATION = "operation"  # of PyTorch: elementwise, reductions, fills, copies


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, columns], `batch` times."""

    rows: int
    columns: int
    inner: int
    itemsize: int  # of the operands
    batch: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.columns * self.inner


@dataclass(frozen=True)
class Programs:
    """A Triton launch, from the traces of a sample of its programs."""

    number: int
    warps: int
    registers: int  # a thread's, where the launch bounds them; else 0
    read: float  # bytes that come from memory at their first touch
    written: float
    reread: tuple[tuple[float, float], ...]  # (reuse distance, bytes of all programs), both in bytes
    shared: float  # bytes that other programs of the launch have just read or written: from the second-level cache
    heaviest: float  # the bytes of the program that has most, over the mean
    rounds: int  # load rounds that wait for one another in a usual program
    longest: int  # and in the program that has most of them


@dataclass(frozen=True)
class Tiles:
    """A Triton launch that multiplies matrices tile by tile, and does more with each tile than to write it."""

    number: int
    most: int  # of the program that has most of them
    flops: float  # of one, its rests outside of the matrices too
    elements: int  # of one


@dataclass(frozen=True)
class Work:
    """One or more launches on the device that belong together."""

    name: str
    sort: Sort
    bytes: float  # to and from memory; of a kernel those of `programs` decide
    launches: int = 1
    product: Product | None = None
    programs: Programs | None = None
    tiles: Tiles | None = None

    @property
    def flops(self) -> float:
        if self.tiles is not None:
            return self.tiles.number * self.tiles.flops
        return 0.0 if self.product is None else self.product.flops


@dataclass(frozen=True)
class Stop:
    """The host waits until the device has nothing left to do."""

    why: str


@dataclass(frozen=True)
class Record:
    """An event on the device's queue."""

    event: int


@dataclass(frozen=True)
class Wait:
    """The host waits for an event."""

    event: int


Entry = Work | Stop | Record | Wait


def late(entries: list[Entry], at: int) -> bool:
    """Whether the wait at that place leaves the device with work: some was queued behind its event."""
    wait = entries[at]
    assert isinstance(wait, Wait)
    for entry in reversed(entries[:at]):
        if isinstance(entry, Work):
            return True
        if isinstance(entry, Record) and entry.event == wait.event:
            return False
    return False


@dataclass
class Ledger:
    """What one call did, and the memory it held."""

    entries: list[Entry] = field(default_factory=list)
    peak_bytes: int = 0  # beyond what was there before the call; results are in it

    @property
    def work(self) -> list[Work]:
        return [entry for entry in self.entries if isinstance(entry, Work)]

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.work)

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.work)

    def _waits(self) -> Iterable[bool]:
        return (late(self.entries, at) for at, entry in enumerate(self.entries) if isinstance(entry, Wait))

    @property
    def stops(self) -> list[str]:
        """Why the host stopped, each time."""
        reasons = [entry.why for entry in self.entries if isinstance(entry, Stop)]
        return reasons + ["an event with nothing queued behind it" for is_late in self._waits() if not is_late]

    @property
    def late_reads(self) -> int:
        """Waits for something that lies behind work still queued: the device does not run dry."""
        return sum(self._waits())


def by_name(ledger: Ledger, seconds: dict[int, float], memory: dict[int, float]) -> list[dict[str, Any]]:
    """The work of a call, added up by name; `seconds` and `memory` by the place among the entries."""
    totals: dict[str, dict[str, Any]] = {}
    for at, entry in enumerate(ledger.entries):
        if not isinstance(entry, Work):
            continue
        line = totals.setdefault(
            entry.name, {"name": entry.name, "launches": 0, "flops": 0, "bytes": 0.0, "seconds": 0.0}
        )
        line["launches"] += entry.launches
        line["flops"] += entry.flops
        line["bytes"] += memory[at]
        line["seconds"] += seconds[at]
    return sorted(totals.values(), key=lambda line: -line["seconds"])
