"""What a bug report needs to say about a machine, as text: ``stable-rlhf env``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import stable_rlhf
from stable_rlhf import ops
from stable_rlhf.ops.backends import extension
from stable_rlhf.run.circumstances import device_name, versions
from stable_rlhf.show.progress import printable
from stable_rlhf.system.http import SECRET_NAME, without_credentials
from stable_rlhf.system.machine import installed

# Beside what this package needs: what can change how processes start, talk and compile.
_OTHERS = ("accelerate", "peft", "tokenizers", "safetensors", "faiss-gpu-cu12", "flash-attn", "jsonargparse")
_PREFIXES = (
    "ACCELERATE_", "CUDA_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "LOCAL_", "MASTER_", "MKL_", "NCCL_", "OMP_", "OMPI_",
    "PYTORCH_", "RANK", "ROLE_", "SLURM_", "STABLE_RLHF_", "TOKENIZERS_", "TORCH", "TRITON_", "UCX_", "WORLD_SIZE",
)  # fmt: skip
# Whose value is shown: switches, sizes, places and addresses that are known to be no credential. Of every other
# variable of these prefixes only the name is: what a secret is called nobody can list.
_SHOWN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|MASTER_(ADDR|PORT)|ROLE_NAME"
    r"|CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING|DEVICE_ORDER|DEVICE_MAX_CONNECTIONS|HOME|PATH|MODULE_LOADING|CACHE_PATH)"
    r"|(OMP|KMP|MKL)_(NUM_THREADS|DYNAMIC|PROC_BIND|PLACES|WAIT_POLICY|SCHEDULE|STACKSIZE|THREAD_LIMIT|AFFINITY|BLOCKTIME"
    r"|MAX_ACTIVE_LEVELS|DUPLICATE_LIB_OK|SETTINGS|DEBUG_CPU_TYPE|ENABLE_INSTRUCTIONS|THREADING_LAYER|VERBOSE)"
    r"|NCCL_(DEBUG|DEBUG_SUBSYS|DEBUG_FILE|SOCKET_IFNAME|SOCKET_FAMILY|SOCKET_NTHREADS|NSOCKS_PERTHREAD|IB_\w+|P2P_\w+"
    r"|SHM_\w+|NET|NET_\w+|ALGO|PROTO|BUFFSIZE|NTHREADS|M\w+_NCHANNELS|M\w+_CTAS|CROSS_NIC|TOPO_FILE|NVLS_ENABLE"
    r"|CUMEM_ENABLE|ASYNC_ERROR_HANDLING|BLOCKING_WAIT|TIMEOUT|COMM_BLOCKING|LAUNCH_MODE|IGNORE_CPU_AFFINITY)"
    r"|GLOO_(SOCKET_IFNAME|DEVICE_TRANSPORT)|FI_(PROVIDER|EFA_\w+|LOG_LEVEL)|UCX_(TLS|NET_DEVICES|LOG_LEVEL)"
    r"|OMPI_COMM_WORLD_(LOCAL_)?(RANK|SIZE)"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|DATASETS_OFFLINE|ENDPOINT|HUB_ENABLE_HF_TRANSFER|HUB_DISABLE_\w+"
    r"|HUB_ETAG_TIMEOUT|HUB_DOWNLOAD_TIMEOUT|ASSETS_CACHE|MODULES_CACHE)|TOKENIZERS_PARALLELISM"
    r"|TORCH_(HOME|LOGS|COMPILE_DEBUG|CUDA_ARCH_LIST|CPP_LOG_LEVEL|EXTENSIONS_DIR|SHOW_CPP_STACKTRACES|DISTRIBUTED_DEBUG"
    r"|NCCL_\w+|ALLOW_TF32\w*|DISABLE_SHARE_RDZV_TCP_STORE|USE_CUDA_DSA)|TORCHDYNAMO_\w+|TORCHINDUCTOR_\w+"
    r"|TORCHELASTIC_(RUN_ID|RESTART_COUNT|MAX_RESTARTS|ERROR_FILE|USE_AGENT_STORE)"
    r"|PYTORCH_(CUDA_ALLOC_CONF|ALLOC_CONF|NVML_BASED_CUDA_CHECK|KERNEL_CACHE_PATH|NO_CUDA_MEMORY_CACHING|JIT)"
    r"|TRITON_(CACHE_DIR|INTERPRET|DEBUG|HOME|PRINT_AUTOTUNING|PTXAS_PATH|KERNEL_DUMP|DUMP_DIR|ALWAYS_COMPILE)"
    r"|DS_(ACCELERATOR|SKIP_CUDA_CHECK|BUILD_\w+|ENV_FILE)|STABLE_RLHF_(DEBUG|DATA|CHECK|CPU_ISA|BACKEND)"
    r"|SLURM_(JOB_ID|JOB_NAME|JOB_PARTITION|JOB_NUM_NODES|JOB_NODELIST|NNODES|NODEID|NODELIST|NTASKS|NTASKS_PER_NODE|NPROCS"
    r"|PROCID|LOCALID|CPUS_PER_TASK|CPUS_ON_NODE|GPUS|GPUS_PER_NODE|GPUS_ON_NODE|MEM_PER_NODE|RESTART_COUNT|SUBMIT_DIR"
    r"|CLUSTER_NAME|STEP_ID)"
    r"|ACCELERATE_(USE_\w+|MIXED_PRECISION|DEEPSPEED_ZERO_STAGE|DYNAMO_BACKEND|DEBUG_MODE|CONFIG_FILE)"
)
_COMPILERS = (("c++", "c++"), ("nvcc", "nvcc"), ("ninja", "ninja"))


def commit() -> str | None:
    """The commit that this package was installed or is run from, where that is known; ``+changes`` beside it when
    files differ from it."""
    try:
        source = json.loads(metadata.distribution("stable-rlhf").read_text("direct_url.json") or "{}")
        if "vcs_info" in source:
            return str(source["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, ValueError, KeyError):
        pass
    folder = Path(stable_rlhf.__file__).resolve().parents[1]
    if not (folder / ".git").exists() or not shutil.which("git"):
        return None  # a repository further up is somebody else's
    head = _first_line("git", "-C", str(folder), "rev-parse", "HEAD")
    changed = _first_line("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{head}{' +changes' if changed else ''}" if head else None


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[0] if done.returncode == 0 and lines else None


def _devices() -> list[tuple[str, str]]:
    lines = [("device", device_name()), ("cpu cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")]
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        lines.append(("host memory", f"{pages * size / 2**30:.1f} GiB"))
    except (ValueError, OSError):
        pass
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append((f"gpu {i}", f"{p.name}, {p.total_memory / 2**30:.1f} GiB, sm_{p.major}{p.minor}"))
    if torch.cuda.is_available():
        driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        lines.append(("driver", driver or "unknown"))
        lines.append(("nccl", ".".join(map(str, torch.cuda.nccl.version()))))
    return [*lines, ("cuda of torch", torch.version.cuda or "none")]


def _compilers() -> list[tuple[str, str]]:
    lines = []
    for name, program in _COMPILERS:
        path = shutil.which(program)
        said = _first_line(program, "--version") if path else None
        lines.append((name, f"{said or 'gives no version'} ({path})" if path else "not found"))
    return lines


def _package_versions() -> list[tuple[str, str]]:
    packages = versions() | installed(_OTHERS)
    return [*packages.items(), ("commit", commit() or "unknown (installed without its repository)")]


def _variables() -> list[tuple[str, str]]:
    """Variables of launchers and libraries; what is not known to be no credential is only said to be there."""
    names = sorted(name for name in os.environ if name.startswith(_PREFIXES))
    return [
        (name, without_credentials(os.environ[name]) if _SHOWN.fullmatch(name) and not SECRET_NAME.search(name)
         else "(set, not shown)")
        for name in names
    ]  # fmt: skip


def report() -> str:
    """Versions, devices, the implementation of every operation, compilers and launcher variables; no credential."""
    built = "built" if extension() is not None else "not built: PyTorch serves on the CPU"
    isa = torch.backends.cpu.get_cpu_capability()
    sections = {
        "versions": _package_versions(),
        "devices": [*_devices(), ("cpu instructions", isa)],
        "operations": [*ops.backend_report().items(), ("C++ extension", built)],
        "compilers": _compilers(),
        "variables": _variables() or [("none", "that a launcher or a library of this run reads")],
    }
    lines = []
    for title, pairs in sections.items():
        lines += [f"[{title}]", *(f"{name:26s}{value}" for name, value in pairs), ""]
    return printable("\n".join(printable(line, lines=False) for line in lines).rstrip())
