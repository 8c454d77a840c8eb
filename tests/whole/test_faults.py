"""What goes wrong outside: full and read-only disks, ranks that die, files that change. Each time one clear message,
and the last checkpoint is whole: with the fault mended, the same command ends with the weights of a run without it."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from helpers.cli import small_ppo, small_scorer, small_sft, whole_snapshots
from helpers.files import metric_lines, tiny_files, weights

pytestmark = pytest.mark.slow  # whole runs, a minute and more


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def scorer(server, files) -> Path:
    return small_scorer(server, files)


@pytest.fixture(scope="module")
def sft(server, files) -> dict[str, bytes]:
    """The weights of an SFT that nothing happened to."""
    server(*small_sft(files), "--output-dir", files / "whole", cwd=files).worked()
    return weights(files / "whole" / "sft")


@pytest.fixture
def disk(tmp_path):
    """``disk("size=300k")`` mounts a file system of its own and returns its folder; again: changes its options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        again = "remount," if folder.is_mount() else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kib", [100, 300, 390])
def test_a_full_disk(cli, disk, files, sft, kib):
    """Full before the first step, in the first snapshot, in a later one: then there is space."""
    folder = disk(f"size={kib}k")
    done = cli(*small_sft(files), "--output-dir", folder / "out").refused("No space left on device", str(folder))
    assert "Traceback" not in done.err
    working = folder / "out" / "sft.tmp"
    before = whole_snapshots(working) if (working / "checkpoints").exists() else []
    assert len(before) >= (1 if kib > 300 else 0)
    disk("size=100m")
    again = cli(*small_sft(files), "--output-dir", folder / "out").worked()
    assert not before or f"going on after step {int(before[-1][5:])}" in again.err
    assert weights(folder / "out" / "sft") == sft


def test_a_full_disk_on_two_ranks(server, disk, files, tmp_path):
    """Every rank says so at once, none waits for the other."""
    folder = disk("size=390k")
    began = time.monotonic()
    for done in server.ranks(2, *small_sft(files), "--output-dir", folder / "out", cwd=tmp_path):
        done.refused("No space left on device", "could not be written")
    assert time.monotonic() - began < 900  # not the hours of a collective
    assert whole_snapshots(folder / "out" / "sft.tmp")


def test_a_read_only_disk(server, cli, disk, files, sft, tmp_path):
    folder = disk("size=100m")
    call = [*small_sft(files), "--output-dir", folder / "out"]
    assert cli(*call, kill="disk/out/sft.tmp/checkpoints/step-00000003").code == -9
    leftover = folder / "out" / "sft.tmp" / "checkpoints" / "step-00000009.tmp"  # to be removed before all else
    leftover.mkdir()
    (leftover / "manifest.json").touch()
    disk("ro")
    before = whole_snapshots(folder / "out" / "sft.tmp", killed=True)
    cli(*call).refused("Read-only file system", str(folder / "out"))
    for done in server.ranks(2, *small_sft(files), "--output-dir", folder / "other", cwd=tmp_path):
        done.refused("Read-only file system", f"output_dir '{folder / 'other'}'")
    assert whole_snapshots(folder / "out" / "sft.tmp", killed=True) == before
    disk("rw")
    assert "going on after step" in cli(*call).worked().err
    assert weights(folder / "out" / "sft") == sft


def test_a_rank_that_dies(server, files, scorer, tmp_path):
    """The other one ends, says why, and the last snapshot is whole."""
    call = [*small_ppo(files, scorer), "--engine.zero_stage", 3, "--output-dir", tmp_path / "out"]
    for who, step in ((1, 3), (0, 6)):
        began = time.monotonic()
        done = server.ranks(
            2, *call, cwd=tmp_path, kill=f"out/ppo-am-sr.tmp/checkpoints/step-{step:08d}", who=[who]
        )  # fmt: skip
        assert time.monotonic() - began < 900
        assert done[who].code == -9
        done[1 - who].refused("another rank has ended")
        assert not list((tmp_path / "out").glob("error-*.txt"))
    for done in server.ranks(2, *call, cwd=tmp_path):
        done.worked()
    whole = [*call[:-1], tmp_path / "whole"]
    server.ranks(2, *whole, cwd=tmp_path)
    assert weights(tmp_path / "out" / "ppo-am-sr") == weights(tmp_path / "whole" / "ppo-am-sr")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes(server, files, tmp_path, rank):
    """It was killed before the ranks met: the other one waits for minutes, not for the hours of a collective."""
    (done,) = server.ranks(
        1, *small_sft(files), "--output-dir", tmp_path / "out", cwd=tmp_path, WORLD_SIZE="2", RANK=str(rank),
        LOCAL_RANK=str(rank), STABLE_RLHF_MEETING_MINUTES="0.05",
    )  # fmt: skip
    done.refused(f"rank {rank}: another rank has ended or was not started: waited 0.05 minutes at 127.0.0.1:", "all 2")


def test_a_reward_that_is_nan(server, files, scorer, tmp_path):
    """On one rank or on both, all end: the scorer's weights are finite, what they give is not."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "scorer-am"
    shutil.copytree(scorer, broken)
    tensors = load_file(broken / "model.safetensors")
    (name,) = [n for n in tensors if n.removeprefix("model.") == "norm.weight"]
    tensors[name].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for done in server.ranks(2, *small_ppo(files, broken), "--output-dir", tmp_path / "out", cwd=tmp_path):
        done.refused("the scorer gave a score that is not finite", "weights are those of the step before")


def test_a_row_of_garbage(cli, files, sft, tmp_path):
    """New in the middle of the file that a run is half through: nothing is lost, and what is wrong is named."""
    mine = tmp_path / "sft.jsonl"
    good = (files / "sft.jsonl").read_bytes()
    mine.write_bytes(good)
    call = [*small_sft(files), "--data.demonstrations", mine, "--output-dir", tmp_path / "out"]
    assert cli(*call, kill="out/sft.tmp/checkpoints/step-00000003").code == -9
    before = whole_snapshots(tmp_path / "out" / "sft.tmp", killed=True)
    lines = good.splitlines(keepends=True)
    mine.write_bytes(b"".join([*lines[:9], b'{"prompt": "\xff\x00\n', *lines[9:]]))
    cli(*call).refused("holds checkpoints of an attempt with other settings", "sft.jsonl")
    cli(*call[:-1], tmp_path / "fresh").refused(f"{mine}:10: not UTF-8")
    assert whole_snapshots(tmp_path / "out" / "sft.tmp", killed=True) == before
    mine.write_bytes(good)
    assert "going on after step" in cli(*call).worked().err
    assert weights(tmp_path / "out" / "sft") == sft


def test_other_settings_never_cost_a_snapshot(cli, files, sft, tmp_path):
    call = [*small_sft(files), "--output-dir", tmp_path / "out"]
    assert cli(*call, kill="out/sft.tmp/checkpoints/step-00000003").code == -9
    before = whole_snapshots(tmp_path / "out" / "sft.tmp", killed=True)
    cli(*call, "--sft.learning_rate", "1e-3").refused("sft.learning_rate: 0.01 -> 0.001", "'none'")
    cli(*call, "--engine.zero_stage", 2).refused("engine.zero_stage: 0 -> 2", "set checkpoint.universal to true")
    assert whole_snapshots(tmp_path / "out" / "sft.tmp", killed=True) == before
    anew = [*call, "--sft.learning_rate", "1e-3", "--checkpoint.resume_from_checkpoint", "none"]
    assert "starting it again" in cli(*anew).worked().err
    assert weights(tmp_path / "out" / "sft") != sft


# -- another layout ----------------------------------------------------------------------------------------------------


def losses(stage: Path) -> list[float]:
    rows = metric_lines(stage)
    return [row[name] for row in rows for name in ("step", "loss", "learning_rate")]


@pytest.mark.parametrize("what", ["sft", "ppo"])
def test_another_number_of_ranks_and_zero_stage(server, files, scorer, tmp_path, what):
    """One rank under ZeRO 1, two under ZeRO 2, one under ZeRO 3: the losses are those of one rank all the way."""
    call, stage = (small_sft(files), "sft") if what == "sft" else (small_ppo(files, scorer), "ppo-am-sr")
    size = [f"--{what}.per_device_train_batch_size", *([f"--{what}.per_device_rehearsal_batch_size"] * (what == "ppo"))]

    def run(ranks: int, zero_stage: int, *more: object, kill: int | None = None) -> list:
        rows = [part for flag in size for part in (flag, 4 // ranks)]
        at = f"out/{stage}.tmp/checkpoints/step-{kill:08d}" if kill else None
        return server.ranks(
            ranks, *call, *rows, "--engine.zero_stage", zero_stage, "--output-dir", tmp_path / "out", *more,
            cwd=tmp_path, kill=at,
        )  # fmt: skip

    server(*call, *[p for f in size for p in (f, 4)], "--output-dir", tmp_path / "whole", cwd=tmp_path).worked()
    want = losses(tmp_path / "whole" / stage)
    universal = ("--checkpoint.universal", "true")
    assert run(1, 1, kill=3)[0].code == -9
    for done in run(2, 2):
        done.refused("engine.zero_stage: 1 -> 2", "set checkpoint.universal to true")
    assert {d.code for d in run(2, 2, *universal, kill=6)} == {-9}
    (done,) = run(1, 3, *universal)
    assert "made with 2 ranks and engine.zero_stage 2: results go on to rounding" in done.worked().err
    found = losses(tmp_path / "out" / stage)
    assert found == pytest.approx(want, abs=1e-5)


def test_other_rows_a_step_are_refused(server, files, tmp_path):
    call = [*small_sft(files), "--output-dir", tmp_path / "out"]
    assert server(*call, cwd=tmp_path, kill="out/sft.tmp/checkpoints/step-00000003").code == -9
    for done in server.ranks(2, *call, "--checkpoint.universal", "true", cwd=tmp_path):
        done.refused("was made with 4 rows a step, this run has 8")
    half = ["--sft.per_device_train_batch_size", 2, "--checkpoint.universal", "true"]
    for done in server.ranks(2, *call, *half, cwd=tmp_path):
        done.worked()
