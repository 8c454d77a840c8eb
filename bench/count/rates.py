"""Rates of the device that is counted for, each an assumption that is printed with every result, and the seconds that
they make of a ledger."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.count.work import Ledger, Product, Programs, Record, Sort, Stop, Tiles, Wait, Work


@dataclass(frozen=True)
class Rates:
    """An H200 (SXM, 141 GB). The first two were measured on such a card; the others are stated, not measured."""

    product_flops: float = 790e12  # dense products in 16 bits, the best that was seen: what floors are made of
    copy_bytes: float = 4.3e12  # read and written together, by a copy far beyond the caches

    multiprocessors: int = 132
    tile: tuple[int, int] = (256, 128)  # of a product's result, in either orientation
    tile_flops: float = 6.17e12  # a multiprocessor on one tile
    tile_start: float = 1.5e-6  # seconds a tile, for its start and its end
    # Of a Triton product's tile: the same rate, and when its steps are done so many instructions an element (read off
    # the machine code, tests/ops/test_ahead_of_time.py), while the blocks of the next tile are already on their way.
    end_instructions: float = 10.75
    issued: float = 128 * 1.755e9  # instructions a second and multiprocessor, of single threads
    most_splits: int = 16  # parts of a product's inner dimension that a library may sum up afterwards
    float32_product_flops: float = 50e12  # without tensor cores, as PyTorch has it by default

    kernel_share: float = 0.85  # of the copy rate, which a Triton kernel gets
    cache_bytes: float = 30e6  # of the second-level cache's 50 MB that a kernel's own data can count on
    cache_rate: float = 5.5e12  # bytes a second from there
    near_bytes: float = 128e3  # of a multiprocessor's own cache; what it holds costs nothing to read again
    load_latency: float = 0.65e-6  # seconds that a load takes that waits for the one before
    threads: int = 2048  # a multiprocessor, at most
    registers: int = 65536
    registers_of_a_thread: int = 64  # where the launch does not bound them

    shortest: float = 2e-6  # seconds: no launch takes less of the device
    wake: float = 20e-6  # from the end of the device's work until the host goes on
    host_operation: float = 6e-6  # the host's time for an operation of PyTorch
    host_kernel: float = 100e-6  # and for a Triton kernel with tens of arguments, and what leads up to it

    def resident(self, programs: Programs) -> int:
        """Programs on the device at a time."""
        threads, registers = 32 * programs.warps, programs.registers or self.registers_of_a_thread
        each = min(self.threads // threads, self.registers // (threads * registers))
        return self.multiprocessors * max(1, each)

    def product_seconds(self, product: Product, moved: float) -> float:
        if product.itemsize > 2:
            return max(product.flops / self.float32_product_flops, moved / self.copy_bytes)
        best = math.inf
        for tall, wide in {self.tile, self.tile[::-1]}:
            tiles = product.batch * math.ceil(product.rows / tall) * math.ceil(product.columns / wide)
            for splits in range(1, self.most_splits + 1):
                waves = math.ceil(tiles * splits / self.multiprocessors)
                inner = math.ceil(product.inner / splits)
                each = 2.0 * tall * wide * inner / self.tile_flops + self.tile_start
                # Parts are written in float32, and read again to be summed.
                parts = 0 if splits == 1 else 8.0 * splits * product.batch * product.rows * product.columns
                best = min(best, waves * each + parts / self.copy_bytes)
        return max(best, moved / self.copy_bytes)

    def tiles_seconds(self, tiles: Tiles, moved: float) -> float:
        end = max(self.tile_start, tiles.elements * self.end_instructions / self.issued)
        return max(tiles.most * (tiles.flops / self.tile_flops + end), moved / self.copy_bytes)

    def kernel_bytes(self, programs: Programs) -> tuple[float, float]:
        """Bytes of a launch from memory and from the second-level cache: a second read is one of memory when the
        programs on the device have touched more than the cache since the first."""
        memory, cache = programs.read + programs.written, programs.shared
        together = min(programs.number, self.resident(programs))
        neighbours = math.ceil(together / self.multiprocessors)
        for distance, amount in programs.reread:
            if distance * together > self.cache_bytes:
                memory += amount
            elif distance * neighbours > self.near_bytes:
                cache += amount
        return memory, cache

    def kernel_seconds(self, programs: Programs) -> float:
        memory, cache = self.kernel_bytes(programs)
        slots = self.resident(programs)
        waves = math.ceil(programs.number / slots)
        # The last wave is not full, or some of the programs on the device have more to do than others.
        balance = waves * slots / programs.number if waves > 1 else programs.heaviest
        rate = self.kernel_share * self.copy_bytes
        waiting = self.load_latency * ((waves - 1) * programs.rounds + programs.longest)
        return max(balance * memory / rate, balance * (memory + cache) / self.cache_rate, waiting)

    def seconds(self, work: Work) -> float:
        if work.programs is not None:
            took = self.kernel_seconds(work.programs)
        elif work.tiles is not None:
            took = self.tiles_seconds(work.tiles, work.bytes)
        elif work.product is not None:
            took = self.product_seconds(work.product, work.bytes)
        else:
            took = work.bytes / self.copy_bytes
        return max(took, self.shortest * work.launches)

    def memory(self, work: Work) -> float:
        return work.bytes if work.programs is None else self.kernel_bytes(work.programs)[0]

    def floor_of_products(self, flops: float) -> float:
        return flops / self.product_flops

    def floor_of_bytes(self, moved: float) -> float:
        return moved / self.copy_bytes


@dataclass(frozen=True)
class Time:
    """Seconds of a call."""

    total: float
    idle: float  # of these the device waits for the host
    by_entry: dict[int, float]


def timed(ledger: Ledger, rates: Rates) -> Time:
    """The device's time for a call. When the call begins the host is far ahead of the device, as in a step of training;
    after a stop it is not, and until it is again the device waits for every launch."""
    device, idle, host = 0.0, 0.0, -math.inf
    events: dict[int, float] = {}
    by_entry: dict[int, float] = {}
    for at, entry in enumerate(ledger.entries):
        if isinstance(entry, Stop):
            host = max(host, device) + rates.wake
        elif isinstance(entry, Record):
            events[entry.event] = device
        elif isinstance(entry, Wait):
            host = max(host, events.get(entry.event, 0.0)) + rates.wake
        else:
            each = rates.host_kernel if entry.sort is Sort.KERNEL else rates.host_operation
            host += each
            idle += max(host - device, 0.0)
            by_entry[at] = rates.seconds(entry)
            device = max(device, host) + by_entry[at]
    return Time(device, idle, by_entry)
