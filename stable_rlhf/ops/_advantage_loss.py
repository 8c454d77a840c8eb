"""The Advantage Model's score and loss (arXiv 2309.10202, eqs. 6 and 8); without bounds, the plain reward model's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_rlhf.ops._backend import choose, register
from stable_rlhf.ops._checks import (
    INTEGERS,
    check_choice,
    check_cu_seqlens,
    check_finite,
    check_tensor,
    check_values,
    first_true,
    statistics_dtype,
)

WEIGHT_MODES = ("length_normalized", "sequence")


class AdvantageLossOutput(NamedTuple):
    """What `advantage_loss` returns: a differentiable loss, and detached figures about it.

    loss: 0-d, differentiable in reward and expected.
    score: [R] a(x, y) of every response, detached.
    ranking_loss, upper_bound_loss, lower_bound_loss: the three terms; they add up to the loss.
    accuracy: share of pairs whose chosen response scores higher, ties counted half.
    effective_sample_size: (sum w)^2 / sum w^2 over the responses, averaged over the K alternates; R without alternates.
    sign_flip_share: share of responses with sum_k w_k > N, whose reward counts with the wrong sign.
    bound_violation_share: share of the pairs' scores past their bound (a_c > m, or a_r < -m); 0 without bounds.
    """

    loss: Tensor
    score: Tensor
    ranking_loss: Tensor
    upper_bound_loss: Tensor
    lower_bound_loss: Tensor
    accuracy: Tensor
    effective_sample_size: Tensor
    sign_flip_share: Tensor
    bound_violation_share: Tensor


def advantage_loss(
    reward: Tensor,
    expected: Tensor | None = None,
    *,
    pairs: Tensor | None = None,
    prompt: Tensor | None = None,
    margin: float | Tensor | None = 2.5,
    rank_margin: float | Tensor = 0.0,
    label_smoothing: float | Tensor = 0.0,
    num_policies: int | None = None,
    logprob: Tensor | None = None,
    alt_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weight_mode: str = "length_normalized",
    max_weight: float | None = 1.0,
    pair_weight: float | Tensor | None = None,
) -> AdvantageLossOutput:
    """The Advantage Model's loss over pairs of responses.

    Score (eq. 8): a = r - (N - K)/N e(x) - 1/N sum_k w_k r,  w_k = pi(y|x) / pi'_k(y|x), without gradient.
    Loss (eq. 6) of a pair with Delta = a_c - a_r, mu = rank_margin, alpha = label_smoothing, m = margin:

        l = -(1 - alpha) log sigma(Delta - mu) - alpha log sigma(-(Delta - mu))
            - log sigma(m_c - a_c) - log sigma(m_r + a_r)
        loss = sum_i pair_weight_i l_i / M

    Args:
        reward: [R] r of every response.
        expected: [P] e of every prompt; None: e = 0 (with margin=None and no alternates: the plain reward model).
        pairs: [M, 2] integer, rows (chosen, rejected) of indices into reward; None: reward's first half was chosen
            against its second half.
        prompt: [R] integer, each response's prompt as an index into expected; None: pair i has prompt i.
        margin: m, one for all or [R] for each response (its prompt's); None: no bounds.
        rank_margin, label_smoothing: one for all or [M]; label_smoothing in [0, 1].
        num_policies: N >= K and at least 1; None: K + 1.
        logprob, alt_logprob, cu_seqlens: [T], [K, T], [R + 1]: packed response tokens' log-probabilities under the
            policy to be tuned and the K alternates that collected the data; all three or none (K = 0).
        weight_mode: "length_normalized" (w_k to the power 1/|y|) or "sequence" (the paper).
        max_weight: each w_k is clamped there, in log space; None: never.
        pair_weight: one for all or [M]; None: 1. For all pairs of a ranking of n: 1 / (n choose 2).

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong, non-finite input included.
    """
    score, weights, policies = _score(
        "advantage_loss",
        reward,
        expected,
        _default_prompt(reward, expected, pairs, prompt),
        num_policies,
        None,
        logprob,
        alt_logprob,
        cu_seqlens,
        weight_mode,
        max_weight,
    )
    dtype, device = score.dtype, score.device
    chosen, rejected = _pairs(reward, pairs).unbind(1)
    count = chosen.numel()
    smoothing = _per("label_smoothing", label_smoothing, count, score)
    if check_values(device) and bool(((smoothing < 0) | (smoothing > 1)).any()):
        raise ValueError("label_smoothing: has values outside [0, 1]")
    weight = _per("pair_weight", 1.0 if pair_weight is None else pair_weight, count, score)

    difference = score[chosen] - score[rejected]
    shifted = difference - _per("rank_margin", rank_margin, count, score)
    ranking = -(1.0 - smoothing) * F.logsigmoid(shifted) - smoothing * F.logsigmoid(-shifted)
    if margin is None:
        upper = lower = torch.zeros_like(difference)
        violations = score.new_zeros(())
    else:
        bound = _per("margin", margin, reward.numel(), score)
        upper = -F.logsigmoid(bound[chosen] - score[chosen])
        lower = -F.logsigmoid(bound[rejected] + score[rejected])
        past = (score[chosen] > bound[chosen]).sum() + (score[rejected] < -bound[rejected]).sum()
        violations = past.to(dtype) / max(2 * count, 1)
    terms = [(weight * term).sum() / max(count, 1) for term in (ranking, upper, lower)]
    with torch.no_grad():
        accuracy = ((difference > 0).to(dtype) + 0.5 * (difference == 0).to(dtype)).sum() / max(count, 1)
        if weights is None:
            size, flips = torch.full((), float(reward.numel()), dtype=dtype, device=device), score.new_zeros(())
        else:
            size = _effective_sample_size(weights)
            flips = (weights.exp().sum(0) > policies).to(dtype).sum() / max(reward.numel(), 1)
    return AdvantageLossOutput(
        loss=terms[0] + terms[1] + terms[2],
        score=score.detach(),
        ranking_loss=terms[0].detach(),
        upper_bound_loss=terms[1].detach(),
        lower_bound_loss=terms[2].detach(),
        accuracy=accuracy,
        effective_sample_size=size.to(dtype),
        sign_flip_share=flips,
        bound_violation_share=violations,
    )


def advantage_score(
    reward: Tensor,
    expected: Tensor | None = None,
    *,
    prompt: Tensor | None = None,
    num_policies: int | None = None,
    num_alternates: int | None = None,
    logprob: Tensor | None = None,
    alt_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weight_mode: str = "length_normalized",
    max_weight: float | None = 1.0,
) -> Tensor:
    """The Advantage Model's score a(x, y) of every response, for PPO, selection and evaluation.

    With log-probabilities of the alternates this is eq. 8. Without, where nothing but r and e is known, w_k = 1 and
    a = (N - K)/N (r - e); r - e alone would be (K + 1) times too large at the default N = K + 1.

    Args:
        reward: [R]; differentiable.
        expected: [P] or None for e = 0.
        prompt: [R] integer into expected; None: response i has prompt i, so P = R.
        num_policies, num_alternates: N and K that the scorer was trained with. None: K from alt_logprob (0 without),
            N = K + 1. N >= K >= 0 and N >= 1; with N = K the score without alternates is 0 everywhere.
        logprob, alt_logprob, cu_seqlens, weight_mode, max_weight: as in `advantage_loss`.

    Returns:
        [R] float32 (float64 for float64 input).

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong.
    """
    return _score(
        "advantage_score",
        reward,
        expected,
        prompt,
        num_policies,
        num_alternates,
        logprob,
        alt_logprob,
        cu_seqlens,
        weight_mode,
        max_weight,
    )[0]


def _score(
    op: str,
    reward: Tensor,
    expected: Tensor | None,
    prompt: Tensor | None,
    num_policies: int | None,
    num_alternates: int | None,
    logprob: Tensor | None,
    alt_logprob: Tensor | None,
    cu_seqlens: Tensor | None,
    weight_mode: str,
    max_weight: float | None,
) -> tuple[Tensor, Tensor | None, int]:
    """Score [R], log w [K, R] (None without alternates) and N."""
    check_tensor("reward", reward)
    if reward.ndim != 1:
        raise ValueError(f"reward: shape {tuple(reward.shape)} instead of [R]")
    device, responses = reward.device, reward.numel()
    dtypes = [reward.dtype]
    if check_values(device):
        check_finite("reward", reward.detach())
    if expected is not None:
        check_tensor("expected", expected, device=device)
        if expected.ndim != 1:
            raise ValueError(f"expected: shape {tuple(expected.shape)} instead of [P]")
        if check_values(device):
            check_finite("expected", expected.detach())
        dtypes.append(expected.dtype)
        if prompt is None:
            if expected.numel() != responses:
                raise ValueError(f"expected: {expected.numel()} values for {responses} responses, and no prompt given")
            prompt = torch.arange(responses, device=device)
        prompt = _indices("prompt", prompt, (responses,), expected.numel(), device)
    elif prompt is not None:
        raise ValueError("prompt: given without expected")
    weights = _log_weights(responses, device, logprob, alt_logprob, cu_seqlens, weight_mode, max_weight)
    known = 0 if weights is None else weights.shape[0]
    if num_alternates is None:
        num_alternates = known
    elif weights is not None and num_alternates != known:
        raise ValueError(f"num_alternates: {num_alternates}, but alt_logprob holds {known}")
    policies = num_alternates + 1 if num_policies is None else num_policies
    if num_alternates < 0:
        raise ValueError(f"num_alternates: K = {num_alternates} is negative")
    if policies < max(num_alternates, 1):
        raise ValueError(f"num_policies: N = {policies} is less than 1 or than the K = {num_alternates} alternates")
    dtype = statistics_dtype(*dtypes)
    e = reward.new_zeros(responses) if expected is None else expected[prompt]
    run = choose(op, device)
    return run(reward.to(dtype), e.to(dtype), weights, policies, num_alternates), weights, policies


def _score_torch(reward: Tensor, expected: Tensor, weights: Tensor | None, policies: int, alternates: int) -> Tensor:
    share = (policies - alternates) / policies
    if weights is None:
        return share * (reward - expected)
    return reward * (1.0 - weights.exp().sum(0).to(reward.dtype) / policies) - share * expected


@torch.no_grad()
def _log_weights(
    responses: int,
    device: torch.device,
    logprob: Tensor | None,
    alt_logprob: Tensor | None,
    cu_seqlens: Tensor | None,
    weight_mode: str,
    max_weight: float | None,
) -> Tensor | None:
    """log w_k [K, R], clamped, in float64; None without alternates (or with K = 0 of them).

    log w_k = sum_t (log pi(y_t) - log pi'_k(y_t)): differences first, for exp(sum log pi) alone underflows.
    """
    check_choice("weight_mode", weight_mode, WEIGHT_MODES)
    if max_weight is not None and not max_weight > 0.0:
        raise ValueError(f"max_weight: {max_weight} is not positive")
    if alt_logprob is None:
        for name, value in (("logprob", logprob), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise ValueError(f"{name}: given without alt_logprob")
        return None
    if logprob is None or cu_seqlens is None:
        raise ValueError(f"{'logprob' if logprob is None else 'cu_seqlens'}: required with alt_logprob")
    check_tensor("logprob", logprob, device=device)
    if logprob.ndim != 1:
        raise ValueError(f"logprob: shape {tuple(logprob.shape)} instead of [T]")
    tokens = logprob.numel()
    check_tensor("alt_logprob", alt_logprob, device=device)
    if alt_logprob.ndim != 2 or alt_logprob.shape[1] != tokens:
        raise ValueError(f"alt_logprob: shape {tuple(alt_logprob.shape)} instead of [K, {tokens}]")
    bounds = check_cu_seqlens(cu_seqlens, tokens, device)
    if bounds.numel() != responses + 1:
        raise ValueError(f"cu_seqlens: {bounds.numel()} entries instead of {responses + 1} for {responses} responses")
    if check_values(device):
        check_finite("logprob", logprob)
        check_finite("alt_logprob", alt_logprob)
    alternates = alt_logprob.shape[0]
    if alternates == 0:
        return None
    lengths = bounds.diff()
    ratio = logprob.double() - alt_logprob.double()  # [K, T]; float64: a sum of thousands of terms, and a small array
    owner = torch.repeat_interleave(torch.arange(responses, device=device), lengths, output_size=tokens)
    weights = ratio.new_zeros(alternates, responses).index_add_(1, owner, ratio)
    if weight_mode == "length_normalized":
        weights = weights / lengths.clamp(min=1)
    if max_weight is not None:
        weights = weights.clamp(max=math.log(max_weight))
    # exp of more than 88 is infinite in float32, and so would the loss be.
    if check_values(device) and bool((weights > 80.0).any()):
        worst = int(weights.amax(0).argmax())
        raise ValueError(
            f"logprob: response {worst} is exp({float(weights.max()):.1f}) times as likely as under an alternate, "
            "its weight overflows; set max_weight"
        )
    return weights


def _effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the responses, averaged over the alternates; from log w [K, R]."""
    if weights.shape[1] == 0:
        return weights.new_zeros(())
    return (2.0 * weights.logsumexp(1) - (2.0 * weights).logsumexp(1)).exp().mean()


def _default_prompt(
    reward: Tensor, expected: Tensor | None, pairs: Tensor | None, prompt: Tensor | None
) -> Tensor | None:
    """Each response's prompt where the caller named none: pair i has prompt i."""
    if expected is None or prompt is not None:
        return prompt
    both = _pairs(reward, pairs)
    if expected.ndim == 1 and expected.numel() != both.shape[0]:
        raise ValueError(f"expected: {expected.numel()} values for {both.shape[0]} pairs, and no prompt given")
    if both.numel() != reward.numel() or both.unique().numel() != both.numel():
        raise ValueError("prompt: required unless every response is in exactly one pair")
    owner = torch.empty(reward.numel(), dtype=torch.int64, device=reward.device)
    numbers = torch.arange(both.shape[0], device=reward.device)
    owner[both[:, 0]] = numbers
    owner[both[:, 1]] = numbers
    return owner


def _pairs(reward: Tensor, pairs: Tensor | None) -> Tensor:
    """[M, 2] int64, checked; by default the first half of the responses against the second."""
    check_tensor("reward", reward)
    responses = reward.numel()
    if pairs is None:
        if responses % 2:
            raise ValueError(f"pairs: required for an odd number of responses ({responses})")
        return torch.arange(responses, device=reward.device).reshape(2, -1).T
    if isinstance(pairs, Tensor) and (pairs.ndim != 2 or pairs.shape[1] != 2):
        raise ValueError(f"pairs: shape {tuple(pairs.shape)} instead of [M, 2]")
    return _indices("pairs", pairs, None, responses, reward.device)


def _indices(name: str, value: Tensor, shape: tuple[int, ...] | None, limit: int, device: torch.device) -> Tensor:
    check_tensor(name, value, shape=shape, device=device, dtypes=INTEGERS)
    if check_values(device):
        outside = ((value < 0) | (value >= limit)).reshape(-1)
        if bool(outside.any()):
            position = first_true(outside)
            raise ValueError(f"{name}: {int(value.reshape(-1)[position])} is outside [0, {limit})")
    return value.to(torch.int64)


def _per(name: str, value: float | Tensor, count: int, like: Tensor) -> Tensor:
    """`value` as a tensor [count] of like's type: a number for all, or one for each."""
    if isinstance(value, Tensor) and value.ndim > 0:
        value = check_tensor(name, value, shape=(count,), device=like.device).detach().to(like.dtype)
    else:
        value = torch.full((count,), float(value), dtype=like.dtype, device=like.device)
    if check_values(like.device):
        check_finite(name, value)
    return value


register("advantage_loss", {"torch": _score_torch})
register("advantage_score", {"torch": _score_torch})
