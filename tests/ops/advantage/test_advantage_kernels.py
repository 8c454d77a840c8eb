"""advantage_loss and advantage_score by C++ and Triton against the plain PyTorch form in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import (
    INTERPRETED,
    Synchronised,
    accesses_checked,
    interpreted,
    interrupted,
    no_synchronisation,
    not_interpreted,
)
from stable_rlhf.ops.advantage import fused
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.flags import notes, tell

cpp = pytest.mark.skipif(extension() is None or INTERPRETED, reason="needs the C++ module; the other process does it")
ISAS = extension().isa_names() if extension() is not None else []
FIGURES = ("score", "ranking_loss", "upper_bound_loss", "lower_bound_loss", "accuracy", "effective_sample_size",
           "sign_flip_share", "bound_violation_share")  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@not_interpreted
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__)


@st.composite
def cases(draw, most_tokens=40):
    """A call of advantage_loss with every option on or off."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    responses = draw(st.sampled_from([0, 1, 2, 3, 6, 17, 64, 600]))
    scale = draw(st.sampled_from([0.1, 2.0, 30.0]))
    call = {"reward": scale * torch.randn(responses, generator=g)}
    listed = draw(st.booleans()) or responses % 2 == 1
    count = responses // 2
    if listed:
        count = draw(st.sampled_from([0, 1, 5, 300])) if responses else 0
        call["pairs"] = torch.randint(0, max(responses, 1), (count, 2), generator=g)
    expected = draw(st.sampled_from(["none", "given", "default"]))
    if expected == "default":
        if listed:  # every response in one pair
            count = responses // 2
            call["reward"] = call["reward"][: 2 * count]
            responses = 2 * count
            call["pairs"] = torch.randperm(responses, generator=g).reshape(-1, 2)
        call["expected"] = torch.randn(count, generator=g)
    elif expected == "given":
        prompts = draw(st.sampled_from([1, 3, 40]))
        call["expected"] = torch.randn(prompts, generator=g)
        call["prompt"] = torch.randint(0, prompts, (responses,), generator=g)

    def number_or_many(low, high, size):
        if draw(st.booleans()):
            return low + (high - low) * torch.rand(size, generator=g)
        return draw(st.sampled_from([low, high]))

    call["margin"] = None if draw(st.booleans()) else number_or_many(0.5, 2.5, responses)
    call["rank_margin"] = number_or_many(0.0, 1.0, count)
    call["label_smoothing"] = number_or_many(0.0, 1.0, count)
    call["pair_weight"] = number_or_many(0.1, 1.0, count) if draw(st.booleans()) else None
    alternates = draw(st.sampled_from([0, 1, 4]))
    if alternates:
        lengths = torch.randint(0, most_tokens, (responses,), generator=g)
        lengths[torch.rand(responses, generator=g) < 0.2] = 1
        tokens = int(lengths.sum())
        call["logprob"] = -5 * torch.rand(tokens, generator=g)
        call["alt_logprob"] = call["logprob"] + 0.5 * torch.randn(alternates, tokens, generator=g)
        call["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        call["weight_mode"] = draw(st.sampled_from(["length_normalized", "sequence"]))
        call["max_weight"] = draw(st.sampled_from([1.0, 3.0, 1e4]))
        call["num_policies"] = draw(st.sampled_from([None, alternates, alternates + 3]))
    return call


def run(call, backend, dtype=torch.float32):
    """(output, gradients) with every floating tensor in `dtype`."""
    call = {
        n: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in call.items()
    }  # fmt: skip
    leaves = {n: call[n].clone().requires_grad_() for n in ("reward", "expected") if n in call}
    with ops.backend(backend):
        out = ops.advantage_loss(**{**call, **leaves})
    out.loss.backward()
    return out, {n: leaf.grad for n, leaf in leaves.items()}


def compare(call, backend, dtype=torch.float32):
    want, want_grads = run(call, "torch", torch.float64)
    got, grads = run(call, backend, dtype)
    near = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(got.loss.double(), want.loss, **near)
    for name in FIGURES:
        value, truth = getattr(got, name), getattr(want, name)
        # A score exactly at its bound, or two that are equal, may fall to either side in float32.
        counted = dtype == torch.float32 and ("share" in name or name == "accuracy")
        allowed = {"rtol": 1e-3, "atol": 0.02} if counted else near
        torch.testing.assert_close(value.double(), truth, **allowed, msg=lambda text, name=name: f"{name}: {text}")
        assert value.dtype == dtype and not value.requires_grad
    # What reaches e(x) is a sum over responses that may cancel: their gradients are its measure.
    size = max((float(truth.abs().max()) for truth in want_grads.values() if truth.numel()), default=0.0)
    unit = 1e-16  # integers stand for the sums in Triton: the smallest one, for a loss of order 1
    for name, truth in want_grads.items():
        torch.testing.assert_close(grads[name].double(), truth, rtol=near["rtol"], atol=near["rtol"] * size + unit)


OPTIONS = {
    "phases": [Phase.generate],
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


@cpp
@settings(max_examples=150, **OPTIONS)
@given(cases(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(ISAS))
def test_cpp(call, dtype, isa):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STABLE_RLHF_CPU_ISA", isa)
        compare(call, "cpu", dtype)


@interpreted
@settings(max_examples=25, **OPTIONS)
@given(cases(), st.sampled_from([torch.float32, torch.float64]))
def test_triton(call, dtype):
    compare(call, "triton", dtype)


BACKENDS = [
    pytest.param("cpu", marks=cpp),
    pytest.param("triton", marks=interpreted),
]


def packed(lengths, alternates=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logprob = -5 * torch.rand(tokens, generator=g)
    return {
        "logprob": logprob,
        "alt_logprob": logprob + 0.5 * torch.randn(alternates, tokens, generator=g),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lengths", [[1, 1], [0, 0], [5000, 1], [0, 3000, 0, 1024], [1023, 1025, 2048, 1], [1] * 30]
)  # fmt: skip
def test_lengths(lengths, backend):
    """Pieces of every kind: whole tiles, ends inside and on them, many responses in one, none at all."""
    call = {"reward": torch.linspace(-1, 2, len(lengths)), **packed(lengths)}
    compare(call, backend)
    compare({**call, "weight_mode": "sequence", "max_weight": 2.0}, backend)


@cpp
def test_pieces_of_a_long_response(monkeypatch):
    """Longer than what one thread takes at a time; and the same bits with one thread and two."""
    call = {"reward": torch.tensor([1.0, -0.5, 0.3, 2.0]), **packed([70_000, 3, 0, 40_000])}
    compare(call, "cpu")
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run(call, "cpu"))
    assert torch.equal(results[0][0].score, results[1][0].score)
    assert torch.equal(results[0][1]["reward"], results[1][1]["reward"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_packing_order_changes_nothing(backend):
    lengths = [3, 1500, 0, 40, 2, 700]
    call, order = packed(lengths), [4, 0, 5, 2, 1, 3]
    reward = torch.randn(6, generator=torch.Generator().manual_seed(1))
    rows = [slice(int(a), int(b)) for a, b in zip(call["cu_seqlens"], call["cu_seqlens"][1:])]  # noqa: B905
    moved = {
        "logprob": torch.cat([call["logprob"][rows[i]] for i in order]),
        "alt_logprob": torch.cat([call["alt_logprob"][:, rows[i]] for i in order], dim=1),
        "cu_seqlens": torch.tensor([0, *(lengths[i] for i in order)]).cumsum(0),
    }
    with ops.backend(backend):
        score = ops.advantage_score(reward, **call)
        other = ops.advantage_score(reward[order], **moved)
    assert torch.equal(other, score[order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1e4, -1e4])
def test_log_ratios_of_ten_thousand(ratio, backend):
    """Clamped above; below, every weight underflows, and the effective sample size still stands."""
    logprob = torch.full((4,), -1.0)
    call = {"reward": torch.tensor([1.0, -1.0, 0.5, 0.2]), "logprob": logprob, "cu_seqlens": torch.arange(5)}
    call["alt_logprob"] = (logprob - ratio * torch.tensor([1.0, 1.0, 1.5, 1.0])).expand(2, 4).contiguous()
    out, _ = run({**call, "weight_mode": "sequence"}, backend)
    slope = 1 / 3 if ratio > 0 else 1.0
    torch.testing.assert_close(out.score, slope * call["reward"])
    assert float(out.effective_sample_size) == pytest.approx(4.0 if ratio > 0 else 3.0)
    assert math.isfinite(float(out.loss.detach()))


@cpp
@pytest.mark.parametrize("isa", ISAS)
def test_the_exponential_of_every_log_ratio(isa, monkeypatch):
    """One alternate of one policy and reward 1: the score is 1 - w, over all log-ratios that a call may have."""
    monkeypatch.setenv("STABLE_RLHF_CPU_ISA", isa)
    log_ratio = torch.cat(
        [torch.linspace(-760, 80, 8001), torch.tensor([-745.2, -708.4, -700.01, -1e-9, 0.0])]
    ).double()
    rows = len(log_ratio)
    with ops.backend("cpu"):
        score = ops.advantage_score(
            torch.ones(rows, dtype=torch.float64), num_policies=1, weight_mode="sequence", max_weight=None,
            logprob=log_ratio, alt_logprob=torch.zeros(1, rows, dtype=torch.float64), cu_seqlens=torch.arange(rows + 1),
        )  # fmt: skip
    weight = [math.exp(x) for x in log_ratio.tolist()]
    worst = max(abs(1 - s - w) / max(1.0, w) for s, w in zip(score.tolist(), weight, strict=True))
    assert worst <= 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend):
    """A response in many pairs, prompts with many responses: sums whose order must not depend on threads."""
    g = torch.Generator().manual_seed(3)
    call = {
        "reward": torch.randn(50, generator=g), "expected": torch.randn(4, generator=g),
        "prompt": torch.randint(0, 4, (50,), generator=g), "pairs": torch.randint(0, 50, (700, 2), generator=g),
        "pair_weight": torch.rand(700, generator=g),
    }  # fmt: skip
    (first, grads), (second, again) = run(call, backend), run(call, backend)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(grads[n], again[n]) for n in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_and_its_gradients(backend):
    g = torch.Generator().manual_seed(5)
    reward = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    expected = torch.randn(3, generator=g, dtype=torch.float64, requires_grad=True)
    prompt = torch.tensor([2, 0, 0, 1, 2])
    call = packed([4, 1, 0, 1030, 2])
    with ops.backend(backend):
        for given_ in (
            {"prompt": prompt, **call},
            {"prompt": prompt, "num_policies": 5, "num_alternates": 2},
        ):
            assert torch.autograd.gradcheck(lambda r, e, a=given_: ops.advantage_score(r, e, **a), (reward, expected))
            with ops.backend("torch"):
                want = ops.advantage_score(reward, expected, **given_)
            torch.testing.assert_close(ops.advantage_score(reward, expected, **given_), want)
        each = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(ops.advantage_score, (reward, each))


@cpp
def test_gradcheck_of_the_loss():
    """Finite differences in float64, the weights held fixed."""
    g = torch.Generator().manual_seed(6)
    reward = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    expected = torch.randn(2, generator=g, dtype=torch.float64, requires_grad=True)
    pairs, prompt = torch.tensor([[0, 1], [2, 1], [5, 3], [0, 4]]), torch.tensor([0, 0, 1, 1, 0, 1])

    def loss(r, e):
        return ops.advantage_loss(
            r, e, pairs=pairs, prompt=prompt, label_smoothing=0.2, rank_margin=torch.tensor([0.1, 0.2, 0.0, 1.0]),
            pair_weight=torch.tensor([1.0, 0.5, 2.0, 1.0]), **packed([3, 1, 0, 4, 2, 9]),
        ).loss  # fmt: skip

    with ops.backend("cpu"):
        assert torch.autograd.gradcheck(loss, (reward, expected))


@cpp
def test_upstream_gradients_and_second_backward():
    reward = torch.tensor([0.5, 1.0, -0.5, 2.0], requires_grad=True)
    out = ops.advantage_loss(reward)
    (3.0 * out.loss).backward()
    once = reward.grad.clone()
    reward.grad = None
    ops.advantage_loss(reward).loss.backward()
    torch.testing.assert_close(once, 3.0 * reward.grad)
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        ops.advantage_loss(reward).loss.backward(create_graph=True)
    assert not ops.advantage_loss(reward.detach()).loss.requires_grad


@cpp
def test_module():
    module = ops.AdvantageLoss(1.5, label_smoothing=0.1)
    reward, expected = torch.tensor([0.5, 1.0, -0.5, 2.0]), torch.tensor([0.1, -0.3])
    want = ops.advantage_loss(reward, expected, margin=1.5, label_smoothing=0.1)
    assert torch.equal(module(reward, expected).loss, want.loss)
    assert torch.equal(module(reward, expected, margin=None).loss,
                       ops.advantage_loss(reward, expected, margin=None, label_smoothing=0.1).loss)  # fmt: skip
    assert "margin=1.5" in repr(module) and not list(module.parameters())
    with pytest.raises(ValueError, match="weight_mode: 'tokens'"):
        ops.AdvantageLoss(weight_mode="tokens")


@cpp
def test_values_that_overflow_go_to_the_reference():
    """The kernel declines them, the reference finds no argument to complain about: its result stands."""
    reward = torch.tensor([3e38, -3e38], requires_grad=True)
    out = ops.advantage_loss(reward, margin=None)
    with ops.backend("torch"):
        want = ops.advantage_loss(reward, margin=None)
    torch.testing.assert_close(out.loss, want.loss, equal_nan=True)
    torch.testing.assert_close(out.score, want.score)


@interpreted
def test_launches():
    """One without alternates, two with them; no buffer outlives the call."""
    reward, expected = torch.randn(4), torch.randn(2)
    for call, launches in (({}, 1), (packed([2000, 3, 1, 0]), 2)):
        with accesses_checked() as launched:
            run({"reward": reward, "expected": expected, **call}, "triton")
        assert launched == ["_prepare_kernel", "_advantage_kernel"][2 - launches :]


@interpreted
def test_many_prompts_beside_few_responses():
    """More programs go through the sums than there are pieces of sequences."""
    case = {
        "reward": torch.randn(2), "expected": torch.randn(3000), "prompt": torch.tensor([0, 1]),
        "pairs": torch.tensor([[0, 1]]), **packed([5, 5]),
    }  # fmt: skip
    with accesses_checked() as launched:
        got = run(case, "triton")
    assert launched == ["_prepare_kernel", "_advantage_kernel"]
    for ours, theirs in zip(got, run(case, "torch"), strict=True):
        torch.testing.assert_close(ours, theirs)


LARGE = {
    "default pairs": (86, {"expected": (43,)}, {}),
    "rankings": (40, {"expected": (9,), "pair_weight": (90,)}, {"pairs": 90, "prompt": 9}),
    "listed, default prompts": (82, {"expected": (41,)}, {"pairs": 41}),
    "prompts given": (82, {"expected": (7,), "pair_weight": (41,)}, {"prompt": 7}),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 responses, several programs from 17 on: what takes thousands otherwise."""
    from stable_rlhf.kernels import advantage as kernels

    monkeypatch.setattr(kernels, "_ITEMS", 16)
    monkeypatch.setattr(kernels, "_MOST_ALONE", 16)


def large(name, alternates):
    """A call of several blocks; without alternates too, when they are small, it is prepared by a launch before."""
    responses, floats, indices = LARGE[name]
    g = torch.Generator().manual_seed(4)
    call = {"reward": torch.randn(responses, generator=g)}
    call |= {argument: torch.rand(*shape, generator=g) for argument, shape in floats.items()}
    if "prompt" in indices:
        call["prompt"] = torch.randint(0, indices["prompt"], (responses,), generator=g)
    if "pairs" in indices:
        count = indices["pairs"]
        free = "prompt" in indices
        call["pairs"] = (
            torch.randint(0, responses, (count, 2), generator=g) if free
            else torch.randperm(responses, generator=g).reshape(-1, 2)
        )  # fmt: skip
    if alternates:
        call |= packed(torch.randint(0, 9, (responses,), generator=g).tolist(), alternates)
    return call


@interpreted
@pytest.mark.parametrize("alternates", [0, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LARGE)
def test_many_blocks(name, alternates, small_blocks):
    call = large(name, alternates)
    with accesses_checked() as launched:
        compare(call, "triton")
    assert launched == ["_prepare_kernel", "_advantage_kernel"]


@interpreted
@pytest.mark.parametrize("kernel", [pytest.param("_prepare_kernel", marks=pytest.mark.slow), "_advantage_kernel"])
def test_calls_at_once_share_nothing(kernel, small_blocks):
    """A call inside another one, between two of its programs: counters that both used would end the outer one early."""
    outer, inner = large("rankings", 1), large("default pairs", 2)
    want, want_inner = run(outer, "triton"), run(inner, "triton")
    inside = []
    with interrupted(kernel, lambda: inside.append(run(inner, "triton"))):
        got = run(outer, "triton")
    for (out, grads), (truth, true_grads) in ((got, want), (inside[0], want_inner)):
        assert torch.equal(out.loss, truth.loss) and torch.equal(out.figures, truth.figures)
        assert all(torch.equal(grads[n], true_grads[n]) for n in true_grads)


@interpreted
@pytest.mark.parametrize("alternates", [0, 2])
def test_nothing_is_read_on_the_host(alternates, small_blocks, monkeypatch):
    """So a CUDA graph can capture it. Where values are checked, as here by default, they are read."""
    call = large("rankings", alternates)
    call["reward"].requires_grad_()
    with ops.backend("triton"):
        with pytest.raises(Synchronised), no_synchronisation():
            ops.advantage_loss(**call)
        monkeypatch.setattr(fused, "check_values", lambda device: False)
        with no_synchronisation():
            ops.advantage_loss(**call).loss.backward()
    assert call["reward"].grad.isfinite().all()


BAD_BOUNDS = {
    "past the tokens": [0, 3, 9, 600, 5000],
    "negative": [-7, 3, 9, 600, 2004],
    "decreasing": [0, 900, 3, 600, 2004],
    "not from 0": [2, 3, 9, 600, 2004],
    "not to the last": [0, 3, 9, 600, 2003],
    "far": [0, 1 << 60, -(1 << 60), 600, 2004],
}


@interpreted
@pytest.mark.parametrize("bounds", BAD_BOUNDS.values(), ids=BAD_BOUNDS)
def test_wrong_bounds_touch_no_memory_and_give_no_result(bounds, monkeypatch):
    monkeypatch.setattr(fused, "check_values", lambda device: False)
    call = {"reward": torch.randn(4), **packed([3, 6, 591, 1404])}
    with ops.backend("triton"), accesses_checked():
        assert math.isfinite(float(ops.advantage_loss(**call).loss))
        assert not notes(call["reward"].device).any()
        call["cu_seqlens"] = torch.tensor(bounds)
        assert math.isnan(float(ops.advantage_loss(**call).loss))
        assert ops.advantage_score(**call).isnan().any()
    with pytest.raises(ValueError, match=r"^cu_seqlens: "):  # told where the host next reads the device
        tell(call["reward"].device, notes(call["reward"].device).tolist())


@interpreted
def test_wrong_values_do_not_pass_for_a_result(monkeypatch):
    """On a GPU nothing is read back for a check: what is out of range gives NaN, and no memory outside is touched."""
    monkeypatch.setattr(fused, "check_values", lambda device: False)
    reward = torch.randn(4)
    wrong = [
        {"pairs": torch.tensor([[0, 4], [1, 2]])},
        {"expected": torch.randn(2), "prompt": torch.tensor([0, 1, -1, 0])},
        {"label_smoothing": torch.tensor([0.1, 1.5])},
        {"reward": torch.tensor([0.0, math.inf, 1.0, 1.0]), "margin": None},
        {**packed([1, 1, 1, 1]), "logprob": torch.tensor([0.0, math.inf, 0.0, 0.0])},
        {"expected": torch.randn(2), "pairs": torch.tensor([[0, 1], [0, 2]])},
    ]
    for changes in wrong:
        with ops.backend("triton"):
            assert not math.isfinite(float(ops.advantage_loss(**{"reward": reward, **changes}).loss)), changes


@pytest.mark.gpu
@pytest.mark.parametrize("alternates", [0, 2])
def test_launches_on_a_gpu(alternates):
    call = {"reward": torch.randn(4), **(packed([2000, 3, 1, 0]) if alternates else {})}
    call = {n: v.cuda() for n, v in call.items()}
    ops.advantage_loss(**call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.advantage_loss(**call)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == (2 if alternates else 1), kernels


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_a_graph_beside_eager_calls_on_a_gpu(name):
    call = {n: v.cuda() for n, v in large(name, 3).items()}
    want = ops.advantage_loss(**call)  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.advantage_loss(**call)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(other):
            eager = ops.advantage_loss(**call)
    torch.cuda.synchronize()
    for out in (captured, eager):
        assert torch.equal(out.loss, want.loss) and torch.equal(out.figures, want.figures)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the GPU itself")
@settings(max_examples=100, **OPTIONS)
@given(cases(most_tokens=3000))
def test_triton_on_a_gpu(call):
    want, want_grads = run(call, "torch", torch.float64)
    there = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    got, grads = run(there, "triton")
    torch.testing.assert_close(got.loss.double().cpu(), want.loss, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.score.double().cpu(), want.score, rtol=1e-5, atol=2e-6)
    for name, truth in want_grads.items():
        torch.testing.assert_close(grads[name].double().cpu(), truth, rtol=1e-4, atol=1e-6)
