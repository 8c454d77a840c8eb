"""The small operations (GAE, whitening, token rewards, selection) beside loops, libraries and the bytes they move.

Every contender's output is compared with the reference before anything is timed. Contenders take turns; the median
over the rounds counts. The floor of a case is the time of moving its bytes once (inputs read, outputs written) at the
rate of a copy measured in the same rounds: nothing that reads its inputs from memory can be faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import MIB, ROOT, Step, Timing, describe, environment, measure, new_result, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stable_rlhf.ops as ops

OURS, COPY = "stable_rlhf", "copy"


@dataclass
class Case:
    """One operation on one set of inputs.

    Args:
        steps: contenders by name, each makes its result from nothing; `stable_rlhf` is among them.
        moved: bytes that any implementation has to read and write.
        absent: contenders that this machine lacks, and why.
        tolerance: how far, relative to the largest number, an output may lie from the first contender's.
    """

    title: str
    steps: dict[str, Step]
    moved: int
    absent: dict[str, str] = field(default_factory=dict)
    tolerance: float = 1e-5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python bench/small_ops.py                                the sizes of the published figures, about two minutes
  python bench/small_ops.py --quick                        a look that everything works, some seconds
  python bench/small_ops.py --only gae topk --rounds 30    two operations, more rounds on a noisy machine
  python bench/small_ops.py --sequences 64 --length 8192   few long sequences instead of many short ones
pandas is optional (pip install pandas): without it its lines say so.""",
    )
    parser.add_argument("--only", nargs="+", choices=sorted(OPERATIONS), help="these operations instead of all")
    parser.add_argument("--sequences", type=int, default=4096, help="packed sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default %(default)s)")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows to select from (default %(default)s)")
    parser.add_argument("--clusters", type=int, default=1000, help="clusters of these rows (default %(default)s)")
    parser.add_argument("--keep", type=int, default=100, help="rows kept of each cluster (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a hundredth of every size, three rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch, ours and the copy's (default: PyTorch's own)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed calls before them (default %(default)s)")
    parser.add_argument("--limit", type=float, default=60.0, help="drop what takes longer, seconds a call")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for one contender (three rounds at least)")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "bench" / "results", help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sequences, arguments.rounds = max(1, arguments.sequences // 100), 3
        arguments.rows, arguments.clusters = arguments.rows // 100, max(1, arguments.clusters // 100)
    return arguments


# -- the operations ----------------------------------------------------------------------------------------------------


def packed(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tensors [T], scores [S] and cu_seqlens of equal sequences, so that padded peers lose nothing to padding."""
    g = torch.Generator().manual_seed(0)
    tokens = arguments.sequences * arguments.length
    made = torch.randn(tokens, generator=g), torch.randn(tokens, generator=g), torch.randn(arguments.sequences)
    limits = torch.arange(0, tokens + 1, arguments.length)
    return tuple(x.to(arguments.device) for x in (*made, limits))  # type: ignore[return-value]


def loop_over_tokens(reward: Tensor, value: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The usual loop on padded [S, L]."""
    advantage = torch.empty_like(reward)
    running = next_value = torch.zeros_like(reward[:, 0])
    for t in range(reward.shape[1] - 1, -1, -1):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        running = delta + gamma * lam * running
        advantage[:, t], next_value = running, value[:, t]
    return advantage, advantage + value


def reversed_list(reward: Tensor, value: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """As in TRL's PPOTrainer: a list of columns, reversed and stacked."""
    last, columns, length = 0, [], reward.shape[1]
    for t in reversed(range(length)):
        next_values = value[:, t + 1] if t < length - 1 else 0.0
        delta = reward[:, t] + gamma * next_values - value[:, t]
        last = delta + gamma * lam * last
        columns.append(last)
    advantage = torch.stack(columns[::-1], dim=1)
    return advantage, advantage + value


def gae_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    reward, value, _, limits = packed(arguments)
    shape, gamma, lam = (arguments.sequences, arguments.length), 0.99, 0.95
    wide = reward.view(shape), value.view(shape)

    def flat(made: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.reshape(-1) for x in made)

    yield Case(
        f"gae, {shape[0]:,} sequences of {shape[1]:,} tokens",
        {
            "loop over tokens": lambda: flat(loop_over_tokens(*wide, gamma, lam)),
            "TRL's reversed list": lambda: flat(reversed_list(*wide, gamma, lam)),
            "torch reference": reference(lambda: ops.gae(reward, value, limits, gamma=gamma, lam=lam)),
            OURS: lambda: ops.gae(reward, value, limits, gamma=gamma, lam=lam),
        },
        moved=4 * reward.nbytes,
    )


def rewards_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    logprob, apart, score, limits = packed(arguments)
    ref_logprob = logprob - 0.3 * apart

    def plain(estimator: str) -> Tensor:
        d = (logprob - ref_logprob).clamp(-20.0, 20.0)
        kl = {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()
        reward = -0.1 * kl
        reward[limits[1:] - 1] += score
        return reward

    for estimator in ("k1", "k3"):

        def ours(estimator: str = estimator) -> Tensor:
            return ops.token_rewards(logprob, ref_logprob, score, limits, kl_coef=0.1, kl_estimator=estimator)

        yield Case(
            f"token_rewards {estimator}, {logprob.numel():,} tokens",
            {
                "plain PyTorch, no checks": lambda estimator=estimator: plain(estimator),  # type: ignore[misc]
                "torch reference": reference(ours),
                OURS: ours,
            },
            moved=3 * logprob.nbytes,
        )


def whiten_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    x, choice, _, _ = packed(arguments)
    mask = choice < 0.8

    def plain() -> Tensor:
        weight = mask.to(x.dtype)
        count = weight.sum()
        mean = (x * weight).sum() / count
        variance = ((x - mean).square() * weight).sum() / count
        return (x - mean) * torch.rsqrt(variance + 1e-8) * weight

    yield Case(
        f"masked_whiten, {x.numel():,} tokens",
        {
            "plain PyTorch in float32, no checks": plain,
            "torch reference in float64": reference(lambda: ops.masked_whiten(x, mask)),
            OURS: lambda: ops.masked_whiten(x, mask),
        },
        moved=2 * x.nbytes + mask.nbytes,
        tolerance=1e-4,  # the plain one's float32 sums
    )


def topk_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    import numpy as np

    g = torch.Generator().manual_seed(0)
    n, clusters, k = arguments.rows, arguments.clusters, arguments.keep
    score = torch.randn(n, generator=g).to(arguments.device)
    cluster = torch.randint(0, clusters, (n,), generator=g).to(arguments.device)
    scores, labels = score.cpu().numpy(), cluster.cpu().numpy()

    def lexsort() -> Any:
        order = np.lexsort((-scores, labels))  # stable: ties by index
        sizes = np.bincount(labels, minlength=clusters)
        starts = np.cumsum(sizes) - sizes
        return np.sort(order[np.arange(n) - np.repeat(starts, sizes) < k])

    def ours() -> Tensor:
        return ops.topk_by_cluster(score, cluster, clusters, k)

    steps: dict[str, Step] = {"numpy lexsort": lexsort, "torch reference": reference(ours), OURS: ours}
    absent = {}
    if importlib.util.find_spec("pandas") is not None:
        import pandas as pd

        frame = pd.DataFrame({"score": scores, "cluster": labels})
        steps["pandas groupby-nlargest"] = lambda: np.sort(
            frame.groupby("cluster")["score"].nlargest(k).index.get_level_values(1).to_numpy()
        )
    else:
        absent["pandas groupby-nlargest"] = "pandas is not installed"
    yield Case(f"topk, {n:,} rows, {clusters:,} clusters, k {k}", steps, score.nbytes + cluster.nbytes, absent, 0.0)


# Where another operation's cases are added: a name, and a function that makes them from the arguments.
OPERATIONS: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
    "gae": gae_cases,
    "token_rewards": rewards_cases,
    "masked_whiten": whiten_cases,
    "topk": topk_cases,
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def reference(step: Step) -> Step:
    """`step` on the plain PyTorch reference."""

    def run() -> Any:
        with ops.backend("torch"):
            return step()

    return run


def copy_step(size: int, device: torch.device) -> Step:
    """Moves `size` bytes, half read and half written, into memory that is there already."""
    source = torch.zeros(max(1, size // 2), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def differences(case: Case) -> dict[str, str]:
    """What is wrong with a contender, by name."""

    def outputs(step: Step) -> list[Tensor]:
        made = step()
        return [torch.as_tensor(x).cpu().double() for x in (made if isinstance(made, tuple) else (made,))]

    wrong, want = {}, None
    for name, step in case.steps.items():
        try:
            got = outputs(step)
        except Exception as error:
            wrong[name] = describe(error)
            continue
        want = want or got
        for x, y in zip(got, want, strict=True):
            if x.shape != y.shape:
                wrong[name] = f"{x.numel():,} results instead of {y.numel():,}"
            elif x.numel() and float((x - y).abs().max()) > case.tolerance * max(1.0, float(y.abs().max())):
                wrong[name] = f"off by {float((x - y).abs().max()):.1e}"
    return wrong


def run(case: Case, arguments: argparse.Namespace, log: Console) -> dict[str, Any]:
    device = torch.device(arguments.device)
    log.log(case.title)
    wrong = differences(case)
    steps = {name: step for name, step in case.steps.items() if name not in wrong}
    timings = measure(
        {**steps, COPY: copy_step(case.moved, device)}, device, rounds=arguments.rounds, warmup=arguments.warmup,
        limit=arguments.limit, budget=arguments.budget, report=lambda text: log.log(f"  {text}"),
    )  # fmt: skip
    for name, why in {**wrong, **case.absent}.items():
        timings[name] = Timing(failure=f"WRONG: {why}" if name in wrong else why)
    own, floor = timings[OURS].median if OURS in timings else None, timings[COPY].median
    results = []
    for name, timing in timings.items():
        found = {"name": name, **timing.record()}
        if timing.median is not None and own and floor:
            found |= {"times_ours": timing.median / own, "times_floor": timing.median / floor}
        results.append(found)
    return {"title": case.title, "moved_mib": case.moved / MIB, "results": results}


def table(record: dict[str, Any]) -> Table:
    made = Table(title="median over rounds; floor: a copy that moves as many bytes")
    made.add_column("case, contender")
    for name in ("median ms", "min ms", "spread", "× ours", "× floor"):
        made.add_column(name, justify="right")
    made.add_column("remarks")
    for case in record["cases"]:
        made.add_section()
        made.add_row(f"[bold]{case['title']}[/], {case['moved_mib']:,.0f} MiB", *[""] * 6)
        for result in sorted(case["results"], key=lambda r: r.get("median_ms") or float("inf")):
            if "failure" in result:
                made.add_row("  " + result["name"], *["–"] * 5, result["failure"])
                continue
            spread = "–" if result["spread"] is None else f"{result['spread']:.0%}"
            ratios = (f"{result[key]:,.2f}" if key in result else "–" for key in ("times_ours", "times_floor"))
            numbers = (f"{result['median_ms']:,.3f}", f"{result['min_ms']:,.3f}", spread, *ratios)
            style = {OURS: "green", COPY: "cyan"}.get(result["name"])
            made.add_row("  " + result["name"], *numbers, "", style=style)
    return made


def main() -> int:
    arguments, log, console = parse(), Console(stderr=True), Console()
    if console.width < 120 and not console.is_terminal:
        console = Console(width=150)  # a log file has no width of its own
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    record: dict[str, Any] = {"environment": environment(device), "settings": settings, "cases": []}
    path = new_result(arguments.output_dir, f"small_ops-{device.type}")
    for name in arguments.only or OPERATIONS:
        for case in OPERATIONS[name](arguments):
            record["cases"].append(run(case, arguments, log))
            write_json(record, path)
    console.print(table(record))
    console.print(f"written to {path}", soft_wrap=True)
    own = [r for case in record["cases"] for r in case["results"] if r["name"] == OURS]
    return 1 if any("failure" in result for result in own) else 0


if __name__ == "__main__":
    sys.exit(main())
