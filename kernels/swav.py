"""Triton kernels of SwAV on the scores of two views, cosines of rows and prototypes [2, rows, prototypes] float32.

A program holds whole rows, a few at a time, in registers. Sums over rows leave a program as one number for each
prototype (or one for the loss) and are added in the order of the programs, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements of a program's tile


@triton.jit
def _tile(scores_ptr, view, first, rows, prototypes, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers [ROWS, WIDTH] to the rows of a view from `first` on, and where there is something behind them."""
    row, k = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    # Where the tile begins may be far; places within are near, and cost half the registers.
    start = scores_ptr + (view * rows + first) * prototypes
    return start + (row * prototypes + k), (row < rows - first) & (k < prototypes)


@triton.jit
def _softened(score, potential_ptr, view, k, prototypes, inverse_epsilon, HAS_POTENTIAL: tl.constexpr):
    """score / epsilon + v, minus infinity in the padding; its largest by row, and the sum of exp(z - largest)."""
    z = score * inverse_epsilon
    if HAS_POTENTIAL:
        z += tl.load(potential_ptr + view * prototypes + k, mask=k < prototypes, other=0.0)[None, :]
    z = tl.where((k < prototypes)[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    e = tl.exp(z - top[:, None])
    return e, top, tl.sum(e, 1)


@triton.jit(do_not_specialize=["rows", "prototypes"])
def _log_sums_kernel(
    scores_ptr, potential_ptr, part_ptr, rows, prototypes, inverse_epsilon,
    HAS_POTENTIAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    k = tl.arange(0, WIDTH)
    place, there = _tile(scores_ptr, view, first, rows, prototypes, ROWS, WIDTH)
    score = tl.load(place, mask=there, other=0.0)
    x = score * inverse_epsilon
    if HAS_POTENTIAL:
        _e, top, total = _softened(score, potential_ptr, view, k, prototypes, inverse_epsilon, True)
        x -= (top + tl.log(total))[:, None]
    x = tl.where(there, x, float("-inf"))
    largest = tl.where(k < prototypes, tl.max(x, 0), 0.0)
    column = tl.sum(tl.exp(x - largest[None, :]), 0)
    part = (view * tl.num_programs(0) + tl.program_id(0)) * prototypes
    tl.store(part_ptr + part + k, largest + tl.log(column), mask=k < prototypes)


@triton.jit(do_not_specialize=["rows", "prototypes"])
def _loss_kernel(
    scores_ptr, potential_ptr, part_ptr, rows, prototypes, inverse_epsilon, inverse_temperature, slope,
    HAS_POTENTIAL: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    k = tl.arange(0, WIDTH)
    place_a, there = _tile(scores_ptr, 0, first, rows, prototypes, ROWS, WIDTH)
    place_b, _there = _tile(scores_ptr, 1, first, rows, prototypes, ROWS, WIDTH)
    score_a = tl.load(place_a, mask=there, other=0.0)
    score_b = tl.load(place_b, mask=there, other=0.0)
    code_a, _top, total = _softened(score_a, potential_ptr, 0, k, prototypes, inverse_epsilon, HAS_POTENTIAL)
    code_a = code_a / total[:, None]
    code_b, _top, total = _softened(score_b, potential_ptr, 1, k, prototypes, inverse_epsilon, HAS_POTENTIAL)
    code_b = code_b / total[:, None]
    # Each view predicts the code of the other. -log p = log(sum) + (largest - z): two terms that cannot cancel.
    e_a, top_a, sum_a = _softened(score_a, potential_ptr, 0, k, prototypes, inverse_temperature, False)
    e_b, top_b, sum_b = _softened(score_b, potential_ptr, 0, k, prototypes, inverse_temperature, False)
    apart = code_b * (top_a[:, None] - score_a * inverse_temperature)
    apart += code_a * (top_b[:, None] - score_b * inverse_temperature)
    loss = tl.sum(tl.where(there, apart, 0.0), 1) + tl.log(sum_a) + tl.log(sum_b)
    tl.store(part_ptr + tl.program_id(0), tl.sum(tl.where(tl.arange(0, ROWS) < rows - first, loss, 0.0), 0))
    if GRADIENT:
        tl.store(place_a, slope * (e_a / sum_a[:, None] - code_b), mask=there)
        tl.store(place_b, slope * (e_b / sum_b[:, None] - code_a), mask=there)


def launch_shape(prototypes: int) -> tuple[int, int, int]:
    """Rows of a program, width of its tile and warps: eight elements of a tile for each thread, up to 8,192."""
    width = max(16, triton.next_power_of_2(prototypes))
    return max(1, _TILE // width), width, min(max(4, width // 256), 32)


def log_sums(scores: Tensor, potential: Tensor | None, inverse_epsilon: float) -> Tensor:
    """[2, prototypes]: log of the sum over the rows of exp(score / epsilon + u), u making every row's code sum to 1."""
    views, rows, prototypes = scores.shape
    tall, width, warps = launch_shape(prototypes)
    programs = triton.cdiv(rows, tall)
    part = torch.empty(views, programs, prototypes, device=scores.device, dtype=torch.float32)
    if programs == 0:
        return part.new_full((views, prototypes), float("-inf"))
    with torch.cuda.device_of(scores):
        _log_sums_kernel[(programs, views)](
            scores, scores if potential is None else potential, part, rows, prototypes, inverse_epsilon,
            HAS_POTENTIAL=potential is not None, ROWS=tall, WIDTH=width, num_warps=warps,
        )  # fmt: skip
    return torch.logsumexp(part, 1)


def loss(
    scores: Tensor,
    potential: Tensor | None,
    inverse_epsilon: float,
    inverse_temperature: float,
    scale: float,
    gradient: bool,
) -> Tensor:
    """Sum over the rows of both cross-entropies, 0-d float64; with `gradient`, `scale` times its gradient takes the
    place of the scores."""
    _, rows, prototypes = scores.shape
    tall, width, warps = launch_shape(prototypes)
    programs = triton.cdiv(rows, tall)
    part = torch.empty(programs, device=scores.device, dtype=torch.float32)
    if programs > 0:
        with torch.cuda.device_of(scores):
            _loss_kernel[(programs,)](
                scores, scores if potential is None else potential, part, rows, prototypes, inverse_epsilon,
                inverse_temperature, scale * inverse_temperature, HAS_POTENTIAL=potential is not None,
                GRADIENT=gradient, ROWS=tall, WIDTH=width, num_warps=warps,
            )  # fmt: skip
    return part.sum(dtype=torch.float64)
