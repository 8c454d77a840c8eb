"""A recipe that is none, or that says a thing twice: one line with the file, and the line where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stable_rlhf.cli.arguments import build_parser, parse
from stable_rlhf.settings.recipe_file import read_recipe

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = [
    ("ppo: {total_steps: 2}\nseed: 1\nppo: {max_new_tokens: 7}\n", ["line 3: 'ppo' is given twice (first in line 1)"]),
    ("ppo:\n  lam: 1\n  gamma: 1\n  lam: 0.9\n", ["line 4: 'lam' is given twice (first in line 2)"]),
    ("select: {criteria: {score: 1, 'score': 2}}", ["line 1: 'score' is given twice"]),
    ("ppo: {lam: 1}\nppo.lam: 0.9\n", ["line 2: 'ppo.lam' is given twice (first in line 1)"]),
    ("ppo: &p\n  total_steps: *p\n", ["line 1: an alias stands inside of what it stands for"]),
    ("variants: &v [rm, *v]\n", ["line 1: an alias stands inside"]),
    (LAUGHS + "title: *i\n", ["line ", "its aliases stand for more than 100000 values"]),
    ("title: !!python/object/apply:os.system ['touch here']\n", ["line 1", "tag '!!python/object/apply:os.system'"]),
    ("title: !!python/name:os.system\n", ["line 1", "!!python/name:os.system"]),
    ("title: !mine x\n", ["line 1", "tag '!mine'"]),
    ("title: !!binary aGk=\n", ["line 1", "!!binary"]),
    ("seed: 1\nmodel_shape: {n_layer: !!int x}\n", ["line 2", "'x' is no int"]),
    ("seed: " + "1" * 5000, ["line 1: a number of 5000 characters"]),
    ("ppo: {learning_rate: " + "1" * 400 + "}", ["line 1: a number of 400 characters"]),
    ("seed: 1:30\n", ["line 1: 1:30 is 90 in YAML"]),
    ("seed: 017\n", ["line 1: 017 is 15 in YAML"]),
    ("title: " + "[" * 3000, ["nested too deeply"]),
    ('seed: 1\ntitle: "\\ud800"\n', ["line 2: not UTF-8"]),
    ("seed: 1\ntitle: a\0b\n", ["line 2: not YAML: special characters are not allowed"]),
    ("seed: 1\n---\nseed: 2\n", ["line 2: not YAML", "another document"]),
    ("? [a]\n: 2\n", ["line 1", "a name must be text"]),
    ("config: other.yaml\n", ["line 1: unknown setting 'config'"]),
    ("\nppo:\n  lam: 1\n  kl: 2\n", ["line 4: unknown setting 'ppo.kl'"]),
    ("world:\n  hot_temperature: 1.1\n", ["line 2: unknown setting 'world.hot_temperature': it is gone and 1.1"]),
    ("- a\n", ["expected settings as `name: value`, found list"]),
    ("word", ["expected settings as `name: value`, found str"]),
    ("seed: 1\n\tppo: 2\n", ["line 2: not YAML"]),
    ("ppo: {lam: 1", ["line 1: not YAML"]),
]
VALUES = [
    ("title: a\nseed: 1e3\n", ["line 2: 'seed': expected a whole number, got '1000.0'"]),
    ("seed: 0o17\n", ["line 1: 'seed': expected a whole number, got '0o17'"]),
    ("\ntitle: no\n", ["line 2: 'title': expected text, got 'False'", "text has quotes"]),
    ("ppo:\n  lam: yes\n", ["line 2: 'ppo.lam': expected a number, got 'True'"]),
]
KNOWN = build_parser("run").known()


def refused(capfd: pytest.CaptureFixture[str], command: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(command, arguments)
    assert end.value.code == 2
    said = capfd.readouterr().err
    message, *hint = said.splitlines()
    assert len(message) < 500 and all(line.startswith("  see `") for line in hint), said
    return message


@pytest.mark.parametrize(("text", "parts"), BAD)
def test_a_recipe_that_is_none(monkeypatch, tmp_path, text, parts):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^recipe 'my\.yaml'") as error:
        read_recipe("my.yaml", KNOWN)
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message and len(message) < 500, message
    assert os.listdir() == ["my.yaml"]


@pytest.mark.parametrize(("text", "parts"), VALUES)
def test_a_value_of_another_type(monkeypatch, tmp_path, capfd, text, parts):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text, encoding="utf-8")
    message = refused(capfd, "run", "my.yaml")
    assert message.startswith("stable-rlhf: error: recipe 'my.yaml'")
    assert all(part in message for part in parts), message


def test_what_is_no_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("latin").write_bytes(b"seed: 1\ntitle: na\xefve\n")
    Path("wide").write_bytes("title: a".encode("utf-16"))
    Path("large").write_text("title: " + "a" * 2**21, encoding="utf-8")
    Path("loop").symlink_to("loop")
    parts = {
        "pipe": "is not a file",
        "/dev/zero": "is not a file",
        "folder": "is a folder",
        "latin": ", line 2: not YAML: not UTF-8",
        "wide": ", line 1: not YAML: not UTF-8",
        "large": "too many for a recipe",
        "loop": "cannot be read",
        "none": "no such file",
    }
    for name, part in parts.items():
        with pytest.raises(ValueError, match=f"^recipe '{name}'.*{part}"):
            read_recipe(name, KNOWN)


def test_what_is_taken(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(
        "\ufeffsft: &s {learning_rate: 1e-5}\nscorer:\n  <<: *s\n  margin: 2\nppo.lam: 0.9\ntitle: 2020-01-01\n"
        "select: {minimum: {score: -1e3}}\n",
        encoding="utf-8",
    )
    recipe, _ = parse("run", ["my.yaml"])
    assert (recipe.sft.learning_rate, recipe.scorer.learning_rate, recipe.scorer.margin) == (1e-5, 1e-5, 2)
    assert (recipe.ppo.lam, recipe.title, recipe.select.minimum) == (0.9, "2020-01-01", {"score": -1000.0})


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--select.criteria {score:\u00a01,score:\u00a02}", "--select.criteria: 'score' is given twice"),
        ("--select.criteria &a\u00a0{score:\u00a0*a}", "--select.criteria: an alias stands inside"),
        ("--model_shape " + "[" * 3000, "--model_shape: nested too deeply"),
        ("--seed " + "1" * 5000, "--seed: a number of 5000 characters"),
        ("--ppo.learning_rate=" + "1" * 400, "--ppo.learning_rate: a number of 400 characters"),
        ("--ppo other.yaml", "--ppo is a section of settings"),
        ("--title x --data.max_pairs many", "--data.max_pairs: expected a whole number, got 'many'"),
    ],
)
def test_values_of_the_command_line(capfd, arguments, part):
    assert part in refused(capfd, "sft", *(word.replace("\u00a0", " ") for word in arguments.split(" ")))
