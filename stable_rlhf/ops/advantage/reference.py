"""The Advantage Model's score and loss in plain PyTorch, and the checks of their values."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_rlhf.ops.checks import check_cu_seqlens, check_finite, check_values, first_true


class PromptRule(enum.IntEnum):
    """Which prompt a response answers; csrc/advantage.h and kernels.advantage have the same numbers."""

    GIVEN = 0  # by the call's `prompt`
    HALVES = 1  # pair i has prompt i, its responses in the two halves
    OF_PAIRS = 2  # pair i of the list has prompt i
    SAME_INDEX = 3  # response i has prompt i


class AdvantageCall(NamedTuple):
    """A call whose shapes, types and devices have been checked; its values have not.

    reward and expected are both float32 or both float64; the other numbers may be of any floating type. Indices are
    int64.
    """

    reward: Tensor  # [R]
    expected: Tensor | None  # [P]
    prompt: Tensor | None  # [R]
    prompt_rule: int  # a PromptRule
    num_policies: int
    num_alternates: int
    logprob: Tensor | None  # [T]; None: every weight is 1
    alt_logprob: Tensor | None  # [K, T]
    cu_seqlens: Tensor | None  # [R + 1]
    length_normalized: bool
    max_weight: float | None
    backend: str
    pairs: Tensor | None = None  # [M, 2]; None: first half against second
    margin: float | Tensor | None = None  # [R]
    rank_margin: float | Tensor = 0.0  # [M]
    label_smoothing: float | Tensor = 0.0  # [M]
    pair_weight: float | Tensor = 1.0  # [M]

    @property
    def pair_count(self) -> int:
        return self.reward.numel() // 2 if self.pairs is None else self.pairs.shape[0]


def check(call: AdvantageCall) -> None:
    """Raises the ValueError that names the first wrong value; reads the device."""
    check_finite("reward", call.reward.detach())
    if call.expected is not None:
        check_finite("expected", call.expected.detach())
    if call.pairs is not None:
        _check_range("pairs", call.pairs, call.reward.numel())
    if call.prompt is not None and call.expected is not None:
        _check_range("prompt", call.prompt, call.expected.numel())
    if call.prompt_rule == PromptRule.OF_PAIRS and pairs_of(call).unique().numel() != call.reward.numel():
        raise ValueError("prompt: required unless every response is in exactly one pair")
    for name in ("margin", "rank_margin", "label_smoothing", "pair_weight"):
        value = getattr(call, name)
        if isinstance(value, Tensor):
            check_finite(name, value.detach())
    smoothing = call.label_smoothing
    if isinstance(smoothing, Tensor) and bool(((smoothing < 0) | (smoothing > 1)).any()):
        raise ValueError("label_smoothing: has values outside [0, 1]")
    if call.logprob is not None and call.alt_logprob is not None and call.cu_seqlens is not None:
        check_cu_seqlens(call.cu_seqlens, call.logprob.numel(), call.reward.device, read=True)
        check_finite("logprob", call.logprob)
        check_finite("alt_logprob", call.alt_logprob)
        weights = log_weights(call)
        # exp of more than 88 is infinite in float32, and so would the loss be.
        if weights is not None and bool((weights > 80.0).any()):
            worst = int(weights.amax(0).argmax())
            raise ValueError(
                f"logprob: response {worst} is exp({float(weights.max()):.1f}) times as likely as under an alternate, "
                "its weight overflows; set max_weight"
            )


def _check_range(name: str, value: Tensor, limit: int) -> None:
    outside = ((value < 0) | (value >= limit)).reshape(-1)
    if bool(outside.any()):
        position = first_true(outside)
        raise ValueError(f"{name}: {int(value.reshape(-1)[position])} is outside [0, {limit})")


def pairs_of(call: AdvantageCall) -> Tensor:
    """[M, 2] (chosen, rejected)."""
    if call.pairs is not None:
        return call.pairs
    return torch.arange(2 * call.pair_count, device=call.reward.device, dtype=torch.int64).reshape(2, -1).T


def prompt_of(call: AdvantageCall) -> Tensor:
    """[R], each response's index into expected."""
    if call.prompt is not None:
        return call.prompt
    responses, device = call.reward.numel(), call.reward.device
    if call.prompt_rule == PromptRule.SAME_INDEX:
        return torch.arange(responses, device=device, dtype=torch.int64)
    pairs = pairs_of(call)
    numbers = torch.arange(pairs.shape[0], device=device, dtype=torch.int64)
    owner = torch.zeros(responses, dtype=torch.int64, device=device)
    return owner.index_copy(0, pairs[:, 0], numbers).index_copy(0, pairs[:, 1], numbers)


@torch.no_grad()
def log_weights(call: AdvantageCall) -> Tensor | None:
    """log w_k [K, R], clamped, in float64; None without alternates.

    log w_k = sum_t (log pi(y_t) - log pi'_k(y_t)): differences first, for exp(sum log pi) alone underflows.
    """
    if call.logprob is None or call.alt_logprob is None or call.cu_seqlens is None or call.num_alternates == 0:
        return None
    tokens, responses = call.logprob.numel(), call.reward.numel()
    lengths = call.cu_seqlens.diff()
    ratio = call.logprob.double() - call.alt_logprob.double()  # [K, T]; float64: a sum of thousands of terms
    owner = torch.repeat_interleave(
        torch.arange(responses, device=ratio.device, dtype=torch.int64), lengths, output_size=tokens
    )
    weights = ratio.new_zeros(call.num_alternates, responses).index_add_(1, owner, ratio)
    if call.length_normalized:
        weights = weights / lengths.clamp(min=1)
    if call.max_weight is not None:
        weights = weights.clamp(max=math.log(call.max_weight))
    return weights


def score(call: AdvantageCall) -> Tensor:
    """[R] a(x, y), eq. 8; differentiable in reward and expected."""
    if check_values(call.reward.device):
        check(call)
    return _score(call, log_weights(call))


def _score(call: AdvantageCall, weights: Tensor | None) -> Tensor:
    share = (call.num_policies - call.num_alternates) / call.num_policies
    if weights is None:
        value = call.reward if call.expected is None else call.reward - call.expected[prompt_of(call)]
        return value if share == 1 else share * value
    value = call.reward * (1.0 - weights.exp().sum(0).to(call.reward.dtype) / call.num_policies)
    return value if call.expected is None else value - share * call.expected[prompt_of(call)]


def loss(call: AdvantageCall) -> tuple[Tensor, Tensor, Tensor]:
    """(loss 0-d, differentiable in reward and expected; score [R]; statistics [7], see csrc/advantage.h)."""
    if check_values(call.reward.device):
        check(call)
    weights = log_weights(call)
    a = _score(call, weights)
    chosen, rejected = pairs_of(call).unbind(1)
    count, responses = chosen.numel(), call.reward.numel()
    smoothing, weight = _per(call.label_smoothing, count, a), _per(call.pair_weight, count, a)
    difference = a[chosen] - a[rejected]
    shifted = difference - _per(call.rank_margin, count, a)
    ranking = -(1.0 - smoothing) * F.logsigmoid(shifted) - smoothing * F.logsigmoid(-shifted)
    if call.margin is None:
        upper = lower = torch.zeros_like(difference)
        violations = a.new_zeros(())
    else:
        bound = _per(call.margin, responses, a)
        upper = -F.logsigmoid(bound[chosen] - a[chosen])
        lower = -F.logsigmoid(bound[rejected] + a[rejected])
        past = (a[chosen] > bound[chosen]).sum() + (a[rejected] < -bound[rejected]).sum()
        violations = past.to(a.dtype) / max(2 * count, 1)
    terms = [(weight * term).sum() / max(count, 1) for term in (ranking, upper, lower)]
    with torch.no_grad():
        accuracy = ((difference > 0).to(a.dtype) + 0.5 * (difference == 0).to(a.dtype)).sum() / max(count, 1)
        if weights is None:
            size, flips = torch.full_like(accuracy, responses), torch.zeros_like(accuracy)
        else:
            size = _effective_sample_size(weights)
            flips = (weights.exp().sum(0) > call.num_policies).to(a.dtype).sum() / max(responses, 1)
        statistics = torch.stack([*terms, accuracy, size.to(a.dtype), flips, violations])
    return terms[0] + terms[1] + terms[2], a.detach(), statistics


def _effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the responses, averaged over the alternates; from log w [K, R]."""
    if weights.shape[1] == 0:
        return weights.new_zeros(())
    return (2.0 * weights.logsumexp(1) - (2.0 * weights).logsumexp(1)).exp().mean()


def _per(value: float | Tensor, count: int, like: Tensor) -> Tensor:
    """`value` as a tensor [count] of like's type: a number for all, or one for each."""
    if isinstance(value, Tensor):
        return value.detach().to(like.dtype)
    return torch.full((count,), value, dtype=like.dtype, device=like.device)
