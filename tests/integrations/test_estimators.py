"""Estimators of advantages are TRL's and verl's on the same scores, each framework in an environment of its own."""

from __future__ import annotations

import pytest

from helpers.frameworks import framework_python, run_in, verl_python


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), [("trl", "1.16.0"), ("verl", "0.9.1")])
def test_advantages_are_theirs(name, version):
    python = verl_python() if name == "verl" else framework_python("trl", "trl==1.16.0", "datasets==5.2.0")
    out = run_in(python, "estimators_worker", name)
    print(out)
    assert f"{name} {version}" in out
