"""The interpreted tests that take long, of all files that have some: ``make test`` leaves them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.interpreter import not_interpreted, run_interpreted

TESTS = Path(__file__).parents[1]


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter():
    """But for test_compile.py, which runs all of its own."""
    files = [
        path for path in sorted(TESTS.rglob("test_*.py"))
        if "run_interpreted(__file__)" in (text := path.read_text(encoding="utf-8")) and "mark.slow" in text
        and path.name != Path(__file__).name
    ]  # fmt: skip
    assert len(files) > 4
    run_interpreted(*map(str, files), marks="slow and not gpu")
