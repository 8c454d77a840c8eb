"""Arguments in the forms that trainers hold them: each gives what the plain form gives."""

from __future__ import annotations

import pytest
import torch

import stable_rlhf.ops as ops
from helpers.policy_cases import CONFIGS, make_case, on_policy_is_its_own_log_probs
from stable_rlhf.ops import PolicyLossConfig

BATCH, LENGTH, VOCABULARY = 4, 9, 31
FULL = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01, rehearsal_coef=0.5, softcap=3.0)
backends = pytest.mark.parametrize("backend", ["cpu", "torch"])


def case_of(dtype=torch.float32):
    case = make_case(BATCH * LENGTH, VOCABULARY, dtype=dtype)
    case = {n: x.reshape(BATCH, LENGTH, *x.shape[1:]) if len(x) == BATCH * LENGTH else x for n, x in case.items()}
    return {name: case[name] for name in case if name not in ("bias", "temperature")}


def run(backend, case, **more):
    """Loss, log-probs, and the gradients of hidden and weight."""
    case = {**case, **more}
    hidden, weight = (case.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight"))
    target, kind = case.pop("target"), case.pop("kind")
    with ops.backend(backend):
        out = ops.linear_policy_loss(hidden, weight, target, kind, **{"config": FULL, **case})
    out.loss.backward()
    return out.loss.detach(), out.logprob, hidden.grad, weight.grad


def same(got, want, tolerance=0.0):
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@backends
@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
@pytest.mark.parametrize("name", ["advantage", "row_weight"])
def test_one_number_a_sequence(backend, name, shape):
    case = case_of()
    each = case[name][:, 0]
    want = run(backend, {**case, name: each[:, None].expand(BATCH, LENGTH).contiguous()})
    same(run(backend, {**case, name: each.reshape(shape)}), want)


@backends
@pytest.mark.parametrize("given", [("policy_denominator",), ("policy_denominator", "rehearsal_denominator")])
def test_denominators_by_sequence(backend, given):
    """As in a mean over sequences of their means: by the sum over rows, written out."""
    case = case_of()
    divisors = {name: 1.0 + torch.arange(BATCH) + 7 * place for place, name in enumerate(given)}
    whole = {"policy_denominator": 1.0, "rehearsal_denominator": 1.0}
    weight = case["row_weight"].clone()
    for name, kind in (("policy_denominator", 1), ("rehearsal_denominator", 2)):
        if name in divisors:
            weight = torch.where(case["kind"] == kind, weight / divisors[name][:, None], weight)
    want = run(backend, {**case, "row_weight": weight}, **whole)
    same(run(backend, case, **{**whole, **divisors}), want, 1e-6)
    case["row_weight"] = None
    assert run(backend, case, **{**whole, **divisors})[0].isfinite()
    for wrong in (-1.0, 0.0, torch.nan):
        each = torch.where(torch.arange(BATCH) == 1, wrong, divisors[given[-1]].double())
        with pytest.raises(ValueError, match=rf"^{given[-1]}: {wrong} is not positive, and row \d+ has it"):
            run(backend, case, **{**whole, **divisors, given[-1]: each})


@backends
def test_denominators_of_sequences_of_one_row(backend):
    case = {name: x[:, :1] if x.shape[:2] == (BATCH, LENGTH) else x for name, x in case_of().items()}
    case["kind"] = torch.ones_like(case["kind"])
    each = 1.0 + torch.arange(BATCH)
    same(run(backend, case, policy_denominator=each[:, None]), run(backend, case, policy_denominator=each))


@backends
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_for_kinds(backend, dtype):
    case = case_of()
    mask = case["kind"] != 0
    same(run(backend, case, kind=mask.to(dtype)), run(backend, case, kind=mask.long()))


@backends
def test_a_mask_of_floats_holds_no_shares(backend):
    case = case_of()
    kind = (case["kind"] != 0).float()
    kind[1, 2] = 0.5
    with pytest.raises(ValueError, match=f"kind: 0.5 at row {LENGTH + 2}; a mask of floats holds 0 and 1"):
        run(backend, case, kind=kind)


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_short_tokens(backend, dtype):
    case = case_of()
    same(run(backend, case, target=case["target"].to(dtype)), run(backend, case))
    plain = ops.linear_logprob(case["hidden"], case["weight"], case["target"])[0]
    assert torch.equal(ops.linear_logprob(case["hidden"], case["weight"], case["target"].to(dtype))[0], plain)
    logits = case["hidden"] @ case["weight"].T
    kinds = (case["kind"] == 2) * 2
    want = ops.policy_loss(logits, case["target"], kinds).loss
    assert torch.equal(ops.policy_loss(logits, case["target"].to(dtype), kinds).loss, want)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_head_over_hidden_states_of_sixteen_bits(backend, dtype):
    case = case_of()
    case["hidden"] = case["hidden"].to(dtype)
    narrow = {**case, "weight": case["weight"].to(dtype)}
    got, want = run(backend, case), run(backend, narrow)
    assert got[2].dtype == dtype and got[3].dtype == torch.float32
    same(got[:3], want[:3])
    same(got[3:], [want[3].float()])
    with ops.backend(backend):
        logprob = ops.linear_logprob(case["hidden"], case["weight"], case["target"])[0]
        assert torch.equal(logprob, ops.linear_logprob(case["hidden"], narrow["weight"], case["target"])[0])
    with pytest.raises(ValueError, match="weight: type"):
        run(backend, {**case, "hidden": case["hidden"].float(), "weight": narrow["weight"]})


@backends
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.3, torch.linspace(0.5, 2.0, BATCH * LENGTH).reshape(BATCH, LENGTH)])
def test_logit_scale(backend, softcap, temperature):
    """Against a head whose weights hold the scale."""
    case, scale = case_of(), 0.37
    options = {"config": PolicyLossConfig(softcap=softcap, rehearsal_coef=0.5), "temperature": temperature}
    got = run(backend, case, logit_scale=scale, **options)
    want = run(backend, {**case, "weight": scale * case["weight"]}, **options)
    same(got[:3], want[:3], 1e-5)
    same(got[3:], [scale * want[3]], 1e-5)
    with ops.backend(backend):
        logprob = ops.linear_logprob(
            case["hidden"], case["weight"], case["target"], softcap=softcap, temperature=temperature, logit_scale=scale
        )[0]
        logits = case["hidden"] @ case["weight"].T
        also = ops.policy_loss(
            logits, case["target"], case["kind"], old_logprob=case["old_logprob"], advantage=case["advantage"],
            row_weight=case["row_weight"], logit_scale=scale, **options,
        )  # fmt: skip
    active = case["kind"] != 0
    same([logprob[active], also.logprob, also.loss.detach()], [want[1][active], want[1], want[0]], 1e-5)
    with pytest.raises(ValueError, match=r"logit_scale: 0\.0 is not a positive number"):
        run(backend, case, logit_scale=0.0)


@backends
def test_what_is_masked_is_not_looked_at(backend):
    """Tokens that a rollout engine left unscored hold NaN."""
    case = case_of()
    masked = (case["kind"] == 0) | (case["target"] == -100)
    want = run(backend, case)
    for name in ("old_logprob", "advantage", "ref_logprob", "row_weight"):
        case[name] = torch.where(masked, torch.nan, case[name])
    same(run(backend, case), want)


@backends
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_an_unscored_policy_token_is_named(backend, value):
    case = case_of()
    case["kind"][:] = 1
    case["target"].clamp_(min=0)
    case["old_logprob"][0, 3] = value
    with pytest.raises(ValueError, match=r"old_logprob: non-finite value .* at position 3"):
        run(backend, case)


@backends
@pytest.mark.parametrize("name", CONFIGS)
def test_no_old_log_probs_on_policy(backend, name):
    on_policy_is_its_own_log_probs(backend, CONFIGS[name])


@backends
def test_rewards_in_a_column_and_integer_margins(backend):
    reward, expected = torch.randn(6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, -0.2, 0.3])
    margins, shifts = torch.tensor([2, 2, 1, 2, 2, 1]), torch.tensor([1, 0, 2])

    def loss(reward, expected, margin, rank_margin):
        with ops.backend(backend):
            out = ops.advantage_loss(reward, expected, margin=margin, rank_margin=rank_margin)
        return out.loss, out.score

    want = loss(reward, expected, margins.float(), shifts.float())
    same(loss(reward[:, None], expected[:, None], margins, shifts), want)
    leaf = reward[:, None].clone().requires_grad_()
    ops.advantage_loss(leaf, expected[:, None]).loss.backward()
    assert leaf.grad.shape == (6, 1)
    with ops.backend(backend):
        score = ops.advantage_score(reward[:3, None], expected[:, None])
        assert torch.equal(score, ops.advantage_score(reward[:3], expected))


def test_a_tensor_among_the_constants_is_named():
    assert PolicyLossConfig(kl_coef=torch.tensor(0.1)).kl_coef == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"^kl_coef: a tensor of shape \(2,\)"):
        PolicyLossConfig(kl_coef=torch.ones(2))
