"""The base install: what it asks for, what it runs, and what it says of the parts that it lacks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from helpers.forks import Done
from helpers.launch import ROOT, command, worker_environment
from stable_rlhf.system.extras import BROUGHT, EXTRAS, TRAIN

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
# Where a module is not called as its distribution is.
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}
COMMANDS = (
    "quickstart", "run", "launch", "study", "sft", "strength", "train-scorer", "select", "train-ppo", "evaluate",
)  # fmt: skip


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=;]", requirement)[0] for requirement in requirements}


def distribution(module: str) -> str:
    return DISTRIBUTIONS.get(module, module.replace("_", "-"))


def light(code: str, *arguments: str) -> Done:
    """`code` in a process of its own that finds torch, triton and numpy alone."""
    done = subprocess.run(
        command("light_install", code, *arguments), capture_output=True, encoding="utf-8", timeout=300,
        env=worker_environment(),
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def light_command(*arguments: str) -> Done:
    return light("from stable_rlhf.cli.commands import main; main()", *arguments)


def test_the_base_asks_for_torch_triton_and_numpy():
    assert names(PROJECT["dependencies"]) == {"torch", "triton", "numpy"}
    (triton,) = [r for r in PROJECT["dependencies"] if r.startswith("triton")]
    assert triton.endswith("; platform_system == 'Linux'")


def test_every_other_extra_brings_the_training_system():
    with_training = {name for name, requirements in OPTIONAL.items() if "stable-rlhf[train]" in requirements}
    assert with_training == {*OPTIONAL} - {"train", "all"}
    (everything,) = OPTIONAL["all"]
    assert set(re.findall(r"\w+", everything.partition("[")[2])) == {*EXTRAS.values()}


def test_the_extras_bring_what_the_messages_promise():
    assert {distribution(module) for module in TRAIN} == names(OPTIONAL["train"])
    for module in {*EXTRAS} - {*BROUGHT}:
        assert distribution(module) in names(OPTIONAL[EXTRAS[module]]), module


def test_whatever_the_package_imports_has_an_extra():
    """Also inside functions. flash-attn is found by transformers, which asks for it itself; who integrates our
    operations into a framework has that one."""
    found = set()
    for path in [*(ROOT / "stable_rlhf").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if (ROOT / "stable_rlhf" / "integrations") in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    ours = found - {*sys.stdlib_module_names, "stable_rlhf", "torch", "triton", "numpy"}
    assert {*BROUGHT} <= ours and ours - {"flash_kmeans", "flash_attn"} <= {*EXTRAS}


def test_the_operations_load_nothing_beside_torch():
    code = """
import sys, torch
before = set(sys.modules)
import stable_rlhf.ops as ops
new = set(sys.modules) - before
print(*sorted({name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)))
print("torch._dynamo" in new)  # torch's compiler: seconds
print(ops.gae(torch.ones(2), torch.zeros(2), torch.tensor([0, 2]), lam=1.0)[0].tolist())
"""
    assert light(code).worked().out.splitlines() == ["stable_rlhf", "False", "[2.0, 1.0]"]


def test_the_choice_of_a_backend_is_a_constant_to_torchs_compiler():
    """Marked without its decorator, which would import the compiler."""
    import torch

    from stable_rlhf.ops.backends import _traced_choice

    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) and vars(marked) == vars(_traced_choice)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["env"], []])
def test_light_what_needs_no_library_works(arguments):
    done = light_command(*arguments)
    assert done.code == (0 if arguments else 2) and "error" not in done.err and "Traceback" not in done.err, done
    assert (done.out or done.err).startswith({"--version": "0.", "env": "[versions]"}.get("".join(arguments), "usage:"))


def test_light_every_command_names_the_extra():
    """All of them in one process, since starting one takes seconds."""
    code = """
import sys
from stable_rlhf.cli.commands import main
for command in sys.argv[1:]:
    for flags in ([], ["--help"]):
        try:
            main([command, *flags])
        except SystemExit as end:
            print(end.code)
"""
    done = light(code, *COMMANDS)
    assert done.code == 0 and done.out.split() == ["2"] * 20, done
    lines = done.err.splitlines()
    assert lines == [
        f"stable-rlhf: error: {name} needs stable-rlhf[train] (transformers is missing): "
        "pip install 'stable-rlhf[train]'"
        for name in COMMANDS
        for _ in range(2)
    ]


def test_light_an_unknown_command_is_told_as_ever():
    light_command("train-pp").refused("unknown command 'train-pp'; did you mean 'train-ppo'?")


@pytest.mark.parametrize(
    "statement, who, extra",
    [
        ("from stable_rlhf.scorer import AdvantageModel", "stable_rlhf.scorer", "train"),
        ("import stable_rlhf.policy.ppo", "stable_rlhf.policy", "train"),
        ("import stable_rlhf.models.policy", "stable_rlhf.models", "train"),
        ("from stable_rlhf.rehearsal import select_file; select_file('none', 'none')", "select_file", "train"),
        ("from stable_rlhf.rehearsal import embed_texts; embed_texts(['a'], model='.')", "an embedding model", "embed"),
        (
            "import numpy; from stable_rlhf.rehearsal import cluster_embeddings; cluster_embeddings(numpy.eye(4), 2)",
            "cluster_embeddings",
            "train",
        ),
        ("from stable_rlhf.world import build_tokenizer; build_tokenizer()", "a generated world's model", "train"),
    ],
)
def test_light_an_import_names_the_extra(statement, who, extra):
    done = light(statement)
    last = done.err.rstrip().splitlines()[-1]
    assert done.code == 1 and f"{who} needs stable-rlhf[{extra}] (" in last, done.err
    assert last.endswith(f": pip install 'stable-rlhf[{extra}]'")


def test_light_a_library_missed_on_the_way_is_told_with_its_extra(monkeypatch, capsys, tmp_path):
    """As faiss is, which only one setting of the selection asks for."""
    from stable_rlhf.cli import commands

    def missing(recipe, own):
        raise ModuleNotFoundError("No module named 'faiss'", name="faiss")

    monkeypatch.setitem(commands._COMMANDS, "sft", missing)
    with pytest.raises(SystemExit) as end:
        commands.main(["sft", "--output-dir", str(tmp_path)])
    assert end.value.code == 2
    said = "sft needs stable-rlhf[embed] (faiss is missing): pip install 'stable-rlhf[embed]'"
    assert said in capsys.readouterr().err


def test_without_the_cpp_module_pytorch_serves_and_says_so_once():
    code = """
import sys, warnings
sys.modules["stable_rlhf._C"] = None
warnings.simplefilter("always")
import torch, stable_rlhf.ops as ops
for _ in range(2):
    print(ops.gae(torch.ones(2), torch.zeros(2), torch.tensor([0, 2]), lam=1.0)[0].tolist())
    ops.linear_logprob(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1]))
print({*ops.backend_report("cpu").values()})
"""
    done = light(code).worked()
    assert done.out.splitlines() == ["[2.0, 1.0]", "[2.0, 1.0]", "{'torch'}"]
    assert done.err.count("runs on the CPU without its C++ module, by PyTorch and more slowly") == 1, done.err
