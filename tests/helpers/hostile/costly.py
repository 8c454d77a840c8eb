"""Kinds that need a whole call of the command line, seconds each: broken models, broken snapshots, signals."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from helpers.cli import small_scorer, small_sft
from helpers.files import contents, tiny_files, weights
from helpers.forks import Done, Server
from helpers.hostile.drawn import corruptions, one_line

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGKILL")
Corrupt = Callable[[bytes], bytes] | None


def clear(done: Done, *names: str) -> bool:
    """Whether it worked; else it said one line, no traceback, and why."""
    assert "Traceback" not in done.err, done.err[-3000:]
    if done.code == 0:
        return True
    assert done.code == 2 and done.err.count("stable-rlhf: error: ") == 1, (done.code, done.err[-3000:])
    one_line(done.message, *names)
    return False


def damage(path: Path, corrupt: Corrupt) -> None:
    if corrupt is None:
        path.unlink()
    else:
        path.write_bytes(corrupt(path.read_bytes()))


# -- models ------------------------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> tuple[bool, float, Corrupt]:
    return draw(st.booleans()), draw(st.floats(0, 0.999)), draw(st.one_of(corruptions(), st.none()))


def check_models(folder: Path, server: Server) -> Callable[[tuple[bool, float, Corrupt]], None]:
    files = tiny_files(folder / "files")
    scorer, tries = small_scorer(server, files), 0

    def tried(case: tuple[bool, float, Corrupt]) -> None:
        nonlocal tries
        tries += 1
        of_scorer, place, corrupt = case
        root = folder / f"model-{tries}"
        shutil.copytree(scorer if of_scorer else files / "model", root)
        name = sorted(contents(root))[int(place * len(contents(root)))]
        damage(root / name, corrupt)
        before = contents(root), contents(files)
        out = folder / f"out-{tries}"
        if of_scorer:
            call = [
                "evaluate",
                "--scorers",
                f"am={root}",
                "--test-pairs",
                files / "pairs.jsonl",
                "--data.max_length",
                40,
                "--data.max_prompt_length",
                40,
            ]
        else:
            call = [*small_sft(files), "--model-name-or-path", root, "--sft.max_steps", 1]
        clear(server(*call, "--output-dir", out, cwd=folder), str(root), "scorer", "model")
        assert (contents(root), contents(files)) == before
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)

    return tried


# -- snapshots and signals ---------------------------------------------------------------------------------------------


@st.composite
def snapshots(draw: st.DrawFn) -> tuple[float, Corrupt]:
    return draw(st.floats(0, 0.999)), draw(st.one_of(corruptions(), st.none()))


def check_snapshots(folder: Path, server: Server) -> Callable[[tuple[float, Corrupt]], None]:
    files = tiny_files(folder / "files")
    call, tries = [*small_sft(files), "--sft.max_steps", 5], 0
    server(*call, "--output-dir", folder / "whole", cwd=folder).worked()
    want = weights(folder / "whole" / "sft")
    killed = server(*call, "--output-dir", folder / "base", cwd=folder, kill="base/sft.tmp/checkpoints/step-00000003")
    assert killed.code == -9, killed

    def tried(case: tuple[float, Corrupt]) -> None:
        nonlocal tries
        tries += 1
        place, corrupt = case
        root = folder / f"run-{tries}"
        shutil.copytree(folder / "base", root)
        before = contents(root)
        name = sorted(before)[int(place * len(before))]
        damage(root / name, corrupt)
        if not clear(server(*call, "--output-dir", root, cwd=folder), str(root)):
            after = contents(root)
            assert all(after[path] == before[path] for path in before if "checkpoints" in path and path != name)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(before[name])
            server(*call, "--output-dir", root, cwd=folder).worked()
        assert weights(root / "sft") == want
        shutil.rmtree(root)

    return tried


@st.composite
def signals(draw: st.DrawFn) -> tuple[str, int]:
    return draw(st.sampled_from(SIGNALS)), draw(st.integers(0, 4))


def check_signals(folder: Path, server: Server) -> Callable[[tuple[str, int]], None]:
    files = tiny_files(folder / "files")
    call, tries = [*small_sft(files), "--sft.max_steps", 6], 0
    server(*call, "--output-dir", folder / "whole", cwd=folder).worked()
    want = weights(folder / "whole" / "sft")

    def tried(case: tuple[str, int]) -> None:
        nonlocal tries
        tries += 1
        sign, step = case
        root = folder / f"signal-{tries}"
        when = f"signal-{tries}/sft.tmp" + (f"/checkpoints/step-{step:08d}" if step else "")
        done = server(*call, "--output-dir", root, cwd=folder, kill=when, sign=getattr(signal, sign))
        assert "Traceback" not in done.err, done.err[-3000:]
        if done.code not in (0, -9):
            assert done.code in (130, 128 + getattr(signal, sign)), (sign, done)
            assert done.err.count("the same command goes on") == 1, (sign, done.err[-2000:])
        server(*call, "--output-dir", root, cwd=folder).worked()
        assert weights(root / "sft") == want
        assert not [p for p in root.rglob("*") if ".tmp" in p.name]
        shutil.rmtree(root)

    return tried
