"""`python -m bench.gpu run1|run2`: the steps of a run in a process that is watched, then their tables. bench/gpu.sh
calls it.

This process never loads torch: a worker that hangs or dies is ended and replaced, and what it had written is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from bench.gpu import tables
from bench.gpu.plan import DRY, Plan, Row
from bench.gpu.worker import LOST, write

ROOT = Path(__file__).resolve().parents[2]
GRACE = 6.0  # seconds that a step may take beyond its limit, for a call that nobody can interrupt
STEPS = {
    "run1": (
        "facts",
        "addmm",
        "ceilings",
        "ours",
        "statistics",
        "rows",
        "propose",
        "profile",
        "correctness",
        "sanitizer",
    ),
    "run2": ("facts", "tuned", "peers", "small", "kmeans", "update", "compiled", "tests"),
}


def read(plan: Plan) -> list[Row]:
    if not plan.lines.exists():
        return []
    rows: list[Row] = []
    for line in plan.lines.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the last one may be half written
            rows.append(json.loads(line))
    return rows


def watch(worker: subprocess.Popen[bytes], plan: Plan, begun: int) -> str | None:
    """Waits for a worker's end, or ends it: at the deadline, or once a step is over its limit. Why, if it did."""
    while worker.poll() is None:
        time.sleep(0.2)
        events = [r for r in read(plan)[begun:] if r["event"] in ("begin", "end")]
        now = events[-1] if events else None
        if plan.left <= 0:
            why = "the run's time was over"
        elif now and now["event"] == "begin" and time.time() > now["at"] + now["limit"] + GRACE:
            why = f"no end after {now['limit']:.0f} s"
        else:
            continue
        worker.kill()
        worker.wait()
        return why
    return None


def go(plan: Plan, steps: list[str]) -> None:
    """Every step has an end in the lines afterwards, whatever became of its worker."""
    fields = {"run": plan.run, "dry": plan.dry, "output": str(plan.output), "deadline": plan.deadline,
              "tuned": str(plan.tuned) if plan.tuned else None}  # fmt: skip
    todo = list(steps)
    while todo:
        begun = len(read(plan))
        with plan.log.open("ab") as log:
            command = [sys.executable, "-m", "bench.gpu.worker", json.dumps(fields), *todo]
            worker = subprocess.Popen(command, cwd=Path.cwd(), stdout=log, stderr=log)
            why = watch(worker, plan, begun)
        ended = {r["step"] for r in read(plan) if r["event"] == "end"}
        before, todo = len(todo), [step for step in todo if step not in ended]
        if not todo or (worker.returncode == LOST and len(todo) < before):
            continue
        # The step that was at work, or the first one where the worker did not even come that far.
        failure = why or f"its process ended with status {worker.returncode} ({plan.log.name})"
        write(plan, {"event": "end", "step": todo.pop(0), "status": "failed", "failure": failure, "seconds": None})
        if plan.left <= 0:
            for step in todo:
                write(plan, {"event": "end", "step": step, "status": "not started", "failure": "no time is left",
                             "seconds": 0.0})  # fmt: skip
            return


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("run", choices=sorted(STEPS))
    parser.add_argument("--dry-run", action="store_true", help="every step without a GPU")
    parser.add_argument("--output-dir", type=Path, required=True, help="eight files at most")
    parser.add_argument("--seconds", type=float, default=260.0, help="for everything (default %(default)s)")
    parser.add_argument("--tuned", type=Path, help="run2: the table to measure beside the package's own")
    parser.add_argument("--steps", nargs="+", help="only these")
    given = parser.parse_args()
    output = given.output_dir.resolve()
    if given.dry_run and output.is_relative_to(ROOT / "bench" / "results"):
        parser.error("--dry-run measures no GPU: its files do not belong in bench/results")
    unknown = set(given.steps or ()) - set(STEPS[given.run])
    if unknown:
        parser.error(f"--steps: {', '.join(sorted(unknown))}; {given.run} has {', '.join(STEPS[given.run])}")
    output.mkdir(parents=True, exist_ok=True)
    tuned = given.tuned.resolve() if given.tuned else None
    plan = Plan(given.run, given.dry_run, output, tuned, time.time() + given.seconds)
    for path in (plan.lines, plan.log):
        path.unlink(missing_ok=True)
    write(plan, {"event": "run", "run": given.run, "dry_run": given.dry_run, "note": DRY if given.dry_run else None})
    go(plan, [step for step in STEPS[given.run] if step in (given.steps or STEPS[given.run])])
    records = read(plan)
    print(tables.told(records), flush=True)
    return 1 if any(r["event"] == "end" and r["status"] == "failed" for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
