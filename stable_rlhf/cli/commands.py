"""The command line: arguments to one call."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stable_rlhf import __version__
from stable_rlhf.cli.usage import USAGE, fail
from stable_rlhf.data.jsonl import read_json, to_json
from stable_rlhf.engine import signals
from stable_rlhf.run.bounds import check
from stable_rlhf.settings.ranges import expand_user
from stable_rlhf.settings.recipe import Recipe, suggestion
from stable_rlhf.settings.stages import SCORER
from stable_rlhf.settings.variants import VARIANTS
from stable_rlhf.show.progress import tolerant_output
from stable_rlhf.system import extras

if TYPE_CHECKING:
    from stable_rlhf.run.dependencies import StageKind

# Before torch loads OpenMP: threads that wait should sleep, not spin. Beside other work on the same cores spinning made
# small steps ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# What gloo and NCCL say to a rank whose peer is gone.
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``stable-rlhf``."""
    with signals.ended_by_one_line():
        _main(argv)


def _main(argv: Sequence[str] | None) -> None:
    tolerant_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    while arguments and arguments[0].startswith("--local_rank"):
        arguments.pop(0)  # the deepspeed launcher puts it first
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        print(__version__)
        return
    if command == "env":
        return _print_environment()
    if command not in _COMMANDS:
        fail(
            f"unknown command {command!r}" + suggestion([command], [*_COMMANDS, "env"]), hint="see `stable-rlhf --help`"
        )
    try:  # at once, not after hours of a run; selection works without DeepSpeed
        extras.require(command, *(name for name in extras.TRAIN if (command, name) != ("select", "deepspeed")))
    except extras.MissingExtra as error:
        fail(str(error))
    from stable_rlhf.cli.arguments import parse

    recipe, own = parse(command, rest)
    try:
        check(recipe)
        signals.set_limits(recipe.checkpoint.grace_seconds)
        _COMMANDS[command](recipe, own)
    except Exception as error:
        if watchdog := sys.modules.get("stable_rlhf.engine.watchdog"):  # not imported for an error's sake
            watchdog.wait_for_the_end()
        if os.environ.get("STABLE_RLHF_DEBUG") == "1":
            raise
        from safetensors import SafetensorError

        if "No space left" in str(error):
            hint = "with space made there, the same command goes on from the last checkpoint"
            fail(f"{error}; output_dir is {recipe.output_dir!r}", hint=hint)
        if isinstance(error, ModuleNotFoundError):
            fail(extras.explained(error, command), hint="STABLE_RLHF_DEBUG=1 shows where it came from")
        if isinstance(error, signals.StoppedByCallback):
            fail(str(error), hint="the same command goes on from there")
        if isinstance(error, (ValueError, OSError, ImportError, ArithmeticError, SafetensorError)):
            fail(str(error), hint="STABLE_RLHF_DEBUG=1 shows where it came from")
        from stable_rlhf.ranks import is_lost_rank

        if is_lost_rank(error):
            if number := signals.received():  # so has the other one, and it was quicker
                raise signals.Stopped(number) from None
            fail("another rank has ended, so this one cannot go on; what it said, or the launcher, tells why",
                 hint="the same command goes on from the last checkpoint")  # fmt: skip
        _unexpected(error, Path(recipe.output_dir))


def _unexpected(error: Exception, output_dir: Path) -> NoReturn:
    """Not a mistake in the input that anybody thought of: keep the traceback beside the run."""
    if not output_dir.is_dir():
        raise error
    path = output_dir / f"error-{os.environ.get('RANK', '0')}.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except OSError:  # a full disk, most likely, and perhaps what the error is about
        raise error from None
    fail(f"{type(error).__name__}: {error}", hint=f"this was not foreseen; the traceback is in {path}")


def _run(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.engine.process import finish
    from stable_rlhf.evaluate.report import summary_table
    from stable_rlhf.run.recipe import run_recipe
    from stable_rlhf.show.progress import console, is_main_process

    summary = run_recipe(recipe)
    finish()
    if is_main_process():
        console(width=None if sys.stdout.isatty() else 140).print(summary_table(summary))
        print(_time_taken(summary["stages"]))
        print(f"report: {Path(recipe.output_dir) / 'report.html'}")


def _time_taken(stages: Sequence[dict[str, Any]]) -> str:
    """What was done now, and what earlier calls had done."""
    now, before = ([s for s in stages if s["skipped"] is skipped] for skipped in (False, True))
    parts = [f"{len(now)} stages took {sum(s['seconds'] for s in now):.0f} s"] if now else []
    if before:
        parts.append(f"{len(before)} stages had been finished before, in {sum(s['seconds'] for s in before):.0f} s")
    return "; ".join(parts)


def _policy(recipe: Recipe) -> str:
    if recipe.model_name_or_path is None:
        raise ValueError("--model_name_or_path: name the policy (hub name, folder or GGUF file)")
    return recipe.model_name_or_path


def _single(name: str, kind: StageKind, recipe: Recipe, inputs: dict[str, Any], run: Callable[[Path], Any]) -> None:
    """Run one stage in its own output folder and print its result. ``inputs``: what the result depends on beside the
    kind's settings; only if all that is the same, a finished stage is found again."""
    from stable_rlhf.engine.process import finish, start
    from stable_rlhf.engine.run_folder import RunDirectory
    from stable_rlhf.rehearsal.store import join_ranks
    from stable_rlhf.run.dependencies import Dependencies
    from stable_rlhf.show.progress import is_main_process

    if kind.policy:
        start(recipe.seed)
    else:
        join_ranks()
    settings = Dependencies(recipe, alone=True).of(kind, **inputs)
    stage = RunDirectory(recipe.output_dir, recipe.checkpoint).stage(name, settings, run)
    finish()
    if is_main_process():
        result = {k: v for k, v in stage.result.items() if k != "curve"}
        print(to_json({"stage": name, "folder": str(stage.folder), **result}, indent=1))


def _sft(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.run.dependencies import SFT
    from stable_rlhf.run.stages import run_sft

    _single(SFT.name, SFT, recipe, {}, partial(run_sft, recipe, _policy(recipe)))


def _train_scorer(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.run.dependencies import SCORER, shifted_responses
    from stable_rlhf.run.stages import run_scorer

    backbone = recipe.scorer_model_name_or_path or _policy(recipe)
    inputs = {"objective": own.objective, "policy": own.policy, **shifted_responses(recipe)}
    run = partial(run_scorer, recipe, own.objective, backbone, own.policy)
    _single(SCORER.named(own.objective), SCORER, recipe, inputs, run)


def _strength(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.engine.process import finish, start
    from stable_rlhf.engine.run_folder import RunDirectory
    from stable_rlhf.run.dependencies import STRENGTH, Dependencies
    from stable_rlhf.run.strength import measure_strength
    from stable_rlhf.scorer.report import in_words, notable_tables
    from stable_rlhf.show.progress import console, is_main_process, printable

    backbone = recipe.scorer_model_name_or_path or _policy(recipe)
    start(recipe.seed)
    settings = Dependencies(recipe, alone=True).of(STRENGTH)
    stage = measure_strength(recipe, RunDirectory(recipe.output_dir, recipe.checkpoint), backbone, settings)
    finish()
    if is_main_process():
        summary = read_json(stage.folder / "strength.json")
        screen = console(width=None if sys.stdout.isatty() else 140)
        for table in notable_tables(summary):
            screen.print(table)
        print(printable("\n".join(in_words(summary))))
        print(f"to read: {stage.folder / 'report.html'}; to train on: --data.pairs {stage.folder / 'pairs.jsonl.gz'}")


def _files(recipe: Recipe, flag: str, given: Sequence[str] | None) -> list[str]:
    from stable_rlhf.cli.arguments import items
    from stable_rlhf.data.tables import is_hub_name
    from stable_rlhf.run.datasets import locate

    files = [expand_user(name) for name in items(flag, given)]
    missing = [str(path) for path in locate(recipe.data, files) if not (is_hub_name(path) or path.exists())]
    if missing:
        raise ValueError(f"{missing[0]}: no such file{_hint(given)}")
    return files


def _named(flag: str, given: Sequence[str] | None) -> dict[str, str]:
    """NAME=FOLDER items by name."""
    from stable_rlhf.cli.arguments import items

    named: dict[str, str] = {}
    for item in items(flag, given):
        name, equals, folder = item.partition("=")
        if not equals or not name or not folder:
            example = f"as in {flag} am=runs/am other=runs/other"
            raise ValueError(f"{flag}: {item!r} is not NAME=FOLDER, {example}{_hint(given)}")
        if name in named:
            raise ValueError(f"{flag}: the name {name!r} is given twice")
        named[name] = expand_user(folder)
    return named


def _hint(given: Sequence[str] | None) -> str:
    """How to write a name with a comma, when one was given."""
    comma = next((part for part in given or () if "," in part and not part.lstrip().startswith("[")), "")
    return f"; commas divide names: one that holds them stands in a list, '{json.dumps([comma])}'" if comma else ""


def _select(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.run.datasets import digests
    from stable_rlhf.run.dependencies import SELECTION, SELECTION_OF_FILES
    from stable_rlhf.run.stages import run_select, run_select_file

    if (own.scorer is None) == (own.candidates is None):
        raise ValueError("select: give either --scorer (and a policy to answer --data.prompts) or --candidates FILE")
    if own.candidates is not None:
        files = _files(recipe, "--candidates", own.candidates)
        kind, candidates = SELECTION_OF_FILES, {"candidates": digests(recipe.data, files)}
        return _single(kind.name, kind, recipe, candidates, partial(run_select_file, recipe, files))
    run = partial(run_select, recipe, _policy(recipe), own.scorer)
    _single(SELECTION.name, SELECTION, recipe, {"scorer_folder": own.scorer}, run)


def _train_ppo(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.run.dependencies import PPO
    from stable_rlhf.run.stages import run_ppo

    policy = _policy(recipe)
    rehearsal = Path(own.rehearsal) if own.rehearsal else None
    variant = VARIANTS[own.variant]
    if variant.rehearsal and rehearsal is None:
        raise ValueError(
            f"--variant {variant.name} needs --rehearsal, the rehearsal.jsonl.gz that `stable-rlhf select` wrote"
        )
    if rehearsal is not None and not variant.rehearsal:
        raise ValueError(f"--rehearsal: --variant {variant.name} does not rehearse, {variant.name}-sr does")
    if (own.scorer is None) == (SCORER in recipe.rewards.functions):
        words = "has" if own.scorer is None else "does not have"
        raise ValueError(f"--scorer: give it where rewards.functions has {SCORER!r}, and else not; it {words} it")
    inputs = {"variant": variant.name, "scorer_folder": own.scorer, "rehearsal": own.rehearsal}
    run = partial(run_ppo, recipe, variant, policy, own.scorer, rehearsal)
    _single(PPO.named(variant.name), PPO, recipe, inputs, run)


def _evaluate(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.run.datasets import digests
    from stable_rlhf.run.dependencies import EVALUATION
    from stable_rlhf.run.summary import evaluate_models

    policies, scorers = _named("--policies", own.policies), _named("--scorers", own.scorers)
    if not policies and not scorers:
        raise ValueError("evaluate: give --scorers NAME=FOLDER, --policies NAME=FOLDER, or both")
    test_pairs = _files(recipe, "--test_pairs", own.test_pairs)
    if test_pairs and not scorers:
        raise ValueError("--test_pairs are for scorers: give --scorers NAME=FOLDER as well")
    if own.judge_scorer is not None and not (policies and recipe.evaluate.judge == "scorer"):
        raise ValueError(
            "--judge_scorer compares policies where evaluate.judge is 'scorer': leave it out, or set these"
        )
    benchmark = _benchmark(recipe, own, bool(scorers), bool(test_pairs))
    baseline = _policy(recipe) if policies else None
    inputs: dict[str, Any] = {
        **{f"scorers.{name}": folder for name, folder in scorers.items()},
        **{f"policies.{name}": folder for name, folder in policies.items()},
        "judge_scorer": own.judge_scorer,
        "test_pairs": digests(recipe.data, test_pairs),
    }
    if benchmark is not None:
        name, source = benchmark
        inputs["benchmark"] = [name, source, *digests(recipe.data, [source] if source else []).values()]
    run = partial(evaluate_models, recipe, baseline, policies, scorers, test_pairs, own.judge_scorer, benchmark)
    _single(EVALUATION.name, EVALUATION, recipe, inputs, run)


def _benchmark(
    recipe: Recipe, own: argparse.Namespace, scorers: bool, test_pairs: bool
) -> tuple[str, str | None] | None:
    """Which benchmark, and the file (as a path) or the hub's data set that it is read from."""
    from stable_rlhf.run.datasets import locate

    if own.benchmark is None:
        if own.benchmark_data is not None:
            raise ValueError("--benchmark_data says where a benchmark is: give --benchmark rewardbench or rewardbench2")
        return None
    if not scorers or test_pairs:
        what = "is measured in place of --test_pairs: leave one out" if test_pairs else "is for scorers: give --scorers"
        raise ValueError(f"--benchmark {what}")
    source = own.benchmark_data
    if source is not None and source.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        source = str(locate(recipe.data, [source])[0])
        if not Path(source).is_file():
            raise ValueError(f"--benchmark_data: {source}: no such file")
    return own.benchmark, source


def _export(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.run.export import export_scorer

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("export is the work of one process: call it without a launcher")
    print(to_json(export_scorer(own.scorer, recipe.output_dir), indent=1))


def _study(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.run.seeds import run_study
    from stable_rlhf.show.progress import printable

    print(printable(run_study(recipe, validation=own.validation)))


def _launch(recipe: Recipe, own: argparse.Namespace) -> None:
    """Several processes: say what would run, write a batch script, or run it."""
    from stable_rlhf.launch import torchrun as launch

    given = [a for a in own.given if a.split("=")[0] in ("--launch.nodes", "--launch.rendezvous")]
    if own.hostfile and (given or own.slurm):
        raise ValueError(f"--hostfile names the nodes: leave out {(given or ['--slurm'])[0].replace('launch.', '')}")
    plan = launch.make_plan(recipe, _forwarded(own.given), own.hostfile)
    if own.slurm and not own.dry_run:
        return launch.write_slurm(recipe, plan, own.slurm)
    if own.slurm:
        print(launch.slurm_script(recipe, plan))
    raise SystemExit(launch.dry_run(recipe, plan) if own.dry_run else launch.run(plan))


def _forwarded(given: Sequence[str]) -> list[str]:
    """Arguments of ``run``: the recipe, and its settings but those of ``launch``."""
    of_run: list[str] = []
    arguments = iter(given[1:])  # the first is --config
    for argument in arguments:
        if not argument.startswith("--launch."):
            of_run.append(argument)
        elif "=" not in argument:
            next(arguments)
    return of_run


def _print_environment() -> None:
    from stable_rlhf.cli.environment import report

    print(report())


_COMMANDS = {
    "quickstart": _run, "run": _run, "launch": _launch, "study": _study, "sft": _sft, "strength": _strength,
    "train-scorer": _train_scorer, "select": _select, "train-ppo": _train_ppo, "evaluate": _evaluate,
    "export": _export,
}  # fmt: skip
