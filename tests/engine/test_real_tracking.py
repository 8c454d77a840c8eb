"""wandb, offline, and trackio themselves: what their files hold after a kill and a resume."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from helpers.files import metric_lines
from helpers.frameworks import framework_python, run_in
from helpers.launch import command, worker_environment


@pytest.mark.slow
def test_a_kill_leaves_one_run_with_every_step_once(tmp_path):
    python = framework_python("tracking", "wandb==0.31.0", "trackio==0.43.0")
    folder = tmp_path / "runs" / "mine" / "ppo-am.tmp"
    extra = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [str(python), *command("tracking_worker", "killed", folder)[1:]], env=worker_environment(**extra),
        capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout[-3000:] + done.stderr[-6000:]
    assert [row["step"] for row in metric_lines(folder)] == [1, 2, 3, 4]
    run_in(python, "tracking_worker", "resumed", folder, **extra)
    found = json.loads(run_in(python, "tracking_worker", "read", folder, **extra).splitlines()[-1])
    (identity,), (name,) = found["wandb"], found["trackio"]
    assert name == f"mine-ppo-am-{identity}"
    for rows in (found["wandb"][identity], found["trackio"][name]):
        assert rows == [[step, pytest.approx(1 / step), step] for step in (1, 2, 3, 4, 5)]
