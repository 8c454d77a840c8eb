"""One case from its call to a line of results."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from bench.count.cases import Case
from bench.count.device import Device
from bench.count.launches import Launches
from bench.count.rates import Rates, timed
from bench.count.work import Ledger, Programs, Work, by_name

MOST_LINES = 10  # of a case's kernels in its result; the others are added up


class Counter:
    """A device, and the launches on it."""

    def __init__(self, rates: Rates | None = None) -> None:
        self.rates = rates or Rates()
        self.device = Device()
        self.launches = Launches(self.device, self.rates.cache_bytes)

    @contextlib.contextmanager
    def _there(self, case: Case) -> Iterator[None]:
        self.device.limit, self.device.capturing = case.limit, case.capturing
        with self.device.present(), self.launches.caught():
            yield

    def ledger(self, case: Case) -> Ledger:
        if case.parts is None:
            return self._called(case, case.build, warm=True)
        assert case.parted is not None
        small, large = (self._called(case, lambda s=share: case.parted(s), warm=False) for share in case.parts)
        return continued(small, large, case.parts)

    def _called(self, case: Case, build: Any, warm: bool) -> Ledger:
        with self._there(case):
            step = build()
            if warm:
                step()  # what is made once a process, and asked once
                gc.collect()
            with self.device.counting() as ledger:
                kept = step()
            del kept, step
        gc.collect()
        return ledger

    def count(self, case: Case) -> dict[str, Any]:
        """The line of a case."""
        ledger, rates = self.ledger(case), self.rates
        time = timed(ledger, rates)
        memory = {at: rates.memory(entry) for at, entry in enumerate(ledger.entries) if isinstance(entry, Work)}
        floor = case.floor(rates)
        kernels = by_name(ledger, time.by_entry, memory)
        rest = kernels[MOST_LINES:]
        if rest:
            names = ("launches", "flops", "bytes", "seconds")
            kernels = [
                *kernels[:MOST_LINES],
                {"name": f"{len(rest)} others", **{n: sum(line[n] for line in rest) for n in names}},
            ]
        return {
            "op": case.op, "case": case.name, "shape": case.shape, "share": _digits(floor / time.total),
            "launches": ledger.launches, "synchronisations": len(ledger.stops), "late_reads": ledger.late_reads,
            "flops": ledger.flops, "bytes": round(sum(memory.values())), "peak_bytes": ledger.peak_bytes,
            "seconds": _digits(time.total), "idle_seconds": _digits(time.idle), "floor_seconds": _digits(floor),
            "kernels": [
                line | {"bytes": round(line["bytes"]), "seconds": _digits(line["seconds"])} for line in kernels
            ],
        }  # fmt: skip


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def continued(small: Ledger, large: Ledger, parts: tuple[float, float]) -> Ledger:
    """The whole call by two shares of it: whatever grows with them goes on as it did. Both have to be the same launches
    in the same order."""

    def names(ledger: Ledger) -> list[Any]:
        return [entry.name if isinstance(entry, Work) else type(entry) for entry in ledger.entries]

    if names(small) != names(large):
        raise RuntimeError("two sizes of one call make different launches: what they differ by cannot be gone on with")
    turns = (1.0 - parts[1]) / (parts[1] - parts[0])

    def on(a: float, b: float) -> float:
        return max(0.0, b + turns * (b - a))

    def programs(a: Programs, b: Programs) -> Programs:
        # Each is asked for its own bytes of a second read, so that what fits the cache of both is not spread out.
        distance = max((d for d, _ in b.reread), default=0.0)
        again = on(sum(n for _, n in a.reread), sum(n for _, n in b.reread))
        amounts = ("read", "written", "shared")
        numbers: dict[str, Any] = {name: on(getattr(a, name), getattr(b, name)) for name in amounts}
        numbers |= {name: round(on(getattr(a, name), getattr(b, name))) for name in ("number", "rounds", "longest")}
        return replace(b, **numbers, reread=((distance, again),) if again else ())

    entries = []
    for a, b in zip(small.entries, large.entries, strict=True):
        if isinstance(a, Work) and isinstance(b, Work):
            both = None if a.programs is None or b.programs is None else programs(a.programs, b.programs)
            b = replace(b, bytes=on(a.bytes, b.bytes), programs=both)
        entries.append(b)
    return Ledger(entries, round(on(small.peak_bytes, large.peak_bytes)))


def stated(rates: Rates) -> dict[str, Any]:
    return asdict(rates)
