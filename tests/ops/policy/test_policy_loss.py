"""linear_policy_loss, policy_loss and linear_logprob against a float64 loop over rows."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.policy_cases import CONFIGS, PER_ROW, fused_of, make_case, naive_of, naive_row, relative
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.policy import formula, types


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (63, 41), (40, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_naive(name, rows, vocabulary, dtype):
    config = CONFIGS[name]
    case = make_case(rows, vocabulary, dtype=dtype, kinds=(1,) if rows == 1 else (0, 1, 2))
    if rows == 1:
        case["target"] = case["target"].clamp(min=0)
    want_leaves, want, logprobs, entropies, metrics = naive_of(case, config)
    want.backward()
    leaves, out = fused_of(case, config)
    out.loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert out.loss.dtype == dtype and out.loss.shape == ()
    assert abs(float(out.loss.detach()) - float(want.detach())) <= tolerance * max(
        abs(metrics["policy_loss"]), abs(float(want.detach())), 0.1
    )
    for got, expected in ((out.logprob, logprobs), (out.entropy, entropies)):
        assert got.dtype == dtype and not got.requires_grad
        torch.testing.assert_close(
            got.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )
    assert set(out.metrics) == set(metrics)
    for key, expected in metrics.items():
        assert float(out.metrics[key]) == pytest.approx(expected, rel=1e-4, abs=1e-6), key
    for key in ("hidden", "weight", "bias"):
        assert relative(leaves[key].grad, want_leaves[key].grad) <= tolerance, key
    ignored = (case["kind"] == 0) | (case["target"] == -100)
    assert torch.equal(leaves["hidden"].grad[ignored], torch.zeros_like(leaves["hidden"].grad[ignored]))


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10_000])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_chunking_does_not_change_the_result(name, rows_per_chunk):
    case = make_case(50, 33, dtype=torch.float64)
    whole_leaves, whole = fused_of(case, CONFIGS[name])
    whole.loss.backward()
    leaves, out = fused_of(case, CONFIGS[name], workspace_bytes=rows_per_chunk * 33 * 48)
    out.loss.backward()
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-13, atol=1e-13)
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, whole_leaves[key].grad, rtol=1e-12, atol=1e-13)


def test_gradcheck_of_all_terms():
    case = make_case(9, 6, width=4, dtype=torch.float64, seed=3)
    case["kind"] = torch.tensor([1, 2, 0, 1, 1, 2, 1, 1, 0])
    config = dataclasses.replace(CONFIGS["everything"], clip_low=0.9, clip_high=5.0, log_ratio_clamp=20.0)

    def call(hidden, weight, bias):
        given = {name: case[name].double() for name in PER_ROW}
        return ops.linear_policy_loss(
            hidden, weight, case["target"], case["kind"], bias=bias, temperature=case["temperature"].double(),
            config=config, workspace_bytes=600, **given,
        ).loss  # fmt: skip

    inputs = tuple(case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(call, inputs)


def test_logits_version_equals_the_linear_one():
    case = make_case(30, 19, dtype=torch.float64)
    _, linear = fused_of(case, CONFIGS["everything"])
    logits = (case["hidden"] @ case["weight"].T + case["bias"]).requires_grad_()
    given = {name: case[name] for name in PER_ROW}
    out = ops.policy_loss(
        logits, case["target"], case["kind"], temperature=case["temperature"], config=CONFIGS["everything"], **given
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss, linear.loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.logprob, linear.logprob, rtol=1e-13, atol=1e-13)
    assert torch.equal(logits.grad[case["kind"] == 0], torch.zeros_like(logits.grad[case["kind"] == 0]))


def test_leading_dimensions_are_flattened():
    case = make_case(24, 11)
    flat_leaves, flat = fused_of(case, CONFIGS["plain"])
    flat.loss.backward()
    folded = {k: v.reshape(4, 6, *v.shape[1:]) if k not in ("weight", "bias") else v for k, v in case.items()}
    leaves, out = fused_of(folded, CONFIGS["plain"])
    out.loss.backward()
    assert out.logprob.shape == (4, 6)
    assert torch.equal(out.loss, flat.loss)
    assert torch.equal(leaves["hidden"].grad.reshape(24, -1), flat_leaves["hidden"].grad)


@pytest.mark.parametrize("kinds", [(0,), (1,), (2,), (0, 1), (0, 2)])
def test_a_kind_without_rows_adds_nothing(kinds):
    case = make_case(20, 9, dtype=torch.float64, kinds=kinds)
    _, want, *_ = naive_of(case, CONFIGS["k3, entropy"])
    leaves, out = fused_of(case, CONFIGS["k3, entropy"])
    out.loss.backward()
    assert float(out.loss) == pytest.approx(float(want), abs=1e-13)
    for leaf in leaves.values():
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    if kinds == (0,):
        assert float(out.loss) == 0.0 and all(not leaf.grad.any() for leaf in leaves.values())


def test_no_rows_at_all():
    hidden = torch.zeros(0, 4, requires_grad=True)
    out = ops.linear_policy_loss(hidden, torch.ones(3, 4), torch.zeros(0, dtype=torch.int64))
    out.loss.backward()
    assert float(out.loss) == 0.0 and out.logprob.shape == (0,)


def test_ignored_rows_may_hold_anything():
    case = make_case(20, 9)
    case["kind"][:3] = torch.tensor([0, 1, 2])
    case["target"][:3] = torch.tensor([4, -100, 4])
    _, clean = fused_of(case, CONFIGS["k3, entropy"])
    dirty = {name: value.clone() for name, value in case.items()}
    dirty["hidden"][0] = math.nan
    dirty["hidden"][1] = math.inf
    dirty["target"][0] = 10**9
    not_policy = (case["kind"] != 1) | (case["target"] == -100)
    for name in ("old_logprob", "advantage", "ref_logprob"):
        dirty[name][not_policy] = math.nan
    dirty["row_weight"][:2] = math.nan
    dirty["temperature"][:2] = -1.0
    leaves, out = fused_of(dirty, CONFIGS["k3, entropy"])
    out.loss.backward()
    assert torch.equal(out.loss, clean.loss)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())


def test_padding_does_not_change_the_loss():
    case = make_case(16, 9, kinds=(1, 2))
    case["target"] = case["target"].clamp(min=0)
    leaves, out = fused_of(case, CONFIGS["everything"])
    out.loss.backward()
    keep = torch.arange(0, 48, 3)
    padded = {}
    for name, value in case.items():
        if name in ("weight", "bias"):
            padded[name] = value
        else:
            padded[name] = torch.ones(48, *value.shape[1:], dtype=value.dtype)
            padded[name][keep] = value
    padded["kind"] = torch.zeros(48, dtype=torch.int64).index_copy(0, keep, case["kind"])
    padded_leaves, padded_out = fused_of(padded, CONFIGS["everything"])
    padded_out.loss.backward()
    assert torch.equal(out.loss, padded_out.loss)
    assert torch.equal(out.entropy, padded_out.entropy[keep])
    assert torch.equal(leaves["weight"].grad, padded_leaves["weight"].grad)


def test_only_active_rows_reach_the_product(monkeypatch):
    case = make_case(40, 9)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(formula.F, "linear", lambda h, w, b=None: seen.append(h.shape[0]) or linear(h, w, b))
    with ops.backend("torch"):
        fused_of(case, CONFIGS["plain"])
    assert seen == [int(((case["kind"] != 0) & (case["target"] != -100)).sum())] and seen[0] < 40


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(scale):
    case = make_case(12, 5, dtype=torch.float32, kinds=(1, 2))
    case["target"] = case["target"].clamp(min=0)
    g = torch.Generator().manual_seed(1)
    if scale > 0:
        logits = scale * torch.randn(12, 5, generator=g).sign()
    else:  # all strongly negative: a running maximum started at 0 would lose every row
        logits = scale + torch.randn(12, 5, generator=g)
    want = [naive_row(logits[i].double(), int(case["target"][i]), 1.0, None) for i in range(12)]
    leaf = logits.clone().requires_grad_()
    out = ops.policy_loss(leaf, case["target"], torch.full((12,), 2))
    out.loss.backward()
    torch.testing.assert_close(out.logprob.double(), torch.stack([w[0] for w in want]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy.double(), torch.stack([w[1] for w in want]), rtol=1e-6, atol=1e-6)
    onehot = torch.nn.functional.one_hot(case["target"], 5).double()
    expected = 0.01 / 12 * (torch.softmax(logits.double(), -1) - onehot)
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.8 - 1e-9, 0.8 + 1e-9, 1.0, 1.2 - 1e-9, 1.2 + 1e-9, 3.0])
def test_both_clip_edges(ratio, advantage):
    logits = torch.tensor([[0.3, -0.2, 1.0]], dtype=torch.float64, requires_grad=True)
    logprob = torch.log_softmax(logits.detach(), -1)[0, 1]
    out = ops.policy_loss(
        logits, torch.tensor([1]), old_logprob=(logprob - math.log(ratio))[None], advantage=torch.tensor([advantage])
    )
    out.loss.backward()
    clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    value = min(max(ratio, 0.8), 1.2) if clipped else ratio
    assert float(out.loss) == pytest.approx(-value * advantage, rel=1e-12)
    assert float(out.metrics["clip_fraction"]) == float(clipped)
    slope = 0.0 if clipped else -ratio * advantage
    expected = slope * (torch.tensor([[0.0, 1.0, 0.0]]).double() - torch.softmax(logits.detach(), -1))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_log_ratios_of_ten_thousand_stay_finite(gap, estimator):
    logits = torch.zeros(1, 2, requires_grad=True)
    config = PolicyLossConfig(kl_coef=1.0, kl_estimator=estimator)
    logprob = -math.log(2)
    out = ops.policy_loss(
        logits,
        torch.tensor([0]),
        old_logprob=torch.tensor([logprob - gap]),
        ref_logprob=torch.tensor([logprob - gap]),
        advantage=torch.tensor([-1.0]),
        config=config,
    )
    out.loss.backward()
    d = math.copysign(20.0, gap)
    surrogate = math.exp(20.0) if gap > 0 else 0.8
    kl = d * d / 2 if estimator == "k2" else math.exp(-d) - 1 + d
    assert float(out.loss) == pytest.approx(surrogate + kl, rel=1e-6)
    assert not logits.grad.any()  # past the clamp nothing pulls


def test_denominators_make_sums_independent_of_the_cut():
    case = make_case(40, 9, dtype=torch.float64)
    leaves, whole = fused_of(case, CONFIGS["k3, entropy"])
    whole.loss.backward()
    counts = {
        "policy_denominator": whole.metrics["policy_tokens"],
        "rehearsal_denominator": float(whole.metrics["rehearsal_tokens"]),
    }
    total, grad = 0.0, 0.0
    for part in (slice(0, 11), slice(11, 12), slice(12, 40)):
        piece = {k: v if k in ("weight", "bias") else v[part] for k, v in case.items()}
        piece_leaves, out = fused_of(piece, CONFIGS["k3, entropy"], **counts)
        out.loss.backward()
        total, grad = total + float(out.loss.detach()), grad + piece_leaves["weight"].grad
    assert total == pytest.approx(float(whole.loss), rel=1e-12)
    torch.testing.assert_close(grad, leaves["weight"].grad, rtol=1e-11, atol=1e-14)


def test_default_kind_is_policy_where_targeted():
    case = make_case(20, 9, dtype=torch.float64)
    case["kind"] = (case["target"] != -100).long()
    _, with_kind = fused_of(case, CONFIGS["plain"])
    case["kind"] = None
    _, without = fused_of(case, CONFIGS["plain"])
    assert torch.equal(with_kind.loss, without.loss)


def test_scalar_temperature_equals_one_per_row():
    case = make_case(20, 9, dtype=torch.float64)
    case["temperature"] = torch.full((20,), 0.7, dtype=torch.float64)
    _, per_row = fused_of(case, CONFIGS["softcap"])
    case["temperature"] = 0.7
    _, scalar = fused_of(case, CONFIGS["softcap"])
    torch.testing.assert_close(per_row.loss, scalar.loss, rtol=1e-14, atol=0)


def test_k1_warns_once_and_has_its_value():
    types.warn_k1.cache_clear()
    case = make_case(20, 9, dtype=torch.float64)
    config = PolicyLossConfig(kl_coef=0.5, kl_estimator="k1")
    with pytest.warns(UserWarning, match="k1"):
        _, out = fused_of(case, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_of(case, config)
    assert float(out.loss) == pytest.approx(float(naive_of(case, config)[1]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_low_precision_is_as_good_as_plain_pytorch(dtype, logits_dtype):
    """The error of every gradient is at most 1.25 times that of the plain loss in the same type, and with float32
    logits far below it."""
    case = make_case(256, 500, width=64, dtype=dtype)
    case["row_weight"] = torch.ones(256)
    config = PolicyLossConfig(rehearsal_coef=1.0)
    want_leaves, want, *_ = naive_of(case, config)
    want.backward()
    plain = {name: case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    logits = torch.nn.functional.linear(plain["hidden"], plain["weight"], plain["bias"]).float()
    log_p = torch.log_softmax(logits / case["temperature"][:, None], -1)
    logprob = log_p.gather(1, case["target"].clamp(min=0)[:, None])[:, 0]
    rho = (logprob - case["old_logprob"]).exp()
    adv = case["advantage"]
    active = case["target"] != -100
    policy, rehearsal = active & (case["kind"] == 1), active & (case["kind"] == 2)
    loss = -torch.minimum(rho * adv, rho.clamp(0.8, 1.2) * adv)[policy].mean() - logprob[rehearsal].mean()
    loss.backward()
    leaves, out = fused_of(case, config, logits_dtype=logits_dtype, workspace_bytes=64 * 500 * 22)
    out.loss.backward()
    assert out.loss.dtype == out.logprob.dtype == torch.float32
    for key in ("hidden", "weight"):
        assert leaves[key].grad.dtype == dtype
        allowed = 1.25 * relative(plain[key].grad, want_leaves[key].grad)
        assert relative(leaves[key].grad, want_leaves[key].grad) <= allowed, key
    if logits_dtype is not None:
        with ops.backend("torch"):  # a CPU without 16-bit products rounds no logits in the fused form
            _, rounded = fused_of(case, config)
        want_logprob = naive_of(case, config)[2]
        exact = torch.tensor(want_logprob)
        assert (out.logprob - exact).abs().max() < 1e-5 < (rounded.logprob - exact).abs().max()


def test_weight_gradient_of_many_chunks_is_summed_in_float32():
    case = make_case(512, 64, width=32, dtype=torch.bfloat16, kinds=(2,))
    want_leaves, want, *_ = naive_of(case, PolicyLossConfig())
    want.backward()
    errors = {}
    for rows in (512, 4):
        leaves, out = fused_of(case, PolicyLossConfig(), logits_dtype=torch.float32, workspace_bytes=rows * 64 * 22)
        out.loss.backward()
        errors[rows] = relative(leaves["weight"].grad, want_leaves["weight"].grad)
    assert errors[4] <= 1.25 * errors[512]


def test_upstream_gradient_and_second_backward():
    case = make_case(20, 9, dtype=torch.float64)
    leaves, out = fused_of(case, CONFIGS["plain"])
    out.loss.backward()
    scaled_leaves, scaled = fused_of(case, CONFIGS["plain"])
    (3.0 * scaled.loss).backward()
    torch.testing.assert_close(scaled_leaves["weight"].grad, 3.0 * leaves["weight"].grad)
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


def test_autocast_takes_float32_weights():
    case = make_case(20, 9)
    case["hidden"] = case["hidden"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves, out = fused_of(case, CONFIGS["plain"], workspace_bytes=1)
    out.loss.backward()
    assert leaves["weight"].grad.dtype == torch.float32 and leaves["hidden"].grad.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("chunk_bytes", [1, 256 << 20])
def test_linear_logprob(chunk_bytes):
    case = make_case(25, 13, dtype=torch.float64)
    args = (case["hidden"], case["weight"], case["target"])
    options = {"bias": case["bias"], "softcap": 1.2, "workspace_bytes": chunk_bytes}
    logprob, entropy = ops.linear_logprob(*args, temperature=case["temperature"], entropy=True, **options)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    for i, target in enumerate(case["target"].tolist()):
        want = (0.0, 0.0) if target == -100 else naive_row(logits[i], target, float(case["temperature"][i]), 1.2)
        assert float(logprob[i]) == pytest.approx(float(want[0]), abs=1e-13)
        assert float(entropy[i]) == pytest.approx(float(want[1]), abs=1e-13)
    assert ops.linear_logprob(*args, temperature=case["temperature"], **options)[1] is None

    def both(hidden, weight, bias):
        options["bias"] = bias
        out = ops.linear_logprob(hidden, weight, case["target"], entropy=True, **options)
        return out[0].square().sum(), out[1].square().sum()

    small = {k: case[k][:4] if k in ("hidden", "target") else case[k] for k in ("hidden", "weight", "bias", "target")}
    case["target"] = small["target"]
    inputs = tuple(small[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("grad", [False, True])
def test_logits_are_never_whole_in_memory(grad, monkeypatch):
    """The largest product makes at most workspace_bytes of logits."""
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        formula.F, "linear", lambda h, w, b=None: sizes.append(h.shape[0] * w.shape[0] * 4) or linear(h, w, b)
    )
    hidden = torch.randn(300, 8, requires_grad=grad)
    weight = torch.randn(1000, 8, requires_grad=grad)
    with torch.set_grad_enabled(grad), ops.backend("torch"):
        logprob, _ = ops.linear_logprob(hidden, weight, torch.arange(300), workspace_bytes=100_000)
    if grad:
        held = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t)
        with hooks, ops.backend("torch"):
            logprob, _ = ops.linear_logprob(hidden, weight, torch.arange(300), workspace_bytes=100_000)
        assert max(held, default=0) < 10_000  # nothing of [T, V] is kept for the backward pass
        logprob.sum().backward()
    assert max(sizes) <= 100_000
