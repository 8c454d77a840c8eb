"""Objectives, ratios of whole sequences, the entropy bonus's own denominator, and the loss of log-probs that exist:
every backend against the formulas as a float64 loop over rows."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.forks import run_interpreted
from helpers.interpreter import interpreted, not_interpreted
from helpers.policy_cases import CONFIGS, make_case, naive_of
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.backends import extension

ROWS, VOCABULARY = 24, 41
BOUNDS = {"padded": list(range(0, ROWS + 1, 6)), "packed": [0, 5, 5, 6, 13, ROWS, ROWS]}
SEQUENCES = {
    "ppo": PolicyLossConfig(0.05, 0.08, importance_level="sequence"),
    "dual clip": PolicyLossConfig(0.1, 0.1, 1.05, importance_level="sequence", rehearsal_coef=0.5),
    "cispo, entropy": PolicyLossConfig(0.05, 0.05, entropy_coef=0.1, objective="cispo", importance_level="sequence"),
    "unbiased KL": PolicyLossConfig(kl_coef=0.3, kl_unbiased=True, importance_level="sequence"),
    "k3+, softcap": PolicyLossConfig(
        kl_coef=0.3, kl_estimator="k3+", kl_unbiased=True, softcap=3.0, importance_level="sequence"
    ),
    "held": PolicyLossConfig(clip_high=3.0, log_ratio_clamp=0.05, importance_level="sequence"),
}
BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(extension() is None, reason="no C++ module")), "torch"]


@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__)


def given_of(case):
    names = ("old_logprob", "advantage", "ref_logprob", "row_weight", "temperature")
    return {name: case[name] for name in names}


def shaped(case, layout):
    """The case's rows as sequences: [B, L], or packed with their limits."""
    if layout == "packed":
        return case, {"cu_seqlens": torch.tensor(BOUNDS[layout], dtype=torch.int32)}
    per_row = {k: v if k in ("weight", "bias") else v.reshape(4, 6, *v.shape[1:]) for k, v in case.items()}
    return per_row, {}


def compare(case, config, layout=None, entropy_denominator=None, tolerance=2e-5, **options):
    """`linear_policy_loss` and `policy_loss` of the case against the loop."""
    bounds = None if layout is None else BOUNDS[layout]
    want, loss, logprob, entropy, metrics = naive_of(
        case, config, denominators=(7.0, 3.0), entropy_denominator=entropy_denominator, bounds=bounds
    )
    loss.backward()
    case, more = (case, {}) if layout is None else shaped(case, layout)
    more |= {"policy_denominator": 7.0, "rehearsal_denominator": 3.0, "entropy_denominator": entropy_denominator}
    leaves = {name: case[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    hidden, weight, bias = leaves.values()
    given = {"config": config, **given_of(case), **more}
    out = ops.linear_policy_loss(hidden, weight, case["target"], case["kind"], bias=bias, **given, **options)
    out.loss.backward()
    for name, leaf in leaves.items():
        close(leaf.grad.reshape(want[name].shape), want[name].grad, tolerance)
    logits = torch.nn.functional.linear(case["hidden"], case["weight"], case["bias"]).requires_grad_()
    from_logits = ops.policy_loss(logits, case["target"], case["kind"], **given)
    from_logits.loss.backward()
    by_hidden = (logits.grad @ case["weight"]).reshape(want["hidden"].shape)
    close(by_hidden, want["hidden"].grad, tolerance)
    for result in (out, from_logits):
        close(result.loss, loss, tolerance)
        close(result.logprob.reshape(-1), torch.tensor(logprob), tolerance)
        close(result.entropy.reshape(-1), torch.tensor(entropy), tolerance)
        for name, value in metrics.items():
            assert float(result.metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    return out


def close(got, want, tolerance):
    assert float((got.detach().double() - want.detach().double()).norm()) <= tolerance * max(
        float(want.detach().double().norm()), 1e-3
    )


def distinct():
    """A case in which some ratios of sequences are on either side of the clip."""
    case = make_case(ROWS, VOCABULARY, seed=3, kinds=(0, 1, 1, 1, 1, 2))
    case["kind"][BOUNDS["packed"][2]] = 2  # a sequence of one rehearsal row
    return case


@not_interpreted
@pytest.mark.parametrize("layout", BOUNDS)
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ratios_of_sequences(backend, name, layout):
    with ops.backend(backend):
        out = compare(distinct(), SEQUENCES[name], layout, workspace_bytes=VOCABULARY * 4 * 7)
    if name == "ppo":
        assert 0.0 < float(out.metrics["clip_fraction"]) < 1.0


@interpreted
@pytest.mark.parametrize(
    ("name", "layout"), [("ppo", "packed"), ("cispo, entropy", "padded"), ("unbiased KL", "packed")]
)
def test_ratios_of_sequences_on_a_gpu(name, layout):
    with ops.backend("triton"):
        compare(distinct(), SEQUENCES[name], layout, workspace_bytes=VOCABULARY * 4 * 7)


def test_a_token_s_ratio_is_not_its_sequence_s():
    """The negative control of the tests above."""
    config = PolicyLossConfig(1.0, 10.0, importance_level="sequence")
    case = distinct()
    _, more = shaped(case, "packed")
    out = ops.linear_policy_loss(
        case["hidden"], case["weight"], case["target"], case["kind"], bias=case["bias"], config=config,
        policy_denominator=7.0, rehearsal_denominator=3.0, **given_of(case), **more,
    )  # fmt: skip
    for bounds, same in ((BOUNDS["packed"], True), (BOUNDS["padded"], False), (None, False)):
        _, loss, *_ = naive_of(case, config, denominators=(7.0, 3.0), bounds=bounds)
        assert (abs(float(out.loss) - float(loss.detach())) < 1e-5) == same


@not_interpreted
@pytest.mark.parametrize("name", ["everything", "reinforce"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_has_a_denominator_of_its_own(backend, name):
    with ops.backend(backend):
        compare(distinct(), CONFIGS[name], entropy_denominator=5.0)
        compare(distinct(), CONFIGS[name], entropy_denominator=5.0, grad_scale=64.0)


@interpreted
@pytest.mark.parametrize("name", ["everything", "cispo"])
def test_the_entropy_has_a_denominator_of_its_own_on_a_gpu(name):
    with ops.backend("triton"):
        compare(distinct(), CONFIGS[name], entropy_denominator=5.0)


@pytest.mark.parametrize("layout", BOUNDS)
def test_no_row_and_no_policy_row(layout):
    config = SEQUENCES["ppo"]
    for kind in (0, 2):
        case = make_case(ROWS, VOCABULARY)
        case["kind"].fill_(kind)
        case, more = shaped(case, layout)
        hidden = case["hidden"].requires_grad_()
        out = ops.linear_policy_loss(
            hidden, case["weight"], case["target"], case["kind"], config=config, **given_of(case), **more
        )
        out.loss.backward()
        assert math.isfinite(float(out.loss.detach())) and (kind == 2) == bool(hidden.grad.any())
        assert float(out.metrics["max_ratio"]) == 0.0


@not_interpreted
@pytest.mark.parametrize("layout", BOUNDS)
@pytest.mark.parametrize("name", [*CONFIGS, *SEQUENCES])
def test_log_probs_that_exist(name, layout):
    """The same loss, and through them the same gradients, as from hidden states."""
    config = {**CONFIGS, **SEQUENCES}[name]
    case, more = shaped(distinct(), layout)
    given = {k: v for k, v in given_of(case).items() if k != "temperature"}
    kind = torch.where(case["target"] == -100, 0, case["kind"])
    made = []
    for door in (True, False):
        hidden = case["hidden"].detach().clone().requires_grad_()
        if door:
            capped = PolicyLossConfig(**{**vars(config), "softcap": None})
            both = ops.linear_logprob(
                hidden, case["weight"], case["target"], entropy=True, softcap=config.softcap,
                temperature=case["temperature"],
            )  # fmt: skip
            out = ops.logprob_policy_loss(both[0], kind, entropy=both[1], config=capped, **given, **more)
        else:
            out = ops.linear_policy_loss(
                hidden, case["weight"], case["target"], case["kind"], config=config,
                temperature=case["temperature"], **given, **more,
            )  # fmt: skip
        out.loss.backward()
        made.append((hidden.grad, out.loss.detach(), out.logprob, *out.metrics.values()))
    for door, whole in zip(*made, strict=True):
        torch.testing.assert_close(door, whole, rtol=2e-5, atol=1e-6)


def test_log_probs_of_rows_that_are_not_active_are_not_looked_at():
    case = make_case(12, VOCABULARY)
    logprob = torch.where(case["kind"] == 0, math.nan, -1.0).requires_grad_()
    given = {k: v for k, v in given_of(case).items() if k != "temperature"}
    out = ops.logprob_policy_loss(logprob, case["kind"], **given)
    out.loss.backward()
    assert torch.isfinite(logprob.grad).all() and not logprob.grad[case["kind"] == 0].any()
    with pytest.raises(ValueError, match="logprob: non-finite"):
        ops.logprob_policy_loss(logprob, None, **given)


@pytest.mark.parametrize(("setting", "message"), [
    ({"objective": "gspo"}, "objective: 'gspo'"), ({"importance_level": "turn"}, "importance_level: 'turn'"),
    ({"kl_unbiased": 1}, "kl_unbiased: "), ({"kl_clamp": 0.0}, "kl_clamp: 0.0 is not positive"),
    ({"kl_ratio_max": -1.0}, "kl_ratio_max: -1.0 is not positive"), ({"kl_estimator": "k4"}, "kl_estimator: 'k4'"),
    ({"kl_clamp": torch.ones(2)}, "kl_clamp: "),
])  # fmt: skip
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**setting)


def test_sequences_are_checked():
    case = make_case(6, VOCABULARY)
    config = PolicyLossConfig(importance_level="sequence")

    def call(**more):
        ops.linear_policy_loss(
            case["hidden"], case["weight"], case["target"].clamp(min=0), config=config, **given_of(case), **more
        )

    with pytest.raises(ValueError, match=r"cu_seqlens: required .* shape \(6,\) is not \[B, L\]"):
        call()
    for bounds in ([0, 5], [1, 6], [0, 4, 2, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: does not rise from 0 to the number of rows, 6"):
            call(cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="cu_seqlens: "):
        call(cu_seqlens=torch.tensor([0.0, 6.0]))
    with pytest.raises(ValueError, match="entropy: required"):
        ops.logprob_policy_loss(
            case["old_logprob"], config=PolicyLossConfig(entropy_coef=0.1), advantage=case["advantage"]
        )
    with pytest.raises(ValueError, match="config: softcap"):
        ops.logprob_policy_loss(case["old_logprob"], config=PolicyLossConfig(softcap=3.0), advantage=case["advantage"])
