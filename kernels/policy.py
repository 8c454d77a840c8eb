"""Triton row kernels of the policy losses: a chunk of logits to statistics, loss coefficients and gradient.

The twin of `stable_rlhf.ops.policy.cpu`, one program a row. Three parts share one kernel and any of them may be left
out: softmax statistics, the loss coefficients of a row, its gradient.
"""

from __future__ import annotations

import math
import os
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from stable_rlhf.ops.policy.formula import RowState, Terms
from stable_rlhf.ops.policy.types import DEFAULT, Kind, PolicyLossConfig

_LOG2_E = tl.constexpr(1.4426950408889634)
_REHEARSAL = tl.constexpr(int(Kind.REHEARSAL))


@triton.jit
def _exp(x):
    """exp of float32 values as a power of 2: the compiler's exp spends three more instructions to keep denormals."""
    return tl.exp2(x * _LOG2_E)


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
    decay = _exp(-2.0 * size)
    inverse = 1.0 / (1.0 + decay)
    far = (1.0 - decay) * inverse
    square = y * y  # near 0 the quotient loses digits
    near = size * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    t = tl.where(size < 0.15, near, far)
    # From the decay and not as 1 - t^2, which loses every digit where t rounds to 1.
    return softcap * tl.where(y < 0.0, -t, t), 4.0 * decay * inverse * inverse


@triton.jit
def _add_block(
    logits, column, vocabulary, scale, softcap, top, ones, rest, weighted, SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):
    """One block [R, L] of a row added to the running statistics [R], which hold one maximum for every L elements: no
    thread waits for another before the row's end. The maxima themselves are counted (`ones`), the others' exponentials
    summed (`rest`): added to 1 in float32 these would lose what a peaked row is about."""
    if MASKED:
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(logits + column).to(tl.float32)
    if SOFTCAP:
        x, _slope = _softcapped(x, softcap)
    z = _times(x, scale)
    if MASKED:
        z = tl.where(inside, z, float("-inf"))
    raised = tl.maximum(top, tl.max(z, 1))
    d = z - raised[:, None]
    largest = d == 0.0
    e = tl.where(largest, 0.0, _exp(d))
    product = e * d
    if MASKED:
        e = tl.where(inside, e, 0.0)
        product = tl.where(inside, product, 0.0)
    # Only statistics of nothing have no maximum. Asking for that, not for top = -inf, lets the NaN of an infinite logit
    # pass.
    step = tl.where(ones == 0.0, 0.0, top - raised)
    factor = _exp(step)
    weighted = (weighted + (ones + rest) * step) * factor + tl.sum(product, 1)
    rest = tl.where(step < 0.0, (ones + rest) * factor, rest) + tl.sum(e, 1)
    ones = tl.where(step < 0.0, 0.0, ones) + tl.sum(largest.to(tl.float32), 1)
    return raised, ones, rest, weighted


@triton.jit
def _gradient_block(
    logits, gradient, column, vocabulary, target, scale, softcap, top, slope_c, slope_e, centre, target_gradient,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(logits + column).to(tl.float32)
    if SOFTCAP:
        x, slope = _softcapped(x, softcap)
    d = _times(x, scale) - top
    if ENTROPY:
        g = _exp(d) * (slope_c + slope_e * (d + centre))
    else:
        g = _exp(d) * slope_c
    if SOFTCAP:
        g = g * slope
    g = tl.where(column == target, target_gradient, g).to(gradient.dtype.element_ty)
    if MASKED:
        tl.store(gradient + column, g, mask=inside)
    else:
        tl.store(gradient + column, g)


@triton.jit
def _clamped(x, bound):
    return tl.minimum(tl.maximum(x, -bound), bound)


@triton.jit
def _coefficients(
    i, logprob, kind_ptr, old_logprob_ptr, advantage_ptr, ref_logprob_ptr, row_weight_ptr, policy_denominator_ptr,
    rehearsal_denominator_ptr, low, high, dual_clip, clamp, kl_coef, entropy_coef, rehearsal_coef,
    HAS_ROW_WEIGHT: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """d loss / d logprob and d loss / d entropy of row i, in float64: once a row, so its speed does not matter."""
    weight = tl.full((), 1.0, tl.float64)
    if HAS_ROW_WEIGHT:
        weight = tl.load(row_weight_ptr + i).to(tl.float64)
    advantage = tl.load(advantage_ptr + i).to(tl.float64)
    log_ratio = logprob - tl.load(old_logprob_ptr + i).to(tl.float64)
    ratio = tl.exp(_clamped(log_ratio, clamp))
    held = tl.abs(log_ratio) > clamp
    held = held | ((advantage > 0.0) & (ratio > high))
    held = held | ((advantage < 0.0) & (ratio < low))
    held = held | ((advantage < 0.0) & (ratio > dual_clip))
    slope = tl.where(held, 0.0, -advantage * ratio)
    if KL != 0:
        apart = logprob - tl.load(ref_logprob_ptr + i).to(tl.float64)
        if KL == 1:
            pull = tl.full((), 1.0, tl.float64)
        elif KL == 2:
            pull = apart
        else:
            pull = 1.0 - tl.exp(-_clamped(apart, clamp))
        slope += tl.where(tl.abs(apart) <= clamp, kl_coef * pull, 0.0)
    scale = weight / tl.load(policy_denominator_ptr).to(tl.float64)
    rehearsal = -weight * rehearsal_coef / tl.load(rehearsal_denominator_ptr).to(tl.float64)
    is_rehearsal = tl.load(kind_ptr + i) == _REHEARSAL
    c = tl.where(is_rehearsal, rehearsal, scale * slope)
    e = tl.where(is_rehearsal, 0.0, -scale * entropy_coef)
    return c.to(tl.float32), e.to(tl.float32)


# Chunks begin at any row, so the alignment of what is per row says nothing and must not multiply the kernels.
_PER_ROW = (
    "row_ptr", "order_ptr", "target_ptr", "inverse_temperature_ptr", "logprob_ptr", "entropy_ptr", "max_ptr",
    "log_sum_ptr", "coefficient_ptr", "entropy_coefficient_ptr", "weighted_ptr", "target_logit_ptr", "kind_ptr",
    "old_logprob_ptr", "advantage_ptr", "ref_logprob_ptr", "row_weight_ptr", "policy_denominator_ptr",
    "rehearsal_denominator_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def _row_kernel(
    logits_ptr,
    gradient_ptr,
    row_ptr,
    order_ptr,
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
    logits_stride,
    gradient_stride,
    vocabulary,
    softcap,
    low,
    high,
    dual_clip,
    clamp,
    kl_coef,
    entropy_coef,
    rehearsal_coef,
    STATISTICS: tl.constexpr,
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    HAS_TARGET_LOGIT: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    gradient_row = i
    if HAS_ORDER:
        i = tl.load(order_ptr + gradient_row)
    logits_row = i
    if HAS_ROW:
        logits_row = tl.load(row_ptr + i)
        gradient_row = logits_row
    logits = logits_ptr + logits_row * logits_stride
    scale = tl.load(inverse_temperature_ptr + i)
    wanted = tl.load(target_ptr + i)
    here = (wanted >= 0) & (wanted < vocabulary)
    target = tl.where(here, wanted, -1).to(tl.int32)
    lanes = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    blocks = vocabulary // BLOCK
    whole = blocks * BLOCK

    # The same float32 operations as for every element: a target that is the maximum must be 0 away from it.
    target_x = tl.load(logits + target, mask=here, other=0.0).to(tl.float32)
    target_slope = 1.0
    if SOFTCAP:
        target_x, target_slope = _softcapped(target_x, softcap)
    target_z = _times(target_x, scale).to(tl.float64)

    if STATISTICS:
        top_lane = tl.full((BLOCK // LANES,), float("-inf"), tl.float32)
        ones_lane = tl.zeros((BLOCK // LANES,), tl.float32)
        rest_lane = tl.zeros((BLOCK // LANES,), tl.float32)
        weighted_lane = tl.zeros((BLOCK // LANES,), tl.float32)
        for begin in range(0, whole, BLOCK):
            top_lane, ones_lane, rest_lane, weighted_lane = _add_block(
                logits, begin + lanes, vocabulary, scale, softcap, top_lane, ones_lane, rest_lane, weighted_lane,
                SOFTCAP, False,
            )  # fmt: skip
        if whole < vocabulary:
            top_lane, ones_lane, rest_lane, weighted_lane = _add_block(
                logits, whole + lanes, vocabulary, scale, softcap, top_lane, ones_lane, rest_lane, weighted_lane,
                SOFTCAP, True,
            )  # fmt: skip
        top = tl.max(top_lane, 0)
        step = tl.where(ones_lane == 0.0, 0.0, top_lane - top)
        factor = _exp(step)
        ones = tl.sum(tl.where(step == 0.0, ones_lane, 0.0), 0).to(tl.float64)
        rest = tl.sum((tl.where(step == 0.0, 0.0, ones_lane) + rest_lane) * factor, 0).to(tl.float64)
        total = ones + rest
        mean = tl.sum((weighted_lane + (ones_lane + rest_lane) * step) * factor, 0).to(tl.float64) / total
        log_total = tl.log(total)
        apart = target_z - top.to(tl.float64)
        log_sum = log_total.to(tl.float32)
        entropy = (log_total - mean).to(tl.float32)
        logprob = tl.where(here, apart - log_total, 0.0).to(tl.float32)
        tl.store(logprob_ptr + i, logprob)
        tl.store(entropy_ptr + i, entropy)
        tl.store(max_ptr + i, top)
        tl.store(log_sum_ptr + i, log_sum)
        if HAS_WEIGHTED:
            tl.store(weighted_ptr + i, mean.to(tl.float32))
        if HAS_TARGET_LOGIT:
            tl.store(target_logit_ptr + i, tl.where(here, apart, 0.0).to(tl.float32))
        if TERMS:
            c, e = _coefficients(
                i, logprob.to(tl.float64), kind_ptr, old_logprob_ptr, advantage_ptr, ref_logprob_ptr, row_weight_ptr,
                policy_denominator_ptr, rehearsal_denominator_ptr, low, high, dual_clip, clamp, kl_coef, entropy_coef,
                rehearsal_coef, HAS_ROW_WEIGHT, KL,
            )  # fmt: skip
            tl.store(coefficient_ptr + i, c)
            tl.store(entropy_coefficient_ptr + i, e)
    else:
        top = tl.load(max_ptr + i)
        log_sum = tl.load(log_sum_ptr + i)
        entropy = tl.load(entropy_ptr + i)
        c = tl.load(coefficient_ptr + i)
        e = tl.load(entropy_coefficient_ptr + i)

    if GRADIENT:
        gradient = gradient_ptr + gradient_row * gradient_stride
        # In place, every thread must have read the target's logit before one of them overwrites it.
        tl.debug_barrier()
        if (c == 0.0) & (e == 0.0):
            zeros = tl.zeros((BLOCK // LANES, LANES), gradient.dtype.element_ty)
            for begin in range(0, vocabulary, BLOCK):
                tl.store(gradient + begin + lanes, zeros, mask=begin + lanes < vocabulary)
        else:
            # The target's own gradient, from its log-prob: 1 - p loses every digit where p rounds to 1.
            target_logprob = target_z - top.to(tl.float64) - log_sum.to(tl.float64)
            target_p = tl.exp(target_logprob)
            target_gradient = c.to(tl.float64) * (1.0 - target_p)
            if ENTROPY:
                target_gradient -= e.to(tl.float64) * target_p * (target_logprob + entropy.to(tl.float64))
            target_gradient = (target_gradient * scale.to(tl.float64) * target_slope).to(tl.float32)
            shared = scale * tl.exp(-log_sum.to(tl.float64)).to(tl.float32)
            slope_c, slope_e = -c * shared, -e * shared
            centre = entropy - log_sum  # log p + H = (z - max) + centre
            # From the end back: what the statistics read last, the cache may still hold.
            if whole < vocabulary:
                _gradient_block(
                    logits, gradient, whole + lanes, vocabulary, target, scale, softcap, top, slope_c, slope_e, centre,
                    target_gradient, SOFTCAP, ENTROPY, True,
                )  # fmt: skip
            for back in range(1, blocks + 1):
                _gradient_block(
                    logits, gradient, (blocks - back) * BLOCK + lanes, vocabulary, target, scale, softcap, top, slope_c,
                    slope_e, centre, target_gradient, SOFTCAP, ENTROPY, False,
                )  # fmt: skip


@triton.jit
def _dropped(coefficient_ptr, entropy_coefficient_ptr, at, count):
    """Whether the rows `at` below `count` have no gradient, and whether they have one."""
    c = tl.load(coefficient_ptr + at, mask=at < count, other=0.0)
    e = tl.load(entropy_coefficient_ptr + at, mask=at < count, other=0.0)
    nothing = (c == 0.0) & (e == 0.0)
    return (nothing & (at < count)).to(tl.int32), 1 - nothing.to(tl.int32)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["coefficient_ptr", "entropy_coefficient_ptr"])
def _order_kernel(coefficient_ptr, entropy_coefficient_ptr, order_ptr, number_ptr, count, BLOCK: tl.constexpr):
    # One program: it counts the kept rows, lists those from place `number` on behind that place, and lets the gaps
    # before it take from that list.
    lanes = tl.arange(0, BLOCK)
    kept_lane = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, count, BLOCK):
        _gap, kept = _dropped(coefficient_ptr, entropy_coefficient_ptr, begin + lanes, count)
        kept_lane += kept
    number = tl.sum(kept_lane, 0)
    tl.store(number_ptr, number)
    seen = tl.zeros((), tl.int32)
    for begin in range(0, count, BLOCK):
        at = begin + lanes
        _gap, kept = _dropped(coefficient_ptr, entropy_coefficient_ptr, at, count)
        late = tl.where(at >= number, kept, 0)
        place = number + seen + tl.cumsum(late, 0) - 1
        tl.store(order_ptr + place, at.to(tl.int64), mask=late != 0)
        seen += tl.sum(late, 0)
    tl.debug_barrier()
    seen = tl.zeros((), tl.int32)
    for begin in range(0, number, BLOCK):
        at = begin + lanes
        gap, _kept = _dropped(coefficient_ptr, entropy_coefficient_ptr, at, count)
        gap = tl.where(at < number, gap, 0)
        place = number + seen + tl.cumsum(gap, 0) - 1
        late = tl.load(order_ptr + place, mask=gap != 0, other=0)
        tl.store(order_ptr + at, tl.where(gap != 0, late, at.to(tl.int64)), mask=at < number)
        seen += tl.sum(gap, 0)


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(tensor_ptr, upstream_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(upstream_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(tensor_ptr + at, mask=at < count).to(tl.float32)
            tl.store(tensor_ptr + at, (x * factor).to(tensor_ptr.dtype.element_ty), mask=at < count)


def launch_shape(vocabulary: int, dtype: torch.dtype, softcap: bool = False) -> tuple[int, int]:
    """Elements a block and warps a program for rows of logits; "BLOCK,WARPS" in STABLE_RLHF_TRITON_CONFIG fixes both.

    A thread holds two 16-byte loads, or one where the softcap needs the registers. Longer rows get more threads, so
    that fewer rows share the cache.
    """
    fixed = os.environ.get("STABLE_RLHF_TRITON_CONFIG")
    if fixed:
        block, warps = (int(part) for part in fixed.split(","))
        return block, warps
    warps = 4 if vocabulary <= 8192 else 8 if vocabulary <= 65536 else 16
    return warps * 32 * (16 if softcap else 32) // dtype.itemsize, warps


def _launch(
    count: int,
    logits: Tensor,
    gradient: Tensor | None,
    state: RowState,
    softcap: float | None,
    *,
    statistics: bool,
    entropy: bool = False,
    row: Tensor | None = None,
    order: Tensor | None = None,
    weighted: Tensor | None = None,
    target_logit: Tensor | None = None,
    kind: Tensor | None = None,
    terms: Terms | None = None,
    config: PolicyLossConfig = DEFAULT,
) -> None:
    """Runs the row kernel on `count` rows: statistics if asked for, coefficients with `terms`, gradient if given."""
    assert logits.stride(1) == 1 and (gradient is None or gradient.stride(1) == 1)
    if count == 0:
        return
    optional: dict[str, Tensor | None] = {
        "row": row, "order": order, "weighted": weighted, "target_logit": target_logit, "kind": kind
    }  # fmt: skip
    for field in fields(Terms):
        optional[field.name] = getattr(terms, field.name, None)
    block, warps = launch_shape(logits.shape[1], logits.dtype, bool(softcap))
    with torch.cuda.device_of(logits):
        _row_kernel[(count,)](
            logits_ptr=logits,
            gradient_ptr=logits if gradient is None else gradient,
            **{f"{name}_ptr": state.target if x is None else x.contiguous() for name, x in optional.items()},
            **{f"{field.name}_ptr": getattr(state, field.name) for field in fields(state)},
            logits_stride=logits.stride(0),
            gradient_stride=0 if gradient is None else gradient.stride(0),
            vocabulary=logits.shape[1],
            softcap=float(softcap or 0.0),
            low=1.0 - config.clip_low,
            high=1.0 + config.clip_high,
            dual_clip=config.dual_clip or math.inf,
            clamp=config.log_ratio_clamp,
            kl_coef=float(config.kl_coef),
            entropy_coef=float(config.entropy_coef),
            rehearsal_coef=float(config.rehearsal_coef),
            STATISTICS=statistics,
            TERMS=terms is not None,
            GRADIENT=gradient is not None,
            HAS_ROW=row is not None,
            HAS_ORDER=order is not None,
            HAS_WEIGHTED=weighted is not None,
            HAS_TARGET_LOGIT=target_logit is not None,
            HAS_ROW_WEIGHT=optional["row_weight"] is not None,
            SOFTCAP=bool(softcap),
            KL=int(config.kl_estimator[1]) if config.kl_coef != 0.0 else 0,
            ENTROPY=entropy,
            BLOCK=block,
            LANES=16 // logits.dtype.itemsize,
            num_warps=warps,
        )


def statistics(
    logits: Tensor,
    state: RowState,
    softcap: float | None,
    *,
    row: Tensor | None = None,
    weighted: Tensor | None = None,
    target_logit: Tensor | None = None,
) -> None:
    """Fills logprob, entropy, max and log_sum from logits [n, V]; of a slice of the vocabulary also the mean of z - max
    under the softmax (`weighted` [A]) and z - max of the target (`target_logit` [A], 0 where it lies elsewhere)."""
    _launch(
        state.target.numel(), logits, None, state, softcap, statistics=True, row=row, weighted=weighted,
        target_logit=target_logit,
    )  # fmt: skip


def kept_rows(state: RowState) -> Tensor | None:
    """Which rows have a gradient, or None: all of them. The device is asked for their number.

    The first of them stay at their places, later ones fill the gaps that dropped rows leave: a gradient written over
    the logits, row j from row order[j], overwrites no row that another one still reads.
    """
    count = state.target.numel()
    order = torch.empty(count, dtype=torch.int64, device=state.target.device)
    number = torch.empty((), dtype=torch.int32, device=state.target.device)
    with torch.cuda.device_of(number):
        _order_kernel[(1,)](state.coefficient, state.entropy_coefficient, order, number, count, BLOCK=1024, num_warps=4)
    kept = int(number)
    return None if kept == count else order[:kept]


def policy(
    logits: Tensor,
    gradient: Tensor,
    state: RowState,
    kind: Tensor,
    terms: Terms,
    config: PolicyLossConfig,
    *,
    row: Tensor | None = None,
    compact: bool = True,
) -> Tensor | None:
    """Statistics, coefficients and gradient (which may be the memory of `logits`) of a chunk.

    Args:
        row: which row of logits and gradient each active row is; None: in order.
        compact: leave out rows whose gradient is exactly zero, which costs one synchronisation. Not done under graph
            capture, nor with a KL or entropy term, which leaves hardly a row without gradient.

    Returns:
        which of the rows each gradient row belongs to, or None: all of them in order.
    """
    count = state.target.numel()
    entropy = config.entropy_coef != 0.0
    compact = compact and count > 0 and row is None and config.kl_coef == 0.0 and not entropy
    if compact and logits.is_cuda and torch.cuda.is_current_stream_capturing():
        compact = False
    _launch(
        count, logits, None if compact else gradient, state, config.softcap, statistics=True, entropy=entropy, row=row,
        kind=kind, terms=terms, config=config,
    )  # fmt: skip
    if not compact:
        return None
    order = kept_rows(state)
    number = count if order is None else order.numel()
    _launch(number, logits, gradient, state, config.softcap, statistics=False, order=order)
    return order


def given(
    logits: Tensor, gradient: Tensor, state: RowState, softcap: float | None, *, row: Tensor | None = None
) -> None:
    """The gradient for the coefficients, max, log_sum and entropy in `state`; a row without coefficients gets zeros."""
    _launch(state.target.numel(), logits, gradient, state, softcap, statistics=False, entropy=True, row=row)


def scale_(tensor: Tensor, upstream: Tensor) -> Tensor:
    """`tensor` times the 0-d `upstream`, in place; where that is 1, nothing of `tensor` is read. No synchronisation."""
    if not tensor.is_contiguous():
        return tensor.mul_(upstream)
    if tensor.numel() > 0:
        block = 4096
        # A few programs for each processor: where there is nothing to do, that is all that starts.
        with torch.cuda.device_of(tensor):
            _scale_kernel[(min(triton.cdiv(tensor.numel(), block), 2048),)](
                tensor, upstream, tensor.numel(), BLOCK=block, num_warps=8
            )
    return tensor
