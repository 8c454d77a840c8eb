"""Starting a recipe on several processes: one torchrun command a node, which ``--dry-run`` prints and ``launch`` runs.

torchrun and not DeepSpeed's runner, on one node as on many: it starts the processes again after one has died
(``--max-restarts``), its rendezvous needs no ssh, and the same command serves Slurm, a hostfile and Kubernetes. The
trainers read nothing but the environment that every launcher sets, so ``deepspeed`` and ``accelerate launch`` work too.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stable_rlhf.engine.signals import set_limits
from stable_rlhf.launch.memory import GIB, Estimate, estimate, remedies
from stable_rlhf.policy.ppo import check_sizes
from stable_rlhf.settings.recipe import LaunchArguments, Recipe
from stable_rlhf.show.progress import printable
from stable_rlhf.system.http import SECRET_NAME, has_credentials

# What a process on another node should find as it is here. Names that look like credentials stay behind: a command
# line can be read by everybody on a machine.
_FORWARDED = (
    "CUDA_", "DS_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTHONPATH", "STABLE_RLHF_", "TORCH_", "TRITON_", "UCX_",
)  # fmt: skip
# Since torch 2.5 all attempts of a run share one store by default, and processes that were started again find the dead
# ones' addresses in it (pytorch issues 135712, 167288; seen with 2.13).
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
_REAP = 10.0  # seconds that a launcher waits longer than the processes it started
# torchrun passes these on; left to itself it would die of the last one, a scheduler's warning.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass(frozen=True)
class Host:
    """One node of a hostfile: its address and how many processes it takes."""

    address: str
    slots: int

    @property
    def name(self) -> str:
        """The address without ``user@``, which only ssh reads."""
        return self.address.rpartition("@")[2]


@dataclass(frozen=True)
class Plan:
    """What a launch runs: ``hosts`` in the order of their ranks (none: the same command on every node)."""

    hosts: list[Host]
    nodes: int
    devices_per_node: int
    endpoint: str
    launch: LaunchArguments
    arguments: list[str]
    name: str
    grace: float = 100.0

    @property
    def variables(self) -> list[str]:
        """What torchrun's environment needs; it gives its processes 30 seconds unless it is told otherwise."""
        return [_OWN_STORE, f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={math.ceil(self.grace + _REAP / 2)}"]

    @property
    def world_size(self) -> int:
        return sum(h.slots for h in self.hosts) or self.nodes * self.devices_per_node

    def command(self, node: int = 0) -> list[str]:
        """The exact command of one node."""
        host = self.hosts[node] if self.hosts else None
        settings = {
            "nnodes": len(self.hosts) or self.nodes,
            "nproc-per-node": host.slots if host else self.devices_per_node,
            "rdzv-backend": "c10d",
            "rdzv-endpoint": f"{self.endpoint}:{self.launch.port}",
            "rdzv-id": self.name,
            "max-restarts": self.launch.max_restarts,
            "signals-to-handle": _SIGNALS,
        }
        if host:
            # Who holds the rendezvous is said rather than guessed from host names: aliases and loopback addresses fool
            # the guess. The address of the node that gets rank 0 becomes MASTER_ADDR.
            settings |= {"rdzv-conf": f"is_host={int(node == 0)}", "local-addr": host.name}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        torchrun = ["env", *self.variables, sys.executable, "-m", "torch.distributed.run", *flags]
        return [*torchrun, "-m", "stable_rlhf", "run", *self.arguments]


def read_hostfile(path: str) -> list[Host]:
    """Nodes of a file in DeepSpeed's form, ``ADDRESS slots=N`` a line; ``#`` begins a comment.

    Raises:
        ValueError: names the file and the line.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise ValueError(f"hostfile {path!r}: is no regular file")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hostfile {path!r}: {getattr(error, 'strerror', None) or 'is not text'}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        entry = re.fullmatch(r"([\w.\-:@]+)\s+slots=([1-9]\d*)", text)
        if not entry:
            raise ValueError(f"hostfile {path!r}, line {number}: expected `ADDRESS slots=N`, got {text!r}")
        if entry[1] in hosts:
            raise ValueError(f"hostfile {path!r}, line {number}: {entry[1]} is there twice")
        hosts[entry[1]] = Host(entry[1], int(entry[2]))
    if not hosts:
        raise ValueError(f"hostfile {path!r}: names no node")
    return list(hosts.values())


def make_plan(recipe: Recipe, arguments: Sequence[str], hostfile: str | None = None) -> Plan:
    """What to run where, from the recipe's ``launch`` settings and ``arguments`` of ``stable-rlhf run``."""
    launch = recipe.launch
    hosts = read_hostfile(hostfile) if hostfile else []
    endpoint = hosts[0].name if hosts else (launch.rendezvous or "127.0.0.1")
    if not hosts and launch.nodes > 1 and not launch.rendezvous:
        endpoint = "$MASTER_ADDR"
    name = re.sub(r"\W+", "-", recipe.output_dir).strip("-") or "run"
    devices = launch.devices_per_node or _devices()
    plan = Plan(hosts, len(hosts) or launch.nodes, devices, endpoint, launch, list(arguments), name,
                recipe.checkpoint.grace_seconds)  # fmt: skip
    if any(v.training == "ppo" for v in recipe.variant_rows):
        check_sizes(recipe.ppo, plan.world_size)
    return plan


def _devices() -> int:
    return torch.cuda.device_count() or 1


def _shell(command: Sequence[str]) -> str:
    # $MASTER_ADDR is for the shell to fill in: shlex would quote it.
    words = [f'"{w}"' if "$" in w and shlex.quote(w) == f"'{w}'" else shlex.quote(w) for w in command]
    return " ".join(words)


def commands_text(plan: Plan) -> str:
    """The commands of a plan, for a person to read and to paste."""
    if plan.hosts:
        parts = [f"# on {host.address}\n{_shell(plan.command(i))}" for i, host in enumerate(plan.hosts)]
        return "\n".join(parts)
    if plan.nodes > 1:
        where = "; MASTER_ADDR is the first node's address" if plan.endpoint.startswith("$") else ""
        return f"# on each of the {plan.nodes} nodes{where}\n{_shell(plan.command())}"
    return _shell(plan.command())


def device_bytes(launch: LaunchArguments) -> int | None:
    """Memory of one device: as given, else this machine's first GPU's, else unknown."""
    if launch.device_memory_gib is not None:
        return int(launch.device_memory_gib * GIB)
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def memory_text(need: Estimate, limit: int | None) -> str:
    """The estimate as a table: a row for each kind of memory, a column for each moment of each stage, in GiB."""
    rows = list(dict.fromkeys(name for moment in need.moments for name in moment.items))
    table = [["GiB per device", *(f"{m.stage} {m.name}" for m in need.moments)]]
    for name in rows:
        table.append([name, *(_gib(m.items.get(name)) for m in need.moments)])
    table.append(["reserve", *(_gib(m.total - sum(m.items.values())) for m in need.moments)])
    table.append(["needed", *(_gib(m.total) for m in need.moments)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in table]  # fmt: skip
    for name, m in need.models.items():
        lines.append(f"{name}: {m.parameters:,} parameters, {m.trained:,} trained; from {m.source}")
    host = f"{need.host_bytes / GIB:.1f} GiB"
    lines.append(f"host memory of a node: {host} while its processes read the models or hold an offloaded optimiser")
    peak, have = need.peak, "unknown (--device-memory-gib says)" if limit is None else f"{limit / GIB:.1f} GiB"
    lines.append(f"largest: {peak.stage}, {peak.name}: {peak.total / GIB:.1f} GiB; a device has {have}")
    return "\n".join(lines)


def _gib(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / GIB:.1f}" if value >= GIB / 20 or value == 0 else "<0.1"


def dry_run(recipe: Recipe, plan: Plan) -> int:
    """Print the commands and the memory estimate; 3 where a device is too small, with the shortfall, else 0."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's defaults are read below: no warning about no GPU
    print(commands_text(plan), "\n", sep="")
    devices = max((h.slots for h in plan.hosts), default=plan.devices_per_node)
    need = estimate(recipe, world_size=plan.world_size, devices_per_node=devices)
    limit = device_bytes(plan.launch)
    print(memory_text(need, limit))
    if limit is None or need.peak.total <= limit:
        return 0
    short = (need.peak.total - limit) / GIB
    message = f"{recipe.title}: every device is {short:.1f} GiB short in stage {need.peak.stage} ({need.peak.name})"
    print(f"stable-rlhf: does not fit: {printable(message, lines=False)}", file=sys.stderr)
    changes = remedies(recipe, world_size=plan.world_size, devices_per_node=devices, limit=limit)
    part = max(need.peak.items, key=need.peak.items.__getitem__)
    lines = [f"its largest part is {part}, {need.peak.items[part] / GIB:.1f} GiB; what lowers the peak, and to what:"]
    lines += changes or ["no setting of this recipe"]
    print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
    return 3


def slurm_script(recipe: Recipe, plan: Plan) -> str:
    """A batch script for sbatch: one torchrun a node, all meeting at the first node of the allocation."""
    flags = ["--nnodes=$SLURM_NNODES", f"--nproc-per-node={plan.devices_per_node}", "--rdzv-backend=c10d",
             f"--rdzv-endpoint=$MASTER_ADDR:{plan.launch.port}", "--rdzv-id=$SLURM_JOB_ID",
             f"--max-restarts={plan.launch.max_restarts}", f"--signals-to-handle={_SIGNALS}"]  # fmt: skip
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
    lines = " \\\n    ".join([*(f'"{f}"' for f in flags), f"-m stable_rlhf run {shlex.join(plan.arguments)}"])
    return f"""#!/bin/bash
# {printable(recipe.title, lines=False)}: submit with sbatch from the folder that relative paths below start at.
# A job that is requeued or submitted again goes on where the run stopped: same command, same output folder.
#SBATCH --job-name={plan.name}
#SBATCH --nodes={plan.nodes}
#SBATCH --ntasks-per-node=1              # torchrun starts the {plan.devices_per_node} processes of a node itself
#SBATCH --gpus-per-node={plan.devices_per_node}
#SBATCH --exclusive
#SBATCH --time=24:00:00                  # your cluster's limits, account and partition go here
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@{min(65535, math.ceil(plan.grace) + 60):<18d}# seconds before the end: time for a snapshot
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # not head: it would break the pipe
export MASTER_ADDR OMP_NUM_THREADS="${{OMP_NUM_THREADS:-4}}"
export {" ".join(plan.variables)}

srun --kill-on-bad-exit=1 {torchrun} \\
    {lines}
"""


def write_slurm(recipe: Recipe, plan: Plan, path: str) -> None:
    """Write the batch script; an existing file is never overwritten.

    Raises:
        ValueError: the file exists, or cannot be written.
    """
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(slurm_script(recipe, plan))
    except FileExistsError:
        raise ValueError(f"--slurm {path!r}: the file exists; nothing is overwritten") from None
    except OSError as error:
        raise ValueError(f"--slurm {path!r}: {error.strerror or error}") from error
    print(f"wrote {path}; look it over, then: sbatch {shlex.quote(path)}")


def is_local(address: str) -> bool:
    """Whether an address is this machine's: it can be bound."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.bind(where)
    except OSError:
        return False
    return True


def check_port(address: str, port: int) -> None:
    """Refuse a rendezvous port that another program listens on, before any process starts.

    Raises:
        ValueError: names the port, a free one, and the flag.
    """
    if not is_local(address):
        return  # the first node finds out by itself
    family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as trial, socket.socket(family, kind) as free:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that ended a moment ago is no hindrance
        try:
            trial.bind(where)
        except OSError:
            free.bind((where[0], 0))
            raise ValueError(
                f"rendezvous port {port} on {address} is taken, perhaps by another run; choose another, as with "
                f"--port {free.getsockname()[1]}"
            ) from None


def start_on(host: Host, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start one node's command: here, or through ssh in the same folder with the variables that libraries read."""
    if is_local(host.name):
        return subprocess.Popen(command, start_new_session=True)
    variables = {
        k: v
        for k, v in os.environ.items()
        if k.startswith(_FORWARDED) and not SECRET_NAME.search(k) and not has_credentials(v)
    }
    words = ["env", *(f"{k}={v}" for k, v in variables.items()), *command]
    remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
    # -tt: when this end goes away, so does the other.
    return subprocess.Popen(
        ["ssh", "-tt", "-o", "BatchMode=yes", host.address, remote], start_new_session=True, stdin=subprocess.DEVNULL
    )


def run(plan: Plan) -> int:
    """Run a plan to its end; the first exit status that is not 0 ends the other nodes and is returned."""
    if not plan.hosts and plan.endpoint.startswith("$"):
        raise ValueError(
            f"{plan.nodes} nodes: name them by --hostfile FILE, write a batch script by --slurm FILE, or start this "
            "command on every node with --rendezvous ADDRESS_OF_THE_FIRST"
        )
    _check_devices(plan)
    check_port(plan.endpoint, plan.launch.port)
    hosts = plan.hosts or [Host("127.0.0.1", plan.devices_per_node)]
    set_limits(plan.grace + 2 * _REAP, unwind=plan.grace + 2 * _REAP)  # a signal here has processes to end
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for node, host in enumerate(hosts):
            try:
                processes.append(start_on(host, plan.command(node)))
            except FileNotFoundError as error:
                raise ValueError(f"{host.address}: {error.filename} is not installed here") from error
        while True:
            codes = [p.poll() for p in processes]
            failed = next(((h, c) for h, c in zip(hosts, codes, strict=True) if c), None)
            if failed:
                if plan.hosts:
                    print(f"stable-rlhf: {failed[0].address} ended with status {failed[1]}", file=sys.stderr)
                return failed[1] if failed[1] > 0 else 128 - failed[1]
            if all(c == 0 for c in codes):
                return 0
            time.sleep(0.2)
    finally:
        _end(processes, plan.grace + _REAP)


def _check_devices(plan: Plan) -> None:
    here = [h.slots for h in plan.hosts if is_local(h.name)] if plan.hosts else [plan.devices_per_node]
    have = torch.cuda.device_count()
    if have and here and max(here) > have:
        raise ValueError(
            f"{max(here)} processes on this machine, which has {have} GPUs: lower --devices-per-node, or the slots of "
            "the hostfile"
        )


def _end(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Ask what still runs to end, whole process groups, and end it when it does not: torchrun passes the signal on, and
    its processes save what they have."""
    running = [p for p in processes if p.poll() is None]
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
