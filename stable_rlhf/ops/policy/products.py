"""The matrix products of a head, chunk by chunk, and the buffer that their logits pass through."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.ops.backends import cpu_isa, extension
from stable_rlhf.ops.memory import fresh, workspace
from stable_rlhf.ops.policy.types import LOGITS_TYPES
from stable_rlhf.ops.policy.wide_products import (
    SLICE_BYTES,
    add_product,
    narrow_in_place,
    narrow_sum,
    takes_places,
    writes_float32,
)

# Values of ONEDNN_MAX_CPU_ISA under which oneDNN, which makes the 16-bit products, has no instructions for them. What
# it does not know it ignores.
_ONEDNN_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_ONEDNN_WITHOUT_FLOAT16 = _ONEDNN_WITHOUT_BFLOAT16 | {
    "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512", "AVX10_1_512_AMX",
}  # fmt: skip

CHUNK_ROWS = 256  # fewer rows keep fewer columns, more rows make better products
_STEPS = tuple(2.0**-step for step in range(3, 11))  # thresholds, in units of the tolerance


def has_native_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of `dtype` in hardware. A CPU that does not, emulates 16-bit products 5 to
    40 times slower than it makes float32 ones; so does one whose oneDNN was told to do without these instructions."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if dtype == torch.bfloat16:
        instructions = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return instructions and limit not in _ONEDNN_WITHOUT_BFLOAT16
    return torch.cpu._is_amx_fp16_supported() and limit not in _ONEDNN_WITHOUT_FLOAT16


@dataclass(frozen=True)
class _Part:
    """What gradient rows [n, columns] and their hidden states [n, H], of one type, add to the weight's gradient."""

    gradient: Tensor
    hidden: Tensor
    columns: Tensor | None  # places in the vocabulary, ascending; None: all of it

    def add_to(self, total: Tensor, rows: slice) -> None:
        """Adds those `rows` of the weight's gradient that `total` holds, in float32."""
        if self.columns is None:
            add_product(self.gradient[:, rows].t(), self.hidden, total, fresh=False)
            return
        ends = torch.tensor([rows.start, rows.stop], dtype=torch.int64, device=self.columns.device)
        begin, end = torch.searchsorted(self.columns, ends).tolist()
        ours, places = self.gradient[:, begin:end], self.columns[begin:end] - rows.start
        add_product(ours.t(), self.hidden, total, fresh=False, places=places)


class HeadProducts:
    """logits = x W^T + b, and the gradients of x, W and b from those of the logits, over chunks of rows.

    Args:
        hidden: [A, H], the active rows.
        weight: [V, H] of the same type.
        bias: [V] or None.
        logits_dtype: float32 for logits that are not rounded to 16 bits; None: the inputs' type.
        needs: which gradients to make: of hidden, weight, bias.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits_dtype: torch.dtype | None,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.dtype, self.on_cpu = hidden.dtype, hidden.device.type == "cpu"
        half = self.dtype.itemsize == 2
        native = has_native_products(self.dtype, hidden.device)
        wide = half and (not native or logits_dtype == torch.float32)
        # Products that write float32 from 16-bit operands; a CPU without them multiplies float32 copies, by slices of
        # the weight.
        self.sliced = wide and self.on_cpu and not (native and writes_float32(self.dtype))
        self.logits_dtype = torch.float32 if wide else self.dtype
        self.gradient_dtype = self.logits_dtype if self.sliced else self.dtype
        self.needs = needs
        self.hidden_grad: Tensor | None = None
        if needs[0]:
            self.hidden_grad = fresh(torch.empty_like(hidden, memory_format=torch.contiguous_format))
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._parts: list[_Part] = []

    @property
    def bytes_per_logit(self) -> int:
        apart = self.gradient_dtype != self.logits_dtype and any(self.needs) and not self.on_cpu
        return self.logits_dtype.itemsize + (self.gradient_dtype.itemsize if apart else 0)

    def buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Room for a chunk's logits and for their gradient; the same memory where the types are the same, and on a CPU,
        whose kernel goes through a row from its beginning. A GPU's rows begin at multiples of 8 elements, 16 bytes in
        a type of 16 bits: its kernels read and write so many at once."""
        vocabulary, device = self.weight.shape[0], self.hidden.device
        width = vocabulary if self.on_cpu else -(-vocabulary // 8) * 8
        logits = workspace(rows, width, self.logits_dtype, device)[:, :vocabulary]
        if self.gradient_dtype == self.logits_dtype or not any(self.needs):
            return logits, logits
        if self.on_cpu:
            return logits, logits.view(self.gradient_dtype)[:, :vocabulary]
        return logits, torch.empty(rows, width, dtype=self.gradient_dtype, device=device)[:, :vocabulary]

    def keep_hidden_wide(self) -> None:
        """Leaves the hidden gradient in float32, for a sum with those of other slices of the vocabulary."""
        if self.hidden_grad is not None:
            self.hidden_grad = fresh(torch.empty_like(self.hidden_grad, dtype=torch.float32))

    def _slices(self) -> list[slice]:
        vocabulary, width = self.weight.shape
        step = max(1, SLICE_BYTES // (4 * width))
        return [slice(begin, min(begin + step, vocabulary)) for begin in range(0, vocabulary, step)]

    def _scratch(self, rows: slice) -> Tensor:
        """Float32 room for rows of the weight or of its gradient; the same memory every time."""
        return workspace(rows.stop - rows.start, self.weight.shape[1], torch.float32, self.weight.device, "slice")

    def _wide(self, rows: slice) -> Tensor:
        """Rows of the weight in float32, until the next call."""
        return self._scratch(rows).copy_(self.weight[rows])

    def logits(self, part: slice, out: Tensor) -> None:
        """The logits of some rows, written to `out`."""
        x = self.hidden[part]
        if self.sliced:
            x = x.float()
            for columns in self._slices():
                torch.mm(x, self._wide(columns).t(), out=out[:, columns])
            if self.bias is not None:
                out += self.bias
        elif out.dtype != x.dtype:
            if self.on_cpu:
                add_product(x, self.weight.t(), out, fresh=True)
            else:
                torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)
            if self.bias is not None:
                out += self.bias
        elif self.bias is not None:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        else:
            torch.mm(x, self.weight.t(), out=out)

    def backward(self, part: slice, gradient: Tensor, order: Tensor | None, last: bool) -> None:
        """Adds one chunk. `gradient` row j belongs to row `order[j]` of the chunk (None: row j), other rows have none;
        `last`: the only chunk, or the final one."""
        first = part.start == 0
        x = self.hidden[part]
        if order is not None:
            x = x.index_select(0, order)
        if self.needs[0]:
            self._add_hidden(part, gradient, order)
        if self.needs[1]:
            self._add_weight(x, gradient, first, last)
        if self.needs[2]:
            self.add_bias(gradient)

    def backward_columns(self, rows: Tensor, gradient: Tensor, selection: Selection) -> None:
        """Adds the selected gradient rows and columns; `rows` [m] are the places of all gradient rows in `hidden`.

        Rows that need every column wait until there are many of them, because a few cost nearly as much as many."""
        few = gather_columns(gradient, selection)  # [bounded, columns]
        wide = torch.float32 if self.sliced else self.dtype
        places = rows[selection.bounded]
        if self.needs[0]:
            assert self.hidden_grad is not None
            if not self.sliced and takes_places(self.dtype):
                product = torch.empty(len(places), self.weight.shape[1], dtype=torch.float32, device="cpu")
                add_product(few, self.weight, product, fresh=True, rows=selection.columns)
            else:
                kept = self.weight.index_select(0, selection.columns).to(wide)
                product = self._product(few, kept, self.hidden_grad.dtype)
            self.hidden_grad.index_copy_(0, places, product.to(self.hidden_grad.dtype))
        if self.needs[1]:
            self._add_part(_Part(few, self.hidden.index_select(0, places).to(wide), selection.columns))
        if selection.dense.numel():
            self._waiting.append((gradient.index_select(0, selection.dense), rows[selection.dense]))
            if sum(len(places) for _, places in self._waiting) >= CHUNK_ROWS:
                self.backward_waiting()

    def backward_waiting(self) -> None:
        """Adds the rows that wait for the whole vocabulary."""
        if not self._waiting:
            return
        gradient, places = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        if self.needs[0]:
            assert self.hidden_grad is not None
            product = self._through_weight(gradient, self.hidden_grad.dtype)
            self.hidden_grad.index_copy_(0, places, product.to(self.hidden_grad.dtype))
        if self.needs[1]:
            self._add_part(_Part(gradient, self.hidden.index_select(0, places).to(gradient.dtype), None))

    def _add_part(self, part: _Part) -> None:
        """Adds a part of the weight's gradient. In a type of 16 bits parts are kept, up to the size of the weight: if
        they are all there is, their sum in float32 is made a slice at a time, and never exists whole."""
        self._parts.append(part)
        size = sum(each.gradient.numel() for each in self._parts)
        if self.dtype.itemsize == 2 and self.weight_grad is None and size <= self.weight.numel():
            return
        total, everything = self._weight_sum(), slice(0, self.weight.shape[0])
        for each in self._parts:
            each.add_to(total, everything)
        self._parts = []

    def _sum_parts(self) -> None:
        """The weight's gradient where parts of it were kept."""
        if not self._parts:
            return
        self.weight_grad = self._new_weight_grad(self.dtype)
        if not self.sliced and takes_places(self.dtype):
            narrow_sum([(part.gradient, part.hidden, part.columns) for part in self._parts], self.weight_grad)
            self._parts = []
            return
        for rows in self._slices():
            total = self._scratch(rows).zero_()
            for part in self._parts:
                part.add_to(total, rows)
            self.weight_grad[rows] = total
        self._parts = []

    def _new_weight_grad(self, dtype: torch.dtype) -> Tensor:
        return fresh(torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device))

    def _weight_sum(self) -> Tensor:
        """The weight's gradient so far, in float32."""
        if self.weight_grad is None:
            self.weight_grad = self._new_weight_grad(torch.float32).zero_()
        return self.weight_grad

    def _product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """a b, in float32 and unrounded where `dtype` is float32 or a GPU would else sum parts of it in 16 bits, which
        it does where few rows meet a large vocabulary; else in the type of a and b."""
        if a.dtype == torch.float32 or (self.on_cpu and dtype != torch.float32):
            return torch.mm(a, b)
        product = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
        add_product(a, b, product, fresh=True)
        return product

    def _through_weight(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """gradient W, in float32 where `dtype` is or the products are sliced."""
        if not self.sliced:
            return self._product(gradient, self.weight, dtype)
        product = torch.zeros(gradient.shape[0], self.weight.shape[1], dtype=torch.float32, device="cpu")
        for columns in self._slices():
            product.addmm_(gradient[:, columns], self._wide(columns))
        return product

    def add_bias(self, gradient: Tensor) -> None:
        """Adds a chunk's gradient rows to the bias's gradient."""
        column_sums = gradient.sum(0, dtype=torch.float32)
        self.bias_grad = column_sums if self.bias_grad is None else self.bias_grad.add_(column_sums)

    def _add_hidden(self, part: slice, gradient: Tensor, order: Tensor | None) -> None:
        assert self.hidden_grad is not None
        out = self.hidden_grad[part]
        if order is None and not self.sliced and (self.on_cpu or out.dtype == torch.float32):
            if out.dtype == gradient.dtype:
                torch.mm(gradient, self.weight, out=out)
            else:
                add_product(gradient, self.weight, out, fresh=True)
            return
        product = self._through_weight(gradient, out.dtype)
        if order is None:
            out.copy_(product)
        else:
            out.zero_().index_copy_(0, order, product.to(out.dtype))

    def _add_weight(self, x: Tensor, gradient: Tensor, first: bool, last: bool) -> None:
        if first and last and not self.sliced:
            self.weight_grad = torch.mm(gradient.t(), x, out=self._new_weight_grad(self.dtype))
            return
        # Sums over chunks are kept in float32, and of products that are not rounded to 16 bits either.
        if not self.sliced:
            if self.weight_grad is None:
                self.weight_grad = self._new_weight_grad(torch.float32)
            add_product(gradient.t(), x, self.weight_grad, fresh=first)
        else:
            x = x.float()
            if self.weight_grad is None:
                self.weight_grad = self._new_weight_grad(self.dtype if last else torch.float32)
            for rows in self._slices():
                total, ours = self.weight_grad[rows], gradient[:, rows].t()
                if total.dtype == torch.float32:  # in place: no fresh memory
                    add_product(ours, x, total, fresh=first)
                else:
                    total.copy_(torch.mm(ours, x, out=self._scratch(rows)))
        if last:
            self._narrow()

    def _narrow(self) -> None:
        """The weight's gradient in the weight's own type: once, when all chunks are in it."""
        if self.weight_grad is not None and self.weight_grad.dtype != self.dtype:
            narrow = self.weight_grad.to if self.on_cpu else functools.partial(narrow_in_place, self.weight_grad)
            self.weight_grad = narrow(self.dtype)

    def finish(self) -> None:
        """What is left after the last chunk: rows that wait, zeros where there was none, sums in their own type."""
        self.backward_waiting()
        self._sum_parts()
        self._narrow()
        if self.bias_grad is not None and self.bias is not None:
            self.bias_grad = self.bias_grad.to(self.bias.dtype)
        if self.needs[1] and self.weight_grad is None:
            self.weight_grad = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        if self.needs[2] and self.bias_grad is None:
            assert self.bias is not None
            self.bias_grad = torch.zeros_like(self.bias)


# -- bounded-error column selection: which columns of a chunk's logits gradient the backward products need -------------
#
# A trained policy's softmax is peaked, so most of the vocabulary's columns of a chunk hold next to nothing. With a
# tolerance tau a column is left out of both backward products where, for every row that takes part,
#
#     sum over the dropped columns of |gradient|  <=  tau |c| / temperature,
#
# c being the row's loss coefficient: without softcap and entropy bonus, that is at most tau of the row's probability.
# The targets' columns always stay. A few candidate thresholds on a column's largest share are tried at once, and the
# one with the least work is taken; rows that break the bound under it go through the whole vocabulary.


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
    sound = scale >= 1e-37  # of less the inverse may be infinite, and 0 times that is no share
    inverse = torch.where(sound, 1.0 / scale, 0.0).float().contiguous()
    peaks = _peaks(gradient, rows, inverse)
    here = target[(target >= 0) & (target < vocabulary)]
    peaks[here] = torch.inf
    holds = (_masses(gradient, rows, inverse, peaks, thresholds) <= tolerance) & sound[:, None]  # [m, thresholds]
    kept = (peaks >= thresholds[:, None]).sum(1)  # [thresholds]; along memory: a third of the time
    bounded = holds.sum(0)
    work = kept * bounded + vocabulary * (count - bounded)
    best = int(work.argmin())
    if int(work[best]) > 0.9 * count * vocabulary:
        return Selection(rows[:0], rows[:0], rows)
    fine = holds[:, best]
    return Selection(torch.nonzero(peaks >= thresholds[best]).squeeze(1), rows[fine], rows[~fine])


def _peaks(gradient: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Largest share of each column [V] float32."""
    peaks = torch.empty(gradient.shape[1], dtype=torch.float32, device="cpu")
    module = extension()
    assert module is not None
    module.column_peaks(**_fields(gradient, rows, inverse, peaks))
    return peaks


def _masses(gradient: Tensor, rows: Tensor, inverse: Tensor, peaks: Tensor, thresholds: Tensor) -> Tensor:
    """Share of each row in the columns below each threshold: [m, thresholds] float32."""
    masses = torch.empty(rows.numel(), thresholds.numel(), dtype=torch.float32, device="cpu")
    module = extension()
    assert module is not None
    module.dropped_masses(
        **_fields(gradient, rows, inverse, peaks), thresholds=thresholds.data_ptr(),
        num_thresholds=thresholds.numel(), masses=masses.data_ptr(),
    )  # fmt: skip
    return masses


def _fields(gradient: Tensor, rows: Tensor, inverse: Tensor, peaks: Tensor) -> dict[str, Any]:
    """What both calls of C++ take."""
    return {
        "type": LOGITS_TYPES[gradient.dtype], "gradient": gradient.data_ptr(), "rows": rows.data_ptr(),
        "stride": gradient.stride(0), "count": rows.numel(), "vocabulary": gradient.shape[1],
        "inverse_scale": inverse.data_ptr(), "peaks": peaks.data_ptr(), "num_threads": torch.get_num_threads(),
        "isa": cpu_isa(),
    }  # fmt: skip


def gather_columns(gradient: Tensor, selection: Selection) -> Tensor:
    """The bounded rows' kept columns, [bounded, columns] contiguous."""
    module = extension()
    assert module is not None
    shape = selection.bounded.numel(), selection.columns.numel()
    out = fresh(torch.empty(shape, dtype=gradient.dtype, device="cpu"))
    module.gather_columns(
        gradient=gradient.data_ptr(), stride=gradient.stride(0), bytes=gradient.element_size(),
        rows=selection.bounded.data_ptr(), num_rows=selection.bounded.numel(), columns=selection.columns.data_ptr(),
        num_columns=selection.columns.numel(), out=out.data_ptr(), num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return out
