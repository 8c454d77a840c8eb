"""The command line: arguments to one call."""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from stable_rlhf import __version__
from stable_rlhf.train.config import VARIANTS, LaunchArguments, Recipe, check

# Before torch loads OpenMP: threads that wait should sleep, not spin. Beside other work on the same cores spinning made
# small steps ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

USAGE = """\
usage: stable-rlhf COMMAND [options]

Advantage Model and Selective Rehearsal (arXiv 2309.10202) for RLHF that stays stable.

whole runs
  quickstart     the whole method in a generated skill world: no data, no download, a few minutes
  run RECIPE     every stage of a YAML recipe; finished stages are not redone
  launch RECIPE  `run` on several devices or nodes; --dry-run: the commands and the memory they need
  study RECIPE   `run` for several seeds, and a comparison with intervals over them; goes on after a kill

single stages
  sft            supervised fine-tuning of a policy
  strength       how sure several reward models are of each preference pair, for reading and for denoising
  train-scorer   reward model or Advantage Model (--objective rm|am)
  select         rehearsal data: embed, cluster, keep the best of each cluster (--scorer DIR, or --candidates FILE)
  train-ppo      one policy (--variant rejection|rm|rm-ma|am|am-sr|am-critic-free)
  evaluate       a report on scorers (accuracy, calibration, tasks) and on policies against SFT (win, lose, tie)

  env            what a bug report needs: versions, devices, kernels, compilers, launcher variables

`stable-rlhf COMMAND --help` lists a command's settings. Every setting of a recipe can be given on the command line:
  stable-rlhf run recipes/smollm2-pairs.yaml --data-dir DIR --ppo.total_steps 10
Several processes (launch writes torchrun's command; deepspeed, torchrun and accelerate launch work as well):
  stable-rlhf launch --dry-run recipes/h100x8-7b.yaml
  stable-rlhf launch --devices-per-node 2 recipes/smollm2-pairs.yaml --data-dir DIR
  stable-rlhf launch --hostfile HOSTS recipes/h100x8-7b.yaml --data-dir DIR
  deepspeed --num_accelerators 2 --module stable_rlhf run recipes/smollm2-pairs.yaml --data-dir DIR
"""

_ALIASES = {"--data_dir": "--data.data_dir", "--on_bad_row": "--data.on_bad_row"} | {
    f"--{name}": f"--launch.{name}" for name in LaunchArguments.__dataclass_fields__
}
_LISTS = {"--variants", "--report_to", "--engine.lora_target_modules"} | {
    f"--data.{name}" for name in ("pairs", "prompts", "demonstrations", "eval_main", "eval_forget", "rehearsal",
                                  "forget_tasks")
}  # fmt: skip
# Flags that only one command has. They are not settings of a recipe, so they have a parser of their own.
_OWN: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "quickstart": [],
    "run": [],
    "launch": [
        ("--hostfile", {"metavar": "FILE", "help": "Nodes, one a line: ADDRESS slots=N (DeepSpeed's form). This "
                        "machine's own addresses are started here, others by ssh."}),
        ("--slurm", {"metavar": "FILE", "help": "Write a batch script for sbatch to FILE and start nothing."}),
        ("--dry_run", {"action": "store_true", "help": "Print each node's exact command and the memory of a device; "
                       "exit status 3, with the shortfall, where it does not fit."}),
    ],
    "study": [
        ("--validation", {"action": "store_true", "help": "Run study.validation_seeds, to choose settings by."}),
    ],
    "sft": [],
    "train-scorer": [
        ("--objective", {"choices": ["am", "rm"], "required": True, "help": "Advantage Model or reward model."}),
        ("--policy", {"help": "The policy to be tuned, for importance weights (Eq. 8)."}),
    ],
    "strength": [],
    "select": [
        ("--scorer", {"help": "Folder that train-scorer wrote: it scores what the policy answers to --data.prompts."}),
        ("--candidates", {"nargs": "+", "action": "extend", "metavar": "FILE",
                          "help": "Answers with a score, in place of --scorer and a policy (docs/data.md)."}),
    ],
    "train-ppo": [
        ("--variant", {"choices": list(VARIANTS), "required": True, "help": "Which policy to train."}),
        ("--scorer", {"required": True, "help": "Folder that train-scorer wrote."}),
        ("--rehearsal", {"help": "rehearsal.jsonl.gz that select wrote (am-sr)."}),
    ],
    "evaluate": [
        ("--scorers", {"nargs": "+", "action": "extend", "metavar": "NAME=FOLDER",
                       "help": "Scorers to measure, each with a name: rm=DIR am=DIR. Without --test_pairs: on the "
                       "held-out pairs that train-scorer scored."}),
        ("--test_pairs", {"nargs": "+", "action": "extend", "metavar": "FILE",
                          "help": "Preference files, every pair of which the scorers are measured on."}),
        ("--policies", {"nargs": "+", "action": "extend", "metavar": "NAME=FOLDER",
                        "help": "Policies to compare with --model_name_or_path, each with a name: am=DIR am-sr=DIR"}),
        ("--judge_scorer", {"help": "Scorer folder that judges."}),
    ],
}  # fmt: skip
_TAKES_RECIPE = ("run", "launch", "study")
# What gloo and NCCL say to a rank whose peer is gone.
_LOST = re.compile(
    r"closed by (remote )?peer|onnection reset|Broken pipe|remote process exited|Socket Timeout|Timed out wait"
)
_TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null",
    "list": "a list, [a, b]", "dict": "a mapping, {a: 1}",
}  # fmt: skip


class _Parser(ArgumentParser):
    """The settings of a recipe as flags, with short help and errors of one line."""

    own: argparse.ArgumentParser
    given: list[str]

    def known(self) -> list[str]:
        actions = [*self._actions, *self.own._actions]
        return [name for action in actions for option in action.option_strings if (name := option.lstrip("-")) != "h"]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(_plain(message, self.given) + self._suggestion(message), hint=f"see `{self.prog} --help`")

    def _suggestion(self, message: str) -> str:
        if "nrecognized" in message:
            return suggestion(re.findall(r"--([\w.\-]+)", message), self.known())
        return ""

    def format_help(self, formatter: Any = None) -> str:
        own = self.own._get_formatter()
        own.start_section("this command")
        own.add_arguments([a for a in self.own._actions if a.option_strings])
        own.end_section()
        section = own.format_help()
        text = super().format_help(formatter).replace("``", "`")
        return text.replace("\noptions:\n", f"\n{section}\noptions:\n", 1) if section else text


class _OwnParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message, hint=f"see `{self.prog} --help`")


def suggestion(unknown: Sequence[str], known: Sequence[str]) -> str:
    """The known name that was probably meant, in words, or nothing."""
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if not near:  # perhaps the right name in the wrong section
            last = {k.rsplit(".", 1)[-1]: k for k in known}
            near = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.6)]
        if near:
            return f"; did you mean {near[0]!r}?"
    return ""


def _plain(message: str, given: Sequence[str]) -> str:
    """jsonargparse's report of a wrong value in one line: which setting, what it takes, what it got."""
    key, value = re.search(r'Parser key "([\w.]+)"', message), re.search(r"(?:Got|Given) value: (.*)", message, re.S)
    wanted = [w for line in message.splitlines() for w in re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", line)]
    if not (key and value and wanted):
        return message.strip()
    words = []
    for kind in wanted:
        if kind.startswith("typing.Literal["):
            words.append("one of " + ", ".join(str(v) for v in ast.literal_eval(kind.removeprefix("typing.Literal"))))
        else:
            name = kind.removeprefix("<class '").removesuffix("'>")
            words.append(_TYPES.get(name, name))
    flag = f"--{key[1]}"
    where = flag if any(g == flag or g.startswith(f"{flag}=") for g in given) else f"setting {key[1]!r} of the recipe"
    return f"{where}: expected {' or '.join(dict.fromkeys(words))}, got {value[1].strip()!r}"


def fail(message: str, *, hint: str = "") -> NoReturn:
    """One clear message on standard error, exit status 2."""
    rank = os.environ.get("RANK", "0")
    print(f"stable-rlhf: error: {message}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
    if hint and rank == "0":
        print(f"  {hint}", file=sys.stderr)
    raise SystemExit(2)


def build_parser(command: str) -> _Parser:
    """The parser of one command: every setting of a recipe, and in ``own`` the command's flags."""
    name = f"stable-rlhf {command}"
    usage = f"{name}{' RECIPE' if command in _TAKES_RECIPE else ''} [options]"
    parser = _Parser(prog=name, usage=usage, description=_describe(command), allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML recipe; flags after it override it.")
    parser.add_class_arguments(Recipe, None)
    for action in parser._actions:
        if action.help == "Path to a configuration file.":  # --ppo FILE and the like: nobody needs to know
            action.help = argparse.SUPPRESS
    parser.own = _OwnParser(prog=name, add_help=False, allow_abbrev=False)
    for flag, options in _OWN[command]:
        parser.own.add_argument(flag, **options)
    parser.given = []
    return parser


def _describe(command: str) -> str:
    for line in USAGE.splitlines():
        words = line.split()
        if words and words[0] == command:
            return " ".join(words[2 if words[1] == "RECIPE" else 1 :])
    return ""


def check_recipe(path: str, known: Sequence[str]) -> None:
    """Refuse what is not a recipe, naming the file and the line or the setting; values are checked by the parser."""
    if Path(path).is_dir():
        fail(f"recipe {path!r}: is a folder")
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except FileNotFoundError:
        fail(f"recipe {path!r}: no such file")
    except OSError as error:
        fail(f"recipe {path!r}: cannot be read: {error.strerror or error}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        fail(f"recipe {path!r}{line}: not YAML: {problem}")
    if content is None:
        fail(f"recipe {path!r}: the file is empty")
    if not isinstance(content, dict):
        fail(f"recipe {path!r}: expected settings as `name: value`, found {type(content).__name__}")
    settings, sections = set(known), {k.split(".")[0] for k in known if "." in k}
    for name, value in content.items():
        if name in sections and name not in settings - sections:
            if not isinstance(value, dict):
                fail(
                    f"recipe {path!r}: {name!r} is a section of settings (`{name}:` and indented lines), got {value!r}"
                )
            unknown = [f"{name}.{key}" for key in value if f"{name}.{key}" not in settings]
        else:
            unknown = [] if name in settings else [str(name)]
        if unknown:
            names = [k for k in known if k not in ("help", "config", "print_config")]
            fail(f"recipe {path!r}: unknown setting {unknown[0]!r}{suggestion(unknown[:1], names)}")


def normalise(argv: Sequence[str]) -> list[str]:
    """Hyphens or underscores in flag names, short names of common settings, one file where a list is wanted, and no
    ``--local_rank`` of a launcher."""
    found: list[str] = []
    wants_list = False
    for argument in argv:
        if not argument.startswith("--") or argument == "--":
            found.append(_as_list(argument) if wants_list else argument)
            wants_list = False
            continue
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("-", "_")
        name = _ALIASES.get(name, name)
        wants_list = name in _LISTS and not equals
        if name != "--local_rank":
            found.append(name + equals + (_as_list(value) if name in _LISTS and equals else value))
    return found


def _recipe_first(command: str, arguments: list[str], switches: Sequence[str]) -> list[str]:
    """The arguments with the recipe, which is the first that is neither a flag nor a flag's value, as ``--config``."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 1 if "=" in arguments[at] or arguments[at] in switches else 2
    if at >= len(arguments):
        usage = f"stable-rlhf {command} RECIPE.yaml [options]"
        fail(f"{command} needs a recipe first: {usage}", hint=f"see `stable-rlhf {command} --help`")
    return ["--config", arguments[at], *arguments[:at], *arguments[at + 1 :]]


def _as_list(value: str) -> str:
    return value if value.lstrip().startswith("[") else json.dumps([part for part in value.split(",") if part])


def parse(command: str, argv: Sequence[str]) -> tuple[Recipe, argparse.Namespace]:
    """A recipe and the command's own flags from its arguments."""
    arguments = normalise(argv)
    parser = build_parser(command)
    if any(a in ("-h", "--help") for a in arguments):
        parser.print_help()
        raise SystemExit(0)
    if command in _TAKES_RECIPE:
        switches = [o for a in parser.own._actions if a.nargs == 0 for o in a.option_strings]
        arguments = _recipe_first(command, arguments, switches)
    own, settings = parser.own.parse_known_args(arguments)
    parser.given = settings
    for flag, value in pairwise([*settings, ""]):
        name, equals, inline = flag.partition("=")
        if name == "--config" and (inline or not equals):
            check_recipe(inline if equals else value, parser.known())
    if command == "quickstart":
        with resources.as_file(resources.files("stable_rlhf.recipes") / "quickstart.yaml") as recipe:
            space = parser.parse_args(["--config", str(recipe), *settings])
    else:
        space = parser.parse_args(settings)
    made = parser.instantiate(space)
    own.given = settings
    return Recipe(**{name: made[name] for name in Recipe.__dataclass_fields__}), own


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``stable-rlhf``."""
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
    if command not in _OWN:
        fail(
            f"unknown command {command!r}" + suggestion([command], [*_OWN, "env"]),
            hint="see `stable-rlhf --help`",
        )
    recipe, own = parse(command, rest)
    try:
        check(recipe)
        _COMMANDS[command](recipe, own)
    except KeyboardInterrupt:
        print("stable-rlhf: interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("STABLE_RLHF_DEBUG") == "1":
            raise
        from safetensors import SafetensorError

        if "No space left" in str(error):
            hint = "with space made there, the same command goes on from the last checkpoint"
            fail(f"{error}; output_dir is {recipe.output_dir!r}", hint=hint)
        if isinstance(error, (ValueError, OSError, ImportError, ArithmeticError, SafetensorError)):
            fail(str(error), hint="STABLE_RLHF_DEBUG=1 shows where it came from")
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            fail("another rank has ended, so this one cannot go on; what it said, or the launcher, tells why",
                 hint="the same command goes on from the last checkpoint")  # fmt: skip
        _unexpected(error, Path(recipe.output_dir))


def _unexpected(error: Exception, output_dir: Path) -> NoReturn:
    """Not a mistake in the input that anybody thought of: keep the traceback beside the run."""
    if not output_dir.is_dir():
        raise error
    path = output_dir / f"error-{os.environ.get('RANK', '0')}.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:  # a full disk, most likely, and perhaps what the error is about
        raise error from None
    fail(f"{type(error).__name__}: {error}", hint=f"this was not foreseen; the traceback is in {path}")


def _run(recipe: Recipe, own: argparse.Namespace) -> None:
    from rich.console import Console

    from stable_rlhf.evaluate.report import summary_table
    from stable_rlhf.progress import is_main_process
    from stable_rlhf.train.engine import finish
    from stable_rlhf.train.run import run_recipe

    summary = run_recipe(recipe)
    finish()
    if is_main_process():
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(summary_table(summary))
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


def _single(name: str, recipe: Recipe, sections: str, inputs: dict[str, Any], run: Any, *, engine: bool = True) -> None:
    """Run one stage in its own output folder and print its result.

    ``sections`` of the recipe and ``inputs`` are what the result depends on: only they must be the same for a finished
    stage to be found again. ``engine``: whether the stage has a policy and needs DeepSpeed."""
    from stable_rlhf.progress import is_main_process
    from stable_rlhf.rehearsal.store import join_ranks
    from stable_rlhf.train.checkpoint import RunDirectory
    from stable_rlhf.train.engine import finish, start

    if engine:
        start(recipe.seed)
    else:
        join_ranks()
    settings = _settings(recipe, sections, inputs, engine=engine)
    stage = RunDirectory(recipe.output_dir, recipe.checkpoint).stage(name, settings, run)
    finish()
    if is_main_process():
        result = {k: v for k, v in stage.result.items() if k != "curve"}
        print(json.dumps({"stage": name, "folder": str(stage.folder), **result}, indent=1))


def _settings(recipe: Recipe, sections: str, inputs: dict[str, Any], *, engine: bool = True) -> dict[str, Any]:
    """What a stage's result depends on; arguments as of `_single`."""
    from stable_rlhf.train.datasets import contents

    everything = recipe.as_dict()
    settings = {s: everything[s] for s in ("model_name_or_path", "seed", *sections.split())} | inputs
    if "data" in settings:
        settings["data"] |= {"contents": contents(recipe.data)}
    settings["made_from"] = {k: _fingerprint(v) for k, v in inputs.items() if isinstance(v, str)}
    if engine and recipe.model_name_or_path is not None:
        settings["made_from"]["model_name_or_path"] = _fingerprint(recipe.model_name_or_path)
    return settings


def _fingerprint(path: str) -> str | None:
    """Which settings an input folder (or the folder of an input file) was made with, when a stage of ours made it."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        return str(json.loads((folder / "stage.json").read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sft(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.train.stages import run_sft

    model = _policy(recipe)
    _single("sft", recipe, "data engine sft", {}, lambda folder: run_sft(recipe, model, folder))


def _train_scorer(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.train.stages import run_scorer

    backbone = recipe.scorer_model_name_or_path or _policy(recipe)
    inputs = {"objective": own.objective, "policy": own.policy}
    sections = "scorer_model_name_or_path data engine scorer" + (" ppo" if recipe.scorer.expected_coef else "")
    run = lambda folder: run_scorer(recipe, own.objective, backbone, own.policy, folder)  # noqa: E731
    _single(f"scorer-{own.objective}", recipe, sections, inputs, run)


def _strength(recipe: Recipe, own: argparse.Namespace) -> None:
    from rich.console import Console

    from stable_rlhf.progress import is_main_process
    from stable_rlhf.scorer.report import in_words, notable_tables
    from stable_rlhf.train.checkpoint import RunDirectory
    from stable_rlhf.train.engine import finish, start
    from stable_rlhf.train.strength import measure_strength

    backbone = recipe.scorer_model_name_or_path or _policy(recipe)
    start(recipe.seed)
    settings = _settings(recipe, "scorer_model_name_or_path data engine scorer", {})
    stage = measure_strength(recipe, RunDirectory(recipe.output_dir, recipe.checkpoint), backbone, settings)
    finish()
    if is_main_process():
        summary = json.loads((stage.folder / "strength.json").read_text())
        console = Console(width=None if sys.stdout.isatty() else 140)
        for table in notable_tables(summary):
            console.print(table)
        print("\n".join(in_words(summary)))
        print(f"to read: {stage.folder / 'report.html'}; to train on: --data.pairs {stage.folder / 'pairs.jsonl.gz'}")


def _items(given: Sequence[str] | None) -> list[str]:
    """What was given as `a b`, as `a,b` or as `[a, b]`."""
    return [item.strip() for part in given or () for item in part.strip(" []").split(",")]


def _files(recipe: Recipe, given: Sequence[str] | None) -> list[str]:
    from stable_rlhf.train.datasets import locate

    files = _items(given)
    missing = [str(path) for path in locate(recipe.data, files) if not path.exists()]
    if missing:
        raise ValueError(f"{missing[0]}: no such file")
    return files


def _named(flag: str, given: Sequence[str] | None) -> dict[str, str]:
    """NAME=FOLDER items by name."""
    named: dict[str, str] = {}
    for item in _items(given):
        name, equals, folder = item.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"{flag}: {item!r} is not NAME=FOLDER, as in {flag} am=runs/am other=runs/other")
        if name in named:
            raise ValueError(f"{flag}: the name {name!r} is given twice")
        named[name] = folder
    return named


def _select(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.train.datasets import digests
    from stable_rlhf.train.stages import run_select, run_select_file

    if (own.scorer is None) == (own.candidates is None):
        raise ValueError("select: give either --scorer (and a policy to answer --data.prompts) or --candidates FILE")
    if own.candidates is not None:
        files = _files(recipe, own.candidates)
        inputs = {"candidates": digests(recipe.data, files)}
        run = lambda folder: run_select_file(recipe, files, folder)  # noqa: E731
        _single("selection", recipe, "data select", inputs, run, engine=False)
        return
    policy = _policy(recipe)
    run = lambda folder: run_select(recipe, policy, own.scorer, folder)  # noqa: E731
    _single("selection", recipe, "data ppo select", {"scorer_folder": own.scorer}, run)


def _train_ppo(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.train.stages import run_ppo

    policy = _policy(recipe)
    rehearsal = Path(own.rehearsal) if own.rehearsal else None
    if own.variant == "am-sr" and rehearsal is None:
        raise ValueError("--variant am-sr needs --rehearsal, the rehearsal.jsonl.gz that `stable-rlhf select` wrote")
    inputs = {"variant": own.variant, "scorer_folder": own.scorer, "rehearsal": own.rehearsal}
    run = lambda folder: run_ppo(recipe, own.variant, policy, own.scorer, rehearsal, folder)  # noqa: E731
    _single(f"ppo-{own.variant}", recipe, "data engine scorer ppo evaluate", inputs, run)


def _evaluate(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.train.datasets import digests
    from stable_rlhf.train.run import evaluate_models

    policies, scorers = _named("--policies", own.policies), _named("--scorers", own.scorers)
    if not policies and not scorers:
        raise ValueError("evaluate: give --scorers NAME=FOLDER, --policies NAME=FOLDER, or both")
    test_pairs = _files(recipe, own.test_pairs)
    if test_pairs and not scorers:
        raise ValueError("--test_pairs are for scorers: give --scorers NAME=FOLDER as well")
    baseline = _policy(recipe) if policies else None
    inputs: dict[str, Any] = {
        **{f"scorers.{name}": folder for name, folder in scorers.items()},
        **{f"policies.{name}": folder for name, folder in policies.items()},
        "judge_scorer": own.judge_scorer,
        "test_pairs": digests(recipe.data, test_pairs),
    }
    run = lambda folder: evaluate_models(  # noqa: E731
        recipe, baseline, policies, scorers, test_pairs, own.judge_scorer, folder
    )
    _single("evaluation", recipe, "data scorer ppo evaluate", inputs, run)


def _study(recipe: Recipe, own: argparse.Namespace) -> None:
    from stable_rlhf.train.study import run_study

    print(run_study(recipe, validation=own.validation))


def _launch(recipe: Recipe, own: argparse.Namespace) -> None:
    """Several processes: say what would run, write a batch script, or run it."""
    from stable_rlhf.train import launch

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
    kept: list[str] = []
    arguments = iter(given[1:])  # the first is --config
    for argument in arguments:
        if not argument.startswith("--launch."):
            kept.append(argument)
        elif "=" not in argument:
            next(arguments)
    return kept


def _print_environment() -> None:
    from stable_rlhf.train.environment import report

    print(report())


_COMMANDS = {
    "quickstart": _run, "run": _run, "launch": _launch, "study": _study, "sft": _sft, "strength": _strength,
    "train-scorer": _train_scorer, "select": _select, "train-ppo": _train_ppo, "evaluate": _evaluate,
}  # fmt: skip
