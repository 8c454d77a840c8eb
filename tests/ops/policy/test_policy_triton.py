"""The Triton row kernel of the policy losses: in the interpreter against float64 and the C++ kernel, and on a GPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import INTERPRETED, bfloat16_of_a_gpu, interpreted, not_interpreted
from helpers.policy_cases import CONFIGS, PER_ROW, fused_of, make_case, naive_row, relative
from helpers.policy_rows import check, exact, fresh, make_rows, new_state
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.policy.formula import RowState, Terms

triton = pytest.importorskip("triton")
cpp = pytest.mark.skipif(extension() is None, reason="installed without the C++ module")
CONFIGS = {**CONFIGS, "k1": PolicyLossConfig(kl_coef=0.3, kl_estimator="k1")}
HALVES = (torch.bfloat16, torch.float16)
SETTINGS = {"clip": PolicyLossConfig(0.05, 0.05), "everything": CONFIGS["everything"]}


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.slow
def test_the_rest_in_the_interpreter():
    run_interpreted(__file__, "slow")


@pytest.fixture(autouse=INTERPRETED)
def rounding_of_a_gpu():
    with bfloat16_of_a_gpu():
        yield


def kernels():
    from stable_rlhf.kernels import policy

    return policy


SHAPES = [
    (1, 1, torch.float32),
    (3, 2, torch.bfloat16),
    (3, 7, torch.float16),
    (17, 33, torch.float32),
    pytest.param(3, 1000, torch.bfloat16, marks=pytest.mark.slow),
    (1, 4099, torch.bfloat16),
    (3, 4099, torch.float32),
    pytest.param(3, 4099, torch.float16, marks=pytest.mark.slow),
]


@interpreted
@pytest.mark.parametrize(("rows", "vocabulary", "dtype"), SHAPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_shapes_and_types(name, rows, vocabulary, dtype):
    config = SETTINGS[name]
    logits, state, kind, terms = make_rows(rows, vocabulary, config, dtype)
    want = exact(logits, state, kind, terms, config)
    order = kernels().policy(logits, logits, state, kind, terms, config)
    check(state, logits, want, order)


@interpreted
@pytest.mark.parametrize(("name", "weighted"), [*((name, True) for name in CONFIGS), ("plain", False)])
def test_every_option(name, weighted):
    config = CONFIGS[name]
    logits, state, kind, terms = make_rows(9, 41, config, seed=1)
    want = exact(logits, state, kind, terms if weighted else with_weight(terms, torch.ones(9)), config)
    gradient = torch.full_like(logits, math.nan)
    before = logits.clone()
    terms = terms if weighted else with_weight(terms, None)
    assert kernels().policy(logits, gradient, state, kind, terms, config, compact=False) is None
    check(state, gradient, want)
    zero = (state.coefficient == 0) & (state.entropy_coefficient == 0)
    assert torch.equal(logits, before) and not gradient[zero].any()


def with_weight(terms, weight):
    return dataclasses.replace(terms, row_weight=weight)


@interpreted
@cpp
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(x, marks=pytest.mark.slow) for x in HALVES)])
@pytest.mark.parametrize("name", SETTINGS)
def test_like_the_cpp_kernel(name, dtype):
    from stable_rlhf.ops.policy import cpu

    config = SETTINGS[name]
    made = []
    for module in (cpu, kernels()):
        logits, state, kind, terms = make_rows(9, 1000, config, dtype, seed=2)
        order = module.policy(logits, logits, state, kind, terms, config, compact=name == "clip")
        made.append((logits, state, order))
    (cpp_gradient, cpp_state, cpp_order), (gradient, state, order) = made
    for field in dataclasses.fields(RowState):
        torch.testing.assert_close(
            getattr(state, field.name), getattr(cpp_state, field.name), rtol=1e-6, atol=1e-6, msg=field.name
        )
    if name == "clip":
        assert torch.equal(order, cpp_order) and order.numel() < 9
    kept = 9 if order is None else order.numel()
    assert relative(gradient[:kept], cpp_gradient[:kept]) <= (1e-6 if dtype == torch.float32 else 1e-3)


@interpreted
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_dropped_rows_leave_no_gap(logits_dtype):
    """In place (bfloat16), and from float32 logits to a bfloat16 gradient."""
    config = SETTINGS["clip"]
    logits, state, kind, terms = make_rows(17, 33, config, logits_dtype, seed=3)
    want = exact(logits, state, kind, terms, config)
    gradient = logits if logits_dtype == torch.bfloat16 else torch.full_like(logits, math.nan, dtype=torch.bfloat16)
    before = gradient.clone()
    order = kernels().policy(logits, gradient, state, kind, terms, config)
    dropped = (state.coefficient == 0).tolist()
    assert 0 < sum(dropped) < 17 and order.tolist() == moved(dropped)
    assert order.tolist() != sorted(order.tolist())  # some row did move
    check(state, gradient, want, order)
    untouched = [i for i in range(len(order), 17) if dropped[i]]
    torch.testing.assert_close(gradient[untouched], before[untouched], rtol=0, atol=0, equal_nan=True)


def moved(dropped: list[bool]) -> list[int]:
    found = dropped.count(False)
    late = iter([i for i in range(found, len(dropped)) if not dropped[i]])
    return [next(late) if dropped[i] else i for i in range(found)]


@interpreted
@pytest.mark.parametrize("count", [1, 5, 1024, 3001])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_kept_rows(count, share):
    g = torch.Generator().manual_seed(count)
    state = new_state(torch.zeros(count, dtype=torch.int64), torch.ones(count))
    dropped = torch.rand(count, generator=g) < share
    either = torch.rand(count, generator=g) < 0.5
    state.coefficient[:] = torch.where(~dropped & either, 1.5, 0.0)
    state.entropy_coefficient[:] = torch.where(~dropped & ~either, math.nan, -0.0)
    gradient = torch.arange(count, dtype=torch.float32)[:, None].repeat(1, 3)
    order = kernels().close_gaps(gradient, state)
    assert (order is None) == (not dropped.any())
    where = moved(dropped.tolist())
    assert order is None or order.tolist() == where
    assert gradient[: len(where)].tolist() == [[row] * 3 for row in where]


@interpreted
def test_all_rows_dropped_and_no_rows():
    config = PolicyLossConfig(0.0, 0.0)
    logits, state, _, terms = make_rows(3, 9, config)
    kind = torch.ones(3, dtype=torch.int8)
    above = dataclasses.replace(terms, old_logprob=torch.full((3,), -50.0), advantage=torch.ones(3))
    before = logits.clone()
    assert kernels().policy(logits, logits, state, kind, above, config).numel() == 0 and torch.equal(logits, before)
    assert kernels().policy(logits, logits, state, kind, above, config, compact=False) is None and not logits.any()
    none = slice(0, 0)
    empty, no_state, no_terms = logits[none], fresh(state).cut(none), terms.cut(none)
    assert kernels().policy(empty, empty, no_state, kind[none], no_terms, config) is None
    kernels().statistics(empty, no_state, None)
    kernels().given(empty, empty, no_state, None)


@interpreted
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, None), (0.1, 0.3, 1.5)])
def test_clip_edges(advantage, low, high, dual):
    config = PolicyLossConfig(low, high, dual)
    edges = [1 - low, 1 + high, dual or 3.0]
    ratios = torch.tensor([0.5, 1.0, 5.0, *(edge * (1 + s) for edge in edges for s in (-1e-5, 1e-5))]).double()
    rows = len(ratios)
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).repeat(rows, 1)
    state = new_state(torch.full((rows,), 2), torch.ones(rows))
    logprob = torch.log_softmax(logits.double(), -1)[:, 2]
    terms = Terms((logprob - ratios.log()).float(), torch.full((rows,), advantage), None, None, *torch.ones(2).unbind())
    kernels().policy(logits, logits, state, torch.ones(rows, dtype=torch.int8), terms, config, compact=False)
    clipped = (ratios > 1 + high) if advantage > 0 else (ratios < 1 - low) | (ratios > (dual or math.inf))
    want = torch.where(clipped, 0.0, -advantage * ratios)
    torch.testing.assert_close(state.coefficient.double(), want, rtol=1e-5, atol=0)
    assert torch.equal(state.coefficient == 0, clipped) and not state.entropy_coefficient.any()


@interpreted
@cpp
@pytest.mark.parametrize("clips", [(0.0, 0.2, 0.28), pytest.param((0.1, 0.3, 0.5), marks=pytest.mark.slow)])
def test_a_ratio_at_a_clip_edge_is_on_the_same_side_for_all(clips):
    """The edge itself, as float32 has it, and the float32 numbers beside it; one token, so that log pi is exactly 0."""
    from stable_rlhf.ops.policy import cpu
    from stable_rlhf.ops.policy.formula import coefficients

    sides = set()
    for clip in clips:
        config = PolicyLossConfig(clip, clip, 1.0 + 2.0 * clip if clip else None)
        at = torch.tensor([1.0 - clip, 1.0 + clip, 1.0 + 2.0 * clip]).double().log().float()
        old = -torch.cat([torch.nextafter(at, torch.tensor(by)) for by in (-9.0, 9.0)] + [at])
        old, rows = old.repeat(2), 18
        advantage = torch.tensor([1.5, -1.5]).repeat_interleave(9)
        terms = Terms(old, advantage, None, None, *torch.ones(2).unbind())
        kind = torch.ones(rows, dtype=torch.int8)
        want = coefficients(kind, torch.zeros(rows), terms, config)[0]
        for module in (kernels(), cpu):
            state = new_state(torch.zeros(rows, dtype=torch.int64), torch.ones(rows))
            module.policy(torch.zeros(rows, 1), torch.zeros(rows, 1), state, kind, terms, config, compact=False)
            assert torch.equal(state.coefficient == 0, want == 0), (module.__name__, clip)
            torch.testing.assert_close(state.coefficient, want, rtol=3e-7, atol=0)
        sides |= set((want == 0).tolist())
    assert sides == {True, False}


@interpreted
@pytest.mark.parametrize("name", ["clip", *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "everything"))])
def test_same_bits_on_every_grid(name, monkeypatch):
    """However many programs share the rows; fewer rows than programs, and many a program, are among them."""
    monkeypatch.setenv("STABLE_RLHF_TRITON_CONFIG", "64,1,1")
    config = CONFIGS["plain"] if name == "plain" else SETTINGS[name]
    made = []
    for programs in (1, 40):
        monkeypatch.setattr(kernels(), "programs", lambda device, each, programs=programs: programs)
        logits, state, kind, terms = make_rows(9, 150, config, torch.bfloat16, seed=3)
        row = None if name == "clip" else torch.tensor([8, 0, 3, 1, 7, 2, 4, 6, 5])
        order = kernels().policy(logits, logits, state, kind, terms, config, row=row)
        made.append((logits, order, state))
    for logits, order, state in made[1:]:
        assert torch.equal(logits, made[0][0]) and (order is None) == (made[0][1] is None)
        assert order is None or torch.equal(order, made[0][1])
        assert all(torch.equal(a, b) for a, b in zip(vars(state).values(), vars(made[0][2]).values(), strict=True))
    assert (made[0][1] is not None) == (name == "clip")


@interpreted
def test_nothing_is_left_out_while_a_graph_is_captured(monkeypatch):
    """The number of kept rows would have to be read; dropped rows get zeros."""
    logits, state, kind, terms = make_rows(17, 33, SETTINGS["clip"], seed=3)
    want = exact(logits, state, kind, terms, SETTINGS["clip"])
    monkeypatch.setattr(kernels(), "capturing", lambda logits: True)
    monkeypatch.setattr(kernels(), "close_gaps", None)
    assert kernels().policy(logits, logits, state, kind, terms, SETTINGS["clip"]) is None
    check(state, logits, want)
    dropped = state.coefficient == 0
    assert dropped.any() and not logits[dropped].any()


@interpreted
@pytest.mark.parametrize(("width", "dtype"), [(33, torch.float32), (40, torch.bfloat16)])
def test_gaps_are_closed_in_padded_rows(width, dtype):
    config = SETTINGS["clip"]
    made, state, kind, terms = make_rows(17, 33, config, dtype, seed=3)
    want = exact(made, state, kind, terms, config)
    wide = torch.full((17, width), 7.0, dtype=dtype)
    wide[:, :33] = made
    order = kernels().policy(wide[:, :33], wide[:, :33], state, kind, terms, config)
    check(state, wide[:, :33], want, order)
    assert (wide[:, 33:] == 7.0).all()


@interpreted
@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 1.5])
def test_blocks_of_every_kind(softcap, monkeypatch):
    """Many blocks, few, part of one; a rest is in most other tests."""
    config = PolicyLossConfig(softcap=softcap, entropy_coef=0.1)
    logits, state, kind, terms = make_rows(2, 768, config, seed=4)
    want = exact(logits, state, kind, terms, config)
    for shape in ("64,1,1", "256,1,2", "1024,2,1"):
        monkeypatch.setenv("STABLE_RLHF_TRITON_CONFIG", shape)
        gradient, part_state = torch.empty_like(logits), fresh(state)
        kernels().policy(logits, gradient, part_state, kind, terms, config)
        check(part_state, gradient, want)


@interpreted
@pytest.mark.parametrize("softcap", [None, pytest.param(2.0, marks=pytest.mark.slow)])
def test_slices_of_the_vocabulary(softcap, monkeypatch):
    """Statistics of slices join to those of the whole; given these, each slice's gradient is the whole one's."""
    monkeypatch.setenv("STABLE_RLHF_TRITON_CONFIG", "64,1,1")
    logits, state, _, _ = make_rows(5, 300, PolicyLossConfig(), seed=5)
    whole, mean = fresh(state), torch.empty(5)
    kernels().statistics(logits, whole, softcap, weighted=mean)
    torch.testing.assert_close(whole.entropy, whole.log_sum - mean)
    joined = fresh(state)
    parts = []
    for begin, end in ((0, 130), (130, 131), (131, 300)):
        part = fresh(state)
        part.target -= begin
        weighted, target_logit = torch.empty(5), torch.empty(5)
        kernels().statistics(logits[:, begin:end], part, softcap, weighted=weighted, target_logit=target_logit)
        here = (part.target >= 0) & (part.target < end - begin)
        assert not part.logprob[~here].any() and not target_logit[~here].any()
        torch.testing.assert_close(target_logit[here] - part.log_sum[here], part.logprob[here])
        parts.append((part, weighted, target_logit + torch.where(here, part.max, 0.0)))
    top = torch.stack([p.max for p, *_ in parts]).amax(0)
    sums = torch.stack([(p.log_sum + p.max - top).exp() for p, *_ in parts])
    assert torch.equal(top, whole.max)
    torch.testing.assert_close(sums.sum(0).log(), whole.log_sum)
    torch.testing.assert_close(sum(z for *_, z in parts) - top - whole.log_sum, whole.logprob, rtol=1e-5, atol=1e-5)
    means = torch.stack([w + p.max - top for p, w, _ in parts])
    torch.testing.assert_close((sums * means).sum(0) / sums.sum(0), mean, rtol=1e-5, atol=1e-5)

    whole.coefficient[:], whole.entropy_coefficient[:] = torch.randn(5), torch.randn(5)
    gradient = torch.empty_like(logits)
    kernels().given(logits, gradient, whole, softcap)
    for begin, end in ((0, 130), (130, 131), (131, 300)):
        joined = dataclasses.replace(whole, target=whole.target - begin)
        part = torch.empty(5, end - begin)
        kernels().given(logits[:, begin:end], part, joined, softcap)
        torch.testing.assert_close(part, gradient[:, begin:end], rtol=1e-6, atol=1e-7)


@interpreted
def test_chosen_rows():
    """Active row i is row `row[i]` of logits and gradient; no other row is touched."""
    row = torch.tensor([4, 0, 3])
    config = SETTINGS["everything"]
    logits, state, kind, terms = make_rows(3, 20, config, seed=8)
    want = exact(logits, state, kind, terms, config)
    spread = torch.full((6, 20), math.nan)
    spread[row] = logits
    gradient = torch.full((6, 20), math.nan)
    kernels().policy(spread, gradient, state, kind, terms, config, row=row, compact=False)
    check(state, gradient[row], want)
    again = torch.full((6, 20), math.nan)
    kernels().given(spread, again, state, config.softcap, row=row)
    torch.testing.assert_close(again, gradient, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert again[[1, 2, 5]].isnan().all()
    only = fresh(state)
    kernels().statistics(spread, only, config.softcap, row=row)
    assert torch.equal(only.logprob, state.logprob) and torch.equal(only.entropy, state.entropy)


@interpreted
def test_int32_offsets_past_two_to_the_31_elements(monkeypatch):
    """The third row starts beyond 2^31 elements, in and out. Pages that nobody touches cost no memory."""
    monkeypatch.setenv("STABLE_RLHF_TRITON_CONFIG", "64,1,1")
    logits, state, kind, terms = make_rows(3, 90, SETTINGS["clip"], torch.bfloat16, seed=9)
    few, want = fresh(state), torch.empty_like(logits)
    kernels().policy(logits, want, few, kind, terms, SETTINGS["clip"], compact=False)
    far = torch.empty(2**31 + 200, dtype=torch.bfloat16).as_strided((3, 90), (2**30 + 7, 1))
    assert 2 * far.stride(0) > 2**31
    far.copy_(logits)
    kernels().policy(far, far, state, kind, terms, SETTINGS["clip"], compact=False)
    assert torch.equal(far, want) and torch.equal(state.logprob, few.logprob)


@interpreted
def test_gaps_are_closed_past_two_to_the_31_elements():
    """The last row, which starts beyond 2^31 elements, moves to the front."""
    far = torch.empty(2**31 + 200, dtype=torch.bfloat16).as_strided((3, 90), (2**30 + 7, 1))
    far.copy_(torch.arange(270).view(3, 90))
    state = new_state(torch.zeros(3, dtype=torch.int64), torch.ones(3))
    state.coefficient[:], state.entropy_coefficient[:] = torch.tensor([0.0, 1.0, 1.0]), 0.0
    want = far[[2, 1]].clone()
    assert kernels().close_gaps(far, state).tolist() == [2, 1] and torch.equal(far[:2], want)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1e4, -1e4, None])
def test_extreme_logits(offset, dtype, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_TRITON_CONFIG", "64,1,1")
    logits, state, _, terms = make_rows(4, 150, PolicyLossConfig(), dtype, seed=6)
    logits = (1e4 * logits.sign()).to(dtype) if offset is None else (logits.float() + offset).to(dtype)
    state.inverse_temperature[:] = 1.0
    kind, config = torch.full((4,), 2, dtype=torch.int8), PolicyLossConfig(rehearsal_coef=1.0)
    want = exact(logits, state, kind, terms, config)
    kernels().policy(logits, logits, state, kind, terms, config)
    check(state, logits, want)


@interpreted
def test_target_of_probability_one():
    """1 - p keeps its digits where p rounds to 1."""
    logits = torch.zeros(1, 40)
    logits[0, 3] = 24.0
    want = naive_row(logits[0].double(), 3, 1.0, None)[0].exp() - 1  # about -1.5e-9
    state = new_state(torch.tensor([3]), torch.ones(1))
    terms = Terms(torch.zeros(1), torch.zeros(1), None, None, torch.ones(()), torch.ones(()))
    kind = torch.full((1,), 2, dtype=torch.int8)
    kernels().policy(logits, logits, state, kind, terms, PolicyLossConfig(rehearsal_coef=1.0))
    assert float(logits[0, 3]) == pytest.approx(float(want), abs=6e-8)
    assert float(logits[0, 4]) == pytest.approx(math.exp(-24.0), rel=1e-5)


@interpreted
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_non_finite_logits_are_not_hidden(value, dtype, monkeypatch):
    monkeypatch.setenv("STABLE_RLHF_TRITON_CONFIG", "64,1,1")
    places = [0, 1, 63, 64, 127, 128, 149]
    logits = torch.zeros(len(places) + 2, 150, dtype=dtype)
    for i, place in enumerate(places):
        logits[i, place] = value
    logits[-2] = value
    state = new_state(torch.zeros(len(logits), dtype=torch.int64), torch.ones(len(logits)))
    kernels().statistics(logits, state, None)
    finite = torch.isfinite(state.logprob) & torch.isfinite(state.entropy)
    assert finite.tolist() == [False] * (len(places) + 1) + [True]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_beyond_the_row_is_touched(in_place, dtype):
    config = SETTINGS["everything"]
    made, state, kind, terms = make_rows(3, 37, config, dtype, seed=7)
    want = exact(made, state, kind, terms, config)
    wide = torch.full((3, 50), math.nan, dtype=dtype)
    wide[:, :37] = made
    out = wide if in_place else torch.full((3, 41), math.nan, dtype=dtype)
    kernels().policy(wide[:, :37], out[:, :37], state, kind, terms, config)
    check(state, out[:, :37], want)
    assert out[:, 37:].isnan().all() and wide[:, 37:].isnan().all()


def run_all(case, name, config, **options):
    with ops.backend(name):
        leaves, out = fused_of(case, config, **options)
        (2.0 * out.loss).backward()
        given = {key: case[key] for key in PER_ROW}
        logits = torch.nn.functional.linear(case["hidden"], case["weight"], case["bias"]).detach().requires_grad_()
        direct = ops.policy_loss(
            logits, case["target"], case["kind"], temperature=case["temperature"], config=config, **given
        )
        direct.loss.backward()
        heads = [case[key].clone().requires_grad_() for key in ("hidden", "weight", "bias")]
        logprob, entropy = ops.linear_logprob(
            *heads[:2], case["target"], bias=heads[2], temperature=case["temperature"], softcap=config.softcap,
            entropy=True, **options,
        )  # fmt: skip
        (logprob.sin().sum() + entropy.cos().sum()).backward()
    return {
        "loss": out.loss, "logprob": out.logprob, "entropy": out.entropy, **out.metrics,
        "direct loss": direct.loss, "direct gradient": logits.grad, "token logprob": logprob, "token entropy": entropy,
        **{f"gradient {key}": leaf.grad for key, leaf in leaves.items()},
        **{f"token gradient {i}": head.grad for i, head in enumerate(heads)},
    }  # fmt: skip


def compare(case, config, device, tolerance, **options):
    got = run_all({k: v.to(device) for k, v in case.items()}, "triton", config, **options)
    want = run_all({k: v.double() if v.is_floating_point() else v for k, v in case.items()}, "torch", config)
    plain = run_all(case, "torch", config) if case["hidden"].element_size() == 2 else None
    for key, value in got.items():
        allowed = tolerance + (1.25 * relative(plain[key].detach(), want[key].detach()) if plain else 0.0)
        assert relative(value.detach().cpu(), want[key].detach()) <= allowed, key


@interpreted
@pytest.mark.parametrize("name", ["everything", pytest.param("clip", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_operations(name, dtype):
    """Chunks, ignored rows, all three gradients, an upstream gradient of 2."""
    case = make_case(11, 41, dtype=dtype)
    case["target"][0], case["kind"][0] = 3, 1
    compare(case, SETTINGS[name], "cpu", 1e-5, workspace_bytes=4 * 41 * 4)


@interpreted
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_one_kind_of_rows(kind):
    case = make_case(3, 7, kinds=(kind,))
    results = {name: run_all(case, name, CONFIGS["plain"]) for name in ("triton", "torch")}
    for key, value in results["triton"].items():
        torch.testing.assert_close(value, results["torch"][key], rtol=1e-5, atol=1e-6, msg=key)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_scale(dtype):
    x = torch.randn(3, 3001, generator=torch.Generator().manual_seed(0)).to(dtype)
    scaled = x.clone()
    assert kernels().scale_(scaled, torch.tensor(1.0)) is scaled and torch.equal(scaled, x)
    kernels().scale_(scaled, torch.tensor(0.3))
    torch.testing.assert_close(scaled, (0.3 * x.float()).to(dtype), rtol=1e-7, atol=0)
    kernels().scale_(scaled.t(), torch.tensor(0.0))
    assert not scaled.any()
    assert kernels().scale_(torch.empty(0), torch.tensor(2.0)).numel() == 0


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (63, 1000), (40, 50257), (9, 128256)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("name", CONFIGS)
    def test_operations(self, name, rows, vocabulary, dtype):
        case = make_case(rows, vocabulary, width=16, dtype=dtype, kinds=(1, 2) if rows > 1 else (1,))
        case["target"] = case["target"].clamp(min=0) if rows == 1 else case["target"]
        compare(case, CONFIGS[name], "cuda", 1e-5, workspace_bytes=rows * vocabulary * 2)

    def test_extreme_logits_with_temperature(self, rows, vocabulary, dtype):
        """A product fused with the subtraction of the maximum would be off by 5e-4 here."""
        g = torch.Generator().manual_seed(0)
        logits = (
            1e4 * torch.randn(rows, vocabulary, generator=g).sign() + torch.randn(rows, vocabulary, generator=g)
        ).to(dtype)
        state = new_state(logits.float().argmax(-1), 0.5 + torch.rand(rows, generator=g))
        z = logits.float() * state.inverse_temperature[:, None]
        on_gpu = RowState(*(getattr(state, field.name).cuda() for field in dataclasses.fields(state)))
        kernels().statistics(logits.cuda(), on_gpu, None)
        want = torch.log_softmax(z.double(), -1).amax(-1)
        torch.testing.assert_close(on_gpu.logprob.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_streams_give_what_one_gives():
    """Workspaces belong to the stream that asked for them: nobody writes into another's logits."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=g).cuda()
    hidden = torch.randn(4, 300, 64, generator=g).cuda()
    target = torch.randint(0, 5000, (4, 300), generator=g).cuda()

    def gradient(i):
        leaf = hidden[i].clone().requires_grad_()
        ops.linear_policy_loss(leaf, weight, target[i], torch.full_like(target[i], 2)).loss.backward()
        return leaf.grad

    want = [gradient(i) for i in range(4)]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for i in range(4):
        with torch.cuda.stream(streams[i % 2]):
            got.append(gradient(i))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@interpreted
def test_peaked_rows_keep_their_digits():
    """A target that the policy is nearly sure of: 1 - p is made of what float32 loses beside 1."""
    g = torch.Generator().manual_seed(4)
    target = torch.tensor([3, 70, 12])
    logits = torch.randn(3, 90, generator=g)
    logits[torch.arange(3), target] = torch.tensor([14.0, 18.0, 22.0])
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    for backend, value in (("triton", leaf), ("torch", truth)):
        with ops.backend(backend):
            ops.policy_loss(value, target, torch.tensor([2, 2, 2]), temperature=0.9).loss.backward()
    for got, want in zip(leaf.grad, truth.grad, strict=True):
        assert relative(got, want) < 2e-6


@interpreted
def test_rows_from_logits_that_take_no_part():
    """Whatever they hold, and whoever knows of them: their gradient is 0, and nothing of them reaches a sum."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(7, 300, generator=g)
    target, kind = torch.randint(0, 300, (7,), generator=g), torch.tensor([1, 0, 2, 1, 1, 1, 0])
    target[3] = -100
    idle = torch.tensor([1, 3, 6])
    given = {"old_logprob": torch.randn(7, generator=g) - 5.0, "advantage": torch.randn(7, generator=g)}
    made = {}
    for backend, filling in (("torch", 0.0), ("triton", 0.0), ("triton", math.nan)):
        leaf = logits.index_fill(0, idle, filling).requires_grad_()
        with ops.backend(backend):
            out = ops.policy_loss(leaf, target, kind, **given)
        out.loss.backward()
        assert not leaf.grad[idle].any() and not out.logprob[idle].any() and not out.entropy[idle].any()
        made[backend, str(filling)] = torch.cat(
            [out.loss[None], out.logprob, out.entropy, leaf.grad.flatten()]
        ).detach()
    want = made["torch", "0.0"]
    torch.testing.assert_close(made["triton", "0.0"], want, rtol=1e-5, atol=1e-6)
    assert torch.equal(made["triton", "nan"], made["triton", "0.0"])


@interpreted
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("target", 300, "300 at row 5 is outside"), ("target", -7, "-7 at row 5 is outside"), ("kind", 3, "3 at row 5")],
)
def test_wrong_values_beside_logits_are_told_in_the_call(name, value, told):
    given = {"target": torch.zeros(7, dtype=torch.int64), "kind": torch.ones(7, dtype=torch.int64)}
    given[name][5] = value
    logits = torch.zeros(7, 300, requires_grad=True)
    with ops.backend("triton"), pytest.raises(ValueError, match=f"{name}: {told}"):
        ops.policy_loss(logits, **given, advantage=torch.ones(7))
