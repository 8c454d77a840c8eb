"""What the count has to say, as data: the bounds that the GPU path is held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.count.cases import SHAPES

GIB = float(1 << 30)
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Bound:
    """Of the case of an operation whose name ends so, a field is at least or at most this."""

    op: str
    ending: str
    name: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        bound = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        return f"{self.op}, {self.ending}: {self.name} {bound}"

    def line(self, lines: Iterable[Line]) -> Line:
        (match,) = (line for line in lines if line["op"] == self.op and line["case"].endswith(self.ending))
        return match

    def holds(self, line: Line) -> bool:
        value = line[self.name]
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def _shapes(op: str, ending: str, name: str, least: tuple[float, ...]) -> list[Bound]:
    """One bound a shape."""
    return [
        Bound(op, f"{', '.join(map(str, shape))}, {ending}", name, least=value)
        for shape, value in zip(SHAPES, least, strict=True)
    ]


_FIRST = ", ".join(map(str, SHAPES[0]))

WANTED: tuple[Bound, ...] = (
    *_shapes("linear_policy_loss", "all active", "share", (0.93, 0.92, 0.88, 0.80)),
    *_shapes("linear_policy_loss", "45 % active", "share", (0.90, 0.90, 0.85, 0.75)),
    *_shapes("linear_logprob", "no gradient", "share", (0.96, 0.95, 0.93, 0.88)),
    Bound("linear_policy_loss", f"{_FIRST}, all active", "launches", most=40),
    Bound("linear_policy_loss", f"{_FIRST}, all active", "synchronisations", most=1),
    Bound("linear_policy_loss", f"{_FIRST}, 45 % active", "synchronisations", most=1),
    Bound("linear_policy_loss", f"{_FIRST}, 45 % active, count given", "synchronisations", most=0),
    *(
        Bound("linear_policy_loss", f"{', '.join(map(str, shape))}, captured", "synchronisations", most=0)
        for shape in SHAPES
    ),
    Bound("linear_policy_loss", f"{_FIRST}, all active", "peak_bytes", most=6.0 * GIB),
    Bound("linear_policy_loss", f"{_FIRST}, 256 MiB", "peak_bytes", most=4.5 * GIB),
    Bound("policy_loss", "151936", "share", least=0.85),
    Bound("policy_loss", "250880", "share", least=0.85),
    Bound("advantage_loss", "K 4, 1024 pairs", "seconds", most=0.03e-3),
    Bound("topk_by_cluster", "10 each", "seconds", most=0.16e-3),
)


def broken(lines: Iterable[Line]) -> list[Bound]:
    """The bounds that do not hold."""
    lines = list(lines)
    return [bound for bound in WANTED if not bound.holds(bound.line(lines))]
