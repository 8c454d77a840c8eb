"""torch.compile traces through every operation in one graph, on every backend, with or without the C++ module; and the
operators that stand for them keep PyTorch's own rules."""

from __future__ import annotations

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import stable_rlhf.ops as ops
from helpers.every_op import CASES, cases, run
from helpers.forks import run_interpreted
from helpers.interpreter import INTERPRETED, not_interpreted
from stable_rlhf.ops import backends, operators, sequence, topk
from stable_rlhf.ops.advantage import fused as advantage_fused
from stable_rlhf.ops.advantage import loss as advantage_loss
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.policy import loss as policy_loss

needs_cpp = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
# Others pass through the same code in another type.
FIRST = [name for name, case in CASES.items() if name == case.op]
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(params=["triton"] if INTERPRETED else ["torch", pytest.param("cpu", marks=needs_cpp)])
def backend(request, monkeypatch):
    """The C++ module, an installation without it, or the interpreter."""
    if request.param == "torch":
        monkeypatch.setattr(backends, "extension", lambda: None)
        assert set(ops.backend_report("cpu").values()) == {"torch"}
    torch._dynamo.reset()
    with ops.backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", FIRST if INTERPRETED else NAMES)
def test_one_graph_and_the_same_bits(name, backend):
    case = CASES[name]
    want = run(case)
    got = run(case, torch.compile(case.call, fullgraph=True, backend="aot_eager"))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@not_interpreted
@pytest.mark.slow
def test_inductor(backend):
    def step(hidden, weight, target, score, cluster):
        out = ops.linear_policy_loss(torch.tanh(hidden), weight, target, torch.full_like(target, 2))
        return 2.0 * out.loss + ops.info_nce(hidden, hidden.flip(0)), ops.topk_by_cluster(score, cluster, 2, 2)

    g = torch.Generator(device="cpu").manual_seed(3)
    target, cluster = torch.tensor([0, 5, -100, 2]), torch.tensor([0, 1, 1, 1])
    made = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [torch.randn(n, 3, generator=g.manual_seed(n)).requires_grad_() for n in (4, 7)]
        loss, kept = function(*leaves, target, torch.arange(4.0), cluster)
        loss.backward()
        made.append([loss.detach(), kept, *(leaf.grad for leaf in leaves)])
    for x, y in zip(*made, strict=True):
        torch.testing.assert_close(x, y)


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_inductor_of_every_operation(name, backend):
    case = CASES[name]
    for x, y in zip(run(case, torch.compile(case.call, fullgraph=True)), run(case), strict=True):
        torch.testing.assert_close(x, y)


@not_interpreted
@pytest.mark.parametrize("name", FIRST)
def test_operators_promise_the_strides_they_give(name, backend, calls):
    """Columns first or with gaps, as torch.compile's own code asserts of what an operator gives."""
    case = CASES[name]
    leaves = [x.t().contiguous().t() if x.ndim == 2 else torch.stack([x, x], -1)[..., 0] for x in case.leaves]
    made = case.call(*(leaf.detach().requires_grad_() for leaf in leaves))
    if case.losses:
        torch.autograd.backward([x.sum() for x in made[: case.losses]], retain_graph=True)
    assert calls
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


@not_interpreted
@pytest.mark.parametrize("name", FIRST)
def test_tracers_that_see_operators_alone(name, backend):
    """make_fx over plain tensors: a kernel that it does not see must not leave its empty output in the graph."""
    case = CASES[name]
    with torch.no_grad():
        traced = make_fx(case.call)(*case.leaves)
        others = [leaf.flip(0) for leaf in case.leaves]
        for got, want in zip(traced(*others), case.call(*others), strict=True):
            assert torch.equal(got, want)


@not_interpreted
def test_sizes_and_numbers_that_change(backend):
    def step(hidden, weight, target, temperature, margin, bounds):
        logprob, _ = ops.linear_logprob(hidden, weight, target, temperature=temperature)
        loss = ops.advantage_loss(logprob, margin=margin).loss
        return loss, ops.gae(logprob, logprob, bounds)[0], ops.topk_by_cluster(logprob, target, 7, 1)

    g = torch.Generator(device="cpu").manual_seed(4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.randn(7, 3, generator=g)
    for rows in (4, 6, 10):
        inputs = torch.randn(rows, 3, generator=g), weight, torch.randint(7, (rows,), generator=g)
        more = torch.tensor(1.0 + 1.0 / rows), torch.tensor(0.5 * rows), torch.tensor([0, 3, rows])
        for got, want in zip(compiled(*inputs, *more), step(*inputs, *more), strict=True):
            torch.testing.assert_close(got, want)


@not_interpreted
def test_wrong_values_are_told_from_compiled_code(backend):
    compiled = torch.compile(ops.gae, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="reward: non-finite value nan at position 1"):
        compiled(torch.tensor([0.0, torch.nan]), torch.zeros(2), torch.tensor([0, 2]))
    assert torch.is_grad_enabled()


@pytest.fixture
def calls(monkeypatch):
    """The calls of operators, where everything goes through them."""
    seen: list[tuple[CustomOpDef, tuple[object, ...]]] = []
    original = CustomOpDef.__call__
    for module in (advantage_loss, advantage_fused, operators, policy_loss, sequence, topk):
        monkeypatch.setattr(module, "needs_operator", lambda *_: True)
    monkeypatch.setattr(CustomOpDef, "__call__", lambda op, *a: (seen.append((op, a)), original(op, *a))[1])
    return seen


@pytest.mark.parametrize("name", FIRST if INTERPRETED else NAMES)
def test_operators_keep_torchs_rules(name, backend, calls, monkeypatch):
    run(CASES[name])
    assert calls
    if "policy_loss" in name:
        # The last backward scales its gradients where they lie, here by -1 where the loss is negative. opcheck holds
        # all that an operator gives, gradients as well, and would see them change; nobody else can.
        monkeypatch.setattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    for op, arguments in calls:
        last = op._name.endswith("_backward")  # nothing is derived from it
        leaves = (
            x.detach().requires_grad_(x.requires_grad and not last) if torch.is_tensor(x) else x for x in arguments
        )
        torch.library.opcheck(op, tuple(leaves))


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.skipif(not backends._has_triton(), reason="needs Triton")
@pytest.mark.parametrize("name", CASES)
def test_shapes_without_values(name, monkeypatch):
    """What torch.compile and memory estimates see of the Triton backend: shapes and types. No kernel runs."""
    want = run(CASES[name])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with FakeTensorMode(shape_env=ShapeEnv()), ops.backend("triton"):
        got = run(cases()[name])
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype and x.ndim == y.ndim
        if name != "topk_by_cluster":  # whose size is data
            assert x.shape == y.shape
