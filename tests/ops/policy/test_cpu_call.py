"""The C++ twins of what a call does once: its rows, their arguments, its totals, against the references."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.policy_cases import CONFIGS, make_case
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.policy.formula import RowState, gather_terms, select_rows, total_loss
from stable_rlhf.ops.policy.fused import COUNTS, METRICS
from stable_rlhf.ops.policy.types import PolicyCall, PolicyLossConfig

pytestmark = pytest.mark.skipif(extension() is None, reason="no C++ module here")
VOCABULARY = 31
ALL = {**CONFIGS, "k1": PolicyLossConfig(kl_coef=0.3, kl_estimator="k1"), "no clip below": PolicyLossConfig(1.0, 0.0)}


def call_of(rows=5000, active=0.6, config=None, **changes):
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, VOCABULARY, (rows,), generator=g)
    kind = torch.randint(1, 3, (rows,), generator=g)
    out = torch.rand(rows, generator=g) >= active
    kind[out] = 0
    target[out & (torch.rand(rows, generator=g) < 0.5)] = -100
    old, ref = (-4 * torch.rand(rows, generator=g) for _ in range(2))
    call = PolicyCall(
        torch.zeros(rows, 3), torch.zeros(VOCABULARY, 3), None, target, 1.0, config or PolicyLossConfig(), kind=kind,
        old_logprob=old, advantage=torch.randn(rows, generator=g), ref_logprob=ref,
        row_weight=torch.rand(rows, generator=g),
    )  # fmt: skip
    return call._replace(**changes)


@pytest.mark.parametrize("rows", [0, 1, 5000])
@pytest.mark.parametrize("active", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [None, torch.int64, torch.int8, torch.uint8])
def test_rows_are_those_of_the_reference(rows, active, dtype):
    from stable_rlhf.ops.policy.cpu_call import select

    call = call_of(rows, active)
    call = call._replace(kind=None if dtype is None else call.kind.to(dtype))
    got, want = select(call, VOCABULARY), select_rows(call, VOCABULARY)
    assert (got.policy_count, got.rehearsal_count) == (want.policy_count, want.rehearsal_count)
    assert (got.index is None) == (want.index is None)
    assert want.index is None or torch.equal(got.index, want.index)
    assert torch.equal(got.target, want.target) and torch.equal(got.kind, want.kind)
    assert got.kind.dtype == torch.int8 and got.temperature == want.temperature


@pytest.mark.parametrize(("field", "value", "message"), [
    ("kind", 3, "kind: 3 at row 7"), ("kind", -1, "kind: -1 at row 7"), ("kind", 256, "kind: 256 at row 7"),
    ("target", VOCABULARY, "target: 31 at row 7"), ("target", -7, "target: -7 at row 7"),
    ("active_rows", 4, "active_rows: 4, and 10 rows are active"),
])  # fmt: skip
def test_wrong_values_are_named(field, value, message):
    from stable_rlhf.ops.policy.cpu_call import select

    call = call_of(10, 1.0)
    call.target.clamp_(min=0)
    if field == "active_rows":
        call = call._replace(active_rows=value)
    else:
        getattr(call, field)[7] = value
    with pytest.raises(ValueError, match=message):
        select(call, VOCABULARY)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("changes", [
    {}, {"row_weight": None}, {"old_logprob": None}, {"advantage": torch.randn(5000, dtype=torch.float64)},
    {"advantage": torch.randn(5000, 2)[:, 1]}, {"policy_denominator": 7.0},
    {"entropy_denominator": 9.0, "rehearsal_denominator": torch.tensor(3)},
], ids=["all", "no weight", "on policy", "float64", "strided", "number", "denominators"])  # fmt: skip
@pytest.mark.parametrize("active", [0.6, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 1.0))])
def test_arguments_and_totals_are_those_of_the_reference(name, changes, active):
    from stable_rlhf.ops.policy.cpu_call import gather, select, totals

    call = call_of(active=active, config=ALL[name], **changes)
    if active == 1.0:
        call.target.clamp_(min=0)
    rows = select(call, VOCABULARY)
    terms, want_terms = gather(rows, call, torch.float32), gather_terms(rows, call, torch.float32)
    for field in vars(want_terms):
        got, want = getattr(terms, field), getattr(want_terms, field)
        assert (got is None) == (want is None), field
        assert want is None or torch.equal(got, want), field
    state = RowState.of(rows)
    g = torch.Generator().manual_seed(3)
    state.logprob.copy_(-4 * torch.rand(len(rows.kind), generator=g))
    state.entropy.copy_(3 * torch.rand(len(rows.kind), generator=g))
    torch.full((2, 5000), math.nan)  # memory that the results may get
    loss, logprob, entropy, metrics, counts = totals(call, rows, state, terms)
    exact = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in vars(want_terms).values()
    ]
    want = total_loss(rows, state.logprob.double(), state.entropy.double(), type(want_terms)(*exact), call.config)
    torch.testing.assert_close(loss.double(), want.loss, rtol=2e-6, atol=1e-6)
    wanted = torch.stack([want.metrics[metric] for metric in METRICS])
    torch.testing.assert_close(metrics.double(), wanted, rtol=1e-5, atol=1e-6)
    assert counts.tolist() == [int(want.metrics[count]) for count in COUNTS]
    assert torch.equal(logprob.double(), want.logprob) and torch.equal(entropy.double(), want.entropy)


@pytest.mark.parametrize("name", ["old_logprob", "advantage", "ref_logprob", "row_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named_where_it_counts(name, value):
    from stable_rlhf.ops.policy.cpu_call import gather, select

    call = call_of(10, 1.0, PolicyLossConfig(kl_coef=0.1))
    call.target.clamp_(min=0)
    call.kind[:] = torch.tensor([1, 2, 0, 1, 1, 1, 1, 1, 1, 1])
    for place, told in ((2, False), (1, name == "row_weight"), (3, True)):
        values = getattr(call, name).clone()
        values[place] = value
        changed = call._replace(**{name: values})
        rows = select(changed, VOCABULARY)
        if told:
            with pytest.raises(ValueError, match=rf"^{name}: non-finite value"):
                gather(rows, changed, torch.float32)
        else:
            gather(rows, changed, torch.float32)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_non_finite_logits_are_told_with_their_row(softcap):
    case = make_case(9, VOCABULARY, kinds=(1, 2))
    case["target"].clamp_(min=0)
    case["target"][0] = -100
    case["hidden"][5] = math.nan
    with ops.backend("cpu"), pytest.raises(ValueError, match="hidden, weight or bias: non-finite logits at row 5"):
        ops.linear_policy_loss(
            case["hidden"], case["weight"], case["target"], case["kind"], old_logprob=case["old_logprob"],
            advantage=case["advantage"], config=PolicyLossConfig(softcap=softcap),
        )  # fmt: skip
