"""What a call does once on a GPU: rows chosen and losses summed by kernels, with no stop where the counts are known."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import interpreted, not_interpreted
from helpers.policy_cases import CONFIGS, make_case, on_policy_is_its_own_log_probs
from stable_rlhf.ops import PolicyLossConfig, flags
from stable_rlhf.ops.policy.formula import RowState, gather_terms, select_rows, total_loss
from stable_rlhf.ops.policy.fused import COUNTS, METRICS
from stable_rlhf.ops.policy.types import DEFAULT, Kind, PolicyCall

pytest.importorskip("triton")
CPU = torch.device("cpu")
VOCABULARY = 31


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.slow
def test_the_rest_in_the_interpreter():
    run_interpreted(__file__, "slow")


@pytest.fixture(autouse=True)
def no_notes():
    flags.notes(CPU).zero_()
    yield
    flags.notes(CPU).zero_()


def make_call(rows=5000, active=0.6, seed=0, config=DEFAULT, **more) -> PolicyCall:
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(1, 3, (rows,), generator=g) * (torch.rand(rows, generator=g) < active)
    target = torch.randint(0, VOCABULARY, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < 0.1] = -100

    def normal() -> torch.Tensor:
        return torch.randn(rows, generator=g)

    given = {"kind": kind, "old_logprob": normal() - 2, "advantage": normal(), "ref_logprob": normal() - 2}
    given |= {"row_weight": torch.rand(rows, generator=g) + 0.1} | more
    return PolicyCall(
        normal()[:, None], torch.zeros(VOCABULARY, 1), None, target, 1.0, config, backend="triton", **given
    )


def late(monkeypatch, graph=False):
    """As on a GPU: values are not read on the host unless they have to be."""
    from stable_rlhf.kernels import policy_call
    from stable_rlhf.ops.policy import formula

    for module in (policy_call, formula):
        monkeypatch.setattr(module, "check_values", lambda device: False)
    monkeypatch.setattr(policy_call, "capturing", lambda tensor: graph)


@interpreted
@pytest.mark.parametrize("rows", [0, 1, 2047, 2048, 5000])
@pytest.mark.parametrize("active", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [None, torch.int64, torch.int8, torch.uint8])
def test_rows_are_those_of_the_reference(rows, active, dtype):
    from stable_rlhf.kernels.policy_call import select

    call = make_call(rows, active)
    call = call._replace(kind=None if dtype is None else call.kind.to(dtype))
    if active == 1.0:
        call = call._replace(target=call.target.clamp(min=0))
    got, want = select(call, VOCABULARY), select_rows(call, VOCABULARY)
    assert (got.policy_count, got.rehearsal_count) == (want.policy_count, want.rehearsal_count)
    assert (got.index is None) == (want.index is None)
    if want.index is not None:
        assert torch.equal(got.index, want.index)
    assert torch.equal(got.target, want.target) and torch.equal(got.kind, want.kind)


@interpreted
@pytest.mark.parametrize(("field", "value", "message"), [
    ("kind", 3, "kind: 3 at row 7"), ("kind", -1, "kind: -1 at row 7"), ("target", VOCABULARY, "target: 31 at row 7"),
    ("target", -7, "target: -7 at row 7"), ("active_rows", 4, "active_rows: 4, and 10 rows are active"),
])  # fmt: skip
def test_wrong_values_are_named(field, value, message):
    from stable_rlhf.kernels.policy_call import select

    call = make_call(10, 1.0)._replace(target=torch.zeros(10, dtype=torch.int64))
    if field == "active_rows":
        call = call._replace(active_rows=value)
    else:
        getattr(call, field)[7] = value
    with pytest.raises(ValueError, match=message):
        select(call, VOCABULARY)


ALL = {**CONFIGS, "k1": PolicyLossConfig(kl_coef=0.3, kl_estimator="k1")}


@interpreted
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weighted", [True, False])
def test_totals_are_those_of_the_reference(name, weighted):
    from stable_rlhf.kernels.policy_call import select, totals

    call = make_call(config=ALL[name])
    if not weighted:
        call = call._replace(row_weight=None)
    rows = select(call, VOCABULARY)
    terms = gather_terms(rows, call, torch.float32)
    state = RowState.of(rows)
    g = torch.Generator().manual_seed(3)
    state.logprob.copy_(-4 * torch.rand(len(rows.kind), generator=g))
    state.entropy.copy_(3 * torch.rand(len(rows.kind), generator=g))
    loss, metrics, counts = totals(rows, state, terms, call.config)
    want = total_loss(rows, state.logprob, state.entropy, terms, call.config)
    torch.testing.assert_close(loss, want.loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(metrics, torch.stack([want.metrics[name] for name in METRICS]), rtol=1e-5, atol=1e-6)
    assert counts.tolist() == [int(want.metrics[name]) for name in COUNTS]
    assert not flags.notes(CPU).any()


def both(call_of, case, **options):
    """Loss, log-probs, entropies, metrics and gradients of a call of `linear_policy_loss`."""
    hidden, weight = (case[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    out = call_of(hidden, weight, **options)
    out.loss.backward()
    metrics = torch.stack([out.metrics[name].double() for name in (*METRICS, *COUNTS)])
    return out.loss.detach(), out.logprob, out.entropy, metrics, hidden.grad, weight.grad


def call_of(case, config):
    def run(hidden, weight, **options):
        with ops.backend("triton"):
            return ops.linear_policy_loss(
                hidden, weight, case["target"], case["kind"], config=config, old_logprob=case["old_logprob"],
                advantage=case["advantage"], ref_logprob=case["ref_logprob"], row_weight=case["row_weight"], **options,
            )  # fmt: skip

    return run


@interpreted
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "everything"])
@pytest.mark.parametrize("how", ["counted", "graph"])
def test_known_counts_and_graphs_give_the_same_and_read_nothing(name, how, monkeypatch):
    """NaN under the mask included, which a graph takes through the products."""
    case = make_case(11, VOCABULARY)
    ignored = (case["kind"] == 0) | (case["target"] == -100)
    active = 11 - int(ignored.sum())
    assert 0 < active < 11
    for part in ("old_logprob", "advantage", "ref_logprob", "row_weight"):
        case[part][ignored] = math.nan
    run = call_of(case, CONFIGS[name])
    want = both(run, case)
    late(monkeypatch, graph=how == "graph")
    refuse_reading(monkeypatch)
    got = both(run, case, active_rows=None if how == "graph" else active)
    monkeypatch.undo()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert not flags.notes(CPU).any()


def refuse_reading(monkeypatch):
    """From here on nothing of a tensor may reach the host, but the upstream gradient of 1: a GPU does not read it."""
    from stable_rlhf.ops import operators

    def refuse(*_args, **_options):
        raise AssertionError("a value was read on the host")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(operators, "float", lambda value: 1.0, raising=False)
    from stable_rlhf.kernels import policy

    # The number of kept rows is read late on a GPU, behind other work (kernels.policy); here no row is dropped.
    monkeypatch.setattr(policy, "capturing", lambda tensor: True)


@interpreted
def test_reading_is_noticed(monkeypatch):
    """The control of the test above: without known counts the same call reads."""
    case = make_case(37, VOCABULARY)
    late(monkeypatch)
    refuse_reading(monkeypatch)
    with pytest.raises(AssertionError, match="was read on the host"):
        both(call_of(case, PolicyLossConfig()), case)


@interpreted
@pytest.mark.parametrize(("change", "words"), [
    ({"active_rows": 8}, "active_rows: not the number"), ({"active_rows": 7}, "active_rows: not the number"),
    ({"target": 31}, "target: outside"), ({"kind": 3}, "kind: not 0"), ({"hidden": math.inf}, "non-finite logits"),
    ({"advantage": math.nan}, "old_logprob, advantage, ref_logprob or row_weight"),
])  # fmt: skip
def test_what_only_the_device_sees_is_told_later(change, words, monkeypatch):
    case = make_case(9, VOCABULARY, kinds=(1, 2))
    case["target"].clamp_(min=0)
    case["kind"][5] = 1
    late(monkeypatch)
    active = change.get("active_rows", 9)
    for name, value in change.items():
        if name != "active_rows":
            case[name][5] = value
    with ops.backend("triton"):
        out = ops.linear_policy_loss(
            case["hidden"], case["weight"], case["target"], case["kind"], active_rows=active,
            old_logprob=case["old_logprob"], advantage=case["advantage"],
        )  # fmt: skip
    assert math.isnan(float(out.loss))
    good = make_case(9, VOCABULARY)
    with pytest.raises(ValueError, match=words):
        both(call_of(good, PolicyLossConfig()), good)
    assert math.isfinite(both(call_of(good, PolicyLossConfig()), good)[0])  # told once


@interpreted
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "everything"])
def test_a_graph_from_logits(name, monkeypatch):
    """Rows that are not active may hold anything there too."""
    case = make_case(11, VOCABULARY)
    ignored = (case["kind"] == 0) | (case["target"] == -100)
    logits = case["hidden"] @ case["weight"].T
    logits[ignored] = math.nan

    def run():
        leaf = logits.clone().requires_grad_()
        with ops.backend("triton"):
            out = ops.policy_loss(
                leaf, case["target"], case["kind"], config=CONFIGS[name], old_logprob=case["old_logprob"],
                advantage=case["advantage"], ref_logprob=case["ref_logprob"],
            )  # fmt: skip
        out.loss.backward()
        return out.loss.detach(), out.logprob, out.entropy, leaf.grad

    want = run()
    assert not want[3][ignored].any()
    late(monkeypatch, graph=True)
    for ours, theirs in zip(run(), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@interpreted
def test_late_log_probs(monkeypatch):
    case = make_case(11, VOCABULARY)
    target = torch.where(case["kind"] == 0, -100, case["target"])

    def run(**options):
        hidden, weight = (case[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
        with ops.backend("triton"):
            logprob, entropy = ops.linear_logprob(hidden, weight, target, entropy=True, **options)
        (logprob.sin() + entropy.cos()).sum().backward()
        return logprob.detach(), entropy.detach(), hidden.grad, weight.grad

    want = run()
    for graph in (False, True):
        late(monkeypatch, graph)
        for ours, theirs in zip(run(active_rows=int((target != -100).sum())), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_log_probs_of_non_finite_logits_are_told_later(value, monkeypatch):
    from stable_rlhf.ops.policy import fused

    case = make_case(9, VOCABULARY)
    case["target"].clamp_(min=0)
    bad = case["hidden"].clone()
    bad[5] = value
    late(monkeypatch)
    monkeypatch.setattr(fused, "check_values", lambda device: False)
    with ops.backend("triton"):
        ops.linear_logprob(case["hidden"], case["weight"], case["target"])
        assert not flags.notes(CPU).any()
        ops.linear_logprob(bad, case["weight"], case["target"])
        with pytest.raises(ValueError, match=r"non-finite logits: in an earlier call"):
            ops.linear_logprob(case["hidden"], case["weight"], case["target"])


@interpreted
def test_where_the_kinds_are_not_known_advantages_are_required(monkeypatch):
    case = make_case(5, VOCABULARY, kinds=(2,))
    late(monkeypatch)
    with ops.backend("triton"), pytest.raises(ValueError, match="advantage: required, since only the device knows"):
        ops.linear_policy_loss(case["hidden"], case["weight"], case["target"], case["kind"], active_rows=5)


@interpreted
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "everything"])
def test_on_policy(name):
    on_policy_is_its_own_log_probs("triton", CONFIGS[name])


def test_a_wrong_count_is_an_error_on_a_cpu():
    case = make_case(37, VOCABULARY)
    active = int(((case["kind"] != 0) & (case["target"] != -100)).sum())
    given = (case["hidden"], case["weight"], case["target"], case["kind"])
    more = {"old_logprob": case["old_logprob"], "advantage": case["advantage"]}
    for backend in ("cpu", "torch"):
        with ops.backend(backend):
            want = ops.linear_policy_loss(*given, **more)
            got = ops.linear_policy_loss(*given, **more, active_rows=active)
            assert torch.equal(got.loss, want.loss)
            with pytest.raises(ValueError, match=f"active_rows: {active - 1}, and {active} rows are active"):
                ops.linear_policy_loss(*given, **more, active_rows=active - 1)
    with pytest.raises(ValueError, match="active_rows: 38 is more than 37"):
        ops.linear_policy_loss(*given, **more, active_rows=38)


def test_faults_are_told_once():
    flags.note(flags.Fault.CU_SEQLENS, torch.tensor(True))
    flags.note(flags.Fault.LOGITS, torch.tensor(False))
    with pytest.raises(ValueError, match=r"^cu_seqlens: .*in an earlier call on cpu"):
        flags.tell(CPU, flags.notes(CPU).tolist())
    flags.tell(CPU, flags.notes(CPU).tolist())
    assert Kind.IGNORED == 0  # what rows that take part without adding anything are


@pytest.mark.gpu
def test_graph_capture_on_a_gpu():
    case = {name: x.cuda() for name, x in make_case(300, VOCABULARY).items()}
    run = call_of(case, PolicyLossConfig())
    hidden, weight = (case[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    want = both(run, case)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(hidden, weight).loss.backward()  # kernels compile, notes are allocated
    torch.cuda.synchronize()
    hidden.grad = weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(hidden, weight)
        out.loss.backward()
    graph.replay()
    torch.testing.assert_close(out.loss.detach(), want[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, want[4], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad, want[5], rtol=2e-5, atol=1e-6)
