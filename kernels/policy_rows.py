"""The Triton row kernel of the policy losses: rows of logits to statistics, loss coefficients and gradient.

The twin of csrc/policy_kernel.h. The grid is as wide as the device, and each program takes every so many rows; the next
block of a row, and the first of the next row, is on its way while one is worked on. Statistics go through a row from
its beginning, the gradient from its end back: the last block is still in registers, those before it in the second-level
cache. Three parts share the kernel, and any of them may be left out: softmax statistics, the loss coefficients of a
row, its gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stable_rlhf.ops.policy.types import OBJECTIVES, Kind

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_POLICY, _REHEARSAL = tl.constexpr(int(Kind.POLICY)), tl.constexpr(int(Kind.REHEARSAL))
_CISPO, _REINFORCE = (tl.constexpr(OBJECTIVES.index(name)) for name in ("cispo", "reinforce"))
# Below every logit, and finite, so that exp(FLOOR - top) (FLOOR - top) is 0. Logits from 1.7e38 on are called
# non-finite.
_FLOOR = tl.constexpr(-(2.0**127))


@triton.jit
def _exp(x):
    """exp of a number a row, to the last digits: what the product with log2 e rounds off is multiplied back."""
    high = x * _LOG2_E
    return tl.exp2(high) * (1.0 + tl.fma(x, _LOG2_E, -high) * _LN_2)


@triton.jit
def _expm1(x):
    """exp(x) - 1, which keeps its digits near 0."""
    near = 1.0 + x * (1.0 / 10.0)
    for term in tl.static_range(9, 1, -1):
        near = 1.0 + x * (1.0 / term) * near
    return tl.where(tl.abs(x) < 0.5, x * near, _exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, which keeps its digits near 0."""
    s = x / (2.0 + x)
    square = s * s
    near = 2.0 * s * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0 + square * (1.0 / 9.0)))))
    return tl.where(x < 0.25, near, tl.log(1.0 + x))


@triton.jit
def _times(x, scale):
    """x scale, rounded: the compiler would join a plain product with the subtraction of the maximum, whose element
    would then be off by its rounding, 5e-4 at logits of 1e4, in place of 0. A sum with 0 it cannot join again."""
    return tl.fma(x, scale, 0.0)


@triton.jit
def _softcapped(x, softcap):
    """softcap tanh(x / softcap) and its slope 1 - tanh^2, float32."""
    y = x * (1.0 / softcap)
    size = tl.abs(y)
    decay = tl.exp2(size * (-2.0 * _LOG2_E))
    inverse = 1.0 / (1.0 + decay)
    far = (1.0 - decay) * inverse
    square = y * y  # near 0 the quotient loses digits
    near = size * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    t = tl.where(size < 0.15, near, far)
    # From the decay and not as 1 - t^2, which loses every digit where t rounds to 1.
    return softcap * tl.where(y < 0.0, -t, t), 4.0 * decay * inverse * inverse


# -- blocks of a row: two tensors [R, L], L logits for each 16 bytes that a thread loads -------------------------------


@triton.jit
def _packed(x):
    """Pairs of 16-bit numbers as they lie in memory, [R, L / 2] int32: half the registers while a block waits. float32
    stays as it is."""
    if x.dtype.primitive_bitwidth == 16:
        pairs = tl.reshape(x.to(tl.int16, bitcast=True), (x.shape[0], x.shape[1] // 2, 2))
        even, odd = tl.split(pairs)
        x = (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)
    return x


@triton.jit
def _unpacked(x, DTYPE: tl.constexpr):
    """The even and the odd places of what was packed, [R, L / 2] float32 each."""
    if DTYPE == tl.float32:  # noqa: SIM300
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    elif DTYPE == tl.bfloat16:  # noqa: SIM300
        even, odd = (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
    else:
        even = x.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        odd = (x >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _load_block(start, lanes, limit, HALF: tl.constexpr, EVICT: tl.constexpr):
    """A block, packed; nothing is read from place `limit` on. Whole blocks without a mask, so that they are read widely
    whatever the vocabulary's size."""
    if limit >= 2 * HALF:
        near = _packed(tl.load(start + lanes, eviction_policy=EVICT))
        far = _packed(tl.load(start + (HALF + lanes), eviction_policy=EVICT))
    else:
        near = _packed(tl.load(start + lanes, mask=lanes < limit, eviction_policy=EVICT))
        far = _packed(tl.load(start + (HALF + lanes), mask=HALF + lanes < limit, eviction_policy=EVICT))
    return near, far


@triton.jit
def _ordered(a, b):
    """The larger and the smaller of two; both NaN where one is."""
    more = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return more, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_others(x, top, scale, rest, weighted):
    d = x - top[:, None]
    e = tl.exp2(d * scale)
    return rest + tl.sum(e, 1), weighted + tl.sum(e * d, 1)


@triton.jit
def _add_other(x, top, scale, rest, weighted):
    d = x - top
    e = tl.exp2(d * scale)
    return rest + e, weighted + e * d


@triton.jit
def _values(x, lanes, limit, softcap, DTYPE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Half a block's logits: the even and the odd places; far below every logit those that are not there."""
    even, odd = _unpacked(x, DTYPE)
    if SOFTCAP:
        even, _slope = _softcapped(even, softcap)
        odd, _slope = _softcapped(odd, softcap)
    if MASKED:
        place, after = tl.split(tl.reshape(lanes, (lanes.shape[0], lanes.shape[1] // 2, 2)))
        even, odd = tl.where(place < limit, even, _FLOOR), tl.where(after < limit, odd, _FLOOR)
    return even, odd


@triton.jit
def _add_block(
    near, far, lanes, limit, scale, softcap, top, rest, weighted,
    HALF: tl.constexpr, DTYPE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block added to the running statistics [R], one maximum for every 2 L logits: no thread waits for another
    before the row's end.

    A knock-out among the logits and the maximum so far leaves the new maximum and the others, whose exponentials are
    summed: with the maximum's own 1 in it the sum would lose, in float32, what a peaked row is about.
    `scale` is that of a power of 2.
    """
    R: tl.constexpr = lanes.shape[0]
    a, b = _values(near, lanes, limit, softcap, DTYPE, SOFTCAP, MASKED)
    c, d = _values(far, HALF + lanes, limit, softcap, DTYPE, SOFTCAP, MASKED)
    a, out_near = _ordered(a, b)
    c, out_far = _ordered(c, d)
    x, out_both = _ordered(a, c)
    if lanes.shape[1] == 8:
        a, b = tl.split(tl.reshape(x, (R, 2, 2)))
        x, out_pair = _ordered(a, b)
    a, b = tl.split(x)
    x, out_half = _ordered(a, b)
    raised, out_last = _ordered(x, top)
    step = top - raised
    factor = tl.exp2(step * scale)
    rest = rest * factor
    weighted = weighted * factor + rest * step
    rest, weighted = _add_others(out_near, raised, scale, rest, weighted)
    rest, weighted = _add_others(out_far, raised, scale, rest, weighted)
    rest, weighted = _add_others(out_both, raised, scale, rest, weighted)
    if lanes.shape[1] == 8:
        rest, weighted = _add_others(out_pair, raised, scale, rest, weighted)
    rest, weighted = _add_other(out_half, raised, scale, rest, weighted)
    rest, weighted = _add_other(out_last, raised, scale, rest, weighted)
    return raised, rest, weighted


@triton.jit
def _gradient_values(
    x, scale, power, softcap, top, slope, slope_by_distance,
    GIVEN: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    factor = 1.0
    if SOFTCAP:
        x, factor = _softcapped(x, softcap)
    d = x - top
    if GIVEN:  # a masked logit over its temperature may be infinite, and nothing times that is no number
        d = tl.maximum(_times(x, scale) - top, -1e30, propagate_nan=tl.PropagateNan.ALL)
    if ENTROPY:
        slope = slope + slope_by_distance * d
    g = tl.exp2(d * power) * slope
    if SOFTCAP:
        g = g * factor
    return g


@triton.jit
def _gradient_half(
    x, lanes, scale, power, softcap, top, slope, slope_by_distance, DTYPE: tl.constexpr, OUT: tl.constexpr,
    GIVEN: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    even, odd = _unpacked(x, DTYPE)
    even = _gradient_values(even, scale, power, softcap, top, slope, slope_by_distance, GIVEN, SOFTCAP, ENTROPY)
    odd = _gradient_values(odd, scale, power, softcap, top, slope, slope_by_distance, GIVEN, SOFTCAP, ENTROPY)
    return tl.reshape(tl.join(even, odd), lanes.shape).to(OUT)


@triton.jit
def _store_block(start, near, far, lanes, limit, HALF: tl.constexpr):
    # Nothing here reads them again, and what is to be read again keeps its place in the cache.
    if limit >= 2 * HALF:
        tl.store(start + lanes, near, eviction_policy="evict_first")
        tl.store(start + (HALF + lanes), far, eviction_policy="evict_first")
    else:
        tl.store(start + lanes, near, mask=lanes < limit, eviction_policy="evict_first")
        tl.store(start + (HALF + lanes), far, mask=HALF + lanes < limit, eviction_policy="evict_first")


# -- a row's numbers, in float32: every warp works them out, and float64 takes 150 operations one after another --------


@triton.jit
def _join(top_lane, rest_lane, weighted_lane, scale):
    """The row's maximum, what 1 is short of the sum of exp(z - max), and the mean of z - max."""
    top = tl.max(top_lane, 0)
    # No logit above the floor, or none that is a number: nothing of the row is.
    top = tl.where(top > _FLOOR, top, float("nan"))
    step = top_lane - top
    factor = tl.exp2(step * scale)
    largest = step == 0.0
    number = tl.sum(largest.to(tl.float32), 0)
    others = tl.where(largest, 0.0, 1.0) + rest_lane
    rest = tl.sum(others * factor, 0) + (number - 1.0)
    moment = tl.sum(weighted_lane * factor + ((1.0 + rest_lane) * factor) * step, 0)
    return top, rest, moment * (_LN_2 * scale) / (1.0 + rest)


@triton.jit
def _clamped(x, bound):
    return tl.minimum(tl.maximum(x, -bound), bound)


@triton.jit
def _coefficients(
    logprob, kind, old_logprob, advantage, ref_logprob, weight, policy_denominator, rehearsal_denominator,
    entropy_denominator, log_low, log_high, log_dual, clamp, kl_coef, kl_clamp, kl_ratio_max, entropy_coef,
    rehearsal_coef, OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_APART: tl.constexpr, KL_UNBIASED: tl.constexpr,
    KL_CLAMPED: tl.constexpr, HAS_ENTROPY_DENOMINATOR: tl.constexpr,
):  # fmt: skip
    """d loss / d logprob and d loss / d entropy of a row; of one that is of neither kind 0, whatever it holds."""
    log_ratio = logprob - old_logprob
    ratio = _exp(_clamped(log_ratio, clamp))
    inside = tl.abs(log_ratio) <= clamp
    if OBJECTIVE == _REINFORCE:
        slope = -advantage
    elif OBJECTIVE == _CISPO:
        slope = -advantage * _exp(_clamped(tl.minimum(tl.maximum(log_ratio, log_low), log_high), clamp))
    else:
        # A ratio at an edge is on the side that its float32 value is on, whatever an approximate exp says.
        held = tl.abs(log_ratio) > clamp
        held = held | ((advantage > 0.0) & (log_ratio > log_high))
        held = held | ((advantage < 0.0) & (log_ratio < log_low))
        held = held | ((advantage < 0.0) & (log_ratio > log_dual))
        slope = tl.where(held, 0.0, -advantage * ratio)
    if KL != 0:
        apart = logprob - ref_logprob
        free = tl.abs(apart) <= clamp
        apart = _clamped(apart, clamp)
        if KL_APART:
            pull = apart
            if KL_UNBIASED:
                pull = pull * tl.minimum(ratio, kl_ratio_max)
            pull = tl.where(free, pull, 0.0)
        else:
            if KL == 1:
                pull = tl.full(apart.shape, 1.0, tl.float32)
                estimate = apart
            elif KL == 2:
                pull = apart
                estimate = 0.5 * apart * apart
            elif KL == 3:
                pull = -_expm1(-apart)
                estimate = apart - pull
            else:
                pull = tl.where(apart > 0.0, 1.0, tl.where(apart < 0.0, -1.0, 0.0))
                estimate = tl.abs(apart)
            if KL_CLAMPED:
                free = free & (tl.abs(estimate) <= kl_clamp)
                estimate = _clamped(estimate, kl_clamp)
            pull = tl.where(free, pull, 0.0)
            if KL_UNBIASED:
                pull = ratio * (pull + tl.where(inside, estimate, 0.0))
        slope += kl_coef * pull
    scale = weight / policy_denominator
    bonus = scale * entropy_coef
    if HAS_ENTROPY_DENOMINATOR:
        bonus = entropy_coef / entropy_denominator
    rehearsal = tl.where(kind == _REHEARSAL, -weight * rehearsal_coef / rehearsal_denominator, 0.0)
    return tl.where(kind == _POLICY, scale * slope, rehearsal), tl.where(kind == _POLICY, -bonus, 0.0)


# Chunks begin at any row, so the alignment of what is per row says nothing and must not multiply the kernels.
_PER_ROW = (
    "row_ptr", "target_ptr", "inverse_temperature_ptr", "logprob_ptr", "entropy_ptr", "max_ptr", "log_sum_ptr",
    "coefficient_ptr", "entropy_coefficient_ptr", "weighted_ptr", "target_logit_ptr", "kind_ptr", "old_logprob_ptr",
    "advantage_ptr", "ref_logprob_ptr", "row_weight_ptr", "policy_denominator_ptr", "rehearsal_denominator_ptr",
    "entropy_denominator_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=_PER_ROW)
def row_kernel(
    logits_ptr,
    gradient_ptr,
    row_ptr,
    target_ptr,
    inverse_temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    coefficient_ptr,
    entropy_coefficient_ptr,
    weighted_ptr,
    target_logit_ptr,
    kind_ptr,
    old_logprob_ptr,
    advantage_ptr,
    ref_logprob_ptr,
    row_weight_ptr,
    policy_denominator_ptr,
    rehearsal_denominator_ptr,
    entropy_denominator_ptr,
    logits_stride,
    gradient_stride,
    count,
    vocabulary,
    softcap,
    log_low,
    log_high,
    log_dual,
    clamp,
    kl_coef,
    entropy_coef,
    rehearsal_coef,
    kl_clamp,
    kl_ratio_max,
    STATISTICS: tl.constexpr,
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    HAS_TARGET_LOGIT: tl.constexpr,
    HAS_OLD_LOGPROB: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    KL_APART: tl.constexpr,
    KL_UNBIASED: tl.constexpr,
    KL_CLAMPED: tl.constexpr,
    HAS_ENTROPY_DENOMINATOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """`LEAVE_OUT`: rows without coefficients keep their logits where others get a gradient; else zeros. `ALIGNED`: rows
    begin at multiples of `LANES` logits, in which the strides are given."""
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    OUT: tl.constexpr = gradient_ptr.dtype.element_ty
    HALF: tl.constexpr = BLOCK // 2
    R: tl.constexpr = HALF // LANES
    UNIT: tl.constexpr = LANES if ALIGNED else 1
    row_width = tl.cast(logits_stride, tl.int64) * UNIT
    if ALIGNED:  # a thread reads 16 bytes at a time
        lanes = tl.arange(0, R)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    else:  # a thread reads single logits, beside those of its neighbours
        lanes = tl.arange(0, R)[:, None] + tl.arange(0, LANES)[None, :] * R
    last = (vocabulary - 1) // BLOCK

    first = tl.program_id(0)
    next_row = first
    if HAS_ROW:
        next_row = tl.load(row_ptr + first).to(tl.int32)
    near, far = _load_block(logits_ptr + next_row * row_width, lanes, vocabulary, HALF, "")
    for i in range(first, count, tl.num_programs(0)):
        row = next_row
        # Where there is no next row nothing of it is read.
        next_limit = tl.where(i + tl.num_programs(0) < count, vocabulary, 0)
        next_row = i + tl.num_programs(0)
        if HAS_ROW:
            next_row = tl.load(row_ptr + next_row, mask=next_limit > 0, other=0).to(tl.int32)
        logits = logits_ptr + row * row_width
        to_next = (next_row - row) * row_width
        scale = tl.load(inverse_temperature_ptr + i)
        target = tl.load(target_ptr + i)
        target = tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)

        if STATISTICS:
            power = scale * _LOG2_E
            top_lane = tl.full((R,), _FLOOR, tl.float32)
            rest_lane = tl.zeros((R,), tl.float32)
            weighted_lane = tl.zeros((R,), tl.float32)
            whole_blocks = last
            if TERMS:
                kind = tl.load(kind_ptr + i)
                whole_blocks = tl.where(kind != 0, last, 0)  # nothing of a row that takes no part is worth reading
            for k in range(0, whole_blocks):
                ahead = (k + 1) * BLOCK
                next_near, next_far = _load_block(logits + ahead, lanes, vocabulary - ahead, HALF, "")
                top_lane, rest_lane, weighted_lane = _add_block(
                    near, far, lanes, BLOCK, power, softcap, top_lane, rest_lane, weighted_lane, HALF, DTYPE, SOFTCAP,
                    False,
                )  # fmt: skip
                near, far = next_near, next_far
            # What a row needs once arrives while its last block is worked on; until here it would take registers.
            target_x = tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32)
            if TERMS:
                policy_denominator = tl.load(policy_denominator_ptr)
                rehearsal_denominator = tl.load(rehearsal_denominator_ptr)
                entropy_denominator = policy_denominator
                if HAS_ENTROPY_DENOMINATOR:
                    entropy_denominator = tl.load(entropy_denominator_ptr)
                old_logprob = 0.0
                if HAS_OLD_LOGPROB:
                    old_logprob = tl.load(old_logprob_ptr + i)
                advantage = tl.load(advantage_ptr + i)
                ref_logprob = 0.0
                if KL != 0:
                    ref_logprob = tl.load(ref_logprob_ptr + i)
                weight = 1.0
                if HAS_ROW_WEIGHT:
                    weight = tl.load(row_weight_ptr + i)
            top_lane, rest_lane, weighted_lane = _add_block(
                near, far, lanes, vocabulary - last * BLOCK, power, softcap, top_lane, rest_lane, weighted_lane, HALF,
                DTYPE, SOFTCAP, True,
            )  # fmt: skip
            # Distances from the maximum before they are scaled: the target's is exactly 0 where it is the maximum.
            top, rest, mean = _join(top_lane, rest_lane, weighted_lane, power)
            if SOFTCAP:
                target_x, target_slope = _softcapped(target_x, softcap)
            apart = (target_x - top) * scale
            log_sum = _log1p(rest)
            entropy = log_sum - mean
            target_logprob = apart - log_sum
            logprob = tl.where(target >= 0, target_logprob, 0.0)
            if TERMS:  # whatever it holds
                logprob = tl.where(kind != 0, logprob, 0.0)
                entropy = tl.where(kind != 0, entropy, 0.0)
            inverse_sum = 1.0 / (1.0 + rest)
            tl.store(logprob_ptr + i, logprob)
            tl.store(entropy_ptr + i, entropy)
            tl.store(max_ptr + i, _times(top, scale))
            tl.store(log_sum_ptr + i, log_sum)
            if HAS_WEIGHTED:
                tl.store(weighted_ptr + i, mean)
            if HAS_TARGET_LOGIT:
                tl.store(target_logit_ptr + i, tl.where(target >= 0, apart, 0.0))
            distance_scale = scale
            if TERMS:
                if not HAS_OLD_LOGPROB:  # on policy
                    old_logprob = logprob
                c, e = _coefficients(
                    logprob, kind, old_logprob, advantage, ref_logprob, weight, policy_denominator,
                    rehearsal_denominator, entropy_denominator, log_low, log_high, log_dual, clamp, kl_coef, kl_clamp,
                    kl_ratio_max, entropy_coef, rehearsal_coef, OBJECTIVE, KL, KL_APART, KL_UNBIASED, KL_CLAMPED,
                    HAS_ENTROPY_DENOMINATOR,
                )  # fmt: skip
                tl.store(coefficient_ptr + i, c)
                tl.store(entropy_coefficient_ptr + i, e)
        else:
            # The maximum is that of the scaled logits, which are rounded here as they were when it was found.
            power = _LOG2_E
            distance_scale = 1.0
            top = tl.load(max_ptr + i)
            log_sum = tl.load(log_sum_ptr + i)
            entropy = tl.load(entropy_ptr + i)
            c = tl.load(coefficient_ptr + i)
            e = tl.load(entropy_coefficient_ptr + i)
            target_x = tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32)
            if SOFTCAP:
                target_x, target_slope = _softcapped(target_x, softcap)
            target_logprob = (_times(target_x, scale) - top) - log_sum
            inverse_sum = _exp(-log_sum)

        if GRADIENT:
            gradient = gradient_ptr + tl.cast(gradient_stride, tl.int64) * UNIT * row
            # In place, every thread must have read the target's logit before one of them overwrites it.
            tl.debug_barrier()
            if (c == 0.0) & (e == 0.0):
                if not LEAVE_OUT:
                    zeros = tl.zeros((R, LANES), OUT)
                    for begin in range(0, vocabulary, HALF):
                        tl.store(gradient + (begin + lanes), zeros, mask=lanes < vocabulary - begin)
                near, far = _load_block(logits + to_next, lanes, next_limit, HALF, "")
            else:
                shared = scale * inverse_sum
                slope = -shared * c
                slope_by_distance = 0.0
                if ENTROPY:  # log p + H = (z - max) + (H - log_sum)
                    slope -= shared * e * (entropy - log_sum)
                    slope_by_distance = -shared * e * distance_scale
                # The target's own gradient, from its log-prob: 1 - p loses every digit where p rounds to 1.
                at_target = -c * _expm1(target_logprob)
                if ENTROPY:
                    at_target -= e * _exp(target_logprob) * (target_logprob + entropy)
                at_target = at_target * scale
                if SOFTCAP:
                    at_target = at_target * target_slope
                for step in range(0, last + 1):
                    k = last - step if STATISTICS else step
                    after = k - 1 if STATISTICS else k + 1
                    more = step < last
                    place = tl.where(more, tl.cast(after * BLOCK, tl.int64), to_next)
                    limit = tl.where(more, vocabulary - after * BLOCK, next_limit)
                    next_near, next_far = _load_block(logits + place, lanes, limit, HALF, "evict_first")
                    g_near = _gradient_half(
                        near, lanes, scale, power, softcap, top, slope, slope_by_distance, DTYPE, OUT, not STATISTICS,
                        SOFTCAP, ENTROPY,
                    )  # fmt: skip
                    g_far = _gradient_half(
                        far, lanes, scale, power, softcap, top, slope, slope_by_distance, DTYPE, OUT, not STATISTICS,
                        SOFTCAP, ENTROPY,
                    )  # fmt: skip
                    _store_block(gradient + k * BLOCK, g_near, g_far, lanes, vocabulary - k * BLOCK, HALF)
                    near, far = next_near, next_far
                tl.debug_barrier()
                tl.store(gradient + target, at_target.to(OUT), mask=target >= 0)
        else:
            near, far = _load_block(logits + to_next, lanes, next_limit, HALF, "")
