"""Running the command line as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.forks import Done, Server
from helpers.launch import environment

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("stable-rlhf"))


def run(*arguments: str | Path, cwd: Path, timeout: float = 1200, module: bool = False, **extra: str) -> Done:
    """One call of the console script (``module``: of ``python -m stable_rlhf``) in a process of its own."""
    program = [sys.executable, "-m", "stable_rlhf"] if module else [CONSOLE_SCRIPT]
    done = subprocess.run(
        [*program, *map(str, arguments)], cwd=cwd, env=environment(**extra), capture_output=True, encoding="utf-8",
        timeout=timeout,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


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


def whole_snapshots(stage: Path, *, killed: bool = False) -> list[str]:
    """Names of the snapshots in a stage's working folder, each checked against its manifest; no other file is there,
    but for what a kill leaves of one that was being written or deleted."""
    from stable_rlhf.engine.snapshots import _read

    found = sorted(p for p in (stage / "checkpoints").iterdir() if not (killed and p.suffix == ".tmp"))
    for path in found:
        assert not isinstance(record := _read(path), str), record
    return [path.name for path in found]
