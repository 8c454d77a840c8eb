"""Every case of test_watchdog.py on two ranks, all at the same time: forks of one process, whose imports take seconds.

Prints for each case and rank the exit status and what was said."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from helpers.launch import free_port
from stable_rlhf.engine import watchdog
from stable_rlhf.show import progress

LIMIT = 3.0
CASES = ("sleeps-0", "sleeps-1", "stops-0", "stops-1", "alone")


def rank_of(case: str, rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    watchdog.watch(LIMIT, folder)
    progress.begin("sft")
    what, _, who = case.partition("-")
    with progress.progress("SFT", total=90, unit="steps") as bar:
        if what == "alone" and rank == 0:
            until = time.monotonic() + 3 * LIMIT
            while time.monotonic() < until:
                bar.advance()
                time.sleep(0.02)
        if who == str(rank):
            bar.advance(7)
            if what == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        dist.barrier()
    watchdog.stop()
    dist.destroy_process_group()


def main() -> None:
    folder, running = Path(sys.argv[1]), {}
    for case in CASES:
        (folder / case).mkdir()
        port = free_port()
        for rank in (0, 1):
            child = os.fork()
            if not child:
                os.dup2(os.open(folder / case / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
                os.environ["RANK"] = str(rank)
                try:
                    rank_of(case, rank, port, folder / case)
                except BaseException:  # the other one has ended: the command line would wait, too
                    watchdog.wait_for_the_end()
                    os._exit(9)
                os._exit(0)
            running[case, rank] = child
    codes = {f"{case}/{rank}": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
             for (case, rank), child in running.items()}  # fmt: skip
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
