"""Runs steps one after the other and writes what they find, line by line, for the process that watches.

    python -m bench.gpu.worker PLAN STEP...        PLAN: the fields of a `Plan` as JSON

A step that fails is reported and the next one runs, in this process; after an error of the device, which leaves nothing
usable behind, the process ends and its watcher starts another for what is left.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.gpu.plan import Plan, Row, Step, sabotaged

DRY_LIMITS = 5.0  # times as long may a step take that is interpreted
LOST = 3  # exit status: the device's state is lost, go on in another process


def write(plan: Plan, record: Row) -> None:
    """One line, and at once: whoever watches reads it, and what was measured outlives this process."""
    with plan.lines.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def is_lost(error: BaseException) -> bool:
    """Whether the error is one of the device itself, after which every later call fails too."""
    import torch

    told = str(error)
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in told or "device-side assert" in told


def run(step: Step, plan: Plan) -> Row:
    """The record of a step's end."""
    begin = time.time()
    most = min(step.limit * (DRY_LIMITS if plan.dry else 1.0), plan.left)
    write(plan, {"event": "begin", "step": step.name, "at": begin, "limit": most})
    status, failure, lost = "ok", None, False
    try:
        sabotaged(step.name)
        for row in step.work(plan):
            write(plan, {"event": "row", "step": step.name, **row})
            if time.time() - begin > most:
                status, failure = "cut", f"over after {most:.0f} s: what comes last is missing"
                break
    except Exception as error:
        traceback.print_exc()
        told = " ".join(str(error).split())[:300]
        status, failure, lost = "failed", f"{type(error).__name__}: {told}", is_lost(error)
    seconds = round(time.time() - begin, 2)
    record: Row = {"event": "end", "step": step.name, "status": status, "failure": failure, "seconds": seconds}
    write(plan, record)
    return record | {"lost": lost}


def main(arguments: list[str]) -> int:
    given: dict[str, Any] = json.loads(arguments[0])
    plan = Plan(**given | {"output": Path(given["output"]), "tuned": Path(given["tuned"]) if given["tuned"] else None})
    if plan.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.gpu import run1, run2
    from stable_rlhf.kernels.tuning import VARIABLE

    if plan.tuned is not None:  # in force for whatever is called ours, but where a step says otherwise
        os.environ[VARIABLE] = str(plan.tuned)

    steps = {"run1": run1.STEPS, "run2": run2.STEPS}[plan.run]
    for step in steps:
        if step.name not in arguments[1:]:
            continue
        if plan.left < 3.0:
            write(plan, {"event": "end", "step": step.name, "status": "not started", "failure": "no time is left",
                         "seconds": 0.0})  # fmt: skip
        elif run(step, plan)["lost"]:
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
