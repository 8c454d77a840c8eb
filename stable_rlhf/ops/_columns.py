"""Bounded-error column selection: which columns of a chunk's logits gradient the backward products need.

A trained policy's softmax is peaked, so most of the vocabulary's columns of a chunk hold next to nothing. With a
tolerance tau a column is left out of both backward products where, for every row that takes part,

    sum over the dropped columns of |gradient|  <=  tau |c| / temperature,

c being the row's loss coefficient: without softcap and entropy bonus, that is at most tau of the row's probability. The
targets' columns always stay. A few candidate thresholds on a column's largest share are tried at once, and the one with
the least work is taken; rows that break the bound under it go through the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stable_rlhf.ops.backends import cpu_isa, extension

CHUNK_ROWS = 256  # fewer rows keep fewer columns, more rows make better products
_STEPS = (1.0, 2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-10)  # thresholds, in units of the tolerance
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Selection:
    """Of some gradient rows, `bounded` go through `columns` only, `dense` through all; all three are indices."""

    columns: Tensor
    bounded: Tensor
    dense: Tensor


def select_columns(gradient: Tensor, rows: Tensor, scale: Tensor, target: Tensor, tolerance: float) -> Selection:
    """What the backward products need of some `rows` [m] of `gradient` [n, V]: everything, where dropping saves little.

    Args:
        scale: [m] |c| / temperature of each row.
        target: [m] the row's target; outside [0, V): it lies in another slice of the vocabulary.
    """
    count, vocabulary = rows.numel(), gradient.shape[1]
    thresholds = torch.tensor([tolerance * step for step in _STEPS], device=gradient.device, dtype=torch.float32)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0).float().contiguous()
    peaks = _peaks(gradient, rows, inverse)
    here = target[(target >= 0) & (target < vocabulary)]
    peaks[here] = torch.inf
    holds = (_masses(gradient, rows, inverse, peaks, thresholds) <= tolerance) & (scale > 0)[:, None]  # [m, thresholds]
    kept = (peaks[:, None] >= thresholds).sum(0)  # [thresholds]
    bounded = holds.sum(0)
    work = kept * bounded + vocabulary * (count - bounded)
    best = int(work.argmin())
    if int(work[best]) > 0.9 * count * vocabulary:
        return Selection(rows[:0], rows[:0], rows)
    fine = holds[:, best]
    return Selection(torch.nonzero(peaks >= thresholds[best]).squeeze(1), rows[fine], rows[~fine])


def _native(gradient: Tensor) -> bool:
    return gradient.device.type == "cpu" and extension() is not None and gradient.dtype in _TYPES


def _peaks(gradient: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Largest share of each column [V] float32."""
    if not _native(gradient):
        return (gradient[rows].float().abs() * inverse[:, None]).amax(0)
    peaks = torch.empty(gradient.shape[1], dtype=torch.float32, device="cpu")
    _call(gradient, rows, inverse, None, peaks, None)
    return peaks


def _masses(gradient: Tensor, rows: Tensor, inverse: Tensor, peaks: Tensor, thresholds: Tensor) -> Tensor:
    """Share of each row in the columns below each threshold: [m, thresholds] float32."""
    if not _native(gradient):
        below = (peaks[:, None] < thresholds).float()  # [V, thresholds]
        return (gradient[rows].float().abs() @ below) * inverse[:, None]
    masses = torch.empty(rows.numel(), thresholds.numel(), dtype=torch.float32, device="cpu")
    _call(gradient, rows, inverse, thresholds, peaks, masses)
    return masses


def _call(
    gradient: Tensor, rows: Tensor, inverse: Tensor, thresholds: Tensor | None, peaks: Tensor, masses: Tensor | None
) -> None:
    module = extension()
    assert module is not None
    module.select_columns(
        _TYPES[gradient.dtype], gradient.data_ptr(), rows.data_ptr(), gradient.stride(0), rows.numel(),
        gradient.shape[1], inverse.data_ptr(),
        0 if thresholds is None else thresholds.data_ptr(), 0 if thresholds is None else thresholds.numel(),
        peaks.data_ptr(), 0 if masses is None else masses.data_ptr(), torch.get_num_threads(), cpu_isa(),
    )  # fmt: skip


def gather_columns(gradient: Tensor, selection: Selection) -> Tensor:
    """The bounded rows' kept columns, [bounded, columns] contiguous."""
    if not _native(gradient):
        return gradient.index_select(0, selection.bounded).index_select(1, selection.columns)
    module = extension()
    assert module is not None
    out = torch.empty(selection.bounded.numel(), selection.columns.numel(), dtype=gradient.dtype, device="cpu")
    module.gather_columns(
        gradient.data_ptr(), gradient.stride(0), gradient.element_size(), selection.bounded.data_ptr(),
        selection.bounded.numel(), selection.columns.data_ptr(), selection.columns.numel(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
