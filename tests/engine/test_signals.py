"""SIGTERM, SIGHUP and SIGUSR1 end a command with one line and its status; where a stage trains, after a snapshot."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.cli import CONSOLE_SCRIPT, small_ppo, small_scorer, small_sft, whole_snapshots
from helpers.files import tiny_files, weights
from helpers.launch import environment, free_port
from stable_rlhf.engine import signals

NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Sends itself signals, and never ends by itself.
PROGRAM = """
import os, select, signal, sys
from stable_rlhf.engine import signals
grace, defer, how = float(sys.argv[1]), sys.argv[2] == "defer", sys.argv[3]
with signals.ended_by_one_line(grace):
    if how == "child":
        import subprocess
        kills_itself = [sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]
        raise SystemExit(-subprocess.run(kills_itself).returncode)
    signals.defer(defer)
    signals._ONE = 0.0
    if how == "fork":
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.write(writing, b"!")
            select.select([], [], [], 20)
            os._exit(0)
        os.read(reading, 1)  # before that it is not yet on its own
        os.kill(child, signal.SIGTERM)
        raise SystemExit(7 if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM else 8)
    number = getattr(signal, how.split("-")[0])
    if how.endswith("blocked"):
        import hashlib, threading
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes inside C: no handler of Python's runs
    os.kill(os.getpid(), number)
    for _ in range(2):
        select.select([], [], [], 0.05)
    if how.endswith("twice"):
        os.kill(os.getpid(), number)
    if how.endswith("ignored"):
        raise SystemExit(7)
    while True:
        select.select([], [], [], 1000)
"""


def program(grace: float, *how: str, hangup: signal.Handlers = signal.SIG_DFL) -> tuple[int, str]:
    def prepare() -> None:  # whether or not nohup runs the tests, or a shell in the background
        signal.signal(signal.SIGHUP, hangup)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(grace), *how], capture_output=True, encoding="utf-8", timeout=900,
        preexec_fn=prepare,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_where_no_step_runs_it_ends_at_once_with_one_line(name):
    code, said = program(1000, "now", name)
    assert code == 128 + getattr(signal, name)
    assert said == f"stable-rlhf: {name}: ended; the same command goes on where it stopped\n"


def test_control_c_as_well():
    code, said = program(1000, "defer", "SIGINT")  # it does not wait for a step
    assert (code, said) == (130, "stable-rlhf: interrupted; the same command goes on where it stopped\n")


@pytest.mark.parametrize(
    ("grace", "how", "words"),
    [
        (0, "SIGTERM", "ended at once"),
        (0.2, "SIGTERM", "not done after 0.2 s"),
        (1000, "SIGTERM-twice", "ended at once"),
    ],
)
def test_what_waits_for_a_step_is_bounded(grace, how, words):
    """No seconds, too few of them, a second signal."""
    code, said = program(grace, "defer", how)
    assert code == 143 and said.splitlines()[-1].startswith(f"stable-rlhf: SIGTERM: {words}")
    assert len(said.splitlines()) == (1 if grace == 0 else 2) and "Traceback" not in said


def test_a_main_thread_that_hears_nothing_is_ended_too():
    code, said = program(0.3, "now", "SIGTERM-blocked")
    assert code == 143 and said.startswith("stable-rlhf: SIGTERM: not done after 0.3 s")


def test_what_nohup_ignores_stays_ignored():
    assert program(1000, "now", "SIGHUP-ignored", hangup=signal.SIG_IGN) == (7, "")


def test_processes_that_a_command_starts_meet_signals_as_ever():
    assert program(1000, "now", "child")[0] == 15


def test_a_fork_that_is_ended_ends_itself_alone():
    """As workers are that a library starts and terminates."""
    assert program(1000, "defer", "fork") == (7, "")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (*NUMBERS, signal.SIGINT)]
    with signals.handled():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (*NUMBERS, signal.SIGINT)] == before
    with signals.handled(), pytest.raises(signals.Stopped, match="SIGUSR1"):
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(signals.Stopped), signals.handled(), signals.whole():
        os.kill(os.getpid(), signal.SIGTERM)
        done = True
    assert done and not signals.received()


# -- stages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("signals"))


def saved(stage: Path, err: str) -> int:
    """The step that a stopped stage says it is saved after, which is its newest snapshot's."""
    found = re.findall(r"^stable-rlhf: SIG\w+: stage .* is saved after step (\d+); the same command goes on", err, re.M)
    assert len(found) == 1, err
    assert whole_snapshots(stage)[-1] == f"step-{int(found[0]):08d}"
    return int(found[0])


@pytest.mark.slow
def test_a_stage_saves_what_it_has_and_goes_on_to_the_same_bits(server, files, tmp_path):
    call = [*small_sft(files), "--checkpoint.save_steps", 0, "--sft.max_steps", 300]
    server(*call, "--output-dir", tmp_path / "whole", cwd=tmp_path).worked()
    done = server(*call, "--output-dir", "out", cwd=tmp_path, kill="out/sft.tmp/metrics.jsonl", sign=signal.SIGUSR1)
    assert done.code == 128 + signal.SIGUSR1, done.err
    step = saved(tmp_path / "out" / "sft.tmp", done.err)
    again = server(*call, "--output-dir", "out", cwd=tmp_path).worked()
    assert f"going on after step {step}\n" in again.err
    assert weights(tmp_path / "out" / "sft") == weights(tmp_path / "whole" / "sft")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch", "torchrun"])
def test_launchers_pass_the_signal_on(files, tmp_path, launcher):
    """To the launcher alone, as a scheduler sends it: both ranks save, and their launcher has the signal's status."""
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"model_name_or_path: {files}/model\noutput_dir: out\nvariants: [rm]\ncheckpoint: {{save_steps: 0}}\n"
        f"data: {{data_dir: {files}, pairs: [pairs.jsonl], prompts: [prompts.jsonl], demonstrations: [sft.jsonl], "
        "forget_tasks: [old], test_fraction: 0.3, judge_fraction: 0.2, eval_prompts: 4, max_prompt_length: 24, "
        "max_length: 40}\nsft: {max_steps: 100000, num_train_epochs: 99999, per_device_train_batch_size: 4}\n"
        "ppo: {rollout_batch_size: 16, per_device_train_batch_size: 4, max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    number = signal.SIGUSR1 if launcher == "launch" else signal.SIGTERM
    program: list[object] = [CONSOLE_SCRIPT, "launch", "--port", free_port(), "--devices-per-node", 2]
    if launcher == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                   f"--master-port={free_port()}", "-m", "stable_rlhf", "run"]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*map(str, program), "my.yaml"], cwd=tmp_path, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    rows = tmp_path / "out" / "sft.tmp" / "metrics.jsonl"
    while not (rows.is_file() and rows.read_bytes().count(b"\n")):
        assert process.poll() is None, log.read_text(encoding="utf-8")[-6000:]
        time.sleep(0.05)
    process.send_signal(number)
    code = process.wait(timeout=1200)
    said = log.read_text(encoding="utf-8")
    assert saved(tmp_path / "out" / "sft.tmp", said) > 0
    if launcher == "launch":
        assert code == 128 + number
        assert said.endswith("stable-rlhf: SIGUSR1: ended; the same command goes on where it stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize("who", [[0], [1], [0, 1]])
def test_two_ranks_stop_after_the_same_step_whoever_is_told(server, files, tmp_path, who):
    scorer = small_scorer(server, files)
    call = [*small_ppo(files, scorer), "--checkpoint.save_steps", 0, "--engine.zero_stage", 3, "--ppo.total_steps", 40]
    for done in server.ranks(2, *call, "--output-dir", tmp_path / "whole", cwd=tmp_path):
        done.worked()
    stage = "ppo-am-sr"
    found = server.ranks(
        2, *call, "--output-dir", "out", cwd=tmp_path, kill=f"out/{stage}.tmp/metrics.jsonl", who=who,
        sign=signal.SIGTERM,
    )  # fmt: skip
    assert [done.code for done in found] == [143, 143], [done.err for done in found]
    saved(tmp_path / "out" / f"{stage}.tmp", found[0].err)
    assert "stable-rlhf: " not in found[1].err  # one line is enough
    for done in server.ranks(2, *call, "--output-dir", "out", cwd=tmp_path):
        done.worked()
    assert weights(tmp_path / "out" / stage) == weights(tmp_path / "whole" / stage)
