"""Products of 16-bit matrices in float32, which nothing rounds to 16 bits on the way.

What is summed over chunks must come from here: where every chunk's product is rounded to 16 bits, their sum is off by
about half as much again as one product over all rows would be, however carefully it is added up.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stable_rlhf.ops.backends import cpu_isa, extension
from stable_rlhf.ops.memory import workspace

SLICE_BYTES = 32 << 20  # what is held in another type for a moment

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # of CBLAS
_GEMMS = {torch.bfloat16: "cblas_gemm_bf16bf16f32", torch.float16: "cblas_gemm_f16f16f32"}


def add_product(
    a: Tensor, b: Tensor, total: Tensor, *, fresh: bool, places: Tensor | None = None, rows: Tensor | None = None
) -> None:
    """total += a b, or total = a b where it is `fresh`; a [M, K] and b [K, N] of one type, total [M, N] in float32.

    Args:
        places: [M] the rows of total, which has more, that are meant; no two are the same.
        rows: [K] the rows of b, which has more, that are meant.
    """
    if a.dtype != torch.float32 and a.device.type == "cpu" and takes_places(a.dtype):
        _call_own(a, b, total, fresh, places, rows)
        return
    if rows is not None:
        b = b.index_select(0, rows)
    if places is not None:
        for some in _slices(a.shape[0], 4 * b.shape[1]):
            product = workspace(some.stop - some.start, b.shape[1], torch.float32, a.device, "product")
            add_product(a[some], b, product, fresh=True)
            (total.index_copy_ if fresh else total.index_add_)(0, places[some], product)
    elif a.dtype == torch.float32:
        if fresh:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif a.device.type != "cpu":
        if fresh:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
            return
        if sums_in_product(a.dtype, a.device):
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
            return
        for some in _slices(a.shape[0], 4 * b.shape[1]):
            total[some] += torch.mm(a[some], b, out_dtype=torch.float32)
    elif (gemm := _blas(a.dtype)) is not None:
        _call(gemm, a, b, total, fresh)
    else:
        b = b.float()
        for some in _slices(a.shape[0], 4 * max(a.shape[1], 1)):
            if fresh:
                torch.mm(a[some].float(), b, out=total[some])
            else:
                total[some].addmm_(a[some].float(), b)


def narrow_sum(parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], out: Tensor) -> None:
    """`out` [rows, n] = the sum over parts (a [k, m], b [k, n], places) of a^T b, in the rows `places` [m] of it, which
    ascend, or in all. It is made in float32 and rounded once; only where `takes_places`."""
    assert out.is_contiguous()
    kept, table = [], []
    for a, b, places in parts:
        a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
        if 0 in a.shape:
            continue
        places = None if places is None else places.contiguous()
        kept.append((a, b, places))
        numbers = [a.data_ptr(), a.stride(0), a.shape[1], a.shape[0], b.data_ptr(), b.stride(0)]
        table.append([*numbers, 0 if places is None else places.data_ptr()])
    fields = torch.tensor(table, dtype=torch.int64, device="cpu")
    module = extension()
    assert module is not None
    module.wide_sum(
        parts=fields.data_ptr(), out=out.data_ptr(), num_parts=len(table), rows=out.shape[0], n=out.shape[1],
        num_threads=torch.get_num_threads(),
    )  # fmt: skip


def writes_float32(dtype: torch.dtype) -> bool:
    """Whether the CPU has float32 products of such matrices, which nothing here has to copy first."""
    return takes_places(dtype) or _blas(dtype) is not None


def _slices(rows: int, bytes_per_row: int) -> list[slice]:
    step = max(1, SLICE_BYTES // bytes_per_row)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


@cache
def sums_in_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device's product of 16-bit matrices adds itself to a float32 sum, in place: nothing of the sum's size
    is read or written besides. Tried once; where a graph is being captured, and nothing can be tried, torch's having
    the operator counts."""
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    a = torch.arange(64, dtype=dtype, device=device).view(8, 8) / 8
    total = torch.ones(8, 8, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, a, a.t(), out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool(torch.equal(total, 1.0 + a.float() @ a.float().t()))


def narrow_in_place(total: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 `total`, contiguous, in a type of 16 bits, in the first half of its own memory.

    A copy would need half as much again, at the very end, when memory is shortest. Each step reads behind what the
    steps before it have written: elements n to 2n lie behind where they go.
    """
    wide = total.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    count, done = wide.numel(), min(wide.numel(), SLICE_BYTES // 4)
    narrow[:done] = wide[:done].to(dtype)
    while done < count:
        end = min(2 * done, count)
        narrow[done:end] = wide[done:end]
        done = end
    return narrow.view(total.shape)


def takes_places(dtype: torch.dtype) -> bool:
    """Whether the CPU's product is the C++ module's, which copies nothing to take rows by their places: of bfloat16, on
    a processor with AVX-512 BF16 that has no AMX. MKL's is fast with AMX; on an AMD it emulates, more slowly than
    float32 copies of the operands would be multiplied."""
    if dtype != torch.bfloat16 or torch.cpu._is_amx_tile_supported() or cpu_isa() not in ("", "avx512"):
        return False
    module = extension()
    return module is not None and bool(module.has_wide_product())


@cache
def _blas(dtype: torch.dtype) -> Callable[..., None] | None:
    """The matrix product of the BLAS that libtorch_cpu is linked to, 16-bit operands to float32, or None.

    torch 2.13 has no door to it on a CPU (`out_dtype` is for CUDA). MKL has it from 2020 on.
    """
    if sys.platform != "linux":
        return None
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Of the library that is loaded, and of what it depends on; nothing is loaded anew.
        gemm: Callable[..., None] = getattr(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY), _GEMMS[dtype])
    except (OSError, AttributeError):
        return None
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    gemm.restype = None  # type: ignore[attr-defined]
    gemm.argtypes = [  # type: ignore[attr-defined]
        *[integer] * 6, number, pointer, integer, pointer, integer, number, pointer, integer,
    ]  # fmt: skip
    return gemm if _works(gemm, dtype) else None


def _works(gemm: Callable[..., None], dtype: torch.dtype) -> bool:
    """Whether a small product of it is right here: a library under the same name may not take the same arguments."""
    a = torch.arange(6, dtype=dtype, device="cpu").view(2, 3)
    total = torch.ones(2, 2, dtype=torch.float32, device="cpu")
    _call(gemm, a, a.view(3, 2), total, fresh=False)
    return total.tolist() == [[11.0, 14.0], [29.0, 41.0]]


def _call_own(a: Tensor, b: Tensor, total: Tensor, fresh: bool, places: Tensor | None, rows: Tensor | None) -> None:
    if 0 in (*a.shape, b.shape[1]):
        if fresh:
            total[slice(None) if places is None else places] = 0.0
        return
    if rows is not None and (b.stride(1) != 1 or b.stride(0) == 1):  # C++ takes places of rows that lie as rows alone
        b, rows = b.index_select(0, rows), None
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    kept = {"total_places": places, "b_places": rows}
    index = {name: at.contiguous() for name, at in kept.items() if at is not None}
    assert total.is_contiguous() and total.dtype == torch.float32
    module = extension()
    assert module is not None
    module.wide_product(
        a=a.data_ptr(), b=b.data_ptr(), total=total.data_ptr(), m=a.shape[0], n=b.shape[1], k=a.shape[1],
        a_row=a.stride(0), a_column=a.stride(1), b_row=b.stride(0), b_column=b.stride(1), fresh=fresh,
        num_threads=torch.get_num_threads(), **{name: at.data_ptr() for name, at in index.items()},
    )  # fmt: skip


def _call(gemm: Callable[..., None], a: Tensor, b: Tensor, total: Tensor, fresh: bool) -> None:
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, n, k):  # BLAS leaves some of these open
        if fresh:
            total.zero_()
        return
    a, transpose_a, lead_a = _layout(a)
    b, transpose_b, lead_b = _layout(b)
    assert total.is_contiguous() and total.dtype == torch.float32
    gemm(
        _ROW_MAJOR, transpose_a, transpose_b, m, n, k, 1.0, a.data_ptr(), lead_a, b.data_ptr(), lead_b,
        0.0 if fresh else 1.0, total.data_ptr(), n,
    )  # fmt: skip


def _layout(x: Tensor) -> tuple[Tensor, int, int]:
    """x as BLAS takes it: memory, whether it is transposed there, the distance between its rows or columns."""
    for memory, transposed in ((x, _AS_IT_IS), (x.t(), _TRANSPOSED)):
        rows, columns = memory.shape
        lead = columns if rows == 1 else memory.stride(0)  # one row's stride may be anything
        if memory.stride(1) == 1 and columns <= lead < 2**31:
            return x, transposed, lead
    return x.contiguous(), _AS_IT_IS, x.shape[1]
