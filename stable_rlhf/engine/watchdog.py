"""A rank that hangs while no process dies: all ranks end, with one line that says which one stands still, and where.

The others would wait for it in a collective for hours, because they also wait while rank 0 works alone (a judge,
embeddings, a download) and that may take as long. So what counts is progress and not time: every rank watches the
thread that trains (the marks of `show.progress`, and whether it is still at the same place in the code when it
is looked at again), and tells through the process group's store when it moved. Where one rank works, one moves. When
none has moved for ``checkpoint.hang_minutes``, the work stands still: each rank says where it is, those that do not
wait for others are the ones that hang, and a process that cannot even say so (stopped, say) is ended by its neighbours.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from stable_rlhf.show import progress

_WAITING = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
_MOVES = "stable_rlhf/moves"
_running: Watchdog | None = None


class Watchdog:
    """Watches this rank and, with the others', the run.

    Args:
        limit: Seconds without progress on any rank.
        folder: Where the stacks of all threads go, ``hang-RANK.txt``.
        store: The process group's, by a connection of its own.
        rank: This one.
        processes: What :func:`_process` says of every rank.
    """

    def __init__(self, limit: float, folder: Path, store: Any, rank: int, processes: list[dict[str, Any]]) -> None:
        self.limit, self.folder, self.store = limit, folder, store
        self.rank, self.size, self.processes = rank, len(processes), processes
        self.tick, self.poll = min(1.0, limit / 20), min(10.0, limit / 10)
        self.main = threading.get_ident()  # who makes it is who trains: in a notebook that may be any thread
        self.place: Any = None
        self.moves = self.told = self.heard = 0
        self.moved = time.time()
        self.news = self.looked = self.answered = time.monotonic()
        self.stopped, self.expired, self.collected = threading.Event(), threading.Event(), threading.Event()
        self.reports: dict[int, dict[str, Any]] = {}

    def start(self) -> None:
        """Begin, in two threads: a store whose process is stopped never answers, whatever its timeout."""
        for work in (self._look, self._talk):
            threading.Thread(target=work, daemon=True).start()

    def _look(self) -> None:
        while not self.stopped.wait(self.tick):
            if self.look(time.monotonic()):
                self._end()

    def _talk(self) -> None:
        while not self.expired.wait(self.poll) and not self.stopped.is_set():
            with suppress(Exception):  # the store's process has ended or is slow: what is not heard is no news
                self.talk()
        with suppress(Exception):
            self.collect()

    def look(self, now: float) -> bool:
        """Whether the work stands still: this rank has not moved for too long, and no other one was heard to."""
        if now - self.looked > 5 * self.tick + 5:
            self.news = now  # this process was stopped itself: nothing is known of the time in between
        self.looked = now
        place = (progress.marks(), *((id(f), f.f_lasti) for f in self._frames()))
        if place != self.place:
            self.place, self.moved, self.news = place, time.time(), now
            self.moves += 1
        return now - self.news > self.limit

    def talk(self) -> None:
        """Tell the others that this rank moved, and hear whether one of them did."""
        moves = self.moves
        total = self.store.add(_MOVES, int(moves != self.told))
        self.told, self.answered = moves, time.monotonic()
        if total != self.heard:
            self.heard, self.news = total, self.answered

    def collect(self) -> None:
        """Tell where this rank stands, and hear it of the others, for as long as they answer."""
        self.store.set(f"stable_rlhf/stands/{self.rank}", json.dumps(self.reports[self.rank]))
        while len(self.reports) < self.size and not self.stopped.is_set():
            for rank in set(range(self.size)) - set(self.reports):
                if self.store.check([f"stable_rlhf/stands/{rank}"]):
                    self.reports[rank] = json.loads(self.store.get(f"stable_rlhf/stands/{rank}"))
            time.sleep(0.05)
        self.collected.set()

    def _frames(self) -> list[FrameType]:
        """Those of the thread that trains, the innermost first."""
        frames, frame = [], sys._current_frames().get(self.main)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return frames

    def _stand(self) -> dict[str, Any]:
        """Where this rank is, and whether it waits for others there."""
        frames = self._frames()
        ours = next((f for f in frames if f"{os.sep}stable_rlhf{os.sep}" in f.f_code.co_filename), None)
        places = [f"{Path(f.f_code.co_filename).name}:{f.f_lineno} ({f.f_code.co_name})"
                  for f in dict.fromkeys((*frames[:1], ours)) if f is not None]  # fmt: skip
        waits = any(part in f.f_code.co_filename for f in frames[:8] for part in _WAITING)
        return {"doing": progress.doing(), "place": " from ".join(places), "waits": waits, "since": self.moved}

    def _end(self) -> None:
        self.reports[self.rank] = self._stand()
        self.expired.set()
        self.collected.wait(2 * self.poll + 2)
        path = self.folder / f"hang-{self.rank}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        silent = self._silent()
        text = (
            f"{self.words(silent)}; the stacks of this rank are in {path}{f' (rank {self.rank})' if self.rank else ''}"
        )
        with suppress(OSError):
            os.write(2, f"stable-rlhf: error: {text}\n".encode())
            if self.rank == 0:
                hint = "the same command goes on from the last checkpoint; where it was long work and no hang, with a "
                os.write(2, f"  {hint}higher checkpoint.hang_minutes (0: never)\n".encode())
        for rank in silent:
            known = self.processes[rank]
            if known == _process(known["pid"]):  # on this machine, and still the one that joined
                with suppress(OSError):
                    os.kill(known["pid"], signal.SIGKILL)
        time.sleep(1 + (self.rank == 0))  # the others have something to say as well; rank 0 may hold the store
        os._exit(2)

    def _silent(self) -> list[int]:
        """The ranks that do not answer; without the store, which is in rank 0's process, nobody else can be heard."""
        if self.rank and time.monotonic() - self.answered > self.limit / 2:
            return [0]
        return [rank for rank in range(self.size) if rank not in self.reports]

    def words(self, silent: list[int]) -> str:
        """What is wrong, in one line."""
        reports = dict(sorted(self.reports.items()))
        limit = f"no rank has got on for {self.limit / 60:g} minutes"
        if silent:
            where = [self.processes[rank] for rank in silent[:4]]
            names = ", ".join(f"{r} (process {p['pid']} on {p['host']})" for r, p in zip(silent, where, strict=False))
            who = f"rank {names} does" if len(silent) == 1 else f"ranks {names} do"
            return f"{limit}, and {who} not answer; rank {self.rank} {_sentence(reports[self.rank])}"
        hung = {rank: stand for rank, stand in reports.items() if not stand["waits"]}
        if not hung:
            hung, limit = reports, f"{limit}, all wait for each other"
        several = "; ".join(f"rank {rank} {_sentence(stand)}" for rank, stand in list(hung.items())[:4])
        return f"{limit}: {several}" + ("; …" if len(hung) > 4 else "")


def _sentence(stand: dict[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(stand["since"]))
    doing = f" ({stand['doing']})" if stand["doing"] else ""
    return f"{'waits' if stand['waits'] else 'stands still'} since {since} in {stand['place']}{doing}"


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from every other one, on this machine or another, in this container or another."""
    known: dict[str, Any] = {"pid": pid, "host": socket.gethostname()}
    with suppress(OSError, IndexError):
        known["machine"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        known["container"] = os.readlink("/proc/self/ns/pid")
        known["started"] = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return known


def watch(limit: float, folder: Path) -> None:
    """Watch this run from now on; all ranks together. Nothing with a limit of 0, or without other ranks."""
    global _running
    if not limit or _running is not None or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    group: Any = dist.distributed_c10d
    store = group._get_default_store().clone()  # the process group waits in the other connection
    # After that: a rank that gets on from here may hang at once, and with it the store that the others still ask for.
    processes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(processes, _process(os.getpid()))
    _running = Watchdog(limit, folder, store, dist.get_rank(), processes)
    _running.start()


def stop() -> None:
    """No more of it: the ranks part."""
    global _running
    if _running is not None:
        _running.stopped.set()
        _running = None


def wait_for_the_end() -> None:
    """Where the watchdog is about to end this process: let it. Other ranks' ends are errors here by then."""
    if _running is not None and _running.expired.is_set():
        time.sleep(60)
