"""The default type and device are the caller's: no operation takes them for its own buffers."""

from __future__ import annotations

import ast
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import stable_rlhf
import stable_rlhf.kernels
import stable_rlhf.ops as ops
from helpers.every_op import CASES, run
from helpers.forks import run_interpreted
from helpers.interpreter import INTERPRETED, not_interpreted
from stable_rlhf.ops.backends import extension

needs_cpp = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
NAMES = ["swav_loss", "token_rewards", "advantage_loss", "policy_loss"] if INTERPRETED else list(CASES)
BACKENDS = ["triton"] if INTERPRETED else ["torch", pytest.param("cpu", marks=needs_cpp)]


# Interpreted kernels are slow, and the second takes every default away at once.
@pytest.fixture(params=["bfloat16"] if INTERPRETED else ["float64", "bfloat16"])
def other_defaults(request):
    """A block with other defaults than PyTorch's: type and device, or the type alone."""

    @contextmanager
    def block():
        torch.set_default_dtype(getattr(torch, request.param))
        try:
            with torch.device("meta") if request.param == "bfloat16" else nullcontext():
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    return block()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["swav_loss", "token_rewards", "advantage_loss", "policy_loss"] if INTERPRETED else CASES
)
def test_bits_are_those_of_the_usual_defaults(name, backend, other_defaults):
    with ops.backend(backend):
        want = run(CASES[name])
        with other_defaults:
            got = run(CASES[name])
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "frombuffer", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip
# Modules that hold parameters, whose type follows the default too. Their device is left to whoever builds a model.
MODULES = {"Linear", "Embedding", "LayerNorm", "RMSNorm", "Conv1d"}


def nameless(tree: ast.AST) -> list[tuple[int, str]]:
    """Calls that leave a type or a device to the defaults: line and what is missing."""
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        owner = ast.unparse(call.func.value)
        if owner == "torch" and call.func.attr in FACTORIES:
            wanted = {"dtype", "device"} - ({"device"} if call.func.attr == "frombuffer" else set())
        elif owner == "torch" and call.func.attr == "Generator":
            wanted = {"device"}
        elif owner in ("nn", "torch.nn") and call.func.attr in MODULES:
            wanted = {"dtype"}
        else:
            continue
        given = {keyword.arg for keyword in call.keywords}
        if call.func.attr == "Generator" and call.args:
            continue
        if wanted - given:
            found.append((call.lineno, f"{owner}.{call.func.attr} without {' and '.join(sorted(wanted - given))}"))
    return found


# Sized on the meta device alone: nothing is computed there.
ALLOWED = {"launch/memory.py": ["nn.Linear without dtype"]}


@not_interpreted
def test_every_tensor_is_made_with_a_type_and_a_device():
    package, kernels = Path(stable_rlhf.__file__).parent, Path(stable_rlhf.kernels.__file__).parent
    files = {file.relative_to(package).as_posix(): file for file in package.rglob("*.py")}
    files |= {f"kernels/{file.name}": file for file in kernels.glob("*.py")}
    found = {}
    for name, file in files.items():
        calls = nameless(ast.parse(file.read_text(encoding="utf-8")))
        wrong = [f"line {line}: {what}" for line, what in calls if what not in ALLOWED.get(name, [])]
        if wrong:
            found[name] = wrong
    assert len(files) > 80 and not found


@not_interpreted
def test_the_rule_sees_what_is_missing():
    lines = ["torch.zeros(3)", "torch.arange(3, device=d)", "torch.full((), 1, dtype=t, device=d)", "nn.Linear(2, 1)"]
    assert nameless(ast.parse("\n".join(lines))) == [
        (1, "torch.zeros without device and dtype"),
        (2, "torch.arange without dtype"),
        (4, "nn.Linear without dtype"),
    ]
