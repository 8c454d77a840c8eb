"""Triton kernels for log-probs and entropies straight from hidden states: the product with the head, whose tiles are
turned to softmax statistics while they are in registers, and the sum of a row's tiles. No logits are written.

As many programs as the device has multiprocessors share the tiles, in an order in which those that run at one time need
few blocks of either operand. A tile's logits meet in a tournament of halves, so that a row's maximum is never among the
exponentials that are summed: with its own 1 in it the sum would lose what a peaked row is about.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stable_rlhf.kernels.policy_call import Chosen, choose, note_statistics
from stable_rlhf.kernels.policy_rows import _FLOOR, _LOG2_E, _log1p, _ordered, _times
from stable_rlhf.kernels.tuning import programs, statistics_in_product
from stable_rlhf.ops.flags import Fault, note
from stable_rlhf.ops.policy.formula import RowState, check_statistics
from stable_rlhf.ops.policy.products import HeadProducts
from stable_rlhf.ops.policy.types import PolicyCall

ROWS, COLUMNS, INNER = 128, 256, 64  # of a tile, and of the blocks that its product takes in a step
WARPS, STAGES = 8, 4  # two warp groups; 48 KiB of blocks a stage
GROUP = 16  # blocks of rows that are gone through together, so that the weight is read once for each 2,048 rows
_JOINED_ROWS, _JOINED_TILES = 32, 64  # rows of a program that joins tiles, and how many tiles it reads at a time
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _halves(x):
    """The left and the right half of the columns [R, C], which lie in the same threads."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _rounded_pairs(z, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The even and the odd columns, rounded to DTYPE."""
    if DTYPE == tl.bfloat16 and ASSEMBLY:  # noqa: SIM300
        # Left to itself the compiler takes every rounded half out of its register before it widens it.
        z = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r", [z], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif DTYPE != tl.float32:  # noqa: SIM300
        z = z.to(DTYPE).to(tl.float32)
    even, odd = tl.split(tl.reshape(z, (z.shape[0], z.shape[1] // 2, 2)))
    return even, odd


@triton.jit
def _add_8(x, top, power, rest, weighted):
    """Exponentials of x [R, 8], and their products with the distance from the top, added to sums [R, 8]."""
    d = x - top
    e = tl.exp2(d * power)
    return rest + e, tl.fma(e, d, weighted)


@triton.jit
def _add_16(x, top, power, rest, weighted):
    a, b = _halves(x)
    rest, weighted = _add_8(a, top, power, rest, weighted)
    return _add_8(b, top, power, rest, weighted)


@triton.jit
def _add_32(x, top, power, rest, weighted):
    a, b = _halves(x)
    rest, weighted = _add_16(a, top, power, rest, weighted)
    return _add_16(b, top, power, rest, weighted)


@triton.jit
def _add_64(x, top, power, rest, weighted):
    a, b = _halves(x)
    rest, weighted = _add_32(a, top, power, rest, weighted)
    return _add_32(b, top, power, rest, weighted)


@triton.jit
def _add_128(x, top, power, rest, weighted):
    a, b = _halves(x)
    rest, weighted = _add_64(a, top, power, rest, weighted)
    return _add_64(b, top, power, rest, weighted)


@triton.jit
def _finish(
    z, row, column, column_block, target_ptr, inverse_temperature_ptr, top_ptr, rest_ptr, weighted_ptr,
    target_logit_ptr, count, room, vocabulary, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The statistics of a tile, whose logits are z."""
    ROWS: tl.constexpr = z.shape[0]
    COLUMNS: tl.constexpr = z.shape[1]
    rows = row + tl.arange(0, ROWS)
    inside = rows < count
    target = tl.load(target_ptr + rows, mask=inside, other=-1)
    power = tl.load(inverse_temperature_ptr + rows, mask=inside, other=1.0) * _LOG2_E
    even, odd = _rounded_pairs(z, DTYPE, ASSEMBLY)
    places = 2 * tl.arange(0, COLUMNS // 2)
    if column + COLUMNS > vocabulary:
        even = tl.where(column + places[None, :] < vocabulary, even, _FLOOR)
        odd = tl.where(column + places[None, :] + 1 < vocabulary, odd, _FLOOR)
    ours = (target >= column) & (target < column + COLUMNS) & (target < vocabulary)
    if tl.max(ours.to(tl.int32), 0) > 0:
        apart = places[None, :] - (target - column).to(tl.int32)[:, None]
        found = tl.where(apart == 0, even, tl.where(apart == -1, odd, 0.0))
        tl.store(target_logit_ptr + rows, tl.sum(found, 1), mask=ours)

    left, out_128 = _ordered(even, odd)
    a, b = _halves(left)
    left, out_64 = _ordered(a, b)
    a, b = _halves(left)
    left, out_32 = _ordered(a, b)
    a, b = _halves(left)
    left, out_16 = _ordered(a, b)
    a, b = _halves(left)
    left, out_8 = _ordered(a, b)
    top = tl.max(left, 1)
    wide_top = tl.broadcast_to(top[:, None], (ROWS, 8))
    wide_power = tl.broadcast_to(power[:, None], (ROWS, 8))
    d = left - wide_top
    largest = d == 0.0
    e = tl.exp2(d * wide_power)
    rest = tl.where(largest, 0.0, e)
    weighted = e * d
    rest, weighted = _add_128(out_128, wide_top, wide_power, rest, weighted)
    rest, weighted = _add_64(out_64, wide_top, wide_power, rest, weighted)
    rest, weighted = _add_32(out_32, wide_top, wide_power, rest, weighted)
    rest, weighted = _add_16(out_16, wide_top, wide_power, rest, weighted)
    rest, weighted = _add_8(out_8, wide_top, wide_power, rest, weighted)
    number = tl.sum(largest.to(tl.float32), 1)
    place = tl.cast(column_block, tl.int64) * room + rows
    tl.store(top_ptr + place, top, mask=inside)
    tl.store(rest_ptr + place, tl.sum(rest, 1) + (number - 1.0), mask=inside)
    tl.store(weighted_ptr + place, tl.sum(weighted, 1), mask=inside)


@triton.jit(do_not_specialize=["room"])
def head_kernel(
    hidden, weight, target_ptr, inverse_temperature_ptr, top_ptr, rest_ptr, weighted_ptr, target_logit_ptr,
    count_ptr, room, vocabulary, width, COUNTED: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Of each tile's rows the maximum, the sum of exp(z - max) less the 1 of the maximum, and the sum of the same times
    z - max, [tiles of a row, room]; and the target's logit. COUNTED: the first rows alone are there, as many as the
    device has counted. Logits are rounded to DTYPE, as those of the loss are."""
    count = room
    if COUNTED:
        count = tl.load(count_ptr).to(tl.int32)
    row_blocks = tl.cdiv(count, ROWS)
    column_blocks = tl.cdiv(vocabulary, COLUMNS)
    steps = tl.cdiv(width, INNER)
    tl.assume(steps > 0)
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
        group = tile // (GROUP * column_blocks) * GROUP
        members = tl.minimum(row_blocks - group, GROUP)
        within = tile % (GROUP * column_blocks)
        row = (group + within % members) * ROWS
        column_block = within // members
        column = column_block * COLUMNS
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, steps):
            a = hidden.load([row, step * INNER])
            b = weight.load([column, step * INNER])
            z = tl.dot(a, b.T, z)
        _finish(
            z, row, column, column_block, target_ptr, inverse_temperature_ptr, top_ptr, rest_ptr,
            weighted_ptr, target_logit_ptr, count, room, vocabulary, DTYPE, ASSEMBLY,
        )  # fmt: skip


@triton.jit
def _merged(top, rest, weighted, other_top, other_rest, other_weighted, power):
    """Two sets of statistics as one: the larger maximum, and the others relative to it."""
    first = top >= other_top
    step = tl.where(first, other_top - top, top - other_top)
    factor = tl.exp2(step * power)
    own, others = tl.where(first, rest, other_rest), tl.where(first, other_rest, rest)
    own_weighted = tl.where(first, weighted, other_weighted)
    others_weighted = tl.where(first, other_weighted, weighted)
    rest = own + (1.0 + others) * factor
    weighted = own_weighted + (others_weighted + (1.0 + others) * step) * factor
    return tl.where(first, top, other_top), rest, weighted


@triton.jit(do_not_specialize=["room"])
def join_kernel(
    top_ptr, rest_ptr, weighted_ptr, target_logit_ptr, target_ptr, inverse_temperature_ptr, logprob_ptr, entropy_ptr,
    max_ptr, log_sum_ptr, count_ptr, index_ptr, room, tiles, vocabulary, COUNTED: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """What the row kernel makes of a row of logits, from the statistics of its tiles. COUNTED: for the first rows
    alone, each to the place that the index gives it."""
    count = room
    if COUNTED:
        count = tl.load(count_ptr).to(tl.int32)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    scale = tl.load(inverse_temperature_ptr + rows, mask=inside, other=1.0)
    target = tl.load(target_ptr + rows, mask=inside, other=-1)
    known = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(target_logit_ptr + rows, mask=inside & known, other=0.0)
    power = (scale * _LOG2_E)[None, :]
    top_lane = tl.full((TILES, ROWS), _FLOOR, tl.float32)
    rest_lane = tl.zeros((TILES, ROWS), tl.float32)
    weighted_lane = tl.zeros((TILES, ROWS), tl.float32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        there = (tile < tiles)[:, None] & inside[None, :]
        place = tile.to(tl.int64)[:, None] * room + rows[None, :]
        top = tl.load(top_ptr + place, mask=there, other=_FLOOR)
        rest = tl.load(rest_ptr + place, mask=there, other=0.0)
        weighted = tl.load(weighted_ptr + place, mask=there, other=0.0)
        top_lane, rest_lane, weighted_lane = _merged(top_lane, rest_lane, weighted_lane, top, rest, weighted, power)
    top = tl.max(top_lane, 0)
    # No logit above the floor, or none that is a number: nothing of the row is.
    top = tl.where(top > _FLOOR, top, float("nan"))
    step = top_lane - top[None, :]
    factor = tl.exp2(step * power)
    largest = step == 0.0
    number = tl.sum(largest.to(tl.float32), 0)
    others = tl.where(largest, 0.0, 1.0) + rest_lane
    rest = tl.sum(others * factor, 0) + (number - 1.0)
    moment = tl.sum(weighted_lane * factor + ((1.0 + rest_lane) * factor) * step, 0)
    log_sum = _log1p(rest)
    logprob = (target_logit - top) * scale - log_sum
    to = rows.to(tl.int64)
    if COUNTED:
        to = tl.load(index_ptr + rows, mask=inside, other=0)
    tl.store(logprob_ptr + to, tl.where(known, logprob, 0.0), mask=inside)
    tl.store(entropy_ptr + to, log_sum - moment * scale / (1.0 + rest), mask=inside)
    tl.store(max_ptr + to, _times(top, scale), mask=inside)
    tl.store(log_sum_ptr + to, log_sum, mask=inside)


def takes(call: PolicyCall) -> bool:
    """Whether statistics can be, and should be, made in the product: 16-bit operands that the device's copy engine can
    read, no bias and no softcap, for which there are no registers, and a Hopper GPU (on other kinds there are none for
    the statistics either) on which nobody measured that the library's product with a kernel behind it is faster."""
    weight = call.weight
    if weight is None or call.bias is not None or call.config.softcap or call.group or call.source.numel() == 0:
        return False
    if weight.dtype.itemsize != 2 or weight.shape[1] % 8 or not _readable(weight):
        return False
    if weight.device.type != "cuda":  # interpreted: bfloat16 would be multiplied as if its bits were whole numbers
        return weight.dtype == torch.float16
    hopper = torch.cuda.get_device_capability(weight.device)[0] == 9
    return hopper and statistics_in_product(weight.device, weight.shape[1])


def _readable(x: Tensor) -> bool:
    """By descriptors: rows without gaps between their elements, which begin at multiples of 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def statistics(
    hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype, state: RowState,
    chosen: Chosen | None = None,
) -> None:  # fmt: skip
    """Fills logprob, entropy, max and log_sum of rows `hidden` [A, H] under the head `weight` [V, H], whose
    logits are rounded to `logits_dtype`. Takes 12 bytes for every 256 logits beside its results.

    `chosen`: of these rows the first alone are there, as many as the device has counted, and their results go to the
    places of its index.
    """
    room, (vocabulary, width) = hidden.shape[0], weight.shape
    if room == 0:
        return
    if not _readable(hidden):  # a copy where it counts as contiguous too: it may begin anywhere
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    tiles = triton.cdiv(vocabulary, COLUMNS)
    made = torch.empty(3 * tiles + 1, room, dtype=torch.float32, device=hidden.device)
    top, rest, weighted, target_logit = made.split([tiles, tiles, tiles, 1])
    counts, index = (state.target, state.target) if chosen is None else (chosen.counts, chosen.index)
    with torch.cuda.device_of(hidden):
        head_kernel[(min(triton.cdiv(room, ROWS) * tiles, programs(hidden.device, 1)),)](
            TensorDescriptor.from_tensor(hidden, [ROWS, INNER]), TensorDescriptor.from_tensor(weight, [COLUMNS, INNER]),
            state.target, state.inverse_temperature, top, rest, weighted,
            target_logit, counts, room, vocabulary, width, COUNTED=chosen is not None,
            DTYPE=_TYPES[logits_dtype], ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER, GROUP=GROUP,
            ASSEMBLY=not triton.knobs.runtime.interpret, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        join_kernel[(triton.cdiv(room, _JOINED_ROWS),)](
            top, rest, weighted, target_logit, state.target, state.inverse_temperature, state.logprob, state.entropy,
            state.max, state.log_sum, counts, index, room, tiles, vocabulary, COUNTED=chosen is not None,
            ROWS=_JOINED_ROWS, TILES=_JOINED_TILES, num_warps=4,
        )  # fmt: skip


def logprobs(call: PolicyCall) -> RowState:
    """The statistics of every row of a call, 0 where it is not active. Which rows are active the device knows, and the
    host reads it when all work is queued; under graph capture, and where `active_rows` was given, it does not."""
    assert call.weight is not None
    vocabulary = call.weight.shape[0]
    chosen = choose(call, vocabulary, index=True)
    rows = chosen.unread(call)
    inverse_temperature = rows.inverse_temperature()
    results = (torch.zeros_like(inverse_temperature) for _ in range(6))  # one memory each: some are returned
    state = RowState(chosen.target, inverse_temperature, *results)
    products = HeadProducts(rows.gather(call.source), call.weight, None, call.logits_dtype)
    statistics(products.hidden, products.weight, products.logits_dtype, state, chosen)
    note_statistics(state)
    if not chosen.late:
        chosen.read(call, vocabulary)
    elif call.active_rows is not None:
        note(Fault.ACTIVE_ROWS, chosen.counts[0] != call.active_rows)
    check_statistics(state.logprob, state.entropy, replace(rows, index=None), call.origin)
    return state
