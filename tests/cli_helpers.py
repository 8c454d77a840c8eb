"""Running the command line as a user would, and small files to run it on."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("stable-rlhf"))
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a launcher (or a training test in this process) put there.

    One thread: models this small gain nothing from more, and lose much where the cores are shared."""
    kept = {k: v for k, v in os.environ.items() if k not in (*_LAUNCHER, "STABLE_RLHF_DEBUG")}
    fixed = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**kept, **fixed, **extra}


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
        assert self.code == 0, self.err[-6000:]
        assert "Traceback" not in self.err, self.err[-6000:]
        return self


def run(*arguments: str | Path, cwd: Path, timeout: float = 300, module: bool = False, **extra: str) -> Done:
    """One call of the console script (``module``: of ``python -m stable_rlhf``) in a process of its own."""
    program = [sys.executable, "-m", "stable_rlhf"] if module else [CONSOLE_SCRIPT]
    done = subprocess.run(
        [*program, *map(str, arguments)], cwd=cwd, env=environment(**extra), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


class Server:
    """Calls of the command line without the seconds that its imports take: a process that has imported everything
    forks for each call. What the call sees is a fresh process with its own arguments, folder and output."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def __call__(self, *arguments: str | Path, cwd: Path, kill_after: float | None = None, **extra: str) -> Done:
        """``kill_after``: SIGKILL the call after so many seconds, if it still runs then (its code is then -9)."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            call: dict[str, Any] = {
                "argv": list(map(str, arguments)),
                "cwd": str(cwd),
                "out": str(out),
                "err": str(err),
                "env": extra,
            }
            call["kill_after"] = kill_after
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            return Done(code, out.read_text(), err.read_text())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


@functools.cache
def shared_server() -> Server:
    """One server for all tests of this process."""
    server = Server()
    atexit.register(server.close)
    return server


def _serve() -> None:
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM  # noqa: F401

    import stable_rlhf.train.run  # noqa: F401
    from stable_rlhf.cli import main

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(call[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
            os.chdir(call["cwd"])
            os.environ.update(call["env"])
            sys.argv = ["stable-rlhf", *call["argv"]]
            code: Any = 0
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ended, status = 0, 0
        if call["kill_after"] is not None:
            until = time.monotonic() + call["kill_after"]
            while not ended and time.monotonic() < until:
                time.sleep(0.005)
                ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                os.kill(child, signal.SIGKILL)
        if not ended:
            _, status = os.waitpid(child, 0)
        replies.write(f"{os.waitstatus_to_exitcode(status)}\n")
        replies.flush()


def write_lines(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a row that is a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def tiny_files(folder: Path, *, pairs: int = 40, prompts: int = 40, demonstrations: int = 24, seed: int = 0) -> Path:
    """``folder`` with a saved model of some thousand weights, and files of the skill world small enough for seconds."""
    from transformers.utils import logging

    from stable_rlhf.world import SKILLS, STRONG_SKILLS, build_model, build_tokenizer, near_miss

    logging.disable_progress_bar()
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, seed=seed).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    seen: set[str] = set()

    def draw(index: int) -> tuple[str, str, str]:
        task = sorted(SKILLS)[index % len(SKILLS)]
        while True:
            prompt, answer = SKILLS[task].sample(rng)
            if prompt not in seen:
                seen.add(prompt)
                return prompt, answer, task

    made = [draw(i) for i in range(pairs)]
    write_lines(
        folder / "pairs.jsonl",
        [{"prompt": p, "chosen": a, "rejected": near_miss(a, rng), "task": t} for p, a, t in made],
    )
    made = [draw(i) for i in range(prompts)]
    rows = [{"prompt": p, "task": "old" if t in STRONG_SKILLS else "new"} for p, _, t in made]
    write_lines(folder / "prompts.jsonl", rows)
    made = [draw(i) for i in range(demonstrations)]
    write_lines(folder / "sft.jsonl", [{"prompt": p, "response": a, "task": t} for p, a, t in made])
    return folder


if __name__ == "__main__":
    _serve()
