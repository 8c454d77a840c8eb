"""`stable-rlhf launch` and `env`: what they print, refuse and write; the runs on several processes are marked slow."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.cli import CONSOLE_SCRIPT, Done, workers
from helpers.files import tiny_files
from helpers.launch import environment, free_port

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = """
model_name_or_path: files/model
output_dir: out
variants: [rm]
launch: {devices_per_node: 2}
data: {data_dir: files, pairs: [pairs.jsonl], prompts: [prompts.jsonl], demonstrations: [sft.jsonl],
       forget_tasks: [old], test_fraction: 0.3, judge_fraction: 0.2, eval_prompts: 4, max_prompt_length: 24,
       max_length: 40}
sft: {max_steps: 2, per_device_train_batch_size: 4}
scorer: {per_device_train_batch_size: 4}
ppo: {total_steps: 1, rollout_batch_size: 8, per_device_train_batch_size: 4, max_new_tokens: 4}
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    tiny_files(tmp_path / "files")
    (tmp_path / "my.yaml").write_text(TINY, encoding="utf-8")
    return tmp_path


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nodes", "devices", "parameters"),
    [("consumer-gpu-1b", 1, 1, 1_235_816_449 + 11_272_192), ("h100x8-7b", 1, 8, 7_248_027_649)],
)
def test_recipes_that_fit(cli, name, nodes, devices, parameters):
    done = cli("launch", "--dry-run", RECIPES / f"{name}.yaml", "--data-dir", "D").worked()
    command = done.out.splitlines()[0]
    assert f"--nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d" in command
    assert command.endswith(f"-m stable_rlhf run {RECIPES / name}.yaml --data.data_dir D")
    for row in ("weights", "gradients", "optimiser", "activations", "loss", "generation", "needed"):
        assert f"\n{row} " in done.out
    assert f"policy: {parameters:,} parameters" in done.out
    needed, have = map(float, re.findall(r"([\d.]+) GiB", done.out.splitlines()[-1]))
    assert 0.4 * have < needed < have


def test_the_176b_recipe(cli):
    """It fits in 80 GB, as nothing is ever whole on a device; a policy that is gathered for rollouts does not."""
    done = cli("launch", "--dry-run", RECIPES / "bloomz-176b-32nodes.yaml").worked()
    assert "# on each of the 32 nodes" in done.out and '"--rdzv-endpoint=$MASTER_ADDR:29400"' in done.out
    assert "--nnodes=32 --nproc-per-node=8" in done.out and "policy: 176,247,285,761 parameters" in done.out
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line and line[0].islower()}
    header = next(line for line in done.out.splitlines() if line.startswith("GiB per device"))
    update = re.split("  +", header).index("ppo update") - 1
    state = sum(float(rows[name][update]) for name in ("weights", "gradients", "optimiser"))
    assert state == pytest.approx(16 * 176_247_285_761 / 256 / 2**30, abs=0.2)
    assert float(rows["gathered"][re.split("  +", header).index("ppo saving") - 1]) < 7  # its largest tensor alone
    done = cli(
        "launch", "--dry-run", RECIPES / "bloomz-176b-32nodes.yaml", "--engine.ds3_gather_for_generation", "true"
    )
    assert done.code == 3
    assert "GiB short in stage evaluation (rollouts)" in done.err
    assert re.search(r"engine\.ds3_gather_for_generation false, with engine\.zero_stage 3: .* which fits", done.err)


def test_a_device_that_is_too_small(cli):
    call = ["launch", "--dry-run", RECIPES / "h100x8-7b.yaml", "--device-memory-gib", 48]
    done = cli(*call)
    assert done.code == 3 and "Traceback" not in done.err
    assert re.search(r"does not fit: .* every device is 1\d\.\d GiB short in stage ppo \(update\)", done.err)
    assert "num_trainable_layers 4: " in done.err and "which fits" in done.err
    cli(*call, "--ppo.num_trainable_layers", 4, "--scorer.num_trainable_layers", 4).worked()


def test_sizes_that_nobody_knows(cli, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model_name_or_path: nobody/nothing\nppo: {rollout_batch_size: 8}", encoding="utf-8"
    )
    cli("launch", "--dry-run", "my.yaml", "--device-memory-gib", 80).refused("'nobody/nothing'", "model_shape")


# -- commands ----------------------------------------------------------------------------------------------------------


def test_a_command_for_each_host(cli, tiny):
    (tiny / "hosts").write_text("# two nodes\nnode-a slots=2\nme@10.0.0.7 slots=2  # the second\n\n", encoding="utf-8")
    out = cli("launch", "my.yaml", "--hostfile", "hosts", "--dry-run", "--ppo.rollout-batch-size=16").worked().out
    first, command, second, other = out.splitlines()[:4]
    assert (first, second) == ("# on node-a", "# on me@10.0.0.7")
    for line, holds, address in ((command, 1, "node-a"), (other, 0, "10.0.0.7")):
        assert "--nnodes=2 --nproc-per-node=2" in line and "--rdzv-endpoint=node-a:29400" in line
        assert f"--rdzv-conf=is_host={holds} --local-addr={address} " in line and " -m stable_rlhf run my.yaml" in line
        assert line.endswith("--ppo.rollout_batch_size=16")
    assert "unknown (--device-memory-gib says)" in out


def test_flags_may_come_before_the_recipe(cli, tiny):
    out = cli("launch", "--dry-run", "--rendezvous", "first", "--nodes", 2, "--port=3000", "--max-restarts", 4,
              "--seed", 3, "my.yaml", "--ppo.rollout_batch_size", 16).worked().out  # fmt: skip
    assert "--rdzv-endpoint=first:3000 --rdzv-id=out --max-restarts=4 " in out
    assert " -m stable_rlhf run my.yaml --seed 3" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("", ["launch needs a recipe first"]),
        ("--dry-run", ["launch needs a recipe first"]),
        ("no.yaml", ["'no.yaml'", "no such file"]),
        ("my.yaml --dryrun", ["--dryrun", "did you mean 'dry_run'?"]),
        ("my.yaml --hostfile no", ["hostfile 'no': No such file"]),
        ("my.yaml --hostfile hosts --nodes 2", ["--hostfile names the nodes", "--nodes"]),
        ("my.yaml --hostfile hosts --slurm x.sh", ["--hostfile names the nodes", "--slurm"]),
        ("my.yaml --nodes 0", ["launch.nodes must be at least 1, got 0"]),
        ("my.yaml --port 99999", ["launch.port must be at most 65535, got 99999"]),
        ("my.yaml --nodes 2 --ppo.rollout_batch_size 16", ["2 nodes", "--hostfile", "--slurm", "--rendezvous"]),
        ("my.yaml --devices-per-node 3", ["ppo.rollout_batch_size 8", "x 3 ranks"]),
        ("my.yaml --slurm my.yaml", ["--slurm 'my.yaml'", "exists", "nothing is overwritten"]),
    ],
)
def test_refused(cli, tiny, arguments, parts):
    (tiny / "hosts").write_text("a slots=1\n", encoding="utf-8")
    cli("launch", *arguments.split()).refused(*parts)
    assert not (tiny / "out").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "names no node"), ("# nothing\n", "names no node"),
        ("a slots=2\nb\n", "line 2: expected `ADDRESS slots=N`"),
        ("a slots=0", "line 1: expected"), ("a slots=1\na slots=1", "line 2: a is there twice"),
        ("a; rm slots=1", "line 1: expected"),
    ],
)  # fmt: skip
def test_refused_hostfiles(cli, tiny, text, part):
    (tiny / "hosts").write_text(text, encoding="utf-8")
    cli("launch", "my.yaml", "--hostfile", "hosts", "--dry-run").refused("hostfile 'hosts'", part)


def test_a_pipe_is_no_hostfile(cli, tiny):
    os.mkfifo(tiny / "pipe")
    cli("launch", "my.yaml", "--hostfile", "pipe", "--dry-run").refused("hostfile 'pipe': is no regular file")


def test_a_port_that_is_taken(cli, tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cli("launch", "my.yaml", "--port", port).refused(f"port {port} on 127.0.0.1 is taken", "with --port ")
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        cli("run", "my.yaml", **ranks).refused(f"port {port} on 127.0.0.1 is taken", "--master_port")  # a launcher's
    assert not (tiny / "out").exists()


def test_a_batch_script(cli, tiny):
    """Run by bash with stand-ins for Slurm's programs: what srun would start is the command of the dry run."""
    done = cli("launch", "--slurm", "job.sh", "my.yaml", "--nodes", 2, "--title", "It's $HOME",
               "--ppo.rollout_batch_size", 16, "--max-restarts", 2).worked()  # fmt: skip
    assert "sbatch job.sh" in done.out
    text = (tiny / "job.sh").read_text(encoding="utf-8")
    assert "\n#SBATCH --signal=USR1@160 " in text and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=105\n" in text
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --gpus-per-node=2\n" in text
    # As many hosts as no pipe holds: what stops reading after the first would end scontrol, and with it the job.
    for name, does in (("scontrol", "seq -f node%.0f 7 30000"), ("srun", 'printf "%s\\n" "$@"')):
        (tiny / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (tiny / name).chmod(0o755)
    path = os.pathsep.join([str(tiny), os.environ["PATH"]])
    extra = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "99", "PATH": path}
    ran = subprocess.run(["bash", "job.sh"], cwd=tiny, env=environment(**extra), capture_output=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "--kill-on-bad-exit=1", sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
        "--rdzv-backend=c10d", "--rdzv-endpoint=node7:29400", "--rdzv-id=99", "--max-restarts=2",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "stable_rlhf",
        "run", "my.yaml", "--title", "It's $HOME", "--ppo.rollout_batch_size", "16",
    ]  # fmt: skip


def test_env(cli):
    out = cli("env", NCCL_DEBUG="INFO", HF_TOKEN="hf_abc", SLURM_JOB_ID="7", UNRELATED_VALUE="x").worked().out
    for part in ("[versions]", "deepspeed", "commit", "[devices]", "host memory", "[operations]", "linear_policy_loss",
                 "C++ extension", "[compilers]", "c++", "nvcc", "[variables]"):  # fmt: skip
        assert part in out
    assert re.search(r"NCCL_DEBUG +INFO", out) and re.search(r"SLURM_JOB_ID +7", out)
    assert re.search(r"HF_TOKEN +\(set, not shown\)", out) and "hf_abc" not in out and "UNRELATED" not in out


# -- several processes -------------------------------------------------------------------------------------------------


def start(folder: Path, *program: object, **extra: str) -> Done:
    path = os.pathsep.join([str(Path(sys.executable).parent), extra.pop("PATH", os.environ["PATH"])])
    done = subprocess.run(
        [*map(str, program)], cwd=folder, env=environment(PATH=path, **extra), capture_output=True, encoding="utf-8",
        timeout=1200,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def finished(folder: Path, ranks: int) -> None:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["device"].endswith(f"{ranks} ranks") and summary["policies"]["rm"]["main"]["n"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch", "torchrun", "deepspeed", "accelerate"])
def test_every_launcher_runs_two_ranks(tiny, launcher):
    port = free_port()
    # The modules behind the console scripts torchrun, deepspeed and accelerate: they run whatever the PATH is.
    python = [sys.executable, "-m"]
    program: dict[str, list[object]] = {
        "launch": [CONSOLE_SCRIPT, "launch", "--port", port],
        "torchrun": [*python, "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m"],
        "deepspeed": [*python, "deepspeed.launcher.runner", "--num_accelerators=2", f"--master_port={port}",
                      "--module"],
        "accelerate": [*python, "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                       "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}", "--module"],
    }  # fmt: skip
    if launcher != "launch":
        program[launcher] += ["stable_rlhf", "run"]
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    done = start(tiny, *program[launcher], "my.yaml")
    assert done.code == 0, done.err[-6000:]
    finished(tiny / "out", 2)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[], ["--ppo.num_trainable_layers", 1, "--scorer.num_trainable_layers", 1]])
def test_a_run_in_bfloat16(cli, tiny, layers):
    """As the recipes for GPUs run: every stage, models that only read in bfloat16 too."""
    cli("run", "my.yaml", "--engine.bf16", "true", "--engine.gradient_checkpointing", "true", "--variants",
        "[rejection,rm,am]", "--ppo.rejection_samples", 2, *layers).worked()  # fmt: skip
    summary = json.loads((tiny / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["settings"]["engine"]["bf16"] and set(summary["policies"]) == {"rejection", "rm", "am"}
    assert summary["policies"]["rm"]["main"]["n"] > 0


@pytest.mark.slow
def test_two_hosts_of_the_loopback_range(tiny):
    """Two nodes of one process each; the second by a stand-in for ssh, whose arguments are those of the real one."""
    (tiny / "bin").mkdir()
    (tiny / "bin" / "ssh").write_text(
        '#!/bin/sh\necho "$@" >> ssh.log\nwhile [ $# -gt 1 ]; do shift; done\nsh -c "$1"\n', encoding="utf-8"
    )
    (tiny / "bin" / "ssh").chmod(0o755)
    (tiny / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", encoding="utf-8")
    done = start(tiny, CONSOLE_SCRIPT, "launch", "--hostfile", "hosts", "--port", free_port(), "my.yaml")
    assert done.code == 0, done.err[-6000:]
    finished(tiny / "out", 2)
    assert not (tiny / "ssh.log").exists()  # both are this machine's addresses
    # 192.0.2.0/24 belongs to nobody (RFC 5737): it can only be reached through ssh. What fails there ends everything.
    (tiny / "hosts").write_text("127.0.0.1 slots=1\n192.0.2.1 slots=1\n", encoding="utf-8")
    (tiny / "bin" / "ssh").write_text(
        '#!/bin/sh\necho "$@" >> ssh.log\necho $HF_TOKEN >> ssh.log\nexit 255\n', encoding="utf-8"
    )
    path = os.pathsep.join([str(tiny / "bin"), os.environ["PATH"]])
    began = time.monotonic()
    done = start(tiny, CONSOLE_SCRIPT, "launch", "--hostfile", "hosts", "--port", free_port(), "my.yaml", PATH=path,
                 HF_TOKEN="hf_abc", NCCL_DEBUG="INFO")  # fmt: skip
    assert done.code == 255 and "192.0.2.1 ended with status 255" in done.err
    assert time.monotonic() - began < 900  # not for as long as a node that never comes
    call = (tiny / "ssh.log").read_text(encoding="utf-8").splitlines()[0]
    assert call.startswith(f"-tt -o BatchMode=yes 192.0.2.1 cd {tiny} && exec env ")
    assert "NCCL_DEBUG=INFO" in call and "HF_TOKEN" not in call and "--rdzv-conf=is_host=0" in call


@pytest.mark.slow
def test_a_killed_rank_is_started_again(tiny):
    """One process of two is killed in the middle of a stage: torchrun starts both again, and they go on from the last
    snapshot."""
    log = tiny / "log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [CONSOLE_SCRIPT, "launch", "--port", str(free_port()), "--max-restarts", "1", "my.yaml", "--sft.max_steps",
             "60", "--sft.num_train_epochs", "99", "--checkpoint.save_steps", "1"],
            cwd=tiny, env=environment(), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while not (tiny / "out" / "sft.tmp" / "checkpoints" / "step-00000003").exists():
        assert process.poll() is None, log.read_text(encoding="utf-8")[-6000:]
        time.sleep(0.01)
    os.kill(max(workers(process.pid)), signal.SIGKILL)
    assert process.wait(timeout=1200) == 0, log.read_text(encoding="utf-8")[-6000:]
    assert log.read_text(encoding="utf-8").count("[sft]\n") == 2 and "going on after step" in log.read_text(
        encoding="utf-8"
    )
    steps = [
        json.loads(line)["step"]
        for line in (tiny / "out" / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert steps == list(range(1, 61))
    finished(tiny / "out", 2)
