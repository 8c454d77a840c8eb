"""The matrix products of a head, chunk by chunk, and the buffer that their logits pass through."""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from stable_rlhf.ops._columns import CHUNK_ROWS, Selection, gather_columns
from stable_rlhf.ops._wide_products import SLICE_BYTES, add_product

# Values of ONEDNN_MAX_CPU_ISA under which oneDNN, which makes the 16-bit products, has no instructions for them. What
# it does not know it ignores.
_ONEDNN_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_ONEDNN_WITHOUT_FLOAT16 = _ONEDNN_WITHOUT_BFLOAT16 | {
    "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512", "AVX10_1_512_AMX",
}  # fmt: skip

_held = threading.local()


def workspace(rows: int, columns: int, dtype: torch.dtype, device: torch.device, kept: str = "logits") -> Tensor:
    """An uninitialised [rows, columns] buffer, one of each name `kept`.

    On the CPU it is kept from call to call: fresh memory there costs a page fault every 4 KiB, about a fifth of a whole
    loss. CUDA's allocator keeps memory by itself.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    wanted = rows * columns * dtype.itemsize
    buffer: Tensor | None = vars(_held).get(kept)
    if buffer is None or buffer.numel() < wanted:
        vars(_held)[kept] = None  # the old one goes before the new one comes
        buffer = vars(_held)[kept] = torch.empty(wanted, dtype=torch.uint8, device="cpu")
    return buffer[:wanted].view(dtype).view(rows, columns)


def release_workspace() -> None:
    """Give back the memory that the losses keep between calls in this thread (CPU; at most `workspace_bytes`,
    and SLICE_BYTES for inputs of 16 bits)."""
    vars(_held).clear()


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
        self.dtype = hidden.dtype
        half = self.dtype.itemsize == 2
        native = has_native_products(self.dtype, hidden.device)
        wide = half and (not native or logits_dtype == torch.float32)
        # CUDA writes float32 logits from 16-bit operands; a CPU multiplies float32 copies, by slices of the weight.
        self.sliced = wide and hidden.device.type == "cpu"
        self.logits_dtype = torch.float32 if wide else self.dtype
        self.gradient_dtype = self.logits_dtype if self.sliced else self.dtype
        self.needs = needs
        self.hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def bytes_per_logit(self) -> int:
        apart = self.gradient_dtype != self.logits_dtype and any(self.needs)
        return self.logits_dtype.itemsize + (self.gradient_dtype.itemsize if apart else 0)

    def buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Room for a chunk's logits and for their gradient; the same memory where the types are the same."""
        vocabulary, device = self.weight.shape[0], self.hidden.device
        logits = workspace(rows, vocabulary, self.logits_dtype, device)
        if self.gradient_dtype == self.logits_dtype or not any(self.needs):
            return logits, logits
        return logits, torch.empty(rows, vocabulary, dtype=self.gradient_dtype, device=device)

    def keep_hidden_wide(self) -> None:
        """Leaves the hidden gradient in float32, for a sum with those of other slices of the vocabulary."""
        if self.hidden_grad is not None:
            self.hidden_grad = torch.empty_like(self.hidden_grad, dtype=torch.float32)

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
            made = self._product(few, self.weight.index_select(0, selection.columns).to(wide), self.hidden_grad.dtype)
            self.hidden_grad.index_copy_(0, places, made.to(self.hidden_grad.dtype))
        if self.needs[1]:
            made = self._product(few.t(), self.hidden.index_select(0, places).to(wide), torch.float32)
            self._weight_sum().index_add_(0, selection.columns, made)
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
            made = self._through_weight(gradient, self.hidden_grad.dtype)
            self.hidden_grad.index_copy_(0, places, made.to(self.hidden_grad.dtype))
        if self.needs[1]:
            x = self.hidden.index_select(0, places).to(gradient.dtype)
            total = self._weight_sum()
            if gradient.dtype != torch.float32:
                add_product(gradient.t(), x, total, fresh=False)
                return
            for rows in self._slices():
                total[rows] += torch.mm(gradient[:, rows].t(), x)

    def _weight_sum(self) -> Tensor:
        """The weight's gradient so far, in float32."""
        if self.weight_grad is None:
            self.weight_grad = torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        return self.weight_grad

    @staticmethod
    def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """a b, in float32 and unrounded where `dtype` is float32, else in the type of a and b."""
        if dtype == a.dtype or dtype != torch.float32:
            return torch.mm(a, b)
        made = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
        add_product(a, b, made, fresh=True)
        return made

    def _through_weight(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """gradient W, in float32 where `dtype` is or the products are sliced."""
        if not self.sliced:
            return self._product(gradient, self.weight, dtype)
        made = torch.zeros(gradient.shape[0], self.weight.shape[1], dtype=torch.float32, device="cpu")
        for columns in self._slices():
            made.addmm_(gradient[:, columns], self._wide(columns))
        return made

    def add_bias(self, gradient: Tensor) -> None:
        """Adds a chunk's gradient rows to the bias's gradient."""
        column_sums = gradient.sum(0, dtype=torch.float32)
        self.bias_grad = column_sums if self.bias_grad is None else self.bias_grad.add_(column_sums)

    def _add_hidden(self, part: slice, gradient: Tensor, order: Tensor | None) -> None:
        assert self.hidden_grad is not None
        out = self.hidden_grad[part]
        if order is None and not self.sliced:
            if out.dtype == gradient.dtype:
                torch.mm(gradient, self.weight, out=out)
            else:
                add_product(gradient, self.weight, out, fresh=True)
            return
        made = self._through_weight(gradient, out.dtype)
        if order is None:
            out.copy_(made)
        else:
            out.zero_().index_copy_(0, order, made.to(out.dtype))

    def _add_weight(self, x: Tensor, gradient: Tensor, first: bool, last: bool) -> None:
        weight = self.weight
        if first and last and not self.sliced:
            self.weight_grad = torch.mm(gradient.t(), x)
            return
        # Sums over chunks are kept in float32, and of products that are not rounded to 16 bits either.
        if not self.sliced:
            if self.weight_grad is None:
                self.weight_grad = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            add_product(gradient.t(), x, self.weight_grad, fresh=first)
        else:
            x = x.float()
            if self.weight_grad is None:
                dtype = weight.dtype if last else torch.float32
                self.weight_grad = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            for rows in self._slices():
                total, ours = self.weight_grad[rows], gradient[:, rows].t()
                if total.dtype == torch.float32:  # in place: no fresh memory
                    add_product(ours, x, total, fresh=first)
                else:
                    total.copy_(torch.mm(ours, x, out=self._scratch(rows)))
        if last:
            self.weight_grad = self.weight_grad.to(weight.dtype)

    def finish(self) -> None:
        """What is left after the last chunk: rows that wait, zeros where there was none, sums in their own type."""
        self.backward_waiting()
        if self.weight_grad is not None:
            self.weight_grad = self.weight_grad.to(self.dtype)
        if self.bias_grad is not None and self.bias is not None:
            self.bias_grad = self.bias_grad.to(self.bias.dtype)
        if self.needs[1] and self.weight_grad is None:
            self.weight_grad = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        if self.needs[2] and self.bias_grad is None:
            assert self.bias is not None
            self.bias_grad = torch.zeros_like(self.bias)
