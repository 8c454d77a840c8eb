"""The Triton row kernels of the policy losses as `stable_rlhf.ops.policy.fused` calls them; the twin of
`stable_rlhf.ops.policy.cpu`. `policy_rows` has the row kernel itself."""

from __future__ import annotations

import functools
import math
import os
import struct
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from stable_rlhf.kernels.policy_call import capturing, kl_number
from stable_rlhf.kernels.policy_rows import row_kernel
from stable_rlhf.kernels.tuning import RowLaunch, programs, row_launch
from stable_rlhf.ops.policy.formula import RowState, Terms
from stable_rlhf.ops.policy.types import DEFAULT, OBJECTIVES, PolicyLossConfig


@triton.jit
def _dropped(coefficient_ptr, entropy_coefficient_ptr, at, count):
    """Whether the rows `at` below `count` have no gradient, and whether they have one."""
    c = tl.load(coefficient_ptr + at, mask=at < count, other=0.0)
    e = tl.load(entropy_coefficient_ptr + at, mask=at < count, other=0.0)
    nothing = (c == 0.0) & (e == 0.0)
    return (nothing & (at < count)).to(tl.int32), 1 - nothing.to(tl.int32)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["coefficient_ptr", "entropy_coefficient_ptr"])
def _order_kernel(coefficient_ptr, entropy_coefficient_ptr, order_ptr, gap_ptr, number_ptr, count, BLOCK: tl.constexpr):
    """The kept rows' number, and that of the gaps before it; the gaps; and the order of rows that fills them.

    One program: it counts the kept rows, lists those from place `number` on behind that place, and lets the gaps before
    it take from that list.
    """
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
    tl.store(number_ptr + 1, seen)
    tl.debug_barrier()
    seen = tl.zeros((), tl.int32)
    for begin in range(0, number, BLOCK):
        at = begin + lanes
        gap, _kept = _dropped(coefficient_ptr, entropy_coefficient_ptr, at, count)
        gap = tl.where(at < number, gap, 0)
        place = seen + tl.cumsum(gap, 0) - 1
        late = tl.load(order_ptr + (number + place), mask=gap != 0, other=0)
        tl.store(order_ptr + at, tl.where(gap != 0, late, at.to(tl.int64)), mask=at < number)
        tl.store(gap_ptr + place, at, mask=gap != 0)
        seen += tl.sum(gap, 0)


@triton.jit
def _move_kernel(gradient_ptr, order_ptr, gap_ptr, number_ptr, stride, vocabulary, BLOCK: tl.constexpr):
    """Rows of the gradient into the gaps before them. How many there are is known on the device only."""
    kept = tl.load(number_ptr)
    gaps = tl.load(number_ptr + 1)
    lanes = tl.arange(0, BLOCK)
    for at in range(tl.program_id(0), gaps, tl.num_programs(0)):
        late = gradient_ptr + tl.load(order_ptr + kept + at) * stride
        gap = gradient_ptr + tl.load(gap_ptr + at).to(tl.int64) * stride
        for begin in range(0, vocabulary, BLOCK):
            inside = lanes < vocabulary - begin
            x = tl.load(late + (begin + lanes), mask=inside, eviction_policy="evict_first")
            tl.store(gap + (begin + lanes), x, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(tensor_ptr, upstream_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(upstream_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(tensor_ptr + at, mask=at < count).to(tl.float32)
            tl.store(tensor_ptr + at, (x * factor).to(tensor_ptr.dtype.element_ty), mask=at < count)


# A thread holds four 16-byte loads of a block, so that 32 KiB a multiprocessor are on their way; these take nearly all
# of 128 registers, so that a multiprocessor has 16 warps: in as many programs as hold their rows in 30 of an H200's
# 50 MB of second-level cache, which is where the gradient finds them.
_WARPS = 16
_ROW_BYTES = {1: 14_000, 2: 28_000, 4: 56_000, 8: 113_000}  # by warps of a program; longer rows get all 16
_MOVE_WARPS = 8  # two loads a thread, four programs a multiprocessor


def launch_shape(
    vocabulary: int, dtype: torch.dtype, softcap: bool = False, device: torch.device | None = None
) -> RowLaunch:
    """How the row kernel runs on rows of logits: as measured on this device where somebody did, else by a rule.
    "BLOCK,WARPS,RESIDENCY" in STABLE_RLHF_TRITON_CONFIG fixes it.

    Short rows get no more threads than there is work for; a softcap needs the registers of half a block.
    """
    fixed = os.environ.get("STABLE_RLHF_TRITON_CONFIG")
    if fixed:
        return RowLaunch(*(int(part) for part in fixed.split(",")))
    if device is not None and not softcap and (measured := row_launch(device, vocabulary, dtype)) is not None:
        return measured
    bytes_of_row = vocabulary * dtype.itemsize
    per_thread = (32 if softcap else 64) // dtype.itemsize
    warps = next((warps for warps, most in _ROW_BYTES.items() if bytes_of_row <= most), _WARPS)
    return RowLaunch(warps * 32 * per_thread, warps, _WARPS // warps)


def block_of(shape: RowLaunch, dtype: torch.dtype, aligned: bool) -> int:
    """The block of rows that begin anywhere is at most half as large: single logits take more registers to address."""
    return shape.block if aligned else min(shape.block, shape.warps * 32 * 32 // dtype.itemsize)


def registers_of(shape: RowLaunch, whole_block: bool) -> int | None:
    """The most registers a thread, so that as many programs as wanted fit a multiprocessor. A whole block takes all
    that one program can have; with a smaller one the compiler makes room for two programs, and spills, unless told."""
    if shape.residency == 1 and whole_block:
        return None
    return min(255, 65536 // (32 * shape.warps * shape.residency))


def _float32(x: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def _next_float32(x: float, up: bool) -> float:
    """The float32 number beside x, which is one and not 0."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return float(struct.unpack("<f", struct.pack("<i", bits + (1 if (x > 0.0) == up else -1)))[0])


@functools.cache
def _log_edge(edge: float, side: int) -> float:
    """The largest float32 x for which exp(side x), rounded to float32 as the reference compares it, is not beyond the
    edge: above it for side 1, below it for side -1."""
    edge = _float32(edge)
    if edge in (0.0, math.inf):
        return math.inf
    x = side * math.log((edge + _next_float32(edge, side > 0)) / 2.0)
    rounded = _float32(x)
    return _next_float32(rounded, False) if rounded > x else rounded


def _launch(
    logits: Tensor,
    gradient: Tensor | None,
    state: RowState,
    softcap: float | None,
    *,
    statistics: bool,
    entropy: bool = False,
    leave_out: bool = False,
    row: Tensor | None = None,
    weighted: Tensor | None = None,
    target_logit: Tensor | None = None,
    kind: Tensor | None = None,
    terms: Terms | None = None,
    config: PolicyLossConfig = DEFAULT,
) -> None:
    """Runs the row kernel: statistics if asked for, coefficients with `terms`, gradient if given."""
    count = state.target.numel()
    for matrix in (logits, logits if gradient is None else gradient):
        assert matrix.stride(1) == 1 or matrix.shape[1] == 1  # one column may have any stride
    if count == 0:
        return
    optional: dict[str, Tensor | None] = {
        "row": row, "weighted": weighted, "target_logit": target_logit, "kind": kind
    }  # fmt: skip
    for field in fields(Terms):
        optional[field.name] = getattr(terms, field.name, None)
    shape = launch_shape(logits.shape[1], logits.dtype, bool(softcap), logits.device)
    lanes = 16 // logits.dtype.itemsize
    rows = [x for x in (logits, gradient) if x is not None]
    aligned = all(x.stride(0) % lanes == 0 and x.storage_offset() % lanes == 0 for x in rows)
    unit = lanes if aligned else 1
    with torch.cuda.device_of(logits):
        row_kernel[(min(count, programs(logits.device, shape.residency)),)](
            logits_ptr=logits,
            gradient_ptr=logits if gradient is None else gradient,
            **{f"{name}_ptr": state.target if x is None else x.contiguous() for name, x in optional.items()},
            **{f"{field.name}_ptr": getattr(state, field.name) for field in fields(state)},
            logits_stride=logits.stride(0) // unit,
            gradient_stride=0 if gradient is None else gradient.stride(0) // unit,
            count=count,
            vocabulary=logits.shape[1],
            softcap=float(softcap or 0.0),
            log_low=-_log_edge(1.0 - config.clip_low, -1),
            log_high=_log_edge(1.0 + config.clip_high, 1),
            log_dual=_log_edge(config.dual_clip or math.inf, 1),
            clamp=config.log_ratio_clamp,
            kl_coef=float(config.kl_coef),
            entropy_coef=float(config.entropy_coef),
            rehearsal_coef=float(config.rehearsal_coef),
            kl_clamp=config.kl_clamp or math.inf,
            kl_ratio_max=config.kl_ratio_max or math.inf,
            STATISTICS=statistics,
            TERMS=terms is not None,
            GRADIENT=gradient is not None,
            LEAVE_OUT=leave_out,
            HAS_ROW=row is not None,
            HAS_WEIGHTED=weighted is not None,
            HAS_TARGET_LOGIT=target_logit is not None,
            HAS_OLD_LOGPROB=optional["old_logprob"] is not None,
            HAS_ROW_WEIGHT=optional["row_weight"] is not None,
            SOFTCAP=bool(softcap),
            OBJECTIVE=OBJECTIVES.index(config.objective),
            KL=kl_number(config),
            KL_APART=config.kl_apart,
            KL_UNBIASED=config.kl_unbiased,
            KL_CLAMPED=config.kl_clamp is not None,
            HAS_ENTROPY_DENOMINATOR=optional["entropy_denominator"] is not None,
            ENTROPY=entropy,
            ALIGNED=aligned,
            BLOCK=block_of(shape, logits.dtype, aligned),
            LANES=lanes,
            num_warps=shape.warps,
            maxnreg=registers_of(shape, aligned and not softcap),
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
    _launch(logits, None, state, softcap, statistics=True, row=row, weighted=weighted, target_logit=target_logit)


def close_gaps(gradient: Tensor, state: RowState) -> Tensor | None:
    """Moves gradient rows into the places of those that have none; says which of the rows each of the first now is, or
    None: all of them are kept.

    The first kept rows stay at their places, later ones fill the gaps. The device is asked for their number once, after
    everything that it has to do here is queued.
    """
    count, device = state.target.numel(), gradient.device
    order = torch.empty(count, dtype=torch.int64, device=device)
    gap = torch.empty(count, dtype=torch.int32, device=device)
    numbers = torch.empty(2, dtype=torch.int32, device=device)
    block, warps = (1024, 4) if count <= 1024 else (4096, 16)  # few steps: each waits for memory and for all threads
    with torch.cuda.device_of(gradient):
        _order_kernel[(1,)](
            state.coefficient, state.entropy_coefficient, order, gap, numbers, count, BLOCK=block, num_warps=warps
        )
        on_host, arrived = numbers, None
        if gradient.is_cuda:
            on_host = torch.empty(2, dtype=torch.int32, device="cpu", pin_memory=True)
            on_host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        _move_kernel[(min(count, programs(device, 4)),)](
            gradient, order, gap, numbers, gradient.stride(0), gradient.shape[1],
            BLOCK=_MOVE_WARPS * 32 * 32 // gradient.element_size(), num_warps=_MOVE_WARPS,
        )  # fmt: skip
        if arrived is not None:
            arrived.synchronize()
    kept = int(on_host[0])
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
            capture, nor with a KL or entropy term or another objective, which leave hardly a row without gradient.

    Returns:
        which of the rows each gradient row belongs to, or None: all of them in order.
    """
    entropy = config.entropy_coef != 0.0
    compact = compact and state.target.numel() > 0 and row is None and config.kl_coef == 0.0 and not entropy
    compact = compact and config.objective == "ppo" and not capturing(logits)
    _launch(
        logits, gradient, state, config.softcap, statistics=True, entropy=entropy, leave_out=compact, row=row,
        kind=kind, terms=terms, config=config,
    )  # fmt: skip
    return close_gaps(gradient, state) if compact else None


def given(
    logits: Tensor, gradient: Tensor, state: RowState, softcap: float | None, *, row: Tensor | None = None
) -> None:
    """The gradient for the coefficients, max, log_sum and entropy in `state`; a row without coefficients gets zeros."""
    _launch(logits, gradient, state, softcap, statistics=False, entropy=True, row=row)


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
