"""What an operation of PyTorch costs the device, by its name and the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.count.work import Product, Sort, Work

# Operations that only look at memory in another way are told by their results; these make memory and fill nothing.
ALLOCATIONS = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
}  # fmt: skip
# All that make a tensor of a size of their own, which may be too large for data.
CREATIONS = ALLOCATIONS | {
    "aten::zeros", "aten::ones", "aten::full", "aten::arange", "aten::eye", "aten::rand", "aten::randn",
    "aten::randint", "aten::randperm", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::rand_like",
    "aten::randn_like", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::scalar_tensor", "aten::linspace",
}  # fmt: skip
NOTHING = ALLOCATIONS | {"aten::detach", "aten::lift_fresh", "aten::set_", "aten::resize_", "aten::_unsafe_view"}
# In place, without reading what was there.
OVERWRITES = {"aten::zero_", "aten::fill_", "aten::copy_", "aten::normal_", "aten::uniform_", "aten::random_"}
# These read of their source what they take, and nothing else.
GATHERS = {"aten::index_select", "aten::gather", "aten::index", "aten::take", "aten::embedding"}
# These write what they are given, and leave the rest as it was; a name without "_" copies all of it before.
SCATTERS = {
    "aten::index_copy": False, "aten::index_put": False, "aten::scatter": False, "aten::index_add": True,
    "aten::scatter_add": True, "aten::scatter_reduce": True, "aten::_index_put_impl": False,
}  # fmt: skip  # whether they add to what is there
# Operations that are several kernels. A radix sort reads its keys once for the digits' counts and then moves keys and
# indices once a byte; what lies in one block is sorted in one kernel.
SORTED_IN_ONE = 4096
SEVERAL = {"aten::nonzero": 3, "aten::cumsum": 2, "aten::unique_consecutive": 6, "aten::_unique2": 8}
READS = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::repeat_interleave",
}  # fmt: skip
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"}


def nbytes(x: Tensor) -> int:
    """Memory that the elements of x lie in: what is expanded counts once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * x.element_size()


def stops_host(name: str, args: Sequence[Any]) -> bool:
    """Whether the operation needs the device's values on the host."""
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None)
    return name in READS


def _product(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Work:
    a, b = args[-2:] if name in ("aten::mm", "aten::bmm") else args[1:3]
    if isinstance(b, torch.dtype):  # `mm` and `bmm` with the type of the result as their last argument
        a, b = args[0], args[1]
    moved = nbytes(a) + nbytes(b) + nbytes(out)
    if "addmm" in name or "baddbmm" in name:
        moved += nbytes(args[0]) if kwargs.get("beta", 1) != 0 else 0
    batch = a.shape[0] if a.ndim == 3 else 1
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    label = f"{name.removeprefix('aten::').rstrip('_')} [{rows}, {inner}] x [{inner}, {columns}]"
    return Work(label, Sort.PRODUCT, moved, product=Product(rows, columns, inner, a.element_size(), batch))


def work_of(
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    read: Sequence[Tensor],
    written: Sequence[Tensor],
) -> list[Work]:
    """The device's work for one operation.

    Args:
        read: the tensors among its arguments, but for those that are only written.
        written: its results, and what it changes in place.
    """
    if name in PRODUCTS:
        return [_product(name, args, kwargs, written[0])]
    label = name.removeprefix("aten::")
    results = float(sum(nbytes(x) for x in written))
    plain = name.rstrip("_")
    if name in GATHERS:
        indices = [x for x in read[1:] if x is not read[0]]
        return [Work(label, Sort.OPERATION, 2 * results + sum(nbytes(x) for x in indices))]
    if plain in SCATTERS:
        source = sum(nbytes(x) for x in read[1:])
        values = max((nbytes(x) for x in read[1:] if x.dtype == read[0].dtype), default=0)
        moved = source + values * (2 if SCATTERS[plain] else 1)
        copies = [] if name.endswith("_") else [Work("clone", Sort.OPERATION, 2.0 * nbytes(read[0]))]
        return [*copies, Work(label, Sort.OPERATION, float(moved))]
    inputs = float(sum(nbytes(x) for x in read))
    if plain == "aten::sort":
        keys = read[0]
        if keys.shape[-1] <= SORTED_IN_ONE:
            return [Work(label, Sort.OPERATION, inputs + results)]
        passes = keys.element_size()
        return [Work(label, Sort.OPERATION, inputs + passes * 2 * results, launches=2 + passes)]
    if name in SEVERAL:
        return [Work(label, Sort.OPERATION, 2 * inputs + results, launches=SEVERAL[name])]
    return [Work(label, Sort.OPERATION, inputs + results)]
