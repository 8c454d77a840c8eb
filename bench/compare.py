"""Two sets of lines beside each other: what became slower or faster beyond the noise of both.

What is compared is the ratio to the floor of the same run, since that is what a machine in another mood leaves alone;
where a case has no floor, its time. Each side is known from its p20 to its p80, and a little beyond: rounds of one
process share the places of its memory, another process has others. Sides that overlap, or one that spreads wider than
the change that is looked for, allow no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.case import Line

SAME, SLOWER, FASTER, NOISE, GONE = "same", "slower", "faster", "too noisy to tell", "no longer measured"


# What another process may differ by, as a share. Two runs of the same code on a quiet machine agreed within 8 % where
# the floor is matrix products; where it is a copy or an empty call, a tenth was common and a third was seen.
PRODUCTS, MEMORY = 0.02, 0.12
FEW = 5  # rounds: with fewer, p20 and p80 are hardly more than two samples


@dataclass(frozen=True)
class Change:
    case: str
    peer: str
    role: str
    before: float | None
    after: float | None
    verdict: str

    @property
    def share(self) -> float | None:
        return self.after / self.before - 1.0 if self.before and self.after else None


def interval(line: Line, ratio: bool) -> tuple[float, float, float]:
    """p20, median, p80 of the ratio to the floor, or of the time."""
    names = ("times_floor_p20", "times_floor", "times_floor_p80") if ratio else ("p20_s", "median_s", "p80_s")
    low, middle, high = (float(line[name]) for name in names)
    steady = "products" in line.get("floor", "") or line.get("floor", "").startswith(("floor", "float32 floor"))
    more = PRODUCTS if steady and line.get("rounds", FEW) >= FEW else MEMORY
    return low * (1.0 - more), middle, high * (1.0 + more)


def judge(before: Line, after: Line, threshold: float) -> Change:
    ratio = before.get("times_floor") is not None and after.get("times_floor") is not None
    (low_a, a, high_a), (low_b, b, high_b) = interval(before, ratio), interval(after, ratio)
    overlap = low_b <= high_a and low_a <= high_b
    change = b / a - 1.0
    if abs(change) <= threshold:
        # Both medians in the same place mean little where each may lie anywhere.
        wide = max((high_a - low_a) / a, (high_b - low_b) / b) > 2.5 * threshold + 4 * PRODUCTS
        verdict = NOISE if wide else SAME
    elif overlap:
        verdict = NOISE
    else:
        verdict = SLOWER if change > 0 else FASTER
    return Change(after["case"], after["peer"], after["role"], a, b, verdict)


def compare(before: Sequence[Line], after: Sequence[Line], threshold: float = 0.10) -> list[Change]:
    """Every contender that was measured before, floors apart: a floor is the measure, not what is measured."""
    counterparts = {(line["case"], line["peer"]): line for line in after}
    changes = []
    for old in before:
        if old["status"] != "ok" or old["role"] == "floor":
            continue
        new = counterparts.get((old["case"], old["peer"]))
        if new is None or new["status"] != "ok":
            changes.append(Change(old["case"], old["peer"], old["role"], old["median_s"], None, GONE))
        else:
            changes.append(judge(old, new, threshold))
    return changes


def slug(environment: dict[str, Any]) -> str:
    """A device's name as a part of a file's: what is compared later must have run on the same one.

    Processors of one name may differ in their instructions, and their ratios to the floor by more than half: the kind
    stands beside the name.
    """
    name = environment.get("gpu")
    if name is None:
        features = environment["cpu_features"]
        widest = next((kind for kind in ("avx512", "avx2") if kind in features), "")
        products = [kind for feature, kind in (("avx512_bf16", "bf16"), ("amx_tile", "amx")) if feature in features]
        name = " ".join([environment["cpu"], widest, *products, f"{environment['threads']} threads"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
