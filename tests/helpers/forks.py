"""Processes without the seconds that their imports take: one that has imported everything forks for each call."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.launch import ROOT, WORKERS, command, environment, free_port, worker_environment


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error without its hint."""
        return next((line for line in self.err.splitlines() if line.startswith("stable-rlhf: error: ")), "")

    def refused(self, *parts: str) -> Done:
        """It was refused with one clear message that holds ``parts``."""
        assert self.code == 2, self
        assert self.err.count("stable-rlhf: error: ") == 1 and "Traceback" not in self.err, self.err
        for part in parts:
            assert part in self.message, self.err
        return self

    def worked(self) -> Done:
        assert self.code == 0, self.out[-3000:] + self.err[-6000:]
        assert "Traceback" not in self.err, self.err[-6000:]
        return self


class Server:
    """What a call sees is a fresh process with its own arguments, folder, environment and output.

    ``serves``: ``commands`` (the command line and the scripts of workers/) or ``tests`` (pytest); ``extra``: of the
    server's own environment, for what is read when a library is imported."""

    def __init__(self, serves: str, **extra: str) -> None:
        self.process = subprocess.Popen(
            command("fork_server", serves), stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
            env=environment(**extra) if serves == "commands" else worker_environment(**extra),
        )  # fmt: skip

    def __call__(
        self, *arguments: object, cwd: Path, kill: float | str | None = None, sign: int = signal.SIGKILL, **extra: str
    ) -> Done:  # fmt: skip
        """A call of the command line, or of pytest. ``kill``: SIGKILL it after so many seconds, or once a file of this
        name (a glob in ``cwd``) is there; if it still runs then, its code is -9. ``sign``: another signal."""
        return self.run(1, arguments, cwd, kill=kill, sign=sign, extra=extra)[0]

    def ranks(
        self, count: int, *arguments: object, cwd: Path, kill: float | str | None = None,
        who: Sequence[int] | None = None, sign: int = signal.SIGKILL, **extra: str,
    ) -> list[Done]:  # fmt: skip
        """The same as ``count`` ranks, as a launcher would start them; ``who``: the ranks to kill (all)."""
        return self.run(count, arguments, cwd, kill=kill, who=who, sign=sign, extra=_launcher(count) | extra)

    def script(self, worker: str, *arguments: object, ranks: int, **extra: str) -> str:
        """What rank 0 of ``workers/<worker>.py`` prints, once all have ended well; when one fails the others end."""
        extra = _launcher(ranks) | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))} | extra
        done = self.run(ranks, arguments, Path.cwd(), script=WORKERS / f"{worker}.py", extra=extra)
        assert not any(rank.code for rank in done), "\n".join(rank.out[-1500:] + rank.err[-4000:] for rank in done)
        return done[0].out

    def run(
        self, count: int, arguments: Sequence[object], cwd: Path, *, script: Path | None = None,
        kill: float | str | None = None, who: Sequence[int] | None = None, sign: int = signal.SIGKILL,
        extra: dict[str, str],
    ) -> list[Done]:  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            outputs = [(Path(folder, f"out-{i}"), Path(folder, f"err-{i}")) for i in range(count)]
            call = {
                "argv": list(map(str, arguments)), "script": script and str(script), "cwd": str(cwd), "env": extra,
                "kill": kill, "who": list(range(count) if who is None else who), "sign": int(sign),
                "outputs": [(str(out), str(err)) for out, err in outputs],
            }  # fmt: skip
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
            codes = json.loads(self.process.stdout.readline())
            return [Done(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
                    for code, (out, err) in zip(codes, outputs, strict=True)]  # fmt: skip

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _launcher(ranks: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@functools.cache
def shared_server(serves: str = "commands", **extra: str) -> Server:
    """One server of a kind for all tests of this process."""
    server = Server(serves, **extra)
    atexit.register(server.close)
    return server


def run_ranks(worker: str, *arguments: object, ranks: int, **extra: str) -> str:
    """What rank 0 of ``workers/<worker>.py`` prints: forks of one process, which ends as they end."""
    return shared_server().script(worker, *arguments, ranks=ranks, **extra)


def run_interpreted(file: str, which: str = "not slow") -> None:
    """The tests of a file once more, interpreted; fails as they fail, or when none ran. Triton reads TRITON_INTERPRET
    when kernels are defined: hence another process. ``which``: of its marks."""
    done = shared_server("tests", TRITON_INTERPRET="1")(
        "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", f"not gpu and ({which})", file, cwd=ROOT
    )
    assert done.code == pytest.ExitCode.OK and " passed" in done.out, done.out[-6000:] + done.err[-2000:]
