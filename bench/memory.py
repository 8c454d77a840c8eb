"""Peak resident set of one contender, in a process that does nothing else (started by run.resident_peak).

The same case at a tiny size first loads code and starts threads; what counts begins after that: inputs are made, the
contender is called twice, and the peak of the second call over the resident set before the first is printed. Scratch
memory and workspaces that stay from call to call are therefore included, compilation is not.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time

import torch

import stable_rlhf.ops as ops
from bench.case import Case, Settings
from bench.common import PROCESS, Step, resident_mib
from bench.ops import OPERATIONS


def _trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _step(case: Case, settings: Settings, name: str) -> Step:
    contenders = OPERATIONS[case.op](case, settings).contenders
    return next(c for c in contenders if c.name == name).make()


def main() -> None:
    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task["threads"])
    case, name = Case(**task["case"]), task["contender"]
    settings = Settings.from_json(task["settings"])
    _step(case.tiny(), settings, name)()
    torch.compiler.reset()
    step = _step(case, settings, name)
    ops.release_workspace()  # of making the inputs
    _trim()
    before = resident_mib("VmRSS")
    step()
    _trim()
    time.sleep(0.05)  # the kernel's counters of the threads settle
    (PROCESS / "clear_refs").write_text("5", encoding="utf-8")  # the peak restarts at what is resident now
    kept = step()
    peak = resident_mib("VmHWM") - before
    del kept
    print(json.dumps({"peak_mib": peak}))


if __name__ == "__main__":
    main()
