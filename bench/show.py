"""Tables of results: all of one run, or one line a case over several (`python bench/show.py bench/results/*.json`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def title(case: dict[str, Any]) -> str:
    parts = [case["op"], case["dtype"], f"T {case['rows']:,}"]
    if case["width"]:
        parts.append(f"H {case['width']:,}")
    parts += [f"V {case['vocabulary']:,}", f"{case['active_rows']:,} active"]
    for name in ("clipped", "rehearsal"):
        if case[name]:
            parts.append(f"{case[name]:.0%} {name}")
    if case.get("chunks"):
        parts.append(f"workspace for {case['chunks']} chunks")
    if case.get("inputs"):
        parts.append(case["inputs"])
    return ", ".join(parts)


def _error(result: dict[str, Any]) -> str:
    check = result.get("check")
    if not check or "failure" in check:
        return ""
    return " / ".join(format(value, ".0e") for value in check["errors"].values())


def _remark(result: dict[str, Any]) -> str:
    judged = (result.get("check") or {}).get("verdict")
    parts = [judged if judged != "right" else None, result.get("failure"), result.get("note")]
    if result.get("gb_per_s") is not None:
        parts.insert(0, f"{result['gb_per_s']:,.0f} GB/s")
    return "; ".join(part for part in parts if part)


def details(record: dict[str, Any]) -> Table:
    """Every contender of every case, in one table."""
    table = Table(title="time (forward + backward where there is one), beside the bare matrix products")
    table.add_column("case, contender", overflow="fold")
    for name in ("median ms", "min", "spread", "× floor", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("error: value / gradients", no_wrap=True)
    table.add_column("remarks", overflow="fold")
    for case in record["cases"]:
        table.add_section()
        table.add_row(f"[bold]{title(case)}[/]", *[""] * 6, case.get("failure", ""))
        ordered = sorted(case.get("results", []), key=lambda r: r.get("median_ms") or float("inf"))
        for result in ordered:
            style = {"ours": "green", "floor": "cyan"}.get(result["role"])
            table.add_row(
                "  " + result["name"],
                _number(result.get("median_ms"), ",.2f"),
                _number(result.get("min_ms"), ",.2f"),
                _number(result.get("spread"), ".0%"),
                _number(result.get("times_floor"), ".2f"),
                _number(result.get("peak_mib"), ",.0f"),
                _error(result),
                _remark(result),
                style=style,
            )
    return table


def errors(record: dict[str, Any]) -> Table:
    table = Table(title="relative error against float64")
    for name in ("inputs", "operation", "what"):
        table.add_column(name)
    for name in ("ours", "plain PyTorch", "ratio"):
        table.add_column(name, justify="right")
    for block in record["errors"]:
        table.add_section()
        if "failure" in block:
            table.add_row(block["inputs"], block["failure"], "", "", "", "")
        for row in block.get("rows", []):
            base = row["plain_error"]
            table.add_row(
                block["inputs"],
                row["operation"],
                row["what"],
                f"{row['error']:.1e}",
                f"{base:.1e}",
                f"{row['error'] / base:.2f}" if base else "–",
            )
    return table


def summary(records: list[dict[str, Any]]) -> Table:
    """One line a case: ours, and the fastest other that is right."""
    table = Table(title="summary")
    table.add_column("case", overflow="fold")
    for name in ("ours ms", "× floor", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fastest peer", overflow="fold")
    for name in ("ms", "× floor", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        for case in record["cases"]:
            results = [r for r in case.get("results", []) if r.get("median_ms")]
            own: dict[str, Any] = next((r for r in results if r["name"] == "stable_rlhf"), {})
            right = [r for r in results if r["role"] == "peer" and (r.get("check") or {}).get("verdict") != "WRONG"]
            peer: dict[str, Any] = min(right, key=lambda r: r["median_ms"], default={})
            columns = (("median_ms", ",.2f"), ("times_floor", ".2f"), ("peak_mib", ",.0f"))
            table.add_row(
                title(case),
                *(_number(own.get(key), form) for key, form in columns),
                peer.get("name", case.get("failure", "–")),
                *(_number(peer.get(key), form) for key, form in columns),
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files written by the benchmarks here")
    parser.add_argument("--details", action="store_true", help="every contender instead of one line a case")
    arguments = parser.parse_args()
    records = [json.loads(path.read_text()) for path in arguments.files]
    console = Console()
    if console.width < 120 and not console.is_terminal:
        console = Console(width=160)  # a log file has no width of its own
    for path, record in zip(arguments.files, records, strict=True):
        seen = record["environment"]
        where = seen.get("gpu") or f"{seen['cpu']}, {seen['threads']} threads, {', '.join(seen['cpu_features'])}"
        dirty = " (changed tree)" if seen["tree_is_dirty"] else ""
        versions = seen["versions"]
        console.print(f"{path.name}: {where}; torch {versions.get('torch')}; commit {seen['commit']}{dirty}")
        if arguments.details:
            console.print(details(record))
            if record["errors"]:
                console.print(errors(record))
    if not arguments.details:
        console.print(summary(records))


if __name__ == "__main__":
    main()
