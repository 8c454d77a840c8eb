"""A tracker with wandb, offline, and trackio for real: killed, or read back. Arguments: what to do, the folder."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from stable_rlhf.engine.tracking import Tracker

SERVICES = ("wandb", "trackio")


def log(tracker: Tracker, *steps: int) -> None:
    for step in steps:
        tracker.log(step, {"loss": 1.0 / step, "score": float(step)})


def killed(folder: Path) -> None:
    """The last step is logged and its snapshot not written; trackio has had no time to take it up."""
    tracker = Tracker(folder, SERVICES, settings={"ppo": {"kl_coef": 0.1}})
    log(tracker, 1, 2, 3)
    time.sleep(3)
    log(tracker, 4)
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(folder: Path) -> None:
    tracker = Tracker(folder, SERVICES, after=2, settings={"ppo": {"kl_coef": 0.1}})
    log(tracker, 3, 4, 5)
    tracker.close()


def records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file, which is LevelDB's log with seven bytes before it: blocks of 32 KiB, each record in pieces with
    a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def read(folder: Path) -> None:
    """What the services' own files hold: of each its runs, and their steps with the figures."""
    import trackio
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict[str, list]] = {"wandb": {}, "trackio": {}}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found["wandb"].setdefault(path.stem.removeprefix("run-"), []).append(
                    [row["_step"], row["loss"], row["score"]]
                )
    from trackio.sqlite_storage import SQLiteStorage

    for run in trackio.Api().runs("stable_rlhf"):
        rows = SQLiteStorage.get_logs("stable_rlhf", run.name)
        found["trackio"][run.name] = [[row["step"], row["loss"], row["score"]] for row in rows]
    print(json.dumps(found))


{"killed": killed, "resumed": resumed, "read": read}[sys.argv[1]](Path(sys.argv[2]))
