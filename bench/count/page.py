"""The section of docs/benchmarks.md that is counted and not measured: before and after, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import pages
from bench.case import RESULTS
from bench.common import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
COUNTED = RESULTS / "count.json"
BEFORE = RESULTS / "count-before.json"

# How each rate is told, and in which unit.
RATES: dict[str, tuple[str, float, str]] = {
    "product_flops": ("dense 16-bit products, the floor's rate (measured once on such a card)", 1e12, "TFLOP/s"),
    "copy_bytes": ("a copy, read and written together (measured once on such a card)", 1e12, "TB/s"),
    "multiprocessors": ("multiprocessors", 1, ""),
    "tile": ("tile of a product's result, in either orientation", 1, ""),
    "tile_flops": ("a multiprocessor on one tile", 1e12, "TFLOP/s"),
    "tile_start": ("start and end of a tile", 1e-6, "µs"),
    "end_instructions": ("end of a tile of our own product, an element (read off the machine code)", 1, "instructions"),
    "issued": ("instructions of single threads, a second and multiprocessor", 1e9, "G"),
    "most_splits": ("parts that a product's inner dimension may be cut into", 1, "at most"),
    "float32_product_flops": ("float32 products", 1e12, "TFLOP/s"),
    "kernel_share": ("share of the copy's rate that a Triton kernel gets", 1, ""),
    "cache_bytes": ("second-level cache that a kernel can count on", 1e6, "MB"),
    "cache_rate": ("rate of that cache", 1e12, "TB/s"),
    "near_bytes": ("a multiprocessor's own cache, free of charge", 1e3, "KB"),
    "load_latency": ("a load that waits for another", 1e-6, "µs"),
    "threads": ("threads a multiprocessor", 1, ""),
    "registers": ("registers a multiprocessor", 1, ""),
    "registers_of_a_thread": ("registers a thread, where its launch does not bound them", 1, ""),
    "shortest": ("the device's time for a launch", 1e-6, "µs at least"),
    "wake": ("from the end of the device's work until the host goes on", 1e-6, "µs"),
    "host_operation": ("the host's time for an operation of PyTorch", 1e-6, "µs"),
    "host_kernel": ("the host's time for a Triton kernel and what leads up to it", 1e-6, "µs"),
}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _numbers(line: dict[str, Any] | None) -> list[str]:
    if line is None:
        return ["–"] * 5
    took = f"{1e3 * line['seconds']:.3g}" if line["seconds"] < 0.1 else f"{1e3 * line['seconds']:.0f}"
    stops = f"{line['synchronisations']}" + (f" + {line['late_reads']} late" if line["late_reads"] else "")
    return [f"{line['share']:.2f}", took, f"{line['launches']:,}", stops, f"{line['peak_bytes'] / 2**30:.2f}"]


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A row a case: what it was, and what it is."""
    earlier = {(line["op"], line["case"]): line for line in before["ops"]}
    head = ["case", "floor, ms", "share of it", "ms", "launches", "stops", "GiB added"]
    rows = []
    for line in after["ops"]:
        was, now = _numbers(earlier.get((line["op"], line["case"]))), _numbers(line)
        pairs = [f"{a} → **{b}**" for a, b in zip(was, now, strict=True)]
        rows.append([f"`{line['op']}` {line['case']}", f"{1e3 * line['floor_seconds']:.3g}", *pairs])
    return pages.markdown(head, rows) + "\n"


def _amount(value: Any, unit: float, name: str) -> str:
    if isinstance(value, list | tuple):
        return " × ".join(str(part) for part in value)
    return f"{value / unit:g} {name}".strip()


def rates(after: dict[str, Any]) -> str:
    stated = after["rates"]
    rows = [[said, _amount(stated[field], unit, name)] for field, (said, unit, name) in RATES.items()]
    return pages.markdown(["assumed", ""], rows) + "\n"


def block(name: str) -> str:
    """What stands between the markers of that name."""
    after = read(COUNTED)
    if name == "rates":
        return rates(after)
    before = read(BEFORE)
    return (
        table(before, after) + f"\n{after['device']}. Before: commit {before['commit'][:8]}; after: commit "
        f"{after['commit'][:8]}{' with changes' if after['changed_since'] else ''}. Again: `python -m bench count "
        "--update`.\n"
    )


def rendered(page: str) -> str:
    """The page with every counted part made anew."""
    return pages.rendered(page, "count", block)


def rewrite() -> bool:
    """Writes the counted parts; whether anything changed."""
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    if after != before:
        PAGE.write_text(after, encoding="utf-8")
    return after != before
