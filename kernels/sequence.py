"""Triton kernels on packed sequences, and whitening over all tokens."""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from stable_rlhf.ops.flags import Fault, notes

_BLOCK = 1024
_WARPS = 4
_CU_SEQLENS = tl.constexpr(int(Fault.CU_SEQLENS))
_MOST_SCALING = 1056  # programs that scale: eight on each multiprocessor of an H200, for each reads all parts
_MOST_PARTS = 512  # programs that count moments: a few for each multiprocessor, and one load of their results


def _float_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit
def _limits(bounds_ptr, notes_ptr, sequence, tokens):
    """A sequence's first token and the one after its last. Nobody has looked at the bounds on a GPU: whatever stands
    there, only tokens that exist are read and written, and what is wrong is noted."""
    begin, end = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    ends_wrong = ((sequence == 0) & (begin != 0)) | ((sequence == tl.num_programs(0) - 1) & (end != tokens))
    tl.store(notes_ptr + _CU_SEQLENS, 1, mask=ends_wrong | (end < begin))
    return tl.minimum(tl.maximum(begin, 0), tokens), tl.minimum(tl.maximum(end, 0), tokens)


@triton.jit
def _after(factor, sum, other_factor, other_sum):
    """The map x -> sum + factor x, followed by x -> other_sum + other_factor x."""
    return factor * other_factor, other_sum + other_factor * sum


@triton.jit
def _gae_kernel(
    reward_ptr,
    value_ptr,
    bounds_ptr,
    bootstrap_ptr,
    advantage_ptr,
    return_ptr,
    notes_ptr,
    tokens,
    GAMMA: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a sequence, block by block from its end: a scan inside the block, its first advantage carried to the
    # block before.
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = _limits(bounds_ptr, notes_ptr, sequence, tokens)
    column = tl.arange(0, BLOCK)
    carried = tl.zeros((), DTYPE)
    last = tl.zeros((), DTYPE)
    if HAS_BOOTSTRAP:
        last = tl.load(bootstrap_ptr + sequence)
    gamma = tl.full((), GAMMA, DTYPE)
    decay = tl.full((), DECAY, DTYPE)
    for back in range(BLOCK, end - begin + BLOCK, BLOCK):
        at = end - back + column
        inside = at >= begin
        value = tl.load(value_ptr + at, mask=inside, other=0.0)
        following = tl.load(value_ptr + at + 1, mask=inside & (at + 1 < end), other=0.0)
        following = tl.where(at + 1 < end, following, last)
        delta = (tl.load(reward_ptr + at, mask=inside, other=0.0) + gamma * following) - value
        factor = tl.zeros_like(delta) + decay
        factor, advantage = tl.associative_scan((factor, delta), 0, _after, reverse=True)
        advantage = advantage + factor * carried
        tl.store(advantage_ptr + at, advantage, mask=inside)
        tl.store(return_ptr + at, advantage + value, mask=inside)
        carried = tl.sum(tl.where(column == 0, advantage, 0.0), 0)


def gae(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T] of contiguous float32 or float64 `reward` and `value` [T].

    Args:
        bounds: [S + 1] int64, the packed sequences' limits.
        bootstrap_value: [S] of the rewards' type, or None for 0 after each end.
    """
    advantage, returns = torch.empty_like(reward), torch.empty_like(reward)
    sequences = bounds.numel() - 1
    if sequences > 0 and reward.numel() > 0:
        with torch.cuda.device_of(reward):
            _gae_kernel[(sequences,)](
                reward,
                value,
                bounds,
                reward if bootstrap_value is None else bootstrap_value,
                advantage,
                returns,
                notes(reward.device),
                reward.numel(),
                GAMMA=gamma,
                DECAY=gamma * lam,
                HAS_BOOTSTRAP=bootstrap_value is not None,
                DTYPE=_float_type(reward),
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    return advantage, returns


@triton.jit
def _kl(d, ESTIMATOR: tl.constexpr, TERMS: tl.constexpr):
    if ESTIMATOR == 1:
        return d
    if ESTIMATOR == 2:
        return 0.5 * d * d
    # exp(x) - 1 - x at x = -d. Near 0, where both subtractions cancel, from the series.
    x = -d
    sum = tl.zeros_like(x) + 1.0
    for i in tl.static_range(TERMS - 2):
        sum = 1.0 + x * sum * (1.0 / (TERMS - i))
    return tl.where(tl.abs(x) < 1.0, 0.5 * x * x * sum, tl.exp(x) - 1.0 - x)


@triton.jit
def _rewards_kernel(
    logprob_ptr,
    ref_logprob_ptr,
    score_ptr,
    bounds_ptr,
    reward_ptr,
    notes_ptr,
    tokens,
    kl_coef,
    kl_coef_rest,
    CLAMP: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    TERMS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a sequence. An empty one, which nobody has looked for on a GPU, has no token to put its score on.
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = _limits(bounds_ptr, notes_ptr, sequence, tokens)
    score = tl.load(score_ptr + sequence)
    scale = -(tl.zeros((), DTYPE) + kl_coef + kl_coef_rest)
    bound = tl.full((), CLAMP, DTYPE)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        d = tl.load(logprob_ptr + at, mask=inside, other=0.0) - tl.load(ref_logprob_ptr + at, mask=inside, other=0.0)
        # NaN passes both comparisons: nothing is hidden.
        d = tl.where(d < -bound, -bound, d)
        d = tl.where(d > bound, bound, d)
        reward = _kl(d, ESTIMATOR, TERMS) * scale
        reward = tl.where(at == end - 1, reward + score, reward)
        tl.store(reward_ptr + at, reward, mask=inside)


def token_rewards(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    bounds: Tensor,
    kl_coef: float,
    kl_estimator: str,
    clamp: float,
) -> Tensor:
    """Rewards [T] of contiguous float32 or float64 log-probs [T] and scores [S], all of one type.

    Args:
        bounds: [S + 1] int64, the packed sequences' limits.
        kl_estimator: "k1", "k2" or "k3".
    """
    reward = torch.empty_like(logprob)
    sequences = bounds.numel() - 1
    if sequences > 0 and logprob.numel() > 0:
        # Numbers arrive in float32. Constants of a run are compiled in; a coefficient that a controller moves comes in
        # two parts.
        coefficient = ctypes.c_float(kl_coef).value
        with torch.cuda.device_of(logprob):
            _rewards_kernel[(sequences,)](
                logprob,
                ref_logprob,
                score,
                bounds,
                reward,
                notes(logprob.device),
                logprob.numel(),
                coefficient,
                kl_coef - coefficient,
                CLAMP=clamp,
                ESTIMATOR=int(kl_estimator[1]),
                TERMS=19 if logprob.dtype == torch.float64 else 11,
                DTYPE=_float_type(logprob),
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    return reward


@triton.jit
def _moments_kernel(x_ptr, mask_ptr, parts_ptr, n, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    # Count, mean and squared distances of the blocks p, p + P, p + 2P, ... of program p of P, merged one by one (Chan,
    # Golub and LeVeque 1979).
    program = tl.program_id(0)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    square = tl.zeros((), tl.float64)
    for first in range(program.to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = at < n
        if HAS_MASK:
            valid = tl.load(mask_ptr + at, mask=valid, other=0) != 0
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float64)
        own_count = tl.sum(valid.to(tl.int32), 0).to(tl.float64)
        own_mean = tl.sum(x, 0) / tl.maximum(own_count, 1.0)
        d = tl.where(valid, x - own_mean, 0.0)
        total = count + own_count
        distance = tl.where(own_count > 0.0, own_mean - mean, 0.0)
        share = own_count / tl.maximum(total, 1.0)
        mean += distance * share
        square += tl.sum(d * d, 0) + distance * distance * count * share
        count = total
    tl.store(parts_ptr + 3 * program, count)
    tl.store(parts_ptr + 3 * program + 1, mean)
    tl.store(parts_ptr + 3 * program + 2, square)


def masked_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Count, mean and sum of squared distances of the elements where `mask` is not 0, [parts, 3] float64.

    Args:
        x: contiguous.
        mask: x's shape, uint8, or None: all count.
    """
    programs = max(1, min(_MOST_PARTS, triton.cdiv(x.numel(), _BLOCK)))
    parts = torch.empty(programs, 3, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        _moments_kernel[(programs,)](
            x, x if mask is None else mask, parts, x.numel(), HAS_MASK=mask is not None, BLOCK=_BLOCK, num_warps=_WARPS
        )
    return parts


@triton.jit
def _scale_kernel(
    x_ptr,
    mask_ptr,
    parts_ptr,
    out_ptr,
    n,
    num_parts,
    EPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SHIFT_MEAN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Every program merges all parts for itself, in the same way, and then scales the blocks p, p + P, p + 2P, ...
    part = tl.arange(0, PARTS)
    there = part < num_parts
    counts = tl.load(parts_ptr + 3 * part, mask=there, other=0.0)
    means = tl.load(parts_ptr + 3 * part + 1, mask=there, other=0.0)
    squares = tl.load(parts_ptr + 3 * part + 2, mask=there, other=0.0)
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    # From the mean of a part that has tokens: parts of one constant give this constant, to the bit.
    fullest = tl.argmax(counts, 0)
    origin = tl.sum(tl.where(part == fullest, means, 0.0), 0)
    mean = origin + tl.sum(counts * (means - origin), 0) / count
    distances = means - mean
    variance = tl.sum(squares + counts * distances * distances, 0) / count
    factor = 1.0 / tl.sqrt(variance + EPS)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < n
        valid = inside
        if HAS_MASK:
            valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        y = (tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float64) - mean) * factor
        if not SHIFT_MEAN:
            y += mean
        tl.store(out_ptr + at, tl.where(valid, y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


def masked_scale(x: Tensor, mask: Tensor | None, parts: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps), mean and variance of the union of `parts`; 0 under the mask.

    Args:
        x, mask: as for `masked_moments`.
        parts: [parts, 3] float64, what it returned (of all ranks).
        shift_mean: False adds the mean again.
    """
    out, parts = torch.empty_like(x), parts.contiguous()
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            _scale_kernel[(min(_MOST_SCALING, triton.cdiv(x.numel(), _BLOCK)),)](
                x,
                x if mask is None else mask,
                parts,
                out,
                x.numel(),
                parts.shape[0],
                EPS=eps,
                HAS_MASK=mask is not None,
                SHIFT_MEAN=shift_mean,
                PARTS=triton.next_power_of_2(parts.shape[0]),
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    return out
