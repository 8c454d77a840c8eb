"""One run a folder: the second one ends at once and names the first, and a dead process holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.files import tiny_files
from stable_rlhf.engine.run_folder import RunDirectory, RunError
from stable_rlhf.system.locks import LOCK, FolderInUse, FolderLock, lock_folder

HOLD = """
import sys, time
from pathlib import Path
from stable_rlhf.system.locks import FolderLock
held = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_process_is_told_who_the_first_is_and_a_dead_one_holds_nothing(tmp_path):
    secret = "http://me:secret@localhost/v1"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), secret], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUse, match=rf"process {holder.pid} on {socket.gethostname()}, since 20") as caught:
            FolderLock(tmp_path)
        assert "http://***@localhost/v1" in str(caught.value) and "secret" not in str(caught.value)
        with pytest.raises(RunError, match=rf"output_dir .* is in use by process {holder.pid} .* another output_dir"):
            RunDirectory(tmp_path / ".")
        assert os.listdir(tmp_path) == [LOCK]  # and the refused run left nothing
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    FolderLock(tmp_path).release()
    assert RunDirectory(tmp_path).root == tmp_path  # a lock file alone is no content


def test_a_process_does_not_lock_itself_out(tmp_path):
    outer = lock_folder(tmp_path)
    inner = lock_folder(tmp_path / ".." / tmp_path.name)
    assert inner is outer
    del inner
    with pytest.raises(FolderInUse, match=rf"process {os.getpid()} "):
        FolderLock(tmp_path)
    del outer
    FolderLock(tmp_path).release()


def test_a_run_folder_is_held_as_long_as_its_object_lives(tmp_path):
    run = RunDirectory(tmp_path / "out")
    again = RunDirectory(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(FolderInUse):
            FolderLock(tmp_path / "out")
        again = run
    del run, again
    FolderLock(tmp_path / "out").release()


@pytest.mark.parametrize("how", ["no locks", "read-only"])
def test_what_cannot_be_locked_is_a_warning(how, tmp_path, monkeypatch, capsys):
    def refuses(*_: object) -> int:
        raise OSError(*((errno.ENOLCK, "No locks available") if how == "no locks" else (errno.EROFS, "Read-only")))

    monkeypatch.setattr(*((fcntl, "flock") if how == "no locks" else (os, "open")), refuses)
    lock = FolderLock(tmp_path)
    assert f"WARNING: '{tmp_path}' cannot be locked ({'No locks' if how == 'no locks' else 'Read-only'}" in (
        capsys.readouterr().err
    )
    lock.release()


def test_an_unreadable_line_is_another_process(tmp_path):
    with FolderLock(tmp_path):
        for text in ("", "[]", "{}", "\xff"):
            (tmp_path / LOCK).write_text(text, encoding="latin-1")
            with pytest.raises(FolderInUse, match="is in use by another process"):
                FolderLock(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("locks"))


MODEL = "--model-name-or-path model --data.max_length 40 --data.max_prompt_length 24 --report_to []"
COMMANDS = {
    "quickstart": "quickstart",
    "sft": f"sft {MODEL} --data.demonstrations sft.jsonl",
    "train-scorer": f"train-scorer --objective rm {MODEL} --data.pairs pairs.jsonl",
    "strength": f"strength {MODEL} --data.pairs pairs.jsonl",
    "select": "select --candidates sft.jsonl --select.embedding_model minilm",
    "train-ppo": f"train-ppo --variant rm --scorer model {MODEL} --data.prompts prompts.jsonl --data.forget_tasks old",
    "evaluate": "evaluate --scorers rm=model --test-pairs pairs.jsonl",
    "study": "study no.yaml",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_keeps_out_of_a_folder_that_is_in_use(command, server, files, tmp_path):
    (files / "no.yaml").write_text("study: {seeds: [1]}\n", encoding="utf-8")
    with FolderLock(tmp_path):
        done = server(*COMMANDS[command].split(), "--output-dir", tmp_path, cwd=files)
        done.refused(f"output_dir '{tmp_path}' is in use by process {os.getpid()} on ")
    assert os.listdir(tmp_path) == [LOCK]


def test_two_ranks_keep_out_together(server, files, tmp_path):
    with FolderLock(tmp_path):
        for done in server.ranks(2, *COMMANDS["sft"].split(), "--output-dir", tmp_path, cwd=files):
            done.refused(f"is in use by process {os.getpid()} on ")
