"""Run 2: ours as tuned, beside peers at the shapes that people ask about, the other operations, a whole update."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import stable_rlhf.ops as ops
from bench.case import OURS, Case, Line, Settings
from bench.common import free_memory
from bench.gpu.plan import Plan, Row, Step, table
from bench.gpu.run1 import ALL, MIXED, batch, beside_products, facts, loss_call, milliseconds, shapes, timed
from bench.presets import GPU_SHAPES
from bench.run import run_case
from stable_rlhf.kernels.tuning import TABLE

# What users of TRL ask for (its issue 7244): Qwen3's vocabulary, 8,192 tokens.
ASKED = {"rows": 8192, "width": 4096, "vocabulary": 151_936}
PEERS = ("plain PyTorch", "cut-cross-entropy", "Liger GRPO")


def tuned(plan: Plan) -> Iterator[Row]:
    """Defaults without any table, beside the given table, or the package's own."""
    empty = plan.output / "no-choices.json"
    empty.write_text("{}\n", encoding="utf-8")
    try:
        for shape in shapes(plan):
            for shares in (ALL, MIXED):
                problem = batch(plan, shape, shares)
                call = loss_call(problem, None)

                def under(path: Path, call: Any = call) -> Callable[[], Any]:
                    def run() -> Any:
                        with table(path):
                            return call()

                    return run

                calls = {"no table": under(empty), "tuned": under(plan.tuned or TABLE)}
                yield from beside_products(plan, shape, problem, calls, peak=shares is ALL)
                del problem, call, calls
                free_memory(plan.device)
    finally:
        empty.unlink()


def settings(plan: Plan, peers: tuple[str, ...] | None, rounds: int = 7, budget: float = 1.0) -> Settings:
    dry = {"rounds": 3, "backends": ("triton",), "memory": False} if plan.dry else {}
    base = Settings(
        device=plan.device.type, rounds=rounds, limit=20.0, budget=budget, peers=peers, as_called=False, memory=True
    )
    return replace(base, **dry)  # type: ignore[arg-type]


def lines(plan: Plan, cases: list[Case], given: Settings) -> Iterator[Row]:
    """Lines of the benchmark suite, one a contender, case by case."""
    for case in cases:
        case = case.tiny() if plan.dry else case
        case_lines: list[Line] = run_case(case, given, lambda text: print(text, file=sys.stderr, flush=True))
        yield from (line for line in case_lines if line["status"] != "absent" or line["role"] == "ours")
        failed = [line for line in case_lines if line["role"] == "ours" and line["status"] == "failed"]
        if failed:
            raise RuntimeError(f"{failed[0]['case']}: {failed[0].get('failure')}")


def policy(shape: dict[str, int]) -> Case:
    return Case("policy", shape, "bfloat16", "gpu", memory=True)


def peers(plan: Plan) -> Iterator[Row]:
    wanted = ("plain PyTorch",) if plan.dry else PEERS
    yield from lines(plan, [policy(GPU_SHAPES[1]), policy(ASKED)], settings(plan, wanted))


def compiled(plan: Plan) -> Iterator[Row]:
    """One shape: each takes the compiler most of a minute."""
    wanted = ("plain PyTorch",) if plan.dry else ("torch.compile",)  # compiled for a CPU there is nothing to rehearse
    yield from lines(plan, [policy(GPU_SHAPES[1])], settings(plan, wanted))


def small(plan: Plan) -> Iterator[Row]:
    cases = [Case("logprob", GPU_SHAPES[1], "bfloat16", "gpu")]
    cases += [Case("logits", {"rows": 8192, "vocabulary": v}, "bfloat16", "gpu") for v in (151_936, 250_880)]
    cases += [
        Case("advantage", {"pairs": 512, "alternates": 4, "length": 512}, study="gpu"),
        Case("advantage", {"pairs": 2048, "alternates": 0, "expected": 1}, study="gpu"),
        Case("gae", {"sequences": 4096, "length": 1024}, study="gpu"),
        Case("topk", {"rows": 10_000_000, "clusters": 1000, "keep": 100}, study="gpu"),
    ]
    yield from lines(plan, cases[:-1], settings(plan, ()))
    yield from replayed(plan)
    yield from lines(plan, cases[-1:], settings(plan, ()))


def replayed(plan: Plan) -> Iterator[Row]:
    """`gae` once more as a graph that is replayed: what is left without the host's share."""
    sequences, length = (8, 16) if plan.dry else (4096, 1024)
    reward, value = (torch.randn(sequences * length, device=plan.device) for _ in range(2))
    limits = torch.arange(0, sequences * length + 1, length, device=plan.device)

    def call() -> Any:
        return ops.gae(reward, value, limits, gamma=0.99, lam=0.95)

    step: Callable[[], Any] = call
    if plan.device.type == "cuda":
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        step = graph.replay
    times = milliseconds(timed(plan, {"graph": step}, rounds=20)["graph"])
    seconds = None if times["ms"] is None else times["ms"] / 1e3
    shape = {"sequences": sequences, "length": length}
    yield {"op": "gae", "peer": f"{OURS}, replayed graph", "role": "ours", "shape": shape, "median_s": seconds,
           "failure": times.get("failure"), "status": "ok" if seconds else "failed"}  # fmt: skip
    if plan.device.type == "cuda":
        del kept


def kmeans(plan: Plan) -> Iterator[Row]:
    cases = [
        Case("kmeans", {"rows": 1_000_000, "width": 768, "clusters": c, "iterations": 20}, study="gpu")
        for c in (100, 1000, 4096)
    ]
    yield from lines(plan, cases[:1] if plan.dry else cases, settings(plan, ("faiss", "flash-kmeans"), rounds=3))


def update(plan: Plan) -> Iterator[Row]:
    """1.4 billion weights, drawn on the card; half of the tokens active, a tenth of those rehearsal."""
    shape = {"model": "llama", "width": 2048, "layers": 16, "vocabulary": 151_936, "batch": 8, "length": 1024}
    case = Case("ppo-update", {**shape, "active": 0.5, "rehearsal": 0.1}, "bfloat16", "gpu")
    yield from lines(plan, [case], settings(plan, ("plain PyTorch",), rounds=5))


def tests(plan: Plan) -> Iterator[Row]:
    """Tests marked gpu, as far as the time goes; in a dry run one test of interpreted kernels stands for them."""
    root = Path(os.environ.get("BENCH_ROOT", Path.cwd()))
    chosen = ["-m", "gpu", "tests/ops"]
    if plan.dry:
        chosen = ["-k", "test_gae and here", "tests/ops/test_sequence_triton.py"]
    command = [sys.executable, "-m", "pytest", *chosen, "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    if not plan.dry:
        command.remove("-x")
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode:
        command = command[:-2]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, encoding="utf-8", timeout=max(10.0, plan.left - 8.0)
        )
        out, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        out, status = (error.stdout or b"").decode(), -1
    print(out, file=sys.stderr)
    told = [line for line in out.splitlines() if line.strip()][-1:] or ["nothing"]
    yield {"status": "over time" if status == -1 else status, "told": told[0]}
    if status > 0:
        raise RuntimeError(f"pytest: {told[0]}")


STEPS = (
    Step("facts", facts, 25.0),
    Step("tuned", tuned, 35.0),
    Step("peers", peers, 60.0),
    Step("small", small, 60.0),
    Step("kmeans", kmeans, 60.0),
    Step("update", update, 45.0),
    Step("compiled", compiled, 60.0),
    Step("tests", tests, 120.0),
)
