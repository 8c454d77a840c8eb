"""Run 1: what the card does, how far ours is from it by size of workspace, and which choices to tune."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stable_rlhf.ops as ops
from bench.case import COPY_BYTES, RESULTS
from bench.common import Step as Call
from bench.common import Timing, allocator_peak, describe, environment, free_memory, measure, quantile
from bench.gpu import correctness
from bench.gpu.plan import Plan, Row, Step, table
from bench.ops.problem import Problem, make_problem, own_loss, random_inputs, with_gradients
from bench.ops.problem import floor as bare_products
from bench.presets import GPU_SHAPES

MIXED = {"active": 0.45, "clipped": 0.2, "rehearsal": 0.1}
ALL = {"active": 1.0, "clipped": 0.0, "rehearsal": 0.0}
CHUNK_ROWS = (2048, 4096)  # candidates beside one chunk of all rows
GIB = 1 << 30
COUNTED = RESULTS / "count.json"
WAYS = ("in the product", "rows of logits")  # to make statistics
STEPS_READ = ("facts", "ours", "statistics", "rows")  # by the proposal


def shapes(plan: Plan) -> list[dict[str, int]]:
    if plan.dry:
        return [{"rows": 16, "width": 16, "vocabulary": v} for v in (264, 131)]
    return list(GPU_SHAPES)


def timed(plan: Plan, calls: dict[str, Call], rounds: int = 10, budget: float = 1.0) -> dict[str, Timing]:
    """In turn, round by round; the kernels are interpreted in a dry run."""
    fewer = 3 if plan.dry else rounds
    with ops.backend(plan.backend):
        return measure(calls, plan.device, rounds=fewer, warmup=2, limit=30.0, budget=budget)


def milliseconds(timing: Timing) -> Row:
    if timing.median is None:
        return {"ms": None, "failure": timing.failure}
    return {"ms": timing.median, "p20": quantile(timing.samples, 0.2), "p80": quantile(timing.samples, 0.8)}


# -- the card ----------------------------------------------------------------------------------------------------------


def facts(plan: Plan) -> Iterator[Row]:
    """The machine and its versions; what `nvidia-smi` says of clocks and memory."""
    row: Row = {"environment": environment(plan.device), "backends": ops.backend_report()}
    row["compute-sanitizer"] = shutil.which("compute-sanitizer")
    row["reduced precision reduction"] = bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        row |= {
            "multiprocessors": properties.multi_processor_count, "l2_mib": properties.L2_cache_size / 2**20,
            "free_gib": torch.cuda.mem_get_info()[0] / GIB,
        }  # fmt: skip
        query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, encoding="utf-8", timeout=20
        )
        row["nvidia-smi"] = done.stdout.strip() or done.stderr.strip()
    yield row


def adds_in_float32(device: torch.device) -> str | None:
    """Why `torch.addmm(out_dtype=float32)` into a float32 sum does not work here; None where it does, unrounded."""
    g = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(256, n, device=device, generator=g).to(torch.bfloat16) for n in (512, 128))
    total = torch.randn(512, 128, device=device, generator=g)
    want = total.double() + a.double().t() @ b.double()
    try:
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return describe(error)
    off = float((total.double() - want).norm() / want.norm())
    return None if off < 1e-5 else f"relative error {off:.1e}: the product is rounded"


def addmm(plan: Plan) -> Iterator[Row]:
    """Whether sums over chunks can be made in the third product's epilogue."""
    obstacle = adds_in_float32(plan.device)
    yield {"works": obstacle is None, "obstacle": obstacle}


def ceilings(plan: Plan) -> Iterator[Row]:
    """The rate of a copy, and of each product of a head as we call it, over all rows and over a chunk."""
    device, works = plan.device, adds_in_float32(plan.device) is None
    for size in (COPY_BYTES,) if plan.dry else (COPY_BYTES, 8 * COPY_BYTES):
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = milliseconds(timed(plan, {"copy": lambda s=source, t=target: t.copy_(s)})["copy"])  # type: ignore[misc]
        yield {"product": f"copy of {size >> 20} MiB", "tb_per_s": 2e-9 * size / times["ms"], **times}
        del source, target
    for shape in shapes(plan):
        yield from products(plan, shape, works)
        free_memory(device)


def products(plan: Plan, shape: dict[str, int], works: bool) -> Iterator[Row]:
    device, (rows, width, vocabulary) = plan.device, (shape[key] for key in ("rows", "width", "vocabulary"))
    padded = -(-vocabulary // 8) * 8  # rows of logits begin at multiples of 16 bytes
    x, weight, _ = random_inputs(rows, width, vocabulary, torch.bfloat16, device)
    g = torch.empty(rows, padded, dtype=torch.bfloat16, device=device).normal_()[:, :vocabulary]
    out, total = torch.empty_like(g), torch.zeros(vocabulary, width, dtype=torch.float32, device=device)
    hidden_grad = torch.empty_like(x)
    for chunk in sorted({rows, min(rows, 4096), min(rows, 512)}, reverse=True):
        part, grad, logits = x[:chunk], g[:chunk], out[:chunk]
        calls: dict[str, Call] = {
            "logits": lambda part=part, logits=logits: torch.mm(part, weight.t(), out=logits),  # type: ignore[misc]
            "hidden": lambda grad=grad, chunk=chunk: torch.mm(grad, weight, out=hidden_grad[:chunk]),  # type: ignore[misc]
            "weight": lambda grad=grad, part=part: torch.mm(grad.t(), part),  # type: ignore[misc]
        }
        if works:
            calls["weight, added in float32"] = lambda grad=grad, part=part: torch.addmm(  # type: ignore[misc]
                total, grad.t(), part, out_dtype=torch.float32, out=total
            )
        for name, timing in timed(plan, calls, rounds=7).items():
            times = milliseconds(timing)
            flops = 2.0 * chunk * width * vocabulary
            rate = None if times["ms"] is None else flops / times["ms"] / 1e9
            yield {**shape, "chunk": chunk, "product": name, "tflop_per_s": rate, **times}


# -- ours --------------------------------------------------------------------------------------------------------------


def loss_call(problem: Problem, workspace: int | None) -> Call:
    """Forward and backward; None leaves the workspace to the operation."""
    given = replace(problem, workspace_bytes=workspace)
    return with_gradients(lambda hidden, weight: own_loss(given, hidden, weight), problem.hidden, problem.weight)


def batch(plan: Plan, shape: dict[str, int], shares: dict[str, Any]) -> Problem:
    sizes = (shape["rows"], shape["width"], shape["vocabulary"])
    with ops.backend(plan.backend):
        inputs = random_inputs(*sizes, torch.bfloat16, plan.device)
        return make_problem(*inputs, **shares, workspace_bytes=None)


def workspaces(problem: Problem, plan: Plan) -> dict[str, int | None]:
    """Candidates by name: bytes, rows of a chunk, everything at once, and what the operation chooses."""
    rows, vocabulary = problem.index.numel(), problem.weight.shape[0]
    row_bytes = 2 * (-(-vocabulary // 8) * 8)
    if plan.dry:
        sizes: dict[str, int | None] = {f"{n} rows": n * row_bytes for n in (4,)}
    else:
        sizes = {"256 MiB": GIB // 4, "1 GiB": GIB, "4 GiB": 4 * GIB}
        sizes |= {f"{n} rows": n * row_bytes for n in CHUNK_ROWS if n < rows}
    return sizes | {"one chunk": rows * row_bytes, "default": None}


def ours(plan: Plan) -> Iterator[Row]:
    """`linear_policy_loss` by workspace beside its three bare products, in the same rounds; and the memory it adds."""
    for shape in shapes(plan):
        for shares in (ALL, MIXED):
            problem = batch(plan, shape, shares)
            calls = {name: loss_call(problem, size) for name, size in workspaces(problem, plan).items()}
            yield from beside_products(plan, shape, problem, calls, peak=shares is ALL)
            del problem, calls
            free_memory(plan.device)


def by_count(shape: dict[str, int], op: str, ending: str) -> float | None:
    """Milliseconds that `python -m bench count --update` expected of the default, the prediction that a measurement
    stands beside; None where nothing was counted."""
    if not COUNTED.exists():
        return None
    for line in json.loads(COUNTED.read_text(encoding="utf-8"))["ops"]:
        if line["op"] == op and line["shape"] == shape and line["case"].endswith(ending):
            return float(1e3 * line["seconds"])
    return None


def beside_products(
    plan: Plan, shape: dict[str, int], problem: Problem, calls: dict[str, Call], peak: bool
) -> Iterator[Row]:
    share = round(problem.index.numel() / problem.kind.numel(), 2)
    timings = timed(plan, {"bare products": bare_products(3, None)(problem.active()), **calls}, rounds=7, budget=0.7)
    bare = timings["bare products"]
    for name, timing in timings.items():
        ratios = sorted(a / b for a, b in zip(bare.samples, timing.samples, strict=False))
        row = {**shape, "active": share, "workspace": name, **milliseconds(timing)}
        row["share"] = quantile(ratios, 0.5) if ratios else None
        if name in ("default", "no table"):
            everything = problem.index.numel() == problem.kind.numel()
            row["by_count_ms"] = by_count(shape, "linear_policy_loss", ", all active" if everything else " % active")
        if peak and name in calls and plan.device.type == "cuda" and timing.median is not None:
            row["added_gib"] = allocator_peak(calls[name], plan.device) / GIB
        yield row


def statistics(plan: Plan) -> Iterator[Row]:
    """`linear_logprob` without a gradient by both ways: statistics in a product of our own, and the library's product
    with the row kernel behind it, which a table of choices asks for; beside the bare product."""
    name = torch.cuda.get_device_name() if plan.device.type == "cuda" else "dry run, not a GPU"
    tables: dict[str, Row] = dict(zip(WAYS, ({}, {name: {"product_width": 0}}), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes(plan):
            sizes = (shape["rows"], shape["width"], shape["vocabulary"])
            hidden, weight, target = random_inputs(*sizes, torch.bfloat16, plan.device)
            calls: dict[str, Call] = {"bare product": lambda h=hidden, w=weight: torch.mm(h, w.t())}  # type: ignore[misc]
            for way, content in tables.items():
                path = Path(folder, f"{way}.json")
                path.write_text(json.dumps(content), encoding="utf-8")

                def call(path: Path = path, h: Tensor = hidden, w: Tensor = weight, t: Tensor = target) -> Tensor:
                    with table(path), torch.no_grad():
                        return ops.linear_logprob(h, w, t)[0]

                calls[way] = call
            timings = timed(plan, calls, rounds=7, budget=0.5)
            for way in tables:
                row = {**shape, "way": way, **milliseconds(timings[way])}
                pairs = zip(timings["bare product"].samples, timings[way].samples, strict=False)
                ratios = sorted(bare / whole for bare, whole in pairs)
                row["share"] = quantile(ratios, 0.5) if ratios else None
                if way == "in the product":
                    row["by_count_ms"] = by_count(shape, "linear_logprob", ", no gradient")
                yield row
            del hidden, weight, target, calls, call
            free_memory(plan.device)


# -- the row kernel ----------------------------------------------------------------------------------------------------


def launches(plan: Plan) -> list[tuple[int, int, int]]:
    """Candidates of block, warps, residency, likely ones first: sixteen warps a multiprocessor in 1, 2 or 4 programs,
    and their neighbours."""
    if plan.dry:
        return [(128, 1, 1), (256, 1, 2)]
    return [(16384, 16, 1), (8192, 8, 2), (4096, 4, 4), (8192, 16, 1), (4096, 8, 4), (16384, 32, 1)]


def own_kernels() -> set[str]:
    """Names of the policy losses' Triton kernels."""
    import importlib
    import pkgutil

    import triton

    import stable_rlhf.kernels as package

    names = set()
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("policy"):
            for name, member in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items():
                if isinstance(member, triton.JITFunction) or hasattr(member, "arg_names"):
                    names.add(getattr(member, "__name__", name))
    return names


def kernel_milliseconds(call: Call, device: torch.device, names: set[str], calls: int = 5) -> float:
    """Device time of the kernels of these names, a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
    spent = sum(event.device_time_total for event in seen.key_averages() if event.key in names)
    return spent / 1e3 / calls


def rows(plan: Plan) -> Iterator[Row]:
    """The row kernel with every candidate of its launch: in place of the logits, where the loss from hidden states has
    it (H is small, the products cost little), and from logits to a gradient of its own."""
    names, worked = own_kernels(), 0
    tall = 16 if plan.dry else 8192
    for vocabulary in (264,) if plan.dry else sorted({shape["vocabulary"] for shape in GPU_SHAPES}):
        problem = batch(plan, {"rows": tall, "width": 16 if plan.dry else 64, "vocabulary": vocabulary}, ALL)
        logits = torch.empty(tall, vocabulary, dtype=torch.bfloat16, device=plan.device).normal_()

        def from_logits(problem: Problem = problem, logits: Tensor = logits) -> Tensor | None:
            leaf = logits.detach().requires_grad_()
            ops.policy_loss(
                leaf, problem.target, problem.kind, old_logprob=problem.old_logprob, advantage=problem.advantage
            ).loss.backward()
            return leaf.grad

        calls = {"in place": loss_call(problem, 1 << 40), "from logits": from_logits}
        for launch in launches(plan):
            os.environ["STABLE_RLHF_TRITON_CONFIG"] = ",".join(map(str, launch))
            about = {"vocabulary": vocabulary, "dtype": "bfloat16", "rows": tall,
                     **dict(zip(("block", "warps", "residency"), launch, strict=True))}  # fmt: skip
            try:
                whole = timed(plan, calls, rounds=5, budget=0.3)
                for name, timing in whole.items():
                    row: Row = {**about, "call": name, "whole_ms": timing.median, "failure": timing.failure}
                    if timing.median is not None:
                        row["ms"] = timing.median
                        if plan.device.type == "cuda":
                            alone = kernel_milliseconds(calls[name], plan.device, names)
                            row["ms"] = alone or timing.median  # where the profiler saw none of our kernels
                        # Read once and written once, from the first to the last byte of the logits.
                        row["tb_per_s"] = 2.0 * logits.nbytes / row["ms"] / 1e9
                        worked += 1
                    yield row
            finally:
                del os.environ["STABLE_RLHF_TRITON_CONFIG"]
        del problem, logits, calls
        free_memory(plan.device)
    if not worked:
        raise RuntimeError("no candidate could be launched")


# -- what to tune ------------------------------------------------------------------------------------------------------


def best_chunk_rows(lines: list[Row]) -> int | None:
    """The fewest rows of a chunk whose shares of the floor are within 1 % of the best candidate's (geometric mean over
    shapes and active shares that all candidates have); None where one chunk of everything is the only one that good."""
    by_case: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in lines:
        if row.get("share"):
            case = (row["rows"], row["width"], row["vocabulary"], row["active"])
            by_case.setdefault(case, {})[row["workspace"]] = row["share"]
    candidates = [f"{n} rows" for n in CHUNK_ROWS] + ["one chunk"]
    whole = [case for case in by_case.values() if all(name in case for name in candidates)]
    if not whole:
        return None
    scores = {n: math.exp(sum(math.log(case[n]) for case in whole) / len(whole)) for n in candidates}
    best = max(scores.values())
    return next((n for n in CHUNK_ROWS if scores[f"{n} rows"] >= 0.99 * best), None)


def best_launches(lines: list[Row]) -> list[Row]:
    """The fastest launch of the row kernel in place, by vocabulary and type."""
    fastest: dict[tuple[int, str], Row] = {}
    for row in lines:
        if row.get("ms") and row["call"] == "in place":
            key = (row["vocabulary"], row["dtype"])
            if key not in fastest or row["ms"] < fastest[key]["ms"]:
                fastest[key] = row
    names = ("dtype", "vocabulary", "block", "warps", "residency")
    return [{name: row[name] for name in names} for row in fastest.values()]


def best_width(lines: list[Row]) -> int | None:
    """The widest hidden states up to which statistics were made faster in the product than by rows of logits at every
    shape, 0 where they nowhere were; None where all of them were, or none was measured both ways."""
    by_width: dict[int, list[bool]] = {}
    product, rows = (
        {(r["width"], r["vocabulary"]): r["ms"] for r in lines if r["way"] == way and r.get("ms")} for way in WAYS
    )
    for case in product.keys() & rows.keys():
        by_width.setdefault(case[0], []).append(product[case] < rows[case])
    paid = 0
    for width in sorted(by_width):
        if not all(by_width[width]):
            return paid
        paid = width
    return None


def propose(plan: Plan) -> Iterator[Row]:
    """`tuned.json`: what was fastest here, in the form of the package's own table."""
    records = [json.loads(line) for line in plan.lines.read_text(encoding="utf-8").splitlines()]
    of = {step: [r for r in records if r["event"] == "row" and r["step"] == step] for step in STEPS_READ}
    if not of["facts"] or not any(of[step] for step in STEPS_READ[1:]):
        raise RuntimeError("nothing was measured to choose from")
    about = of["facts"][0]["environment"]
    device = "dry run, not a GPU" if plan.dry else about["gpu"]
    entry: Row = {
        "chunk_rows": best_chunk_rows(of["ours"]), "row_launches": best_launches(of["rows"]),
        "product_width": best_width(of["statistics"]),
        "measured": {"time": about["time"], "commit": about["commit"], "versions": about["versions"]},
    }  # fmt: skip
    path = plan.output / "tuned.json"
    path.write_text(json.dumps({device: entry}, indent=1) + "\n", encoding="utf-8")
    chosen = {name: value for name, value in entry.items() if name != "measured"}
    yield {"file": path.name, "device": device, **chosen}


# -- a profile, and the tools ------------------------------------------------------------------------------------------


def profile(plan: Plan) -> Iterator[Row]:
    """Where one call at the first shape spends its time, by kernel; and how long the device had nothing to do."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    cuda = plan.device.type == "cuda"
    problem = batch(plan, shapes(plan)[0], ALL)
    call = loss_call(problem, None)
    with ops.backend(plan.backend):
        call()
        whole = timed(plan, {"call": call}, rounds=5)["call"]
        with profiling(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
            call()
            if cuda:
                torch.cuda.synchronize(plan.device)
    events = seen.key_averages()

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3

    text = events.table(sort_by="self_device_time_total" if cuda else "self_cpu_time_total", row_limit=40)
    (plan.output / "profile.txt").write_text(text, encoding="utf-8")
    listed = sorted(events, key=spent, reverse=True)
    busy = sum(spent(event) for event in events)
    yield {"kernel": "all", "ms": busy, "whole_ms": whole.median, "calls": sum(event.count for event in events)}
    for event in listed[:12]:
        yield {"kernel": event.key[:90], "ms": spent(event), "calls": event.count}


TOOLS = ("memcheck", "racecheck")
SUMMARIES = ("ERROR SUMMARY", "RACECHECK SUMMARY")


def sanitizer(plan: Plan) -> Iterator[Row]:
    """Every operation once on tiny inputs under tools of compute-sanitizer, side by side, since no time is taken; where
    it is not installed the program runs without."""
    program = [sys.executable, "-m", "bench.gpu.tiny", plan.device.type]
    path = shutil.which("compute-sanitizer") if plan.device.type == "cuda" else None
    # Blocks of their own from the driver: inside one of the allocator's, a read beyond the end is none.
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    until = time.time() + min(400.0 if plan.dry else 80.0, plan.left - 3.0)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for name in TOOLS if path else ("nothing",):
            command = [path, "--tool", name, "--error-exitcode", "9", *program] if path else program
            with Path(folder, name).open("wb") as written:
                running.append((name, subprocess.Popen(command, env=variables, stdout=written, stderr=written)))
        failed = []
        for name, process in running:
            try:
                status: int | str = process.wait(max(1.0, until - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = "over time"
            text = Path(folder, name).read_text(encoding="utf-8", errors="replace")
            with (plan.output / "sanitizer.log").open("a", encoding="utf-8") as log:
                log.write(f"== {name}\n{text[-500_000:]}\n")
            told = [line for line in text.splitlines() if any(title in line for title in SUMMARIES)]
            yield {"tool": name if path else "no compute-sanitizer, the program alone", "status": status, "told": told}
            if status:
                failed.append(f"{name}: {status}")
    if failed:
        raise RuntimeError(f"{', '.join(failed)}; see sanitizer.log")


STEPS = (
    Step("facts", facts, 25.0),
    Step("addmm", addmm, 10.0),
    Step("ceilings", ceilings, 35.0),
    Step("ours", ours, 55.0),
    Step("statistics", statistics, 25.0),
    Step("rows", rows, 55.0),
    Step("propose", propose, 5.0),
    Step("profile", profile, 20.0),
    Step("correctness", correctness.work, 45.0),
    Step("sanitizer", sanitizer, 90.0),
)
