"""The adapter for verl in runs of the real one: verl 0.9.1 beside transformers 5.9.0, in an environment of its own.

`build/frameworks/verl` is made once; where it cannot be installed the tests are skipped. Each prints its versions.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from helpers.frameworks import run_code, run_in, verl_python
from helpers.launch import ROOT


@pytest.fixture(scope="session")
def python() -> Path:
    return verl_python()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["forward", "function"])
def test_verl_with_ours_is_verl(case, python):
    out = run_in(python, "verl_worker", case)
    print(out)
    assert out.startswith("verl 0.9.1 ")


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "whose"), [("1", "ours"), ("0", "verl's"), ("yes", "verl's")])
def test_verl_loads_the_plugin(setting, whose, python, tmp_path):
    """By the entry point of pyproject.toml, and only where it is switched on."""
    (entries,) = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"].items()
    lines = [f"[{entries[0]}]", *(f"{name} = {module}" for name, module in entries[1].items())]
    metadata = tmp_path / "plugin_of_this_tree-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: plugin-of-this-tree\nVersion: 0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests")))
    out = run_in(python, "verl_worker", "plugin", PYTHONPATH=path, STABLE_RLHF_VERL=setting)
    assert out.splitlines()[-1].startswith(whose)


@pytest.mark.slow
def test_memory_of_a_logprob_step(python):
    ours, theirs = (
        int(re.search(rf"{whose} (\d+) MiB", run_in(python, "verl_worker", "memory", whose))[1])
        for whose in ("ours", "theirs")
    )
    print(f"log-probs and entropy, backward, 1,024 tokens, V 151,936: ours {ours} MiB, verl's {theirs} MiB")
    assert ours < theirs / 2


PAGE = (ROOT / "docs" / "guide" / "integrations.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_the_page_says_runs(python, tmp_path):
    """Pasted into a script. Negative control: with another name it does not run."""
    (code,) = re.findall(r"^```python\n([^`]*integrations\.verl.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    run_code(python, code, tmp_path)
    with pytest.raises(AssertionError, match="ImportError"):
        run_code(python, re.sub(r"(from stable_rlhf\.integrations\.\w+ import) \w+", r"\1 nothing", code), tmp_path)
