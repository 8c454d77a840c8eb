"""`python -m bench count`: the cases, a table or one JSON object, and the results that docs/benchmarks.md shows."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import ROOT, write_json
from bench.count import page

DEVICE = "H200 (141 GB), by count: no GPU was used"
SOURCES = ("stable_rlhf", "kernels")  # what is counted


def add_arguments(count: argparse.ArgumentParser) -> None:
    count.add_argument("--shape", metavar="T,H,V", help="the policy losses at this shape, in place of all cases")
    count.add_argument("--ops", help="comma-separated operations, such as linear_policy_loss,gae (default: all)")
    count.add_argument("--json", action="store_true", help="print one JSON object")
    count.add_argument("--update", action="store_true", help=f"write {page.COUNTED.relative_to(ROOT)} and the page")
    count.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object there")
    count.add_argument("--kernels", action="store_true", help="list what each case's time is made of")


def under_interpreter(words: list[str]) -> None:
    """Starts this command anew where Triton's kernels would be compiled, which needs a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "bench", *words], environment)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def record(lines: list[dict[str, Any]], rates: Any) -> dict[str, Any]:
    """The object of a run; `commit` is the last one that changed what is counted."""
    from bench.count.counting import stated

    changed = _git("status", "--porcelain", "--", *SOURCES)
    commit = _git("log", "-1", "--format=%H", "--", *SOURCES) or os.environ.get("BENCH_COMMIT")
    return {
        "device": DEVICE, "commit": commit, "changed_since": None if changed is None else bool(changed),
        "rates": stated(rates), "ops": lines,
    }  # fmt: skip


def table(lines: list[dict[str, Any]], kernels: bool) -> Table:
    listing = Table(title=f"{DEVICE}; every rate is an assumption (bench/count/rates.py)")
    listing.add_column("case", overflow="fold")
    for name in ("share", "ms", "floor ms", "idle ms", "launches", "stops", "late", "TFLOP", "GB", "GiB added"):
        listing.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        listing.add_section()
        listing.add_row(
            f"[bold]{line['op']}[/]: {line['case']}", f"{line['share']:.3f}", f"{1e3 * line['seconds']:.3f}",
            f"{1e3 * line['floor_seconds']:.3f}", f"{1e3 * line['idle_seconds']:.3f}", str(line["launches"]),
            str(line["synchronisations"]), str(line["late_reads"]), f"{line['flops'] / 1e12:.1f}",
            f"{line['bytes'] / 1e9:.2f}", f"{line['peak_bytes'] / 2**30:.2f}",
        )  # fmt: skip
        for part in line["kernels"] if kernels else ():
            listing.add_row(
                f"  {part['name']}", "", f"{1e3 * part['seconds']:.3f}", "", "", str(part["launches"]), "", "",
                f"{part['flops'] / 1e12:.1f}", f"{part['bytes'] / 1e9:.2f}", "",
            )  # fmt: skip
    return listing


def run(given: argparse.Namespace, console: Console, log: Console) -> int:
    from bench.count.cases import all_cases, policy_cases
    from bench.count.counting import Counter
    from bench.count.wanted import broken
    from stable_rlhf.data.jsonl import to_json

    cases = all_cases()
    if given.shape:
        sizes = given.shape.split(",")
        if len(sizes) != 3 or not all(s.strip().isdigit() and int(s) > 0 for s in sizes):
            sys.exit(f"--shape: {given.shape!r} is not T,H,V, three positive numbers")
        cases = policy_cases((int(sizes[0]), int(sizes[1]), int(sizes[2])))
    if given.ops:
        wanted = {name.strip() for name in given.ops.split(",")}
        known = {case.op for case in cases}
        if wanted - known:
            sys.exit(f"--ops: unknown {', '.join(sorted(wanted - known))}; expected some of {', '.join(sorted(known))}")
        cases = [case for case in cases if case.op in wanted]
    if given.update and (given.shape or given.ops):
        sys.exit("--update: writes all cases; leave out --shape and --ops")
    counter, lines = Counter(), []
    for case in cases:
        begin = time.monotonic()
        lines.append(counter.count(case))
        log.log(f"{case.key} ({time.monotonic() - begin:.1f} s)", markup=False, highlight=False)
    content = record(lines, counter.rates)
    for path in [given.output, page.COUNTED if given.update else None]:
        if path is not None:
            write_json(content, path)
    if given.json:
        print(to_json(content))
        return 0
    console.print(table(lines, given.kernels))
    if not (given.shape or given.ops):
        for bound in broken(lines):
            console.print(f"does not hold: {bound}", markup=False, highlight=False)
    if given.update:
        console.print("the page was written" if page.rewrite() else "the page was up to date")
    return 0
