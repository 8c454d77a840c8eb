"""Where files stand. (Which room may import which is held by ``lint-imports``, see pyproject.toml.)"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.launch import ROOT

TESTS = ROOT / "tests"
FOLDERS = {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/*.py")}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("room", sorted(FOLDERS))
def test_no_test_imports_a_test(room):
    """What two of them need stands in tests/helpers, which imports none of them either."""
    own = {p.stem for p in TESTS.rglob("*.py") if "helpers" not in p.parts}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (TESTS / room).rglob("*.py")
        for name in imported(path)
        if name.startswith((".", "tests")) or name.split(".")[0] in own
    ]
    assert not found


def test_no_module_stands_outside_a_room():
    loose = {path.stem for path in (ROOT / "stable_rlhf").glob("*.py")}
    assert loose == {"__init__", "__main__", "metrics", "ranks"}


def test_a_folder_of_tests_is_named_for_a_room():
    rooms = {p.stem for p in (ROOT / "stable_rlhf").iterdir()}
    assert {"ops", "engine"} < FOLDERS <= rooms | {"bench", "docs", "helpers", "hostile", "whole"}


@pytest.mark.parametrize("folder", ["stable_rlhf", "bench", "kernels", "csrc", "tests"])
def test_no_file_is_longer_than_a_reader(folder):
    kinds = (".py", ".cpp", ".h", ".sh", ".j2")
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }
    assert sizes and {name: lines for name, lines in sizes.items() if lines > 600} == {}
