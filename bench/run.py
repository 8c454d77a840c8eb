"""How a case becomes lines of results: contenders checked, timed in turn, weighed, held against the floor."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

import stable_rlhf.ops as ops
from bench.case import COPY_BYTES, OURS, Case, Line, Prepared, Settings, copy_floor
from bench.common import MIB, ROOT, Step, Timing, allocator_peak, describe, environment, free_memory, measure, quantile
from bench.ops import OPERATIONS

NOISY = 0.10  # a ratio whose p20 to p80 spans more than this share of its median is no verdict
SLOW = "BENCH_SLOW"


# -- measuring ---------------------------------------------------------------------------------------------------------


def slowed(name: str, step: Step) -> Step:
    """The hook of the tests: BENCH_SLOW="part of a name=0.5" makes such contenders take half as long again."""
    told = os.environ.get(SLOW, "")
    part, _, share = told.rpartition("=")
    if not part or part not in name:
        return step

    def run() -> Any:
        begin = time.perf_counter()
        outputs = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        until = now + float(share) * (now - begin)
        while time.perf_counter() < until:
            pass
        return outputs

    return run


def is_absent(failure: str) -> bool:
    return failure.startswith(("ModuleNotFoundError", "ImportError", "not installed"))


def run_case(case: Case, settings: Settings, log: Callable[[str], None]) -> list[Line]:
    """Checks, times and weighs every contender of a case; one line each. Nothing that fails stops the others."""
    device = torch.device(settings.device)
    base: Line = {
        "op": case.op, "peer": OURS, "status": "failed", "median_s": None, "floor_share": None, "role": "ours",
        "case": case.key, "shape": dict(case.shape), "dtype": case.dtype, "study": case.study, "device": device.type,
    }  # fmt: skip
    log(case.key)
    try:
        prepared = OPERATIONS[case.op](case, settings)
        wanted = [c for c in prepared.contenders if c.role != "peer" or settings.wants(c.name)]
        report = prepared.check(wanted)
    except Exception as error:  # out of memory in making the inputs: the other cases still run
        log(f"  {describe(error)}")
        return [base | {"status": "absent" if is_absent(str(error)) else "failed", "failure": describe(error)}]
    _forget_compiled()
    lines: dict[str, Line] = {}
    steps: dict[str, Step] = {}
    for contender in wanted:
        result = report.get(contender.name, {})
        line = lines[contender.name] = base | {"peer": contender.name, "role": contender.role, "note": contender.note}
        failure = result.get("failure")
        if "verdict" in result:
            line |= {"errors": result["errors"], "verdict": result["verdict"]}
            if result["verdict"] == "WRONG":
                failure = "wrong result, not timed"
        if failure is None:
            try:
                steps[contender.name] = slowed(contender.name, contender.make())
                continue
            except Exception as error:
                failure = describe(error)
        line |= {"status": "absent" if is_absent(failure) else "failed", "failure": failure}
        log(f"  {contender.name}: {failure}")
    timings = measure(
        steps, device, rounds=settings.rounds, warmup=settings.warmup, limit=settings.limit, budget=settings.budget,
        shortest=10e-3, report=lambda text: log(f"  {text}"),
    )  # fmt: skip
    scales = {c.name: c.scale for c in wanted}
    for name, timing in timings.items():
        scaled = Timing([x * scales[name] for x in timing.samples], timing.failure, timing.faults)
        timings[name] = scaled
        lines[name] |= _times(scaled, prepared)
    for name, line in lines.items():
        if line["status"] == "ok" and line["role"] != "floor":
            line |= prepared.extra(name)
            if case.memory and settings.memory:
                line |= _memory(case, settings, name, steps[name], log)
                if case.op == "ppo-update" and name in (OURS, "plain PyTorch"):
                    line |= _fitting(case, settings, name, log)
    against_floor(list(lines.values()))
    for name, why in prepared.absent.items():
        lines[name] = base | {"peer": name, "role": "peer", "status": "absent", "failure": why}
    steps.clear()
    _forget_compiled()
    ops.release_workspace()
    free_memory(device)
    return list(lines.values())


def _forget_compiled() -> None:
    """Each shape is compiled for itself: after a second one the compiler would turn to unknown sizes."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _times(timing: Timing, prepared: Prepared) -> Line:
    if timing.median is None:
        return {"status": "failed", "failure": timing.failure}
    seconds = timing.median / 1e3
    line: Line = {
        "status": "ok", "median_s": seconds, "p20_s": quantile(timing.samples, 0.2) / 1e3,
        "p80_s": quantile(timing.samples, 0.8) / 1e3, "rounds": len(timing.samples),
        "samples_s": [float(f"{x / 1e3:.4g}") for x in timing.samples],
    }  # fmt: skip
    if timing.faults:
        line["page_faults"] = round(statistics.median(timing.faults))
    if prepared.flops:
        line |= {"flops": prepared.flops, "flops_per_s": prepared.flops / seconds}
    if prepared.moved:
        line |= {"bytes": prepared.moved, "bytes_per_s": prepared.moved / seconds}
    return line


def against_floor(lines: list[Line]) -> None:
    """Adds each contender's times of the floor: the fastest floor, in the input type where the machine multiplies it.

    Ratios are taken round by round, since a disturbance hits neighbours alike; their median is the figure, their p20
    and p80 say how far to trust it.
    """
    timed = [line for line in lines if line["role"] == "floor" and line["status"] == "ok"]
    native = [line for line in timed if not line["peer"].startswith("float32 floor")]
    floor = min(native or timed, key=lambda line: line["median_s"], default=None)
    if floor is None:
        return
    for line in lines:
        if line["status"] == "ok":
            pairs = zip(line["samples_s"], floor["samples_s"], strict=False)  # who is slow has fewer rounds
            ratios = [own / bare for own, bare in pairs]
            middle, low, high = (quantile(ratios, share) for share in (0.5, 0.2, 0.8))
            line |= {
                "floor": floor["peer"], "floor_share": 1.0 / middle, "times_floor": middle, "times_floor_p20": low,
                "times_floor_p80": high, "noisy": (high - low) / middle > NOISY,
            }  # fmt: skip


# -- memory ------------------------------------------------------------------------------------------------------------


def _memory(case: Case, settings: Settings, name: str, step: Step, log: Callable[[str], None]) -> Line:
    device = torch.device(settings.device)
    try:
        if device.type == "cuda":
            ops.release_workspace()
            return {"peak_mib": allocator_peak(step, device) / MIB}
        return {"peak_mib": resident_peak(case, settings, name)}
    except Exception as error:
        log(f"  {name}: no memory figure: {describe(error)}")
        return {"memory_failure": describe(error)}


def _fitting(case: Case, settings: Settings, name: str, log: Callable[[str], None]) -> Line:
    try:
        return {"largest_batch": largest_batch(case, settings, name), "budget_mib": settings.budget_mib}
    except Exception as error:  # the sizes tried may exceed the machine
        log(f"  {name}: no largest batch: {describe(error)}")
        return {}


def peak_of(case: Case, settings: Settings, name: str) -> float:
    """MiB of one call at another size than the one that was timed."""
    if settings.device == "cpu":
        return resident_peak(case, settings, name)
    device = torch.device(settings.device)
    step = next(c for c in OPERATIONS[case.op](case, settings).contenders if c.name == name).make()
    step()
    return allocator_peak(step, device) / MIB


def largest_batch(case: Case, settings: Settings, name: str) -> int:
    """The largest batch whose update stays within the budget: guessed from two sizes, then measured until it fits."""

    def peak(batch: int) -> float:
        return peak_of(replace(case, shape={**case.shape, "batch": batch}), settings, name)

    budget, first = settings.budget_mib, int(case.shape["batch"])
    low, high = peak(first), peak(2 * first)
    each = max((high - low) / first, 1e-3)
    # No guess beyond 64 times what was seen: a slope lost in noise must not ask for all the machine's memory.
    guess = min(first + int((budget - low) / each) // 2 * 2, 64 * first)
    for _ in range(4):
        if guess < 2 or peak(guess) <= budget:
            break
        guess = int(0.92 * guess) // 2 * 2
    else:
        raise RuntimeError(f"memory does not grow with the batch as expected: {guess} is too large still")
    return max(guess, 0)


def resident_peak(case: Case, settings: Settings, name: str) -> float:
    """MiB that the resident set of a fresh process grows by during one call, everything that stays included."""
    task = {"case": asdict(case), "settings": asdict(settings), "contender": name, "threads": torch.get_num_threads()}
    # Large blocks come from the system and go back to it at once: the resident set then is what is really held.
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory"], input=json.dumps(task), capture_output=True, encoding="utf-8", cwd=ROOT,
        env=os.environ | variables, timeout=300,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


# -- provenance ----------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Where results come from, with the machine's own rates: products of 2,048 cubed, a copy of 256 MiB."""
    facts = environment(device)

    def best(step: Step, work: float) -> float:
        steps = {"it": step}
        samples = measure(steps, device, rounds=5, warmup=2, limit=60.0, budget=5.0)["it"].samples
        return work / (min(samples) / 1e3) if samples else float("nan")

    x = torch.randn(2048, 2048, device=device)
    rates = {"float32_flops_per_s": best(lambda: x @ x, 2.0 * 2048**3)}
    if device.type == "cuda":
        y = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rates["bfloat16_flops_per_s"] = best(lambda: y @ y, 2.0 * 8192**3)
    rates["copy_bytes_per_s"] = best(copy_floor(0.0, device).make(), 2.0 * COPY_BYTES)
    return facts | {"rates": rates}
