"""The adapters for TRL in runs of the real one: trl 1.16.0 beside transformers 5.23.0, in an environment of its own.

`build/frameworks/trl` is made once; where it cannot be installed the tests are skipped. Each prints its versions.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.frameworks import framework_python, run_code, run_in
from helpers.launch import ROOT, environment


@pytest.fixture(scope="session")
def python() -> Path:
    return framework_python("trl", "trl==1.16.0", "datasets==5.2.0")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["logprob", "reward"])
def test_trl_with_ours_is_trl(case, python):
    out = run_in(python, "trl_worker", case)
    print(out)
    assert out.startswith("trl 1.16.0 transformers 5.")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["losses", "train", "rehearsal"])
def test_fused_grpo_is_trls_grpo(case, python):
    """Every loss type, each with a control that is off; whole runs; and rehearsal rows in the same pass."""
    out = run_in(python, "trl_grpo_worker", case)
    print(out)
    assert out.startswith("trl 1.16.0 transformers 5.")


PAGE = (ROOT / "docs" / "guide" / "integrations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("code", [block for block in BLOCKS if "integrations.tr" in block])
def test_what_the_page_says_runs(code, python, tmp_path):
    """Pasted into a script, in the framework's environment. Negative control: with another name it does not."""
    run_code(python, code, tmp_path)
    with pytest.raises(AssertionError, match=r"ImportError|AttributeError"):
        run_code(python, re.sub(r"(from stable_rlhf\.integrations\.\w+ import) \w+", r"\1 nothing", code), tmp_path)


@pytest.mark.slow
def test_the_memory_study_compares_the_same_loss(python, tmp_path):
    code = """
import runpy, sys
sys.argv[1:] = ["--rows", "64", "--width", "32", "--vocabulary", "4096", "--threads", "1"]
runpy.run_module("bench.studies.trl_memory", run_name="__main__")
"""
    rows = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \| (\S+) \|$", run_code(python, code, tmp_path), flags=re.MULTILINE)
    assert len(rows) == 4
    losses = [float(loss) for *_, loss in rows]
    assert max(losses) - min(losses) <= 1.001e-4 and abs(losses[0]) > 1e-3


def test_it_is_imported_without_trl():
    """Until one of the classes is asked for."""
    code = """
import sys
sys.modules["trl"] = None
import stable_rlhf.integrations.trl as ours
assert not {name for name in sys.modules if name.startswith("transformers")}
for name in ("AdvantageRewardTrainer", "FusedGRPOTrainer", "patch_logprob"):
    try:
        getattr(ours, name)()
    except ImportError as error:
        print(name, error.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "AdvantageRewardTrainer", "FusedGRPOTrainer", "patch_logprob",
    ]  # fmt: skip
