"""SIGKILL at random moments of a training run, checkpoint writes included: what comes out in the end is the same."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli_helpers import Server, tiny_files

KILLS = 20


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    files = tiny_files(tmp_path / "files")
    server = Server()

    def train(folder: str, kill_after: float | None = None) -> int:
        done = server(
            "sft", "--model-name-or-path", files / "model", "--data.demonstrations", files / "sft.jsonl",
            "--output-dir", tmp_path / folder, "--sft.max_steps", "40", "--sft.num_train_epochs", "99",
            "--sft.per_device_train_batch_size", "4", "--sft.learning_rate", "1e-2", "--checkpoint.save_steps", "2",
            cwd=tmp_path, kill_after=kill_after,
        )  # fmt: skip
        assert done.code in (0, -9), done.err[-4000:]
        return done.code

    try:
        assert train("first") == 0  # waits for the server's imports too
        began = time.monotonic()
        assert train("whole") == 0
        seconds = time.monotonic() - began
        want = weights(tmp_path / "whole" / "sft")
        assert want
        draw, kills, finished = random.Random(0), 0, 0
        while kills < KILLS or not finished:
            folder = f"killed-{finished}"
            if kills < KILLS and train(folder, draw.uniform(0.2, 1.0) * seconds) == -9:
                kills += 1
                continue
            assert train(folder) == 0  # to its end, or found finished
            assert weights(tmp_path / folder / "sft") == want
            left = [str(p) for p in (tmp_path / folder).rglob("*") if ".tmp" in p.name or p.name == "checkpoints"]
            assert not left
            finished += 1
    finally:
        server.close()
