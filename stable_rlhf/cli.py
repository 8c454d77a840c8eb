"""The command line: arguments to one call."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from stable_rlhf import __version__
from stable_rlhf.train.config import VARIANTS, Recipe

USAGE = """\
usage: stable-rlhf COMMAND [options]

Advantage Model and Selective Rehearsal (arXiv 2309.10202) for RLHF that stays stable.

whole runs
  quickstart     the whole method in a generated skill world: no data, no download, a few minutes
  run RECIPE     every stage of a YAML recipe; finished stages are not redone

single stages
  sft            supervised fine-tuning of a policy
  train-scorer   reward model or Advantage Model (--objective rm|am)
  select         rehearsal data: embed, cluster, keep the best of each cluster
  train-ppo      one policy (--variant rejection|rm|rm-ma|am|am-sr)
  evaluate       policies against SFT: win, lose, tie on a main and a forget set

  env            versions, devices and which kernels are in use

`stable-rlhf COMMAND --help` lists a command's settings. Every setting of a recipe can be given on the command line:
  stable-rlhf run recipes/smollm2-pairs.yaml --data-dir DIR --ppo.total_steps 10
Several processes:
  deepspeed --num_accelerators 2 --module stable_rlhf run recipes/smollm2-pairs.yaml --data-dir DIR
"""

_ALIASES = {"--data_dir": "--data.data_dir", "--on_bad_row": "--data.on_bad_row"}
_EXTRAS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "quickstart": [],
    "run": [],
    "sft": [],
    "train-scorer": [
        ("--objective", {"choices": ["am", "rm"], "required": True, "help": "Advantage Model or reward model."}),
        ("--policy", {"type": str, "default": None, "help": "The policy to be tuned, for importance weights (Eq. 8)."}),
    ],
    "select": [
        ("--scorer", {"type": str, "required": True, "help": "Folder that train-scorer wrote."}),
    ],
    "train-ppo": [
        ("--variant", {"choices": list(VARIANTS), "required": True, "help": "Which policy to train."}),
        ("--scorer", {"type": str, "required": True, "help": "Folder that train-scorer wrote."}),
        ("--rehearsal", {"type": str, "default": None, "help": "rehearsal.jsonl.gz that select wrote (am-sr)."}),
    ],
    "evaluate": [
        ("--policies", {"type": list[str], "required": True, "help": "name=folder, one or more: [am=DIR, am-sr=DIR]"}),
        ("--judge_scorer", {"type": str, "default": None, "help": "Scorer folder that judges."}),
    ],
}  # fmt: skip


class _Parser(ArgumentParser):
    """Says which setting was probably meant when one is unknown."""

    known: list[str]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(message + self._suggestion(message), hint=f"see `{self.prog} --help`")

    def _suggestion(self, message: str) -> str:
        unknown = (
            re.findall(r"--([\w.\-]+)", message) if "nrecognized" in message else re.findall(r"'([\w.]+)'", message)
        )
        dotted = [".".join(unknown)] if len(unknown) == 2 else []
        for name in (*dotted, *unknown):
            if name in self.known:
                continue
            near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.6)
            if not near:  # perhaps the right name in the wrong section
                last = {k.rsplit(".", 1)[-1]: k for k in self.known}
                near = [
                    last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.6)
                ]
            if near:
                return f"; did you mean {near[0]!r}?"
        return ""


def fail(message: str, *, hint: str = "") -> NoReturn:
    """One clear line on standard error, exit status 2."""
    print(f"stable-rlhf: error: {message}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)
    raise SystemExit(2)


def build_parser(command: str) -> _Parser:
    """The parser of one command: its own flags and every setting of a recipe."""
    parser = _Parser(prog=f"stable-rlhf {command}", description=_describe(command), allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML recipe; flags after it override it.")
    for flag, options in _EXTRAS[command]:
        parser.add_argument(flag, **options)
    parser.add_class_arguments(Recipe, None)
    parser.known = [
        name for action in parser._actions for option in action.option_strings if (name := option.lstrip("-")) != "h"
    ]
    return parser


def _describe(command: str) -> str:
    for line in USAGE.splitlines():
        words = line.split()
        if words and words[0] == command:
            return " ".join(words[2 if words[1] == "RECIPE" else 1 :])
    return ""


def normalise(argv: Sequence[str]) -> list[str]:
    """Hyphens or underscores in flag names, short names of common settings, and the launcher's ``--local_rank``."""
    found: list[str] = []
    for argument in argv:
        if not argument.startswith("--") or argument == "--":
            found.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("-", "_")
        name = _ALIASES.get(name, name)
        if name != "--local_rank":
            found.append(name + equals + value)
    return found


def parse(command: str, argv: Sequence[str]) -> tuple[Recipe, Namespace]:
    """A recipe and the command's own flags from its arguments."""
    arguments = normalise(argv)
    if command == "run":
        if arguments and arguments[0] not in ("-h", "--help"):
            if arguments[0].startswith("-"):
                fail("run needs a recipe first: stable-rlhf run RECIPE.yaml [options]")
            if not Path(arguments[0]).is_file():
                fail(f"recipe {arguments[0]!r}: no such file")
            arguments = ["--config", *arguments]
        elif not arguments:
            fail("run needs a recipe: stable-rlhf run RECIPE.yaml [options]")
    parser = build_parser(command)
    if command == "quickstart":
        with resources.as_file(resources.files("stable_rlhf.recipes") / "quickstart.yaml") as recipe:
            space = parser.parse_args(["--config", str(recipe), *arguments])
    else:
        space = parser.parse_args(arguments)
    made = parser.instantiate(space)
    fields = {name: made[name] for name in Recipe.__dataclass_fields__}
    return Recipe(**fields), made


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``stable-rlhf``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    while arguments and arguments[0].startswith("--local_rank"):
        arguments.pop(0)  # the deepspeed launcher puts it first
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        raise SystemExit(0 if arguments else 2)
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        print(__version__)
        return
    if command == "env":
        return print_environment()
    if command not in _EXTRAS:
        near = difflib.get_close_matches(command, [*_EXTRAS, "env"], n=1)
        fail(
            f"unknown command {command!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint="see `stable-rlhf --help`",
        )
    recipe, space = parse(command, rest)
    try:
        _COMMANDS[command](recipe, space)
    except (ValueError, OSError) as error:
        if os.environ.get("STABLE_RLHF_DEBUG") == "1":
            raise
        fail(str(error), hint="STABLE_RLHF_DEBUG=1 shows where it came from")


def _run(recipe: Recipe, space: Namespace) -> None:
    from rich.console import Console

    from stable_rlhf.evaluate.report import summary_table
    from stable_rlhf.progress import is_main_process
    from stable_rlhf.train.run import run_recipe

    summary = run_recipe(recipe)
    if is_main_process():
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(summary_table(summary))
        total = sum(s["seconds"] for s in summary["stages"] if not s["skipped"])
        console.print(f"stages took {total:.0f} s; report: {Path(recipe.output_dir) / 'report.html'}")


def _policy(recipe: Recipe) -> str:
    if recipe.model_name_or_path is None:
        raise ValueError("--model_name_or_path: name the policy (hub name, folder or GGUF file)")
    return recipe.model_name_or_path


def _single(name: str, recipe: Recipe, extra: dict[str, Any], run: Any) -> None:
    """Run one stage in its own output folder and print its result."""
    from stable_rlhf.progress import is_main_process
    from stable_rlhf.train.checkpoint import RunDirectory
    from stable_rlhf.train.engine import start

    start(recipe.seed)
    settings = {**recipe.as_dict(), **extra}
    settings.pop("output_dir")
    stage = RunDirectory(recipe.output_dir).stage(name, settings, run)
    if is_main_process():
        result = {k: v for k, v in stage.result.items() if k != "curve"}
        print(json.dumps({"stage": name, "folder": str(stage.folder), **result}, indent=1))


def _sft(recipe: Recipe, space: Namespace) -> None:
    from stable_rlhf.train.stages import run_sft

    model = _policy(recipe)
    _single("sft", recipe, {}, lambda folder: run_sft(recipe, model, folder))


def _train_scorer(recipe: Recipe, space: Namespace) -> None:
    from stable_rlhf.train.stages import run_scorer

    backbone = recipe.scorer_model_name_or_path or _policy(recipe)
    extra = {"objective": space.objective, "policy": space.policy}
    run = lambda folder: run_scorer(recipe, space.objective, backbone, space.policy, folder)  # noqa: E731
    _single(f"scorer-{space.objective}", recipe, extra, run)


def _select(recipe: Recipe, space: Namespace) -> None:
    from stable_rlhf.train.stages import run_select

    policy = _policy(recipe)
    _single("selection", recipe, {"scorer": space.scorer}, lambda f: run_select(recipe, policy, space.scorer, f))


def _train_ppo(recipe: Recipe, space: Namespace) -> None:
    from stable_rlhf.train.stages import run_ppo

    policy = _policy(recipe)
    rehearsal = Path(space.rehearsal) if space.rehearsal else None
    extra = {"variant": space.variant, "scorer": space.scorer, "rehearsal": space.rehearsal}
    run = lambda folder: run_ppo(recipe, space.variant, policy, space.scorer, rehearsal, folder)  # noqa: E731
    _single(f"ppo-{space.variant}", recipe, extra, run)


def _evaluate(recipe: Recipe, space: Namespace) -> None:
    from stable_rlhf.train.stages import run_evaluate

    baseline = _policy(recipe)
    policies: dict[str, str] = {}
    for item in space.policies:
        name, equals, folder = item.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"--policies: {item!r} is not name=folder")
        policies[name] = folder
    extra = {"policies": policies, "judge_scorer": space.judge_scorer}
    _single("evaluation", recipe, extra, lambda f: run_evaluate(recipe, baseline, policies, space.judge_scorer, f))


def print_environment() -> None:
    """Versions, device, and the backend of every op on it."""
    from stable_rlhf import ops
    from stable_rlhf.train.run import device_name, versions

    for name, version in versions().items():
        print(f"{name:24s}{version}")
    print(f"{'device':24s}{device_name()}")
    for name, value in ops.backend_report().items():
        print(f"{name:24s}{value}")


_COMMANDS = {
    "quickstart": _run, "run": _run, "sft": _sft, "train-scorer": _train_scorer, "select": _select,
    "train-ppo": _train_ppo, "evaluate": _evaluate,
}  # fmt: skip
