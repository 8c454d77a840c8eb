"""Running the command line as a user would, and small files to run it on."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import signal
import socket
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


def run(*arguments: str | Path, cwd: Path, timeout: float = 1200, module: bool = False, **extra: str) -> Done:
    """One call of the console script (``module``: of ``python -m stable_rlhf``) in a process of its own."""
    program = [sys.executable, "-m", "stable_rlhf"] if module else [CONSOLE_SCRIPT]
    done = subprocess.run(
        [*program, *map(str, arguments)], cwd=cwd, env=environment(**extra), capture_output=True, encoding="utf-8",
        timeout=timeout,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


class Server:
    """Calls of the command line without the seconds that its imports take: a process that has imported everything
    forks for each call. What the call sees is a fresh process with its own arguments, folder and output."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment(),
        )

    def __call__(
        self, *arguments: object, cwd: Path, kill: float | str | None = None, sign: int = signal.SIGKILL, **extra: str
    ) -> Done:  # fmt: skip
        """``kill``: SIGKILL the call after so many seconds, or once a file of this name (a glob in ``cwd``) is there;
        if it still runs then, its code is -9. ``sign``: another signal than SIGKILL."""
        return self._run(1, arguments, cwd, kill, [0], sign, extra)[0]

    def ranks(
        self, count: int, *arguments: object, cwd: Path, kill: float | str | None = None, who: list[int] | None = None,
        sign: int = signal.SIGKILL, **extra: str,
    ) -> list[Done]:  # fmt: skip
        """The same as ``count`` ranks, as a launcher would start them; ``who``: the ranks to kill (all)."""
        launcher = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return self._run(count, arguments, cwd, kill, who or list(range(count)), sign, launcher | extra)

    def _run(
        self, count: int, arguments: tuple[object, ...], cwd: Path, kill: float | str | None, who: list[int],
        sign: int, extra: dict[str, str],
    ) -> list[Done]:  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            outputs = [(Path(folder, f"out-{i}"), Path(folder, f"err-{i}")) for i in range(count)]
            call: dict[str, Any] = {
                "argv": list(map(str, arguments)), "cwd": str(cwd), "env": extra, "kill": kill, "who": who,
                "sign": int(sign),
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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

    import stable_rlhf.cli.commands  # noqa: F401
    import stable_rlhf.run.recipe  # noqa: F401

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        children = [_fork(call, rank) for rank in range(len(call["outputs"]))]
        codes: list[int | None] = [None] * len(children)
        kill, began = call["kill"], time.monotonic()
        while None in codes:
            for rank, child in enumerate(children):
                if codes[rank] is None:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
            if kill is not None and (
                any(Path(call["cwd"]).glob(kill)) if isinstance(kill, str) else time.monotonic() - began > kill
            ):
                kill = None
                for rank in call["who"]:
                    if codes[rank] is None:
                        os.kill(children[rank], call["sign"])
            time.sleep(0.005)
        replies.write(json.dumps(codes) + "\n")
        replies.flush()


def _fork(call: dict[str, Any], rank: int) -> int:
    """Start one rank of a call; returns its process id."""
    child = os.fork()
    if child:
        return child
    for number, name in enumerate(call["outputs"][rank], 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(call["cwd"])
    os.environ.update(call["env"])
    if "WORLD_SIZE" in call["env"] and "RANK" not in call["env"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["stable-rlhf", *call["argv"]]
    code: Any = 0
    try:
        from stable_rlhf.cli.commands import main

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


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``, children before their own children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:  # grows while it is read
        found += children.get(process, [])
    return found[1:]


def workers(pid: int) -> list[int]:
    """Processes below a launcher that run the command line themselves."""
    found = []
    for process in descendants(pid):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"torch.distributed.run" not in words and b"stable_rlhf" in words:
            found.append(process)
    return found


def write_lines(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a row that is a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
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


def small_sft(files: Path) -> list[object]:
    """Arguments of an SFT of ``tiny_files`` that takes a moment a step and writes a snapshot after each."""
    return [
        "sft", "--model-name-or-path", files / "model", "--data.demonstrations", files / "sft.jsonl",
        "--data.max_length", 40, "--data.max_prompt_length", 40, "--sft.max_steps", 12, "--sft.num_train_epochs", 99,
        "--sft.learning_rate", "1e-2", "--sft.per_device_train_batch_size", 4, "--checkpoint.save_steps", 1,
        "--report_to", "[]",
    ]  # fmt: skip


def small_ppo(files: Path, scorer: Path) -> list[object]:
    """The same for PPO with Selective Rehearsal; ``scorer``: from :func:`small_scorer`."""
    return [
        "train-ppo", "--variant", "am-sr", "--scorer", scorer, "--rehearsal", files / "sft.jsonl",
        "--model-name-or-path", files / "model", "--data.prompts", files / "prompts.jsonl",
        "--data.forget_tasks", "old", "--data.max_prompt_length", 24, "--data.max_length", 40,
        "--ppo.total_steps", 9, "--ppo.rollout_batch_size", 8,
        "--ppo.num_mini_batches", 2, "--ppo.per_device_train_batch_size", 2, "--ppo.per_device_rehearsal_batch_size", 2,
        "--ppo.rehearsal_coef", 0.1, "--ppo.max_new_tokens", 4, "--ppo.learning_rate", "3e-3",
        "--ppo.head_learning_rate", "1e-2", "--ppo.warmup_ratio", 0.5, "--checkpoint.save_steps", 1,
        "--report_to", "[]",
    ]  # fmt: skip


def small_scorer(server: Server, files: Path) -> Path:
    """An Advantage Model on ``tiny_files``, in ``files/out/scorer-am``."""
    server(
        "train-scorer", "--objective", "am", "--model-name-or-path", files / "model", "--data.pairs",
        files / "pairs.jsonl", "--data.max_length", 40, "--data.max_prompt_length", 40,
        "--scorer.head_learning_rate", "1e-2", "--output-dir", files / "out", "--report_to", "[]", cwd=files,
    ).worked()  # fmt: skip
    return files / "out" / "scorer-am"


def weights(folder: Path) -> dict[str, bytes]:
    """What a stage saved, bit for bit."""
    found = {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}
    assert found
    return found


def whole_snapshots(stage: Path) -> list[str]:
    """Names of the snapshots in a stage's working folder, each checked against its manifest; no other file is there."""
    from stable_rlhf.engine.snapshots import _read

    found = sorted((stage / "checkpoints").iterdir())
    for path in found:
        assert not isinstance(record := _read(path), str), record
    return [path.name for path in found]


if __name__ == "__main__":
    _serve()
