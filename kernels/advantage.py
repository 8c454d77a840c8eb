"""The Advantage Model's scores, loss and gradients in one launch (arXiv 2309.10202, eqs. 6 and 8).

The grid runs over the tokens: program p sums the log-ratios of one piece of one response. The cuts are the ends of the
responses and the multiples of TILE tokens, merged in order, so that responses of very different length keep every
program equally busy: response s has its piece in tile j in program s + j. The program that finishes last does the
rest, which is small: weights, scores, pairs, gradients. Gradients of a response in several pairs are summed as
integers, whose sum does not depend on the order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stable_rlhf.ops.advantage.reference import AdvantageCall, PromptRule

_HALVES, _OF_PAIRS, _SAME_INDEX = (
    tl.constexpr(int(rule)) for rule in (PromptRule.HALVES, PromptRule.OF_PAIRS, PromptRule.SAME_INDEX)
)
TILE = 1024
_counters: dict[tuple[str, int], Tensor] = {}


@triton.jit
def _wide(x):
    """A number as float64 (an argument may be a Python number in the interpreter)."""
    return tl.zeros((), tl.float64) + x


@triton.jit
def _falling(x):
    """sigma(-x)."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, 1.0, e) / (1.0 + e)


@triton.jit
def _log1p_exp(x):
    """log1p(exp(-|x|)): what -log sigma(x) has beyond max(-x, 0)."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log(u) is off by the rounding of u; the quotient takes that back.
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _item(values_ptr, at, number, mask, GIVEN: tl.constexpr, DTYPE: tl.constexpr):
    """One value for each, or one for all."""
    if GIVEN:
        return tl.load(values_ptr + at, mask=mask, other=0.0).to(DTYPE)
    else:
        return tl.zeros(at.shape, DTYPE) + tl.cast(number, DTYPE)


@triton.jit
def _pair(pairs_ptr, at, pairs, mask, LISTED: tl.constexpr):
    """Indices of the chosen and the rejected response."""
    if LISTED:
        return tl.load(pairs_ptr + 2 * at, mask=mask, other=0), tl.load(pairs_ptr + 2 * at + 1, mask=mask, other=0)
    else:
        return at, at + pairs


@triton.jit
def _sum_piece(
    logprob_ptr, alt_ptr, cu_ptr, partial_ptr, responses, tokens, K, TILE: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    low, high = p * 0, p * 0 + responses - 1
    while low < high:  # the last response s with s + cu[s] // TILE <= p
        middle = (low + high + 1) // 2
        before = middle + tl.load(cu_ptr + middle) // TILE <= p
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    tile = p - low
    begin = tl.maximum(tl.load(cu_ptr + low), tile * TILE)
    end = tl.minimum(tl.load(cu_ptr + low + 1), (tile + 1) * TILE)
    at = begin + tl.arange(0, TILE)
    ours = tl.load(logprob_ptr + at, mask=at < end, other=0.0).to(tl.float64)
    for k in range(0, K):
        theirs = tl.load(alt_ptr + k * tokens + at, mask=at < end, other=0.0).to(tl.float64)
        tl.store(partial_ptr + p * K + k, tl.sum(ours - theirs, 0))


@triton.jit
def _weigh(
    cu_ptr, partial_ptr, weight_sum_ptr, responses, K,
    NORMALIZED: tl.constexpr, MAX_LOG_WEIGHT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the sum of each response's weights; returns the effective sample size, averaged over the alternates."""
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    size = tl.zeros((), tl.float64)
    for k in range(0, K):
        top = tl.full((), -float("inf"), tl.float64)
        sums = tl.zeros((), tl.float64)
        squares = tl.zeros((), tl.float64)
        for first in range(0, responses, BLOCK):
            r = first + lanes
            mask = r < responses
            begin = tl.load(cu_ptr + r, mask=mask, other=0)
            end = tl.load(cu_ptr + r + 1, mask=mask, other=0)
            slot = r + begin // TILE
            count = tl.where(end > begin, (end - 1) // TILE - begin // TILE + 1, 0)
            log_weight = tl.zeros((BLOCK,), tl.float64)
            for i in range(0, tl.max(count, 0)):
                # Written by other programs: not from this multiprocessor's own cache.
                log_weight += tl.load(
                    partial_ptr + (slot + i) * K + k, mask=mask & (i < count), other=0.0, cache_modifier=".cg"
                )
            if NORMALIZED:
                log_weight = log_weight / tl.maximum(end - begin, 1).to(tl.float64)
            if MAX_LOG_WEIGHT is not None:  # NaN stays, and so does what is infinite: they must show in the loss
                above = (log_weight > MAX_LOG_WEIGHT) & (log_weight < float("inf"))
                log_weight = tl.where(above, MAX_LOG_WEIGHT, log_weight)
            total = tl.exp(log_weight)
            if k > 0:
                total += tl.load(weight_sum_ptr + r, mask=mask, other=0.0)
            tl.store(weight_sum_ptr + r, total, mask=mask)
            log_weight = tl.where(mask, log_weight, -float("inf"))
            higher = tl.maximum(top, tl.max(log_weight, 0))
            there = tl.where(mask, tl.exp(log_weight - higher), 0.0)
            shrink = tl.where(top == -float("inf"), 0.0, tl.exp(top - higher))
            sums = sums * shrink + tl.sum(there, 0)
            squares = squares * shrink * shrink + tl.sum(there * there, 0)
            top = higher
        size += sums * sums / squares / K
    return size


@triton.jit(do_not_specialize=["responses", "prompts", "pairs", "tokens", "policies", "K"])
def _advantage_kernel(
    reward_ptr, expected_ptr, prompt_ptr, pairs_ptr, margin_ptr, shift_ptr, smoothing_ptr, pair_weight_ptr,
    logprob_ptr, alt_ptr, cu_ptr,
    partial_ptr, weight_sum_ptr, slope_ptr, totals_ptr, owner_ptr, counter_ptr,
    loss_ptr, score_ptr, statistics_ptr, gradient_ptr, expected_gradient_ptr,
    responses, prompts, pairs, tokens, policies, K, margin, shift, smoothing, pair_weight,
    LOSS: tl.constexpr, WEIGHED: tl.constexpr, NORMALIZED: tl.constexpr, MAX_LOG_WEIGHT: tl.constexpr,
    EXPECTED: tl.constexpr, LISTED: tl.constexpr, RULE: tl.constexpr, BOUNDS: tl.constexpr,
    MARGINS: tl.constexpr, SHIFTS: tl.constexpr, SMOOTHINGS: tl.constexpr, PAIR_WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if WEIGHED:
        _sum_piece(logprob_ptr, alt_ptr, cu_ptr, partial_ptr, responses, tokens, K, TILE)
        tl.debug_barrier()
        ticket = tl.atomic_add(counter_ptr, 1)
    else:
        ticket = tl.program_id(0)
    if ticket == tl.num_programs(0) - 1:
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        bad = tl.zeros((BLOCK,), tl.int32)
        share = _wide(policies - K) / policies
        size = _wide(responses)
        if WEIGHED:
            tl.store(counter_ptr, 0)  # for the next launch
            size = _weigh(cu_ptr, partial_ptr, weight_sum_ptr, responses, K, NORMALIZED, MAX_LOG_WEIGHT, TILE, BLOCK)
        prompts_ptr = prompt_ptr
        if EXPECTED and RULE == _OF_PAIRS:  # each response's prompt is the number of its pair
            for first in range(0, pairs, BLOCK):
                i = first + lanes
                chosen, rejected = _pair(pairs_ptr, i, pairs, i < pairs, LISTED)
                here = (i < pairs) & (chosen >= 0) & (chosen < responses) & (rejected >= 0) & (rejected < responses)
                tl.store(owner_ptr + chosen, i, mask=here)
                tl.store(owner_ptr + rejected, i, mask=here)
            prompts_ptr = owner_ptr
            tl.debug_barrier()

        flips = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, responses, BLOCK):
            r = first + lanes
            mask = r < responses
            slope = tl.zeros((BLOCK,), DTYPE) + share.to(DTYPE)
            if WEIGHED:
                total = tl.load(weight_sum_ptr + r, mask=mask, other=0.0)
                slope = (1.0 - total / policies).to(DTYPE)
                flips += (mask & (total > policies)).to(tl.int32)
            value = slope * tl.load(reward_ptr + r, mask=mask, other=0.0)
            if EXPECTED:
                if RULE == _HALVES:
                    prompt = tl.where(r >= pairs, r - pairs, r)
                elif RULE == _SAME_INDEX:
                    prompt = r
                else:
                    prompt = tl.load(prompts_ptr + r, mask=mask, other=0)
                inside = (prompt >= 0) & (prompt < prompts)
                bad += (mask & (inside == 0)).to(tl.int32)
                e = tl.load(expected_ptr + prompt, mask=mask & inside, other=0.0)
                value -= share.to(DTYPE) * e
            tl.store(score_ptr + r, value, mask=mask)
            if LOSS:
                tl.store(slope_ptr + r, slope, mask=mask)
                tl.store(totals_ptr + r, tl.zeros((BLOCK,), tl.int64), mask=mask)
            else:
                tl.store(gradient_ptr + r, slope, mask=mask)

        if LOSS:
            if EXPECTED and RULE != _HALVES:
                for first in range(0, prompts, BLOCK):
                    p = first + lanes
                    tl.store(totals_ptr + responses + p, tl.zeros((BLOCK,), tl.int64), mask=p < prompts)
            largest = tl.abs(_wide(pair_weight))
            if PAIR_WEIGHTS:
                heaviest = tl.zeros((BLOCK,), tl.float64)
                for first in range(0, pairs, BLOCK):
                    i = first + lanes
                    w = tl.load(pair_weight_ptr + i, mask=i < pairs, other=0.0).to(tl.float64)
                    heaviest = tl.maximum(heaviest, tl.abs(w))
                largest = tl.max(heaviest, 0)
            many = tl.maximum(_wide(pairs), 1.0)
            # A pair adds at most twice its weight to each of two responses: no sum of integers can overflow.
            scale = 4.611686018427388e18 / (4.0 * many * tl.where(largest > 0, largest, 1.0))
            tl.debug_barrier()

            ranking = tl.zeros((BLOCK,), tl.float64)
            upper = tl.zeros((BLOCK,), tl.float64)
            lower = tl.zeros((BLOCK,), tl.float64)
            wins = tl.zeros((BLOCK,), tl.int32)
            past = tl.zeros((BLOCK,), tl.int32)
            for first in range(0, pairs, BLOCK):
                i = first + lanes
                chosen, rejected = _pair(pairs_ptr, i, pairs, i < pairs, LISTED)
                inside = (chosen >= 0) & (chosen < responses) & (rejected >= 0) & (rejected < responses)
                bad += ((i < pairs) & (inside == 0)).to(tl.int32)
                mask = (i < pairs) & inside
                c = tl.load(score_ptr + chosen, mask=mask, other=0.0)
                r = tl.load(score_ptr + rejected, mask=mask, other=0.0)
                alpha = _item(smoothing_ptr, i, smoothing, mask, SMOOTHINGS, DTYPE)
                w = _item(pair_weight_ptr, i, pair_weight, mask, PAIR_WEIGHTS, DTYPE)
                z = (c - r) - _item(shift_ptr, i, shift, mask, SHIFTS, DTYPE)
                bad += (mask & ((alpha >= 0.0) & (alpha <= 1.0) == 0)).to(tl.int32)
                # By its two sides: neither a hard pair nor a smoothed easy one loses digits to the other.
                falling = (1.0 - alpha) * tl.maximum(-z, 0.0) + alpha * tl.maximum(z, 0.0)
                ranking += tl.where(mask, w * (_log1p_exp(z) + falling), 0.0)
                slope_c = alpha * _falling(-z) - (1.0 - alpha) * _falling(z)
                slope_r = -slope_c
                wins += tl.where(mask, 2 * (c > r).to(tl.int32) + (c == r).to(tl.int32), 0)
                if BOUNDS:
                    m_c = _item(margin_ptr, chosen, margin, mask, MARGINS, DTYPE)
                    m_r = _item(margin_ptr, rejected, margin, mask, MARGINS, DTYPE)
                    above = m_c - c
                    below = m_r + r
                    upper += tl.where(mask, w * (_log1p_exp(above) + tl.maximum(-above, 0.0)), 0.0)
                    lower += tl.where(mask, w * (_log1p_exp(below) + tl.maximum(-below, 0.0)), 0.0)
                    slope_c += _falling(above)
                    slope_r -= _falling(below)
                    past += tl.where(mask, (c > m_c).to(tl.int32) + (r < -m_r).to(tl.int32), 0)
                q_c = ((w * slope_c).to(tl.float64) * scale).to(tl.int64)
                q_r = ((w * slope_r).to(tl.float64) * scale).to(tl.int64)
                if LISTED:
                    tl.atomic_add(totals_ptr + chosen, q_c, mask=mask)
                    tl.atomic_add(totals_ptr + rejected, q_r, mask=mask)
                else:
                    tl.store(totals_ptr + chosen, q_c, mask=mask)
                    tl.store(totals_ptr + rejected, q_r, mask=mask)
            tl.debug_barrier()

            unit = 1.0 / (scale * many)
            for first in range(0, responses, BLOCK):
                r = first + lanes
                mask = r < responses
                total = tl.load(totals_ptr + r, mask=mask, other=0)
                slope = tl.load(slope_ptr + r, mask=mask, other=0.0)
                tl.store(gradient_ptr + r, slope * (total.to(tl.float64) * unit).to(DTYPE), mask=mask)
                if EXPECTED and RULE != _HALVES:
                    prompt = r
                    if RULE != _SAME_INDEX:
                        prompt = tl.load(prompts_ptr + r, mask=mask, other=0)
                    inside = mask & (prompt >= 0) & (prompt < prompts)
                    tl.atomic_add(totals_ptr + responses + prompt, total, mask=inside)
            if EXPECTED:
                tl.debug_barrier()
                for first in range(0, prompts, BLOCK):
                    p = first + lanes
                    mask = p < prompts
                    if RULE == _HALVES:
                        total = tl.load(totals_ptr + p, mask=mask, other=0)
                        total += tl.load(totals_ptr + pairs + p, mask=mask, other=0)
                    else:
                        total = tl.load(totals_ptr + responses + p, mask=mask, other=0)
                    tl.store(expected_gradient_ptr + p, (-share * (total.to(tl.float64) * unit)).to(DTYPE), mask=mask)

            terms = tl.sum(ranking, 0) / many, tl.sum(upper, 0) / many, tl.sum(lower, 0) / many
            # Bad indices were left out: they must not pass for a result.
            poison = tl.where(tl.sum(bad, 0) > 0, float("nan"), 0.0)
            tl.store(loss_ptr, (terms[0] + terms[1] + terms[2] + poison).to(DTYPE))
            tl.store(statistics_ptr, terms[0].to(DTYPE))
            tl.store(statistics_ptr + 1, terms[1].to(DTYPE))
            tl.store(statistics_ptr + 2, terms[2].to(DTYPE))
            tl.store(statistics_ptr + 3, (0.5 * tl.sum(wins, 0) / many).to(DTYPE))
            tl.store(statistics_ptr + 4, size.to(DTYPE))
            tl.store(statistics_ptr + 5, (tl.sum(flips, 0) / tl.maximum(_wide(responses), 1.0)).to(DTYPE))
            tl.store(statistics_ptr + 6, (tl.sum(past, 0) / (2.0 * many)).to(DTYPE))


def _counter(device: torch.device) -> Tensor:
    """How many programs of the launch under way have finished: one for each stream, 0 between launches."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (str(device), stream)
    if key not in _counters:
        _counters[key] = torch.zeros((), dtype=torch.int32, device=device)
    return _counters[key]


def advantage(call: AdvantageCall, pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (0-d), scores [R], statistics [7] (csrc/advantage.h), gradients of the reward [R] and of expected [P].

    Args:
        call: the arguments of `advantage_loss`, on one device. Wrong indices and weights that are not finite give a
            loss of NaN; nothing outside the tensors is read.
        pairs: False: scores, and d score / d reward as the gradient; loss and statistics are not written.
    """
    reward = call.reward.detach().contiguous()
    device, dtype, responses = reward.device, reward.dtype, reward.shape[0]
    prompts = 0 if call.expected is None else call.expected.shape[0]
    tokens = 0 if call.logprob is None else call.logprob.shape[0]
    weighed = call.logprob is not None and call.num_alternates > 0 and responses > 0

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=device)

    counts = (responses, call.pair_count, call.pair_count, call.pair_count)
    items = [0.0 if call.margin is None else call.margin, call.rank_margin, call.label_smoothing, call.pair_weight]
    if dtype == torch.float64:  # a number among a kernel's arguments is a float32
        items = [
            item if isinstance(item, Tensor) else torch.full((count,), item, dtype=dtype, device=device)
            for item, count in zip(items, counts, strict=True)
        ]
    given_each = [isinstance(item, Tensor) for item in items]
    loss, score, statistics, gradient, expected_gradient = (
        empty(), empty(responses), empty(7), empty(responses), empty(prompts)
    )  # fmt: skip
    programs = responses + triton.cdiv(tokens, TILE) if weighed else 1
    listed, of_pairs = call.pairs is not None, call.expected is not None and call.prompt_rule == PromptRule.OF_PAIRS
    with torch.cuda.device_of(reward):
        _advantage_kernel[(programs,)](
            reward, reward if call.expected is None else call.expected.detach().contiguous(),
            reward if call.prompt is None else call.prompt.contiguous(),
            call.pairs.contiguous() if call.pairs is not None else reward,
            *(item.contiguous() if isinstance(item, Tensor) else reward for item in items),
            *(reward if x is None else x.contiguous() for x in (call.logprob, call.alt_logprob, call.cu_seqlens)),
            empty(programs * call.num_alternates if weighed else 0, of=torch.float64),
            empty(responses if weighed else 0, of=torch.float64), empty(responses),
            empty(responses + prompts if pairs else 0, of=torch.int64),
            empty(responses if of_pairs else 0, of=torch.int64), _counter(device),
            loss, score, statistics, gradient, expected_gradient,
            responses, prompts, call.pair_count, tokens, call.num_policies, call.num_alternates,
            *(0.0 if given else item for item, given in zip(items, given_each, strict=True)),
            LOSS=pairs, WEIGHED=weighed, NORMALIZED=call.length_normalized,
            MAX_LOG_WEIGHT=None if call.max_weight is None else math.log(call.max_weight),
            EXPECTED=call.expected is not None, LISTED=listed, RULE=int(call.prompt_rule),
            BOUNDS=call.margin is not None, MARGINS=given_each[0], SHIFTS=given_each[1], SMOOTHINGS=given_each[2],
            PAIR_WEIGHTS=given_each[3], DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, TILE=TILE,
            BLOCK=512, num_warps=8,
        )  # fmt: skip
    return loss, score, statistics, gradient, expected_gradient
