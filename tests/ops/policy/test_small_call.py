"""A loss on few rows in one stretch, against the way in chunks and the formulas in float64."""

from __future__ import annotations

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.policy_cases import CONFIGS, PER_ROW, make_case, naive_of, relative
from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.memory import release_workspace
from stable_rlhf.ops.policy import fused, small_call
from stable_rlhf.ops.policy.types import PolicyLossConfig

pytestmark = pytest.mark.skipif(extension() is None, reason="no C++ module here")
ALL = {
    **CONFIGS, "k1": PolicyLossConfig(kl_coef=0.3, kl_estimator="k1"),
    "k1+": PolicyLossConfig(kl_coef=0.3, kl_estimator="k1+"), "no rehearsal": PolicyLossConfig(rehearsal_coef=0.0),
}  # fmt: skip


@pytest.fixture
def taken(monkeypatch):
    """Whether each call was taken here."""
    found: list[bool] = []
    right = small_call.loss_and_gradients

    def watched(call):
        made = right(call)
        found.append(made is not None)
        return made

    monkeypatch.setattr(small_call, "loss_and_gradients", watched)
    return found


def in_chunks(call):
    """The same call the other way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_call, "loss_and_gradients", lambda call: None)
        return call()


def run(needs=(True, True), shape=None, **options):
    rows, vocabulary, width = shape or (24, 31, 12)
    g = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(n, width, generator=g).requires_grad_(need)
        for n, need in zip((rows, vocabulary), needs, strict=True)
    )
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    kind = torch.randint(0, 3, (rows,), generator=g)
    per_row = {name: -3 * torch.rand(rows, generator=g) for name in ("old_logprob", "ref_logprob")}
    given = {"kind": kind, "advantage": torch.randn(rows, generator=g), **per_row} | options
    hidden_given, weight_given = given.pop("hidden", hidden), given.pop("weight", weight)
    out = ops.linear_policy_loss(hidden_given, weight_given, given.pop("target", target), **given)
    if any(needs):
        (out.loss * 3).backward()
    return [out.loss.detach(), out.logprob, out.entropy, *out.metrics.values(), hidden.grad, weight.grad]


def alike(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:kl_estimator 'k1'")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kinds", [(0, 1, 2), (1, 2), (1,), (2,)], ids=str)
def test_it_is_the_loss_of_the_formulas(name, kinds, taken):
    case = make_case(19, 37, kinds=kinds)
    case["bias"].zero_()
    case["temperature"].fill_(0.8)
    hidden, weight = (case[key].clone().requires_grad_() for key in ("hidden", "weight"))
    out = ops.linear_policy_loss(
        hidden, weight, case["target"], case["kind"], temperature=0.8, config=ALL[name],
        **{key: case[key] for key in PER_ROW},
    )  # fmt: skip
    out.loss.backward()
    assert taken == [ALL[name].kl_estimator != "k1"]  # which may warn
    leaves, loss, logprobs, entropies, metrics = naive_of(case, ALL[name])
    loss.backward()
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=2e-6, abs=2e-7)
    assert relative(weight.grad, leaves["weight"].grad) < 5e-6 and relative(hidden.grad, leaves["hidden"].grad) < 5e-6
    torch.testing.assert_close(out.logprob, torch.tensor(logprobs), rtol=5e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(out.entropy, torch.tensor(entropies), rtol=5e-6, atol=1e-6, check_dtype=False)
    for key, value in metrics.items():
        assert float(out.metrics[key]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize(
    "options",
    [
        {}, {"row_weight": torch.rand(24)}, {"old_logprob": None}, {"temperature": 0.7}, {"logit_scale": 2.0},
        {"policy_denominator": 7.0, "rehearsal_denominator": 3.0}, {"kind": None}, {"kind": torch.ones(24).bool()},
        {"advantage": torch.randn(24, dtype=torch.float64)}, {"advantage": torch.randn(24, 2)[:, 1]},
        {"needs": (True, False)}, {"needs": (False, True)}, {"grad_scale": 8.0}, {"active_rows": 14},
        {"config": PolicyLossConfig(kl_coef=0.2, entropy_coef=0.1, dual_clip=3.0)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_it_is_the_other_way_to_rounding(options, taken):
    mine = run(**options)
    assert taken == [True]
    alike(mine, in_chunks(lambda: run(**options)))


def test_rows_of_two_dimensions_and_memory_that_is_not_in_order(taken):
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(12, 4, 6, generator=g).permute(1, 2, 0)  # [4, 6, 12]
    options = {
        "target": torch.randint(0, 31, (6, 4), generator=g).t(), "kind": torch.randint(0, 3, (4, 6), generator=g),
        "old_logprob": -torch.rand(4, 6), "advantage": torch.randn(4), "ref_logprob": None,
        "weight": torch.randn(12, 31, generator=g).t(),
    }  # fmt: skip
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    mine = run(needs=(False, False), **options | {"hidden": leaves[0]})
    other = in_chunks(lambda: run(needs=(False, False), **options | {"hidden": leaves[1]}))
    assert taken == [True] and mine[1].shape == (4, 6)
    alike(mine, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": torch.full((24,), 3)}, "kind: 3 at row 0"),
        ({"target": torch.full((24,), 31)}, "target: 31 at row"),
        ({"active_rows": 5}, "active_rows: 5, and 1[0-9] rows are active"),
        ({"advantage": None}, "advantage: required"),
        ({"advantage": torch.full((24,), torch.nan)}, "advantage: non-finite value nan"),
        ({"hidden": torch.full((24, 12), torch.inf)}, "hidden, weight or bias: non-finite logits at row"),
        ({"policy_denominator": 0.0}, "policy_denominator: 0.0 is not positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_named_as_ever(changes, message, taken):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert taken == [False]


@pytest.mark.parametrize(
    "options",
    [
        {"needs": (False, False)}, {"shape": (300, 1000, 4)}, {"shape": (24, 1000, 700)},
        {"workspace_bytes": 31 * 4 * 5}, {"grad_tolerance": 1e-2},
        {"bias": torch.zeros(31)}, {"temperature": torch.ones(24)}, {"policy_denominator": torch.tensor(7.0)},
        {"config": PolicyLossConfig(importance_level="sequence"), "cu_seqlens": torch.tensor([0, 24])},
        {"config": PolicyLossConfig(entropy_coef=0.1), "entropy_denominator": 5.0}, {"kind": torch.zeros(24).long()},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_what_does_not_fit_goes_the_other_way(options, taken):
    run(**options)
    assert taken == [False]


def test_autocast_and_16_bits_go_the_other_way(taken):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run()
    run(hidden=torch.randn(24, 12).bfloat16(), weight=torch.randn(31, 12).bfloat16(), needs=(False, False))
    assert taken == [False, False]


def test_results_share_no_memory():
    """An operator's must not."""
    seen = []
    right = fused.small_call.loss_and_gradients

    def watched(call):
        seen.append(right(call))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_call, "loss_and_gradients", watched)
        run()
    (made,) = seen
    places = [tensor.untyped_storage().data_ptr() for tensor in made if tensor.numel()]
    assert len(made) == 8 and len(places) == len(set(places)) == 7


def test_autograd_knows_the_loss_alone():
    weight, target = torch.randn(31, 12, requires_grad=True), torch.randint(0, 31, (24,))
    out = ops.linear_policy_loss(torch.randn(24, 12), weight, target, advantage=torch.randn(24))
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in (out.logprob, out.entropy, *out.metrics.values()))


def test_memory_that_is_kept_from_a_call_under_inference_mode(taken):
    target = torch.zeros(24).long()
    release_workspace()
    with torch.inference_mode():
        ops.linear_logprob(torch.randn(24, 12), torch.randn(31, 12), target)
    run(target=target, kind=None)
    assert taken == [True]


def test_memory_that_is_kept_from_calls_of_other_shapes(taken):
    for shape in ((24, 31, 12), (7, 90, 12), (30, 31, 12), (24, 31, 12)):
        mine = run(shape=shape)
        alike(mine, in_chunks(lambda shape=shape: run(shape=shape)))
    assert taken == [True] * 4


def test_rows_between_products_are_shared_out_to_threads_that_are_awake(taken):
    before_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = extension().shared_loops()
        run(shape=(64, 1000, 8))
        assert extension().shared_loops() == before + 1
        run(shape=(24, 31, 12))
        assert extension().shared_loops() == before + 1, "these are done before a worker has looked"
    finally:
        torch.set_num_threads(before_threads)
    assert taken == [True, True]
