"""SIGKILL at random moments of a training run, checkpoint writes included: what comes out in the end is the same."""

from __future__ import annotations

import random
import time

import pytest

from helpers.cli import small_ppo, small_scorer, small_sft
from helpers.files import tiny_files, weights

KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills(server, tmp_path, ranks):
    """One rank: SFT. Two ranks: PPO with rehearsal under ZeRO 3, of which both are killed, or one and the other must
    end by itself."""
    files = tiny_files(tmp_path / "files")
    call, stage = small_sft(files), "sft"
    if ranks == 2:
        call, stage = [*small_ppo(files, small_scorer(server, files)), "--engine.zero_stage", 3], "ppo-am-sr"
    draw = random.Random(0)

    def train(folder: str, kill: float | None = None) -> bool:
        """Whether it ended by itself."""
        who = None if ranks == 1 or draw.random() < 0.5 else [draw.randrange(2)]
        done = server.ranks(
            ranks, *call, "--output-dir", tmp_path / folder, cwd=tmp_path, kill=kill, who=who,
            STABLE_RLHF_MEETING_MINUTES="1",  # on a slow machine one dies before they have met
        )  # fmt: skip
        if all(d.code == 0 for d in done):
            return True
        assert kill is not None and any(d.code == -9 for d in done), done
        for other in (d for d in done if d.code not in (0, -9)):  # 0: it was done when the other one was killed
            other.refused("another rank has ended")
        return False

    train("first")  # waits for the server's imports too
    began = time.monotonic()
    assert train("whole")
    seconds = time.monotonic() - began
    want = weights(tmp_path / "whole" / stage)
    kills, finished = 0, 0
    while kills < KILLS or not finished:
        folder, began = f"killed-{finished}", time.monotonic()
        if kills < KILLS and not train(folder, draw.uniform(0.2, 1.0) * seconds):
            kills += 1
            continue
        if kills < KILLS:  # it was done before its time came: the machine was slower when that was measured
            seconds = min(seconds, time.monotonic() - began)
        assert train(folder)  # to its end, or found finished
        assert weights(tmp_path / folder / stage) == want
        left = [str(p) for p in (tmp_path / folder).rglob("*") if ".tmp" in p.name or p.name == "checkpoints"]
        assert not left
        finished += 1
