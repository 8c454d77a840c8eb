"""From the words of a command line to a recipe and the command's own flags, with errors of one line."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from stable_rlhf.cli.usage import USAGE, fail
from stable_rlhf.settings.ranges import expand_user, is_text, leaves, unwritable
from stable_rlhf.settings.recipe import LaunchArguments, Recipe, suggestion
from stable_rlhf.settings.recipe_file import check_value, read_recipe
from stable_rlhf.settings.variants import VARIANTS

_ALIASES = {"--data_dir": "--data.data_dir", "--on_bad_row": "--data.on_bad_row"} | {
    f"--{name}": f"--launch.{name}" for name in LaunchArguments.__dataclass_fields__
}
_SETTINGS = {f"--{name}": hint for name, hint in leaves(Recipe)}
# Lists that may be given as a,b: no mappings, and not the strings that end a response, which hold commas themselves.
_LISTS = {flag for flag, hint in _SETTINGS.items() if "list[" in str(hint) and "dict[" not in str(hint)}
_LISTS -= {"--ppo.stop"}
_NUMBERS = {flag for flag in _LISTS if "list[typing.Annotated[int" in str(_SETTINGS[flag])}
_REHEARSE = ", ".join(name for name, row in VARIANTS.items() if row.rehearsal)
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
    "export": [
        ("--scorer", {"required": True, "help": "Folder that train-scorer wrote. Its reward model goes to --output-dir "
                      "as transformers' AutoModelForSequenceClassification loads it, with one label; README.md there "
                      "says what its logit is."}),
    ],
    "select": [
        ("--scorer", {"help": "Folder that train-scorer wrote: it scores what the policy answers to --data.prompts."}),
        ("--candidates", {"nargs": "+", "action": "extend", "metavar": "FILE",
                          "help": "Answers with a score, in place of --scorer and a policy (docs/guide/data.md)."}),
    ],
    "train-ppo": [
        ("--variant", {"choices": list(VARIANTS), "required": True, "help": "Which policy to train."}),
        ("--scorer", {"help": "Folder that train-scorer wrote; left out where rewards.functions has no scorer."}),
        ("--rehearsal", {"help": f"rehearsal.jsonl.gz that select wrote ({_REHEARSE})."}),
    ],
    "evaluate": [
        ("--scorers", {"nargs": "+", "action": "extend", "metavar": "NAME=FOLDER",
                       "help": "Scorers to measure, each with a name: rm=DIR am=DIR. Without --test_pairs: on the "
                       "held-out pairs that train-scorer scored."}),
        ("--test_pairs", {"nargs": "+", "action": "extend", "metavar": "FILE",
                          "help": "Preference files, every pair of which the scorers are measured on."}),
        ("--benchmark", {"choices": ["rewardbench", "rewardbench2"], "help": "Measure the scorers on RewardBench or "
                         "RewardBench 2: accuracy by subset, beside the calibration figures of the same pairs."}),
        ("--benchmark_data", {"metavar": "NAME", "help": "Where from: a .jsonl, .jsonl.gz or .parquet file in the "
                              "published format, or a data set of a hub (default: the published one)."}),
        ("--policies", {"nargs": "+", "action": "extend", "metavar": "NAME=FOLDER",
                        "help": "Policies to compare with --model_name_or_path, each with a name: am=DIR am-sr=DIR"}),
        ("--judge_scorer", {"help": "Scorer folder that judges."}),
    ],
}  # fmt: skip
COMMANDS = tuple(_OWN)
# What a first run of one's own is likely to need, in this order.
_FIRST = (
    "model_name_or_path", "output_dir", "variants", "seed", "data.data_dir", "data.pairs", "data.prompts",
    "data.forget_tasks", "data.judge_fraction", "data.max_prompt_length", "data.max_length", "engine.zero_stage",
    "engine.bf16", "engine.lora_r", "scorer.learning_rate", "select.embedding_model", "ppo.total_steps",
    "ppo.rollout_batch_size", "ppo.learning_rate", "ppo.kl_coef", "ppo.max_new_tokens", "evaluate.judge",
)  # fmt: skip
_TAKES_RECIPE = ("run", "launch", "study")
_TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null",
    "list": "a list, [a, b]", "dict": "a mapping, {a: 1}",
}  # fmt: skip


class _Parser(ArgumentParser):
    """The settings of a recipe as flags, with short help and errors of one line."""

    own: argparse.ArgumentParser
    given: list[str]
    where: dict[str, str]  # where a recipe gives a setting, for errors about its value

    def known(self) -> list[str]:
        actions = [*self._actions, *self.own._actions]
        return [name for action in actions for option in action.option_strings if (name := option.lstrip("-")) != "h"]

    def parse_path(self, path: str | os.PathLike[str], *given: Any, **settings: Any) -> Any:
        """A recipe is UTF-8; jsonargparse reads it in the locale's encoding."""
        return self.parse_string(Path(path).read_text(encoding="utf-8"), path, *given, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(_plain(message, self.given, self.where) + self._suggestion(message), hint=f"see `{self.prog} --help`")

    def _suggestion(self, message: str) -> str:
        if "nrecognized" in message:
            return suggestion(re.findall(r"--([\w.\-]+)", message), self.known())
        return ""

    def format_help(self, formatter: Any = None) -> str:
        own = self.own._get_formatter()
        own.start_section("this command")
        own.add_arguments([a for a in self.own._actions if a.option_strings])
        own.end_section()
        if self.prog.split()[-1] in _TAKES_RECIPE:
            actions = {action.dest: action for action in self._actions}
            own.start_section("what a first run is likely to need (every setting stands below)")
            own.add_arguments([_brief(actions[name]) for name in _FIRST])
            own.end_section()
        section = own.format_help().replace("``", "`")
        text = super().format_help(formatter).replace("``", "`")
        return text.replace("\noptions:\n", f"\n{section}\noptions:\n", 1) if section else text


def _brief(action: argparse.Action) -> argparse.Action:
    """A setting as one line of help: its flag and what it is, without types, defaults and details."""
    words = str(action.help).split(" (type:")[0].split(". ")[0].rstrip(".")
    return argparse.Action([f"--{action.dest}"], action.dest, nargs=0, help=words.replace("%", "%%"))


class _OwnParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message, hint=f"see `{self.prog} --help`")


def _plain(message: str, given: Sequence[str], places: Mapping[str, str]) -> str:
    """jsonargparse's report of a wrong value in one line: which setting, what it takes, what it got."""
    key, value = re.search(r'Parser key "([\w.]+)"', message), re.search(r"(?:Got|Given) value: (.*)", message, re.S)
    kinds = [w for line in message.splitlines() for w in re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", line)]
    if not (key and value and kinds):
        return _cut(" ".join(message.split()))
    words = []
    for kind in kinds:
        if kind.startswith("typing.Literal["):
            words.append("one of " + ", ".join(str(v) for v in ast.literal_eval(kind.removeprefix("typing.Literal"))))
        else:
            name = kind.removeprefix("<class '").removesuffix("'>")
            words.append(_TYPES.get(name, name))
    flag = f"--{key[1]}"
    on_the_line = any(g == flag or g.startswith(f"{flag}=") for g in given)
    where = flag if on_the_line else places.get(key[1], f"setting {key[1]!r} of the recipe")
    quotes = ""
    if "text" in words and value[1].strip() in ("True", "False") and not on_the_line:
        quotes = " (yes, no, on and off are true and false in YAML: text has quotes)"
    return f"{where}: expected {' or '.join(dict.fromkeys(words))}, got {_cut(value[1].strip())!r}{quotes}"


def _cut(text: str) -> str:
    """Text of an error, not pages of it."""
    return text if len(text) <= 400 else f"{text[:200]}… ({len(text)} characters)"


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
        # What is neither a choice nor a switch names a file or folder (lists of them: `items`).
        path: dict[str, Any] = {} if {"choices", "action"} & options.keys() else {"type": expand_user}
        parser.own.add_argument(flag, **options, **path)
    parser.given, parser.where = [], {}
    return parser


def _describe(command: str) -> str:
    for line in USAGE.splitlines():
        words = line.split()
        if words and words[0] == command:
            return " ".join(words[2 if words[1] == "RECIPE" else 1 :])
    return ""


def normalise(argv: Sequence[str]) -> list[str]:
    """Hyphens or underscores in flag names, short names of common settings, one file or number where a list is wanted,
    and no ``--local_rank`` of a launcher."""
    arguments: list[str] = []
    name = equals = ""
    for argument in argv:
        if not argument.startswith("--") or argument == "--":
            arguments.append(argument if equals else _as_list(name, argument))
            name = ""
            continue
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("-", "_")
        name = _ALIASES.get(name, name)
        if name != "--local_rank":
            arguments.append(name + equals + (_as_list(name, value) if equals else value))
    return arguments


def _recipe_first(command: str, arguments: list[str], switches: Sequence[str]) -> list[str]:
    """The arguments with the recipe, which is the first that is neither a flag nor a flag's value, as ``--config``."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 1 if "=" in arguments[at] or arguments[at] in switches else 2
    if at >= len(arguments):
        usage = f"stable-rlhf {command} RECIPE.yaml [options]"
        fail(f"{command} needs a recipe first: {usage}", hint=f"see `stable-rlhf {command} --help`")
    return ["--config", arguments[at], *arguments[:at], *arguments[at + 1 :]]


def _as_list(name: str, value: str) -> str:
    """``a,b`` as ``["a", "b"]`` for a setting that is a list of words, ``[1, 2]`` for one of numbers."""
    if value.lstrip().startswith("[") or value == "null":
        return value
    if name in _NUMBERS:
        return f"[{value}]"
    return json.dumps([part for part in value.split(",") if part]) if name in _LISTS else value


def items(flag: str, given: Sequence[str] | None) -> list[str]:
    """The names given as `a b`, as `a,b` or as the list `[a, b]`, in which quotes keep what is inside: `["a,b"]`.

    Raises:
        ValueError: what begins with [ is no list.
    """
    names: list[str] = []
    for part in given or ():
        if not part.lstrip().startswith("["):
            names += [item for item in part.split(",") if item]
            continue
        try:
            listed = yaml.load(part, yaml.BaseLoader)
        except yaml.YAMLError:
            listed = None
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            example = json.dumps([part])
            raise ValueError(f"{flag}: {part!r} is no list; a name that begins with [ stands in one: '{example}'")
        names += listed
    return names


def _check_flag(parser: _Parser, flag: str, value: str) -> None:
    """What the parser would take, or would stop at without a clear word."""
    name = flag.removeprefix("--")
    if flag == "--config":
        for setting, line in read_recipe(value, parser.known()).items():
            parser.where[setting] = f"recipe {value!r}, line {line}: {setting!r}"
    elif name in Recipe.__dataclass_fields__ and flag not in _SETTINGS:
        if not value.startswith("{"):
            raise ValueError(f"{flag} is a section of settings: {flag}.NAME VALUE sets one of them")
        check_value(flag, value)
    elif flag.removesuffix("+") in _SETTINGS and not is_text(_SETTINGS[flag.removesuffix("+")]):
        check_value(flag, value)


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
    for name, value in vars(own).items():  # names and paths go into records, as settings do
        if wrong := unwritable(value, f"--{name}"):
            fail(wrong)
    try:
        for flag, value in pairwise([*settings, ""]):
            name, equals, inline = flag.partition("=")
            if name.startswith("--"):  # a value may have a section's name: `--evaluate.judge scorer`
                _check_flag(parser, name, inline if equals else value)
    except ValueError as error:
        fail(str(error))
    if command == "quickstart":
        with resources.as_file(resources.files("stable_rlhf.recipes") / "quickstart.yaml") as recipe:
            space = parser.parse_args(["--config", str(recipe), *settings])
    else:
        space = parser.parse_args(settings)
    settings_by_name = parser.instantiate(space)
    own.given = settings
    return Recipe(**{name: settings_by_name[name] for name in Recipe.__dataclass_fields__}), own
