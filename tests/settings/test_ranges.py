"""What a setting may be: every one of every command, whoever added it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin

import pytest

from stable_rlhf.cli.arguments import _FIRST, COMMANDS, build_parser, items, parse
from stable_rlhf.rollout.local import GenerationSettings
from stable_rlhf.scorer import ScorerSettings
from stable_rlhf.settings.ranges import Range, check_settings, expand_user, leaves, paths_in
from stable_rlhf.settings.recipe import Recipe

SETTINGS = dict(leaves(Recipe))
# On purpose: each of these numbers means something.
NEGATIVE = {
    "ppo.entropy_coef", "ppo.missing_eos_penalty", "ppo.rejection_threshold", "select.criteria", "select.minimum",
    "select.maximum", "rewards.weights",
}  # fmt: skip
# Text that names no file and no folder.
WORDS = {
    "title", "data.forget_tasks", "engine.lora_target_modules", "launch.rendezvous", "rollout.server", "strength.check",
    "ppo.stop", "evaluate.judge_base_url", "evaluate.judge_model", "evaluate.judge_api_key_env", "rollout.api_key_env",
    "rewards.answer", "rewards.pattern", "study.compare",
}  # fmt: skip


def numbers(hint: Any) -> list[tuple[type, Range | None]]:
    """The numbers in a type, each with its range."""
    if get_origin(hint) is Annotated:
        plain, *marks = get_args(hint)
        limits = next((mark for mark in marks if isinstance(mark, Range)), None)
        return [(plain, limits)] if plain in (int, float) else []
    if hint in (int, float):
        return [(hint, None)]
    return [found for part in get_args(hint) if isinstance(part, type) or get_args(part) for found in numbers(part)]


SECTIONS = {"": Recipe} | {name: type(value) for name, value in vars(Recipe()).items() if is_dataclass(value)}


def check_one(name: str, value: Any) -> Any:
    """What becomes of one setting, given in a list or a mapping where it takes one, in a section that is checked."""
    hint = str(SETTINGS[name])
    value = [value] if hint.startswith("list") else {"score": value} if hint.startswith("dict") else value
    section, _, last = name.rpartition(".")
    made = SECTIONS[section](**{last: value})
    check_settings(made, f"{section}." if section else "")
    return getattr(made, last)


NUMBERS = [name for name, hint in SETTINGS.items() if numbers(hint)]


def test_every_number_has_a_range():
    missing = [name for name in NUMBERS for _, limits in numbers(SETTINGS[name]) if limits is None]
    assert not missing, "say in stable_rlhf.settings.ranges' types what these take"
    assert len(NUMBERS) > 100
    check_settings(Recipe())  # and every default is inside


@pytest.mark.parametrize("section", sorted({name.split(".")[0] for name in NUMBERS}))
def test_what_no_setting_takes(section):
    for name in NUMBERS:
        if name.split(".")[0] == section:
            refuses_what_it_cannot_use(name)


def refuses_what_it_cannot_use(name: str) -> None:
    ((kind, limits),) = numbers(SETTINGS[name])
    bad: list[Any] = [math.nan, math.inf, -math.inf, 2**63, 10**30 + 1, 10**400, -(10**5000), "1", True, [1.0], None]
    bad += [1.5] if kind is int else [1e300, -1e300]
    bad += [] if name in NEGATIVE else [-1, -1e-9]
    if type(None) in get_args(SETTINGS[name]):
        bad.remove(None)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name.replace('.', '[.]')}(\.score)?:? .*(got|nothing)") as refused:
            check_one(name, value)
        assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)
    assert limits is not None
    for value in [] if limits.without_low else [limits.low]:
        check_one(name, kind(value))
    for value in [] if limits.without_high else [limits.high]:
        check_one(name, kind(value))
    if limits.without_low:
        with pytest.raises(ValueError, match="above"):
            check_one(name, limits.low)
    if limits.without_high:
        with pytest.raises(ValueError, match="below"):
            check_one(name, limits.high)


def test_zero_is_taken_where_it_means_something():
    taken = set()
    for name in NUMBERS:
        ((_, limits),) = numbers(SETTINGS[name])
        assert limits is not None
        if not limits.refuses(0):
            taken.add(name)
    sizes = (
        "batch_size",
        "num_clusters",
        "top_k",
        "max_length",
        "total_steps",
        "epochs",
        "num_scorers",
        "bins",
        "nodes",
    )
    assert not [name for name in taken if name.endswith(sizes)]
    assert {"engine.max_grad_norm", "data.max_pairs", "evaluate.temperature", "seed", "checkpoint.save_steps"} <= taken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluate.judge_request", {"temperature": math.inf}),
        ("evaluate.judge_request", {"a": [{"b": math.nan}]}),
        ("model_shape", {"hidden_size": -math.inf}),
        ("model_shape", {1: 2}),
        ("scorer.denoise", [{"below": math.nan}]),
        ("title", "half a \ud83d"),
        ("title", 3),
        ("model_shape", {"a": {1, 2}}),
        ("output_dir", ""),
        ("output_dir", "a\0b"),
        ("variants", ["rm", "xm"]),
        ("engine.bf16", 1),
        ("engine.zero_stage", True),
        ("ppo.stop", "word"),
    ],
)
def test_what_could_not_be_written_or_is_of_another_type(name, value):
    recipe = Recipe()
    section, _, last = name.rpartition(".")
    setattr(getattr(recipe, section) if section else recipe, last, value)
    with pytest.raises(ValueError, match=f"^{name}"):
        check_settings(recipe)


@pytest.mark.parametrize(
    ("made", "setting", "value"),
    [(kind, setting, value) for kind, settings in ((GenerationSettings, ("max_new_tokens", "temperature", "top_p")),
                                                   (ScorerSettings, ("num_policies", "num_alternates", "margin")))
     for setting in settings for value in (math.nan, math.inf, -1, 2**63, True, "1", None)],
)  # fmt: skip
def test_settings_of_the_library_are_checked_alike(made, setting, value):
    with pytest.raises(ValueError, match=rf"^{setting}"):
        made(**{setting: value})


def test_every_path_is_one_to_expand(monkeypatch, tmp_path):
    text = [
        n
        for n, hint in SETTINGS.items()
        if "str" in str(hint) and not {"Literal", "dict"} & {*re.findall(r"\w+", str(hint))}
    ]
    assert {name for name in text if not paths_in(SETTINGS[name])} == WORDS, "a new path is a PathName, new words join"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in set(text) - WORDS:
        found = check_one(name, "~/there")
        assert found == (here := str(tmp_path / "there")) or found == [here], name
    with pytest.raises(ValueError, match="output_dir: '~nobody-here/x': there is no such user"):
        check_settings(Recipe(output_dir="~nobody-here/x"))


def test_flags_of_one_command_are_choices_switches_lists_and_paths(monkeypatch, tmp_path):
    """Numbers are settings of the recipe, where they are checked."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in COMMANDS:
        for action in build_parser(command).own._actions:
            kind = action.choices or action.nargs is not None or action.type is expand_user
            assert kind and (action.nargs is None or action.type is None), f"{command} {action.option_strings}"
    _, own = parse("select", ["--scorer", "~/s"])
    assert own.scorer == f"{tmp_path}/s"


def test_from_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe, _ = parse("sft", ["--output-dir", "~/out", "--data.pairs", "~/a,b", "--data-dir=~/d", "--ppo.lam", "1"])
    assert recipe.output_dir == f"{tmp_path}/out" and recipe.data.pairs == [f"{tmp_path}/a", "b"]
    assert recipe.data.data_dir == f"{tmp_path}/d" and json.dumps(recipe.as_dict(), allow_nan=False)
    recipe, _ = parse("evaluate", ["--evaluate.judge", "scorer", "--title", "select"])  # values, and names of sections
    assert (recipe.evaluate.judge, recipe.title) == ("scorer", "select")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["a,b", "c"], ["a", "b", "c"]),
        (["[a=b, c=d]"], ["a=b", "c=d"]),
        (['["a,b", "c]"]', "d"], ["a,b", "c]", "d"]),
        (["runs/[1]", "x=runs/a]"], ["runs/[1]", "x=runs/a]"]),
        (['["[x].jsonl"]'], ["[x].jsonl"]),
        (["[1, no, 1e-5]"], ["1", "no", "1e-5"]),
        (["[]"], []),
        (None, []),
    ],
)
def test_names_with_commas_and_brackets(given, names):
    assert items("--scorers", given) == names


def test_a_list_that_is_none():
    with pytest.raises(ValueError, match=re.escape("""'[x].jsonl' is no list; a name that begins with [ stands""")):
        items("--scorers", ["[x].jsonl"])
    with pytest.raises(ValueError, match=re.escape("--scorers: '[a: b]' is no list")):
        items("--scorers", ["[a: b]"])


def test_help_begins_with_the_settings_that_matter():
    assert set(_FIRST) <= set(SETTINGS)
    beginning, _, everything = build_parser("run").format_help().partition("--config")
    assert all(f"--{name}" in beginning and f"--{name}" in everything for name in _FIRST)
    assert "first run" not in build_parser("sft").format_help()
