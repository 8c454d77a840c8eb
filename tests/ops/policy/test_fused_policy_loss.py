"""The fused policy losses on the CPU against the plain PyTorch form in float64, over shapes, types and options."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig, memory
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.policy import products, small_call

pytestmark = pytest.mark.skipif(extension() is None, reason="the C++ module is not installed")

ISAS = extension().isa_names() if extension() is not None else []
INPUTS = ("hidden", "weight", "bias")
PER_ROW = ("old_logprob", "advantage", "ref_logprob", "row_weight")


@pytest.fixture
def in_chunks(monkeypatch):
    """A small call goes the way of large ones."""
    monkeypatch.setattr(small_call, "loss_and_gradients", lambda call: None)


@st.composite
def cases(draw):
    """A call of linear_policy_loss: inputs that fit, and every option on or off."""
    rows = draw(st.sampled_from([0, 1, 2, 3, 7, 16, 33, 63]))
    vocabulary = draw(st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 33, 127, 1000, 1031, 2049]))
    width = draw(st.sampled_from([1, 3, 8, 24]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 4.0]))
    config = PolicyLossConfig(
        clip_low=draw(st.sampled_from([0.0, 0.1, 0.2, 1.0])),
        clip_high=draw(st.sampled_from([0.0, 0.2, 0.5])),
        dual_clip=draw(st.sampled_from([None, 1.5])),
        kl_coef=draw(st.sampled_from([0.0, 0.0, 0.3])),
        kl_estimator=draw(st.sampled_from(["k2", "k3"])),
        entropy_coef=draw(st.sampled_from([0.0, 0.0, 0.1])),
        rehearsal_coef=draw(st.sampled_from([0.0, 0.01, 1.0])),
        softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        log_ratio_clamp=draw(st.sampled_from([20.0, 0.5])),
    )
    kinds = torch.tensor(draw(st.sampled_from([[0, 1, 2], [1], [2], [0, 1], [1, 2], [0]])))
    pick = kinds[torch.randint(0, len(kinds), (rows,), generator=g)]
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    weight = (scale * torch.randn(vocabulary, width, generator=g) / math.sqrt(width)).to(dtype)
    here = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, target[:, None])[:, 0].float()
    target[torch.rand(rows, generator=g) < 0.1] = -100
    optional = lambda value: value if draw(st.booleans()) else None  # noqa: E731
    call = {
        "hidden": hidden,
        "weight": weight,
        "bias": optional((0.3 * torch.randn(vocabulary, generator=g)).to(dtype)),
        "target": target,
        "kind": optional(pick.to(draw(st.sampled_from([torch.int64, torch.int8])))),
        "old_logprob": here + 0.4 * torch.randn(rows, generator=g),
        "advantage": torch.randn(rows, generator=g) * (torch.rand(rows, generator=g) > 0.2),
        "ref_logprob": here + 0.7 * torch.randn(rows, generator=g),
        "row_weight": optional(torch.rand(rows, generator=g) + 0.2),
        "temperature": draw(st.sampled_from([1.0, 0.7]))
        if draw(st.booleans())
        else torch.rand(rows, generator=g) + 0.5,
        "policy_denominator": draw(st.sampled_from([None, 17.0, torch.tensor(5)])),
        "rehearsal_denominator": draw(st.sampled_from([None, 9.0])),
        "workspace_bytes": draw(st.sampled_from([1, 7 * vocabulary * 4, 256 << 20])),
        "config": config,
    }
    return call, draw(st.sampled_from(ISAS))


def run(call: dict, backend: str, dtype: torch.dtype | None = None):
    """(output, gradients) of the call on a backend, its inputs in `dtype` first."""
    call = dict(call)
    leaves = {n: call[n].to(dtype or call[n].dtype).clone().requires_grad_() for n in INPUTS if call[n] is not None}
    if isinstance(call["temperature"], torch.Tensor) and dtype is not None:
        call["temperature"] = call["temperature"].to(dtype)
    call.update(leaves)
    with ops.backend(backend):
        out = ops.linear_policy_loss(call.pop("hidden"), call.pop("weight"), call.pop("target"), **call)
    out.loss.backward()
    return out, {n: leaf.grad for n, leaf in leaves.items()}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm())


def poison() -> None:
    """What the buffer between calls holds must never reach a result: fill it with NaN."""
    ops.release_workspace()
    memory.workspace(1, 70_000, torch.float32, torch.device("cpu")).fill_(math.nan)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_as_good_as_plain_pytorch(drawn):
    call, isa = drawn
    dtype = call["hidden"].dtype
    want, want_grads = run(call, "torch", torch.float64)
    plain, plain_grads = run(call, "torch")
    poison()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STABLE_RLHF_CPU_ISA", isa)
        got, got_grads = run(call, "cpu")
    unit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    pairs = [(getattr(got, n), getattr(plain, n), getattr(want, n)) for n in ("loss", "logprob", "entropy")]
    pairs += [(got_grads[n], plain_grads[n], want_grads[n]) for n in want_grads]
    for value, theirs, truth in pairs:
        assert value.shape == truth.shape and value.dtype == theirs.dtype
        size = float(truth.double().norm())
        if dtype == torch.float32:
            assert distance(value, truth) <= 1e-5 * max(size, 1e-2)
        else:
            # Where every logit is exact in 16 bits plain PyTorch can be lucky: a rounding of the result is always ours.
            assert distance(value, truth) <= 1.25 * distance(theirs, truth) + unit * size + 1e-6
    for name in want.metrics:
        value, theirs, truth = (float(out.metrics[name]) for out in (got, plain, want))
        if dtype == torch.float32:
            assert value == pytest.approx(truth, rel=1e-4, abs=1e-5), name
        else:  # a row at a clip's edge may fall to either side
            assert value == pytest.approx(theirs, rel=0.1, abs=0.05), name
    inactive = call["target"] == -100
    if call["kind"] is not None:
        inactive |= call["kind"] == 0
    assert not got_grads["hidden"][inactive].any() and not got.logprob[inactive].any()


def example(rows: int = 40, vocabulary: int = 300, width: int = 16, dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    call = {
        "hidden": torch.randn(rows, width, generator=g).to(dtype),
        "weight": (torch.randn(vocabulary, width, generator=g) / 4).to(dtype),
        "bias": None,
        "target": torch.randint(0, vocabulary, (rows,), generator=g),
        "kind": torch.randint(0, 3, (rows,), generator=g),
        "old_logprob": torch.full((rows,), -math.log(vocabulary)),
        "advantage": torch.randn(rows, generator=g),
        "temperature": 1.0,
        "config": PolicyLossConfig(rehearsal_coef=0.5),
    }
    return call


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_agrees(isa, dtype, monkeypatch):
    g = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(9, 2051, generator=g)).to(dtype).requires_grad_()
    target, ones = torch.randint(0, 2051, (9,), generator=g), torch.ones(9)
    config = PolicyLossConfig(softcap=8.0, entropy_coef=0.1, kl_coef=0.2)

    def call():
        logits.grad = None
        out = ops.policy_loss(
            logits, target, old_logprob=-5 * ones, ref_logprob=-6 * ones, advantage=ones, config=config
        )
        out.loss.backward()
        return out, logits.grad

    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", "baseline")
    want, want_grad = call()
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    got, got_grad = call()
    torch.testing.assert_close(got.logprob, want.logprob, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got_grad, want_grad)


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="sse9"):
        run(example(), "cpu")


def test_rows_are_read_and_written_up_to_their_end_and_no_further():
    """A row between two others of NaN: reading them would poison the result, writing them is seen."""
    for vocabulary in (1, 3, 4, 5, 7, 8, 9, 31, 1023, 1024, 1025, 1029):
        buffer = torch.full((3, vocabulary + 2), math.nan)
        buffer[1, 1:-1] = torch.linspace(-3, 3, vocabulary)
        logits = buffer[:, 1:-1][1:2].requires_grad_()
        whole = torch.full((1, vocabulary + 2), math.nan)
        from stable_rlhf.ops.policy import cpu
        from stable_rlhf.ops.policy.formula import RowState, gather_terms, select_rows
        from stable_rlhf.ops.policy.types import PolicyCall

        config = PolicyLossConfig(rehearsal_coef=1.0)
        call = PolicyCall(logits, None, None, torch.tensor([0]), 1.0, config, torch.tensor([2]))
        rows = select_rows(call, vocabulary)
        terms = gather_terms(rows, call, torch.float32)
        state = RowState.of(rows)
        cpu.policy(logits.detach(), whole[:, 1:-1], state, rows.kind, terms, config)
        expected = torch.softmax(logits.detach(), -1)
        expected[0, 0] -= 1
        torch.testing.assert_close(whole[:, 1:-1], expected, rtol=1e-6, atol=1e-7)
        assert whole[0, 0].isnan() and whole[0, -1].isnan()


def test_rows_without_a_gradient_reach_no_backward_product(in_chunks, monkeypatch):
    call = example(rows=60)
    call["kind"] = torch.ones(60, dtype=torch.int64)
    call["advantage"][::2] = 0.0
    seen = []
    backward = products.HeadProducts.backward
    monkeypatch.setattr(
        products.HeadProducts,
        "backward",
        lambda self, part, gradient, *rest: seen.append(len(gradient)) or backward(self, part, gradient, *rest),
    )
    got, grads = run(call, "cpu")
    want, want_grads = run(call, "torch", torch.float64)
    assert 0 < sum(seen) <= 30
    torch.testing.assert_close(grads["weight"].double(), want_grads["weight"], rtol=1e-4, atol=1e-7)
    assert not grads["hidden"][::2].any()
    assert got.metrics["clip_fraction"] == float(want.metrics["clip_fraction"])


def test_only_asked_for_products_are_made(in_chunks, monkeypatch):
    made = []
    for name in ("_add_hidden", "_add_weight"):
        original = getattr(products.HeadProducts, name)
        monkeypatch.setattr(
            products.HeadProducts, name, lambda self, *a, f=original, n=name: made.append(n) or f(self, *a)
        )
    call = example()
    hidden, weight, target = call.pop("hidden"), call.pop("weight"), call.pop("target")
    ops.linear_policy_loss(hidden, weight, target, **call)
    with torch.no_grad():
        ops.linear_policy_loss(hidden.requires_grad_(), weight.requires_grad_(), target, **call)
    assert made == []
    ops.linear_policy_loss(hidden, weight.detach(), target, **call)
    assert set(made) == {"_add_hidden"}


def test_two_runs_give_the_same_bits():
    call = example(rows=200, vocabulary=1031)
    first, second = run(call, "cpu"), run(call, "cpu")
    assert torch.equal(first[0].loss, second[0].loss)
    assert all(torch.equal(first[1][n], second[1][n]) for n in first[1])


def test_upstream_gradients_accumulate_and_retained_graphs_stay_right():
    call = example()
    _, grads = run(call, "cpu")
    hidden, weight = (call.pop(n).clone().requires_grad_() for n in ("hidden", "weight"))
    target = call.pop("target")
    out = ops.linear_policy_loss(hidden, weight, target, **call)
    for upstream in (1.0, 1.0, 2.5):  # scaling in place, or sharing memory with .grad, would break the later ones
        (out.loss * upstream).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 4.5 * grads["weight"])
    torch.testing.assert_close(hidden.grad, 4.5 * grads["hidden"])
    out.loss.backward()
    torch.testing.assert_close(weight.grad, 5.5 * grads["weight"])
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


def test_used_twice_in_one_graph():
    call = example()
    _, grads = run(call, "cpu")
    hidden, weight = (call.pop(n).clone().requires_grad_() for n in ("hidden", "weight"))
    target = call.pop("target")
    total = sum(factor * ops.linear_policy_loss(hidden, weight, target, **call).loss for factor in (1.0, -3.0))
    total.backward()
    torch.testing.assert_close(weight.grad, -2.0 * grads["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logprob_gradients(dtype):
    call = example(dtype=dtype, rows=50)
    call["target"][::7] = -100
    g = torch.Generator().manual_seed(5)
    weights = torch.randn(2, 50, generator=g)

    def gradients(backend, dtype, workspace=256 << 20):
        leaves = [call[n].to(dtype).clone().requires_grad_() for n in ("hidden", "weight")]
        with ops.backend(backend):
            logprob, entropy = ops.linear_logprob(
                *leaves, call["target"], temperature=0.8, softcap=5.0, entropy=True, workspace_bytes=workspace
            )
        (logprob * weights[0] + entropy * weights[1]).sum().backward()
        return [logprob.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]

    truth, plain = gradients("torch", torch.float64), gradients("torch", dtype)
    for workspace in (256 << 20, 300 * 4 * 9):
        for got, theirs, want in zip(gradients("cpu", dtype, workspace), plain, truth, strict=True):
            allowed = 1e-5 * float(want.norm()) if dtype == torch.float32 else 1.25 * distance(theirs, want)
            assert distance(got, want) <= allowed


def test_threads_do_not_share_the_buffer():
    call = example(rows=300, vocabulary=2000)
    want = run(call, "cpu")[1]["weight"]
    failures = []

    def work():
        for _ in range(5):
            if not torch.equal(run(call, "cpu")[1]["weight"], want):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_memory_beyond_inputs_and_gradients_is_the_workspace():
    """Everything that PyTorch allocates during a call in several chunks, at its highest."""
    rows, vocabulary, width = 512, 4096, 64
    call = example(rows=rows, vocabulary=vocabulary, width=width)
    call["workspace_bytes"] = 64 * vocabulary * 4
    leaves = [call.pop(n).requires_grad_() for n in ("hidden", "weight")]
    target = call.pop("target")
    ops.release_workspace()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = ops.linear_policy_loss(*leaves, target, **call)
    sizes = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]  # each carries the bytes allocated (positive) or given back
    now = peak = 0
    for event in sizes:
        now += event.nbytes()
        peak = max(peak, now)
    gradients = sum(leaf.numel() * 4 for leaf in leaves)
    assert gradients < peak <= gradients + 1.05 * call["workspace_bytes"] + 64 * rows
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out.loss.backward()  # hands the gradients over as they are
    events = profile.profiler.kineto_results.events()
    assert sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0) < 1000


def test_peaked_rows_keep_their_digits():
    """A target that the policy is nearly sure of: 1 - p is made of what float32 loses beside 1."""
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(500, 48, generator=g) / 48**0.5
    target = torch.randint(0, 400, (20,), generator=g)
    call = example()
    call |= {"weight": weight, "hidden": 22 * weight[target] + torch.randn(20, 48, generator=g), "target": target}
    call |= {n: call[n][:20] for n in ("kind", "old_logprob", "advantage")} | {"temperature": 0.9}
    want = run(call, "torch", torch.float64)[1]
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STABLE_RLHF_CPU_ISA", isa)
            got = run(call, "cpu")[1]
        assert all(distance(got[n], want[n]) <= 1e-5 * float(want[n].norm()) for n in want)
