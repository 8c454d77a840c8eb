"""What every benchmark here shares: interleaved timing, the record of the machine, JSON. Imports no other file here.

Contenders take turns within each round, so that noise of the machine (another process, a clock that changes) hits all
of them alike; the median over rounds is what counts, the smallest and the spread say how far to trust it.
"""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.data.jsonl import to_json
from stable_rlhf.system.machine import installed, processor

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
FEWEST_ROUNDS = 3
PEERS = ROOT / "build" / "peers"  # a folder for each peer that cannot lie beside this environment's libraries

Step = Callable[[], Any]


@dataclass
class Timing:
    """Milliseconds of one contender, one value a round; or why there are none."""

    samples: list[float] = field(default_factory=list)
    failure: str | None = None
    faults: list[float] = field(default_factory=list)  # pages that a call had to be given by the system, a round

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None


def quantile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def describe(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def page_faults() -> int:
    """Pages that this process has been given so far: an allocator that gives memory back pays for it at every call."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Stopwatch:
    """One timed call: CUDA events after a flush of the L2 cache, `perf_counter` on the CPU."""

    faults: float | None = None  # a call, the last time; on the CPU

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush: Tensor | None = None
        if device.type == "cuda":
            # Twice the cache, so that no contender finds its inputs where another one left them.
            size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, step: Step, calls: int = 1) -> float:
        """Milliseconds a call. The last result of `step` is dropped outside the timed part."""
        if self.flush is None:
            before, begin = page_faults(), time.perf_counter()
            for _ in range(calls):
                kept = step()
            elapsed = 1e3 * (time.perf_counter() - begin) / calls
            self.faults = (page_faults() - before) / calls
            del kept
            return elapsed
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        kept = step()
        end.record()
        end.synchronize()
        del kept
        return float(start.elapsed_time(end))


def measure(
    steps: dict[str, Step],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    limit: float,
    budget: float,
    shortest: float = 0.0,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Times every step in turn, round by round.

    Args:
        steps: by name; each makes its result from nothing, and returns it.
        rounds: timed rounds; a slow contender leaves once it has used `budget` seconds and has three samples.
        warmup: untimed calls of each before the first round (at least the one that `limit` judges).
        limit: a contender whose call takes longer than this many seconds is dropped. The first call of all may spend
            its time on compilation: a second one is then given before the verdict.
        budget: seconds for one contender over all rounds.
        shortest: on the CPU a sample is the mean of as many calls as fill this many seconds (200 at most): a clock
            reading and a wandering frequency are large beside one call of some microseconds.
        report: called with one line for each contender that is dropped.
    """
    watch = Stopwatch(device)
    timings = {name: Timing() for name in steps}
    alive: dict[str, Step] = {}
    calls = dict.fromkeys(steps, 1)
    for name, step in steps.items():
        try:
            took = watch(step) / 1e3
            if took > limit:
                took = watch(step) / 1e3
            if took > limit:
                timings[name].failure = f"> {limit:g} s"
            else:
                for _ in range(warmup - 1 if took * warmup < budget else 0):
                    took = min(took, watch(step) / 1e3)
                alive[name] = step
                if device.type == "cpu" and took < shortest:
                    calls[name] = min(200, math.ceil(shortest / max(took, 1e-9)))
        except Exception as error:  # a contender that fails must not take the others with it
            timings[name].failure = describe(error)
        if timings[name].failure:
            report(f"{name}: {timings[name].failure}")
            free_memory(device)
    names = list(alive)
    collecting = gc.isenabled()
    gc.collect()
    for number in range(rounds):
        gc.collect(0)  # what the last round left; nothing is older, since nobody collects within a round
        gc.disable()
        try:
            # Every round starts with another contender: nobody always runs after the same neighbour.
            first = number % len(names) if names else 0
            for name in names[first:] + names[:first]:
                timing = timings[name]
                if len(timing.samples) >= FEWEST_ROUNDS and sum(timing.samples) > 1e3 * budget:
                    continue
                try:
                    timing.samples.append(watch(alive[name], calls[name]))
                    if watch.faults is not None:
                        timing.faults.append(watch.faults)
                except Exception as error:
                    timing.samples.clear()
                    timing.failure = describe(error)
                    report(f"{name}: {timing.failure}")
        finally:
            if collecting:
                gc.enable()
        names = [name for name in names if timings[name].failure is None]
    return timings


def allocator_peak(step: Step, device: torch.device) -> int:
    """The most that one call holds on a CUDA device at a time, its result included, beyond what was there before."""
    free_memory(device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = step()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


PROCESS = Path("/proc/self")


def resident_mib(name: str) -> float:
    """MiB of a line of /proc/self/status: VmRSS, VmHWM (its peak), RssAnon (without pages of mapped files)."""
    for line in (PROCESS / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / MIB
    raise RuntimeError(f"{name} is not in {PROCESS / 'status'}")


# -- the record of the machine -----------------------------------------------------------------------------------------

PACKAGES = (
    "stable-rlhf", "torch", "triton", "transformers", "numpy", "liger-kernel", "cut-cross-entropy", "trl", "verl",
    "pandas", "datasets", "quack-kernels", "flash-attn", "flash-kmeans", "faiss-cpu", "scikit-learn",
    "sentence-transformers", "deepspeed",
)  # fmt: skip


def find_peers() -> None:
    """Makes what `make bench-peers` put into folders of its own importable, behind everything that is installed."""
    sys.path += [str(folder) for folder in sorted(PEERS.glob("*")) if str(folder) not in sys.path]


def _without_folders(word: str) -> str:
    """A result says what was run and never where on whose machine: of an absolute path only the last part."""
    return Path(word).name if Path(word).is_absolute() else word


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_features() -> list[str]:
    """The instruction sets that decide how fast matrix products are."""
    checks = {
        "avx2": "_is_avx2_supported",
        "avx512": "_is_avx512_supported",
        "avx512_vnni": "_is_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_tile": "_is_amx_tile_supported",
        "amx_fp16": "_is_amx_fp16_supported",
    }
    # Private names of torch: one that another version lacks is left out.
    return [name for name, check in checks.items() if getattr(torch.cpu, check, lambda: False)()]


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result comes from: device, versions, commit (`BENCH_COMMIT` where there is no git folder)."""
    find_peers()
    changed = _output_of("git", "status", "--porcelain", "--", ".", ":!bench/results")
    record: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "cpu": processor(),
        "cpu_features": cpu_features(),
        "cpu_capability_of_torch": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": installed(PACKAGES),
        "commit": _output_of("git", "rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT"),
        "tree_is_dirty": None if changed is None else bool(changed),
        "command": " ".join(_without_folders(word) for word in ["python", *sys.orig_argv[1:]]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / (1 << 30), 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return record


def new_result(folder: Path, name: str) -> Path:
    """The path folder/name-TIME.json; never one that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, number = folder / f"{name}-{stamp}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{stamp}-{number}.json", number + 1
    return path


def write_json(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a run that is stopped leaves what it had before."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
