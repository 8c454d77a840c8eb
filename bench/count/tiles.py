"""A Triton launch that multiplies matrices, by one of its tiles: all are alike, and so are a product's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.count.trace import Sectors, Trace
from bench.count.work import Tiles


class Tile(Trace):
    """The first tile of a program, and how many more it has. The outermost loop is the one over tiles, of which the
    first is run where the tile is `looked_at`; of the product's steps the first one is, and stands for all."""

    def __init__(self, looked_at: bool) -> None:
        super().__init__()
        self.looked_at, self.inside = looked_at, False
        self.number, self.flops, self.elements = 0, 0.0, 0

    def turns(self, numbers: range) -> Iterator[int]:
        if self.inside:
            before = self.flops
            yield numbers[0]
            self.flops += (len(numbers) - 1) * (self.flops - before)
            return
        self.number = len(numbers)
        if self.looked_at and self.number:
            self.inside = True
            yield numbers[0]
            self.inside = False

    def multiply(self, rows: int, inner: int, columns: int) -> None:
        self.flops += 2.0 * rows * inner * columns
        self.elements = rows * columns

    def load(self, sectors: Sectors, first: int, needs: int, stays: bool = True) -> int:
        return 0

    def store(self, sectors: Sectors, first: int, stays: bool = True) -> None:
        pass


def tiles_of(run: Callable[[int, Tile], Any], programs: int) -> Tiles:
    """Of a launch; `run(program, trace)` runs one program."""
    traces = [Tile(looked_at=program == 0) for program in range(programs)]
    for program, trace in enumerate(traces):
        run(program, trace)
    first = traces[0]
    return Tiles(sum(t.number for t in traces), max(t.number for t in traces), first.flops, first.elements)
