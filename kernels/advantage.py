"""The Advantage Model's scores, loss and gradients (arXiv 2309.10202, eqs. 6 and 8): one launch without alternates, two
with them.

The first launch sums log-ratios. Program p takes one piece of one response: the cuts are the ends of the responses and
the multiples of TILE tokens, merged in order, so that responses of very different length keep every program equally
busy: response s has its piece in tile j in program s + j. It also sets to 0 what the second launch counts in, so that
every call has counters of its own: calls on several streams and captured graphs have nothing in common.

The second launch spreads blocks of pairs, and of responses that may be in several pairs, over the grid. A block finds
the weights and scores of its responses from the sums of pieces; a response in several pairs is scored again in each of
them, which costs less than to wait for another program. The program that finishes last adds up the blocks' figures in
the order of the blocks. Gradients of a response in several pairs are summed as integers, whose sum does not depend on
the order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stable_rlhf.ops.advantage.reference import AdvantageCall, PromptRule
from stable_rlhf.ops.flags import Fault, notes

_GIVEN, _OF_PAIRS = (tl.constexpr(int(rule)) for rule in (PromptRule.GIVEN, PromptRule.OF_PAIRS))
_CU_SEQLENS = tl.constexpr(int(Fault.CU_SEQLENS))
TILE = 512
_FIGURES = tl.constexpr(7)  # of a block: three terms, wins, scores past their bound, flipped signs, bad values
_ITEMS = 256  # responses of a block, or twice its pairs
_ITEMS_ALONE = 1024  # of a block where one program does all
_MOST_ALONE = 4096  # responses and twice pairs that one program does


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


# -- first launch ------------------------------------------------------------------------------------------------------


@triton.jit
def _piece(cu_ptr, p, responses, tokens, TILE: tl.constexpr, PROBES: tl.constexpr):
    """First token of piece p and the one after its last. A search by many probes at once: two reads that wait for each
    other up to 65,536 responses, where halving takes sixteen."""
    low, high = p * 0, p * 0 + responses - 1
    while low < high:  # the last response s with s + cu[s] // TILE <= p
        step = (high - low + PROBES - 1) // PROBES
        probe = low + step * (1 + tl.arange(0, PROBES))
        start = tl.load(cu_ptr + probe, mask=probe <= high, other=0)
        before = (probe <= high) & (probe + start // TILE <= p)
        low += step * tl.sum(before.to(tl.int64), 0)
        high = tl.minimum(high, low + step - 1)
    # Whatever stands there, only tokens that exist are read.
    begin, end = _limits(cu_ptr, low, True, tokens)
    return tl.maximum(begin, (p - low) * TILE), tl.minimum(end, (p - low + 1) * TILE)


@triton.jit
def _limits(cu_ptr, r, mask, tokens):
    begin, end = tl.load(cu_ptr + r, mask=mask, other=0), tl.load(cu_ptr + r + 1, mask=mask, other=0)
    return tl.minimum(tl.maximum(begin, 0), tokens), tl.minimum(tl.maximum(end, 0), tokens)


@triton.jit(do_not_specialize=["responses", "tokens", "K", "zeros", "weights", "heavy"])
def _prepare_kernel(
    logprob_ptr, alt_ptr, cu_ptr, pair_weight_ptr, partial_ptr, totals_ptr, heaviest_ptr,
    responses, tokens, K, zeros, weights, heavy,
    WEIGHED: tl.constexpr, HEAVIEST: tl.constexpr, ALTERNATES: tl.constexpr, TILE: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    for first in range(p * TILE, zeros, tl.num_programs(0) * TILE):
        tl.store(totals_ptr + first + lanes, tl.zeros((TILE,), tl.int64), mask=first + lanes < zeros)
    if HEAVIEST and p < heavy:
        largest = tl.zeros((TILE,), tl.float64)
        for first in range(p * TILE, weights, tl.cast(heavy, tl.int64) * TILE):
            w = tl.load(pair_weight_ptr + first + lanes, mask=first + lanes < weights, other=0.0)
            largest = tl.maximum(largest, tl.abs(w.to(tl.float64)))
        tl.store(heaviest_ptr + p, tl.max(largest, 0))
    if WEIGHED:
        begin, end = _piece(cu_ptr, p, responses, tokens, TILE, PROBES)
        at = begin + lanes
        ours = tl.load(logprob_ptr + at, mask=at < end, other=0.0).to(tl.float64)
        for first in range(0, K, ALTERNATES):
            k = first + tl.arange(0, ALTERNATES).to(tl.int64)  # times tokens it may pass 2^31
            there = (k < K)[:, None] & (at < end)[None, :]
            theirs = tl.load(alt_ptr + k[:, None] * tokens + at[None, :], mask=there, other=0.0).to(tl.float64)
            ratio = tl.where(there, ours[None, :] - theirs, 0.0)
            tl.store(partial_ptr + p * K + k, tl.sum(ratio, 1), mask=k < K)


# -- second launch -----------------------------------------------------------------------------------------------------


@triton.jit
def _weigh(
    cu_ptr, partial_ptr, spread_ptr, notes_ptr, block, blocks, r, mask, counted, responses, tokens, K,
    NORMALIZED: tl.constexpr, MAX_LOG_WEIGHT: tl.constexpr, ALTERNATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sums of the weights of responses r, and where their bounds are wrong. Of the counted ones it writes largest
    log-weight, sum and sum of squares of weight / largest, by alternate: the effective sample size is made of them."""
    first, last = tl.load(cu_ptr + r, mask=mask, other=0), tl.load(cu_ptr + r + 1, mask=mask, other=0)
    begin, end = _limits(cu_ptr, r, mask, tokens)
    wrong = mask & ((begin != first) | (end != last) | (end < begin))
    wrong |= mask & (((r == 0) & (first != 0)) | ((r == responses - 1) & (last != tokens)))
    tl.store(notes_ptr + _CU_SEQLENS, 1, mask=tl.max(wrong.to(tl.int32), 0) > 0)
    slot = r + begin // TILE
    count = tl.where(end > begin, (end - 1) // TILE - begin // TILE + 1, 0)
    total = tl.zeros(r.shape, tl.float64)
    for alternate in range(0, K, ALTERNATES):
        k = alternate + tl.arange(0, ALTERNATES).to(tl.int64)
        log_weight = tl.zeros((r.shape[0], ALTERNATES), tl.float64)
        for piece in range(0, tl.max(count, 0), 4):
            for i in tl.static_range(4):  # four reads on their way at once
                there = (mask & (piece + i < count))[:, None] & (k < K)[None, :]
                place = ((slot + piece + i) * K)[:, None] + k[None, :]
                log_weight += tl.load(partial_ptr + place, mask=there, other=0.0)
        if NORMALIZED:
            log_weight = log_weight / tl.maximum(end - begin, 1).to(tl.float64)[:, None]
        if MAX_LOG_WEIGHT is not None:  # NaN stays, and so does what is infinite: they must show in the loss
            above = (log_weight > MAX_LOG_WEIGHT) & (log_weight < float("inf"))
            log_weight = tl.where(above, MAX_LOG_WEIGHT, log_weight)
        total += tl.sum(tl.where((k < K)[None, :], tl.exp(log_weight), 0.0), 1)
        top = tl.max(tl.where(counted[:, None], log_weight, -float("inf")), 0)
        weight = tl.where(counted[:, None], tl.exp(log_weight - top[None, :]), 0.0)
        own = spread_ptr + block * K + k
        tl.store(own, top, mask=k < K)
        tl.store(own + blocks * K, tl.sum(weight, 0), mask=k < K)
        tl.store(own + 2 * blocks * K, tl.sum(weight * weight, 0), mask=k < K)
    return total, wrong


@triton.jit
def _sample_size(spread_ptr, blocks, K, ALTERNATES: tl.constexpr, BLOCK: tl.constexpr):
    """The effective sample size, averaged over the alternates."""
    size = tl.zeros((), tl.float64)
    for alternate in range(0, K, ALTERNATES):
        k = alternate + tl.arange(0, ALTERNATES).to(tl.int64)
        top = tl.full((ALTERNATES,), -float("inf"), tl.float64)
        sums = tl.zeros((ALTERNATES,), tl.float64)
        squares = tl.zeros((ALTERNATES,), tl.float64)
        for first in range(0, blocks, BLOCK):
            block = first + tl.arange(0, BLOCK).to(tl.int64)
            there = (block < blocks)[:, None] & (k < K)[None, :]
            own = spread_ptr + (block * K)[:, None] + k[None, :]
            # Written by other programs: not from this multiprocessor's own cache.
            theirs = tl.load(own, mask=there, other=-float("inf"), cache_modifier=".cg")
            their_sum = tl.load(own + blocks * K, mask=there, other=0.0, cache_modifier=".cg")
            their_square = tl.load(own + 2 * blocks * K, mask=there, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, tl.max(theirs, 0))
            shrink = tl.where(theirs == -float("inf"), 0.0, tl.exp(theirs - higher[None, :]))
            shrink_own = tl.where(top == -float("inf"), 0.0, tl.exp(top - higher))
            sums = sums * shrink_own + tl.sum(their_sum * shrink, 0)
            squares = squares * shrink_own * shrink_own + tl.sum(their_square * shrink * shrink, 0)
            top = higher
        size += tl.sum(tl.where(k < K, sums * sums / tl.where(k < K, squares, 1.0), 0.0), 0)
    return size / K


@triton.jit
def _figure(figures_ptr, which: tl.constexpr, blocks, BLOCK: tl.constexpr):
    """A figure's sum over the blocks, in an order that no run changes."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK).to(tl.int64)
        own = figures_ptr + which * blocks + block
        sums += tl.load(own, mask=block < blocks, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit(
    do_not_specialize=[
        "responses", "prompts", "pairs", "tokens", "policies", "K", "response_blocks", "blocks", "heavy",
    ]
)  # fmt: skip
def _advantage_kernel(
    reward_ptr, expected_ptr, prompt_ptr, pairs_ptr, margin_ptr, shift_ptr, smoothing_ptr, pair_weight_ptr,
    cu_ptr, partial_ptr, spread_ptr, figures_ptr, totals_ptr, heaviest_ptr, notes_ptr,
    loss_ptr, score_ptr, statistics_ptr, gradient_ptr, expected_gradient_ptr,
    responses, prompts, pairs, tokens, policies, K, response_blocks, blocks, heavy,
    margin, shift, smoothing, pair_weight,
    LOSS: tl.constexpr, WEIGHED: tl.constexpr, NORMALIZED: tl.constexpr, MAX_LOG_WEIGHT: tl.constexpr,
    EXPECTED: tl.constexpr, LISTED: tl.constexpr, RULE: tl.constexpr, BOUNDS: tl.constexpr,
    MARGINS: tl.constexpr, SHIFTS: tl.constexpr, SMOOTHINGS: tl.constexpr, PAIR_WEIGHTS: tl.constexpr,
    ALONE: tl.constexpr, ALTERNATES: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    # In how many pairs a response or a prompt may be: in one, its gradient is written, in several summed.
    ONCE: tl.constexpr = not LISTED or RULE == _OF_PAIRS
    OWN_PROMPT: tl.constexpr = LOSS and EXPECTED and RULE != _GIVEN  # pair i has prompt i
    SHARED_PROMPT: tl.constexpr = EXPECTED and RULE == _GIVEN
    SUMMED: tl.constexpr = LOSS and (SHARED_PROMPT or not ONCE)
    HALF: tl.constexpr = ITEMS // 2
    lanes = tl.arange(0, ITEMS).to(tl.int64)
    many = tl.maximum(_wide(pairs), 1.0)
    share = _wide(policies - K) / policies
    if ALONE and (SUMMED or RULE == _OF_PAIRS):  # no launch before has done it
        for first in range(0, responses + prompts, ITEMS):
            tl.store(totals_ptr + first + lanes, tl.zeros((ITEMS,), tl.int64), mask=first + lanes < responses + prompts)
        tl.debug_barrier()
    scale = many
    if SUMMED:
        largest = tl.abs(_wide(pair_weight))
        if PAIR_WEIGHTS:
            heaviest = tl.zeros((ITEMS,), tl.float64)
            for first in range(0, heavy, ITEMS):
                w = tl.load(heaviest_ptr + first + lanes, mask=first + lanes < heavy, other=0.0).to(tl.float64)
                heaviest = tl.maximum(heaviest, tl.abs(w))
            largest = tl.max(heaviest, 0)
        # A pair adds at most twice its weight to each of two responses: no sum of integers can overflow.
        scale = 4.611686018427388e18 / (4.0 * many * tl.where(largest > 0, largest, 1.0))

    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        of_pairs = LOSS & (block >= response_blocks)
        t = tl.where(of_pairs, block - response_blocks, block) * ITEMS + lanes
        there = t < tl.where(of_pairs, tl.cast(pairs, tl.int64) * 2, responses)
        r = t
        i = t // 2
        is_chosen = t % 2 == 0
        if LOSS:
            if LISTED:
                r = tl.where(of_pairs, tl.load(pairs_ptr + t, mask=there & of_pairs, other=0), t)
            else:
                r = tl.where(is_chosen, i, i + pairs)
        mask = there & (r >= 0) & (r < responses)
        bad = (there & (mask == 0)).to(tl.int32)
        # A response in several pairs is counted in a block of responses.
        counted = mask & (ONCE | (of_pairs == 0))
        if LOSS and RULE == _OF_PAIRS:  # and one that should be in one pair must not come again
            bad += (tl.atomic_add(totals_ptr + r, 1, mask=mask) != 0).to(tl.int32) * mask.to(tl.int32)

        slope = tl.zeros((ITEMS,), DTYPE) + share.to(DTYPE)
        flips = tl.zeros((ITEMS,), tl.int32)
        wrong = tl.zeros((ITEMS,), tl.int1)
        if WEIGHED:
            total, wrong = _weigh(
                cu_ptr, partial_ptr, spread_ptr, notes_ptr, block, blocks, r, mask, counted, responses, tokens, K,
                NORMALIZED, MAX_LOG_WEIGHT, ALTERNATES, TILE,
            )  # fmt: skip
            slope = (1.0 - total / policies).to(DTYPE)
            flips = (counted & (total > policies)).to(tl.int32)
        a = slope * tl.load(reward_ptr + r, mask=mask, other=0.0)
        prompt = r
        if EXPECTED:
            if OWN_PROMPT:
                prompt = i
            elif RULE == _GIVEN:
                prompt = tl.load(prompt_ptr + r, mask=mask, other=0)
            known = mask & (prompt >= 0) & (prompt < prompts)
            wrong |= mask & (known == 0)
            a -= share.to(DTYPE) * tl.load(expected_ptr + prompt, mask=known, other=0.0)
        a = tl.where(wrong, float("nan"), a)  # wrong values must not pass for a result
        tl.store(score_ptr + r, a, mask=counted)
        if not LOSS or not ONCE:  # the loss multiplies it by the sum over the pairs
            tl.store(gradient_ptr + r, slope, mask=counted)

        if LOSS:
            bad += wrong.to(tl.int32)
            ranking = tl.zeros((HALF,), tl.float64)
            upper = tl.zeros((ITEMS,), tl.float64)
            lower = tl.zeros((ITEMS,), tl.float64)
            wins = tl.zeros((HALF,), tl.int32)
            past = tl.zeros((ITEMS,), tl.int32)
            if of_pairs:
                pair = (block - response_blocks) * HALF + tl.arange(0, HALF)
                both = tl.sum(tl.reshape(mask.to(tl.int32), (HALF, 2)), 1) == 2
                c, d = tl.split(tl.reshape(a, (HALF, 2)))
                alpha = _item(smoothing_ptr, pair, smoothing, both, SMOOTHINGS, DTYPE)
                w = _item(pair_weight_ptr, pair, pair_weight, both, PAIR_WEIGHTS, DTYPE)
                z = (c - d) - _item(shift_ptr, pair, shift, both, SHIFTS, DTYPE)
                # By its two sides: neither a hard pair nor a smoothed easy one loses digits to the other.
                falling = (1.0 - alpha) * tl.maximum(-z, 0.0) + alpha * tl.maximum(z, 0.0)
                ranking = tl.where(both, w * (_log1p_exp(z) + falling), 0.0).to(tl.float64)
                ranking = tl.where(both & ((alpha >= 0.0) & (alpha <= 1.0) == 0), float("nan"), ranking)
                wins = tl.where(both, 2 * (c > d).to(tl.int32) + (c == d).to(tl.int32), 0)
                slope_c = w * (alpha * _falling(-z) - (1.0 - alpha) * _falling(z))
                # Back to responses: the rejected one has the other sign.
                by_item = tl.reshape(tl.join(slope_c, -slope_c), (ITEMS,))
                mask = tl.reshape(tl.join(both, both), (ITEMS,))
                if BOUNDS:
                    weight = _item(pair_weight_ptr, i, pair_weight, mask, PAIR_WEIGHTS, DTYPE)
                    m = _item(margin_ptr, r, margin, mask, MARGINS, DTYPE)
                    signed = tl.where(is_chosen, a, -a)
                    inside = m - signed
                    term = weight * (_log1p_exp(inside) + tl.maximum(-inside, 0.0))
                    upper = tl.where(mask & is_chosen, term, 0.0).to(tl.float64)
                    lower = tl.where(mask & (is_chosen == 0), term, 0.0).to(tl.float64)
                    by_item += weight * tl.where(is_chosen, _falling(inside), -_falling(inside))
                    past = (mask & (signed > m)).to(tl.int32)
                wide = by_item.to(tl.float64)
                whole = (wide * scale).to(tl.int64)
                if ONCE:
                    tl.store(gradient_ptr + r, slope * (wide / many).to(DTYPE), mask=mask)
                else:
                    tl.atomic_add(totals_ptr + r, whole, mask=mask)
                if OWN_PROMPT:
                    of_prompt = tl.sum(tl.reshape(tl.where(mask, wide, 0.0), (HALF, 2)), 1)
                    tl.store(expected_gradient_ptr + pair, (-share * (of_prompt / many)).to(DTYPE), mask=pair < pairs)
                if SHARED_PROMPT:
                    tl.atomic_add(totals_ptr + responses + prompt, whole, mask=mask & (wrong == 0))
            own = figures_ptr + block
            tl.store(own, tl.sum(ranking, 0))
            tl.store(own + blocks, tl.sum(upper, 0))
            tl.store(own + 2 * blocks, tl.sum(lower, 0))
            tl.store(own + 3 * blocks, tl.sum(wins, 0).to(tl.float64))
            tl.store(own + 4 * blocks, tl.sum(past, 0).to(tl.float64))
            tl.store(own + 5 * blocks, tl.sum(flips, 0).to(tl.float64))
            tl.store(own + 6 * blocks, tl.sum(bad, 0).to(tl.float64))

    if LOSS:
        tl.debug_barrier()
        ticket = tl.num_programs(0) - 1
        if not ALONE:
            ticket = tl.atomic_add(totals_ptr + responses + prompts, 1)
        if ticket == tl.num_programs(0) - 1:
            unit = 1.0 / (scale * many)
            if not ONCE:
                for first in range(0, responses, ITEMS):
                    r = first + lanes
                    mask = r < responses
                    total = tl.load(totals_ptr + r, mask=mask, other=0, cache_modifier=".cg")
                    slope = tl.load(gradient_ptr + r, mask=mask, other=0.0, cache_modifier=".cg")
                    tl.store(gradient_ptr + r, slope * (total.to(tl.float64) * unit).to(DTYPE), mask=mask)
            if SHARED_PROMPT:
                for first in range(0, prompts, ITEMS):
                    p = first + lanes
                    total = tl.load(
                        totals_ptr + responses + p, mask=p < prompts, other=0, cache_modifier=".cg"
                    )  # fmt: skip
                    slope = (-share * (total.to(tl.float64) * unit)).to(DTYPE)
                    tl.store(expected_gradient_ptr + p, slope, mask=p < prompts)
            size = _wide(responses)
            if WEIGHED:
                size = _sample_size(spread_ptr, blocks, K, ALTERNATES, HALF)
            ranking = _figure(figures_ptr, 0, blocks, HALF) / many
            upper = _figure(figures_ptr, 1, blocks, HALF) / many
            lower = _figure(figures_ptr, 2, blocks, HALF) / many
            poison = tl.where(_figure(figures_ptr, 6, blocks, HALF) > 0, float("nan"), 0.0)
            tl.store(loss_ptr, (ranking + upper + lower + poison).to(DTYPE))
            tl.store(statistics_ptr, ranking.to(DTYPE))
            tl.store(statistics_ptr + 1, upper.to(DTYPE))
            tl.store(statistics_ptr + 2, lower.to(DTYPE))
            tl.store(statistics_ptr + 3, (0.5 * _figure(figures_ptr, 3, blocks, HALF) / many).to(DTYPE))
            tl.store(statistics_ptr + 4, size.to(DTYPE))
            flips = _figure(figures_ptr, 5, blocks, HALF)
            tl.store(statistics_ptr + 5, (flips / tl.maximum(_wide(responses), 1.0)).to(DTYPE))
            tl.store(statistics_ptr + 6, (_figure(figures_ptr, 4, blocks, HALF) / (2.0 * many)).to(DTYPE))


def advantage(call: AdvantageCall, pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (0-d), scores [R], statistics [7] (csrc/advantage.h), gradients of the reward [R] and of expected [P].

    Args:
        call: the arguments of `advantage_loss`, on one device. Wrong indices and bounds, and weights that are not
            finite, give a loss of NaN; nothing outside the tensors is read or written.
        pairs: False: scores, and d score / d reward as the gradient; loss and statistics are not written.
    """
    reward = call.reward.detach().contiguous()
    device, dtype, responses = reward.device, reward.dtype, reward.shape[0]
    prompts = 0 if call.expected is None else call.expected.shape[0]
    tokens = 0 if call.logprob is None else call.logprob.shape[0]
    weighed = call.logprob is not None and call.num_alternates > 0 and responses > 0
    listed = call.pairs is not None
    once = not listed or call.prompt_rule == PromptRule.OF_PAIRS
    # Blocks of responses, then blocks of pairs; a response in one pair has its place with the pair.
    response_items = responses if not pairs or not once else 0
    pair_items = 2 * call.pair_count if pairs else 0
    alone = pairs and not weighed and response_items + pair_items <= _MOST_ALONE
    items = _ITEMS_ALONE if alone else _ITEMS
    response_blocks = triton.cdiv(response_items, items)
    blocks = response_blocks + triton.cdiv(pair_items, items)

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=device)

    counts = (responses, call.pair_count, call.pair_count, call.pair_count)
    numbers = [0.0 if call.margin is None else call.margin, call.rank_margin, call.label_smoothing, call.pair_weight]
    if dtype == torch.float64:  # a number among a kernel's arguments is a float32
        numbers = [
            number if isinstance(number, Tensor) else torch.full((count,), number, dtype=dtype, device=device)
            for number, count in zip(numbers, counts, strict=True)
        ]
    given_each = [isinstance(number, Tensor) for number in numbers]
    by_item = [number.contiguous() if isinstance(number, Tensor) else reward for number in numbers]
    loss, score, statistics, gradient, expected_gradient = (
        empty(), empty(responses), empty(7), empty(responses), empty(prompts)
    )  # fmt: skip
    packed = [reward if x is None else x.contiguous() for x in (call.logprob, call.alt_logprob, call.cu_seqlens)]
    pieces = responses + triton.cdiv(tokens, TILE) if weighed else 0
    partial = empty(0, of=torch.float64)
    totals = empty(responses + prompts + 1 if pairs else 0, of=torch.int64)  # the last one counts programs
    heaviest, heavy = by_item[3], call.pair_count
    alternates = min(4, triton.next_power_of_2(max(call.num_alternates, 1)))
    with torch.cuda.device_of(reward):
        if weighed or (pairs and not alone):
            programs = max(pieces, min(1024, triton.cdiv(max(totals.numel(), call.pair_count), TILE)), 1)
            heavy = min(programs, triton.cdiv(call.pair_count, TILE)) if given_each[3] and pairs else 0
            heaviest = empty(heavy, of=torch.float64)
            # Every program stores its sum, those beyond the pieces one of nothing.
            partial = empty(programs * call.num_alternates if weighed else 0, of=torch.float64)
            _prepare_kernel[(programs,)](
                *packed, by_item[3], partial, totals, heaviest,
                responses, tokens, call.num_alternates, totals.numel(), call.pair_count, heavy,
                WEIGHED=weighed, HEAVIEST=heavy > 0, ALTERNATES=alternates, TILE=TILE, PROBES=256, num_warps=4,
            )  # fmt: skip
        if blocks > 0 or pairs:
            _advantage_kernel[(1 if alone else blocks,)](
                reward, reward if call.expected is None else call.expected.detach().contiguous(),
                reward if call.prompt is None else call.prompt.contiguous(),
                reward if call.pairs is None else call.pairs.contiguous(), *by_item,
                packed[2], partial, empty(3 * blocks * call.num_alternates if weighed else 0, of=torch.float64),
                empty(_FIGURES.value * blocks if pairs else 0, of=torch.float64), totals, heaviest,
                notes(device) if weighed else totals,
                loss, score, statistics, gradient, expected_gradient,
                responses, prompts, call.pair_count, tokens, call.num_policies, call.num_alternates,
                response_blocks, blocks, heavy,
                *(0.0 if given else number for number, given in zip(numbers, given_each, strict=True)),
                LOSS=pairs, WEIGHED=weighed, NORMALIZED=call.length_normalized,
                MAX_LOG_WEIGHT=None if call.max_weight is None else math.log(call.max_weight),
                EXPECTED=call.expected is not None, LISTED=listed, RULE=int(call.prompt_rule),
                BOUNDS=call.margin is not None, MARGINS=given_each[0], SHIFTS=given_each[1],
                SMOOTHINGS=given_each[2], PAIR_WEIGHTS=given_each[3], ALONE=alone, ALTERNATES=alternates,
                DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, TILE=TILE, ITEMS=items,
                num_warps=8,
            )  # fmt: skip
    return loss, score, statistics, gradient, expected_gradient
