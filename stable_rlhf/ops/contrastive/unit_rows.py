"""Rows over their lengths, whose products are cosines; and the same for rows that lie on several ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf.ops.backends import cpu_isa, extension, selected, transformed
from stable_rlhf.ops.checks import FLOATS, check_finite, check_tensor, check_values, statistics_dtype
from stable_rlhf.ops.groups import stack_ranks
from stable_rlhf.ops.memory import fresh
from stable_rlhf.ops.operators import Differentiable, needs_operator
from stable_rlhf.ops.policy.types import LOGITS_TYPES


def check_pair(a: Tensor, b: Tensor) -> None:
    """Raises the error that names what keeps row i of `a` from matching row i of `b`."""
    check_tensor("a", a)
    if a.ndim != 2 or a.shape[1] < 1:
        raise ValueError(f"a: shape {tuple(a.shape)} instead of [B, D]")
    check_tensor("b", b, shape=tuple(a.shape), device=a.device, dtypes=(a.dtype,))


def unit_rows(x: Tensor, name: str) -> Tensor:
    """x / |x| of every row [n, D], in float32 (float64 for float64); differentiable any number of times.

    Where no entry of a row reaches the type's smallest normal number, the row counts as zero: it has no direction, and
    the result is 0. No other finite row is too long or too short: its largest entry is taken out first.
    """
    if not transformed():
        return _operation(UnitRows(x, name))[0]
    scaled, length, _scale = _scaled(x, name)
    return scaled / length


def _scaled(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x times a constant of each row [n, D], how long that is [n, 1], and the constants [n, 1]; a row of zeros has
    length 1 and the constant 0."""
    wide = statistics_dtype(x.dtype)
    with torch.no_grad():
        largest = torch.linalg.vector_norm(x.detach(), float("inf"), dim=1, keepdim=True).to(wide)
        if check_values(x.device) and not bool(largest.isfinite().all()):
            check_finite(name, x)
        scale = torch.where(largest < torch.finfo(wide).tiny, 0.0, 1.0 / largest)
    scaled = x * scale
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)  # from 1 to sqrt(D), or 0
    return scaled, torch.where(length == 0.0, 1.0, length), scale


def _plain(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    scaled, length, scale = _scaled(x, name)
    return scaled.div_(length).contiguous(), scale / length


# -- C++: a row is read from memory once, and once on the way back -----------------------------------------------------


def _compiled(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    module, x = extension(), x.contiguous()
    assert module is not None
    unit = fresh(torch.empty(x.shape, dtype=torch.float32, device="cpu"))
    inverse = unit.new_empty(x.shape[0], 1)
    finite = module.unit_rows(
        x=x.data_ptr(), type=LOGITS_TYPES[x.dtype], rows=x.shape[0], width=x.shape[1], unit=unit.data_ptr(),
        inverse=inverse.data_ptr(), num_threads=torch.get_num_threads(), isa=cpu_isa(),
    )  # fmt: skip
    if not finite and check_values(x.device):
        check_finite(name, x)
    return unit, inverse


def _compiled_backward(upstream: Tensor, unit: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    module, upstream = extension(), upstream.contiguous()
    assert module is not None
    gradient = fresh(torch.empty(unit.shape, dtype=dtype, device="cpu"))
    module.unit_rows_back(
        type=LOGITS_TYPES[dtype], rows=unit.shape[0], width=unit.shape[1], unit=unit.data_ptr(),
        inverse=inverse.data_ptr(), upstream=upstream.data_ptr(), gradient=gradient.data_ptr(),
        num_threads=torch.get_num_threads(), isa=cpu_isa(),
    )  # fmt: skip
    return gradient


# -- the operator ------------------------------------------------------------------------------------------------------


def _by_cpp(x: Tensor) -> bool:
    """Part of two operations, which have the same backends."""
    return x.dtype in LOGITS_TYPES and selected("info_nce", x.device) == "cpu"


class UnitRows(NamedTuple):
    """A call of `unit_rows`."""

    x: Tensor  # [n, D]
    name: str  # of x, in errors


def _made(call: UnitRows) -> tuple[Tensor, ...]:
    """`unit_rows`, and 1 / |x| [n, 1]."""
    return _compiled(*call) if _by_cpp(call.x) else _plain(*call)


def _shapes(call: UnitRows) -> tuple[Tensor, ...]:
    unit = torch.empty_like(call.x, dtype=statistics_dtype(call.x.dtype), memory_format=torch.contiguous_format)
    return unit, unit.new_empty(call.x.shape[0], 1)


@torch.library.custom_op("stable_rlhf::unit_rows_backward", mutates_args=())
def unit_rows_backward(upstream: Tensor, unit: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient by x, in its type; without derivatives of its own."""
    return _compiled_backward(upstream, unit, inverse, dtype)


@unit_rows_backward.register_fake
def _(upstream, unit, inverse, dtype):
    return unit.new_empty(unit.shape, dtype=dtype)


def _keep(ctx: Any, call: UnitRows, results: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.by_cpp = call.x.dtype, _by_cpp(call.x)
    ctx.save_for_backward(*results)


def _through(ctx: Any, upstream: Tensor | None, by_inverse: Tensor | None) -> list[Tensor | None]:
    unit, inverse_length = ctx.saved_tensors
    gradient = None
    if upstream is not None:
        if ctx.by_cpp and by_inverse is None and not torch.is_grad_enabled():
            many = torch._C._functorch.is_legacy_batchedtensor(upstream)  # at once, by vmap over the backward pass
            back = unit_rows_backward if many or needs_operator(upstream) else _compiled_backward
            return [back(upstream, unit, inverse_length, ctx.dtype)]
        # Only what is at right angles to the row turns it.
        along = (upstream * unit).sum(1, keepdim=True)
        gradient = torch.addcmul(upstream, unit, along, value=-1.0).mul_(inverse_length)
    if by_inverse is not None:  # of a second derivative: d (1 / |x|) = -u du / |x|^2
        shorter = -by_inverse * inverse_length.square() * unit
        gradient = shorter if gradient is None else gradient + shorter
    return [None if gradient is None else gradient.to(ctx.dtype)]


_operation = Differentiable(
    "unit_rows", UnitRows, ("x",), 2, body=_made, shapes=_shapes, setup=_keep, backward=_through, differentiable=2
)


class Ranks:
    """The ranks of a process group, each of which holds some of the rows; one rank for `process_group` None.

    Every rank makes one, with its rows, before the operation: an error of one is an error of all, and no rank waits for
    another that has given up.

    Args:
        rows: named [n, D] tensors with the same n on one rank, of which every rank has its own.
        same: named tensors of which every rank has a copy.
    """

    def __init__(self, process_group: object | None, rows: dict[str, Tensor], same: dict[str, Tensor]) -> None:
        first = next(iter(rows.values()))
        self.group: Any = process_group
        self.counts, self.rank = [first.shape[0]], 0
        if process_group is not None:
            self._meet(rows, same)
        self.total, self.offset = sum(self.counts), sum(self.counts[: self.rank])
        if self.total == 0:
            raise ValueError(f"{next(iter(rows))}: no rows")

    def _meet(self, rows: dict[str, Tensor], same: dict[str, Tensor]) -> None:
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(
                f"process_group: expected a torch.distributed process group, got {type(self.group).__name__}"
            )
        self.rank = dist.get_rank(self.group)
        given = {**rows, **same}
        first = next(iter(rows.values()))
        mine = [first.shape[0], first.shape[1], FLOATS.index(first.dtype)]
        mine += [value.shape[0] for value in same.values()]
        for value in given.values():
            mine += [int(torch.is_grad_enabled() and value.requires_grad), int(bool(value.isfinite().all()))]
        told = torch.zeros(dist.get_world_size(self.group), len(mine), dtype=torch.int64, device=first.device)
        told[self.rank] = torch.tensor(mine, device=first.device, dtype=torch.int64)
        dist.all_reduce(told, group=self.group)
        columns = told.T.tolist()
        self.counts = columns.pop(0)
        shared = ["width", "type", *(f"rows of {name}" for name in same)]
        for what, column in zip(shared, columns, strict=False):
            if len(set(column)) > 1:
                raise ValueError(f"{next(iter(rows))}: the ranks of process_group differ in {what}")
        for i, (name, value) in enumerate(given.items()):
            asks, finite = columns[len(shared) + 2 * i], columns[len(shared) + 2 * i + 1]
            if len(set(asks)) > 1:
                raise ValueError(f"{name}: requires a gradient on some ranks of process_group only")
            if not all(finite):
                check_finite(name, value)
                raise ValueError(f"{name}: rank {finite.index(0)} of process_group has a value that is not finite")

    def gather(self, mine: Tensor) -> Tensor:
        """The rows of all ranks, [total, D], in rank order. The gradient of mine is the sum of the ranks' gradients."""
        return mine if self.group is None else _Gather.apply(mine, self)

    def sum(self, mine: Tensor) -> Tensor:
        """The sum over the ranks, the same on each; the gradient goes back to each as it is."""
        return mine if self.group is None else _Sum.apply(mine, self.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        padded = mine.new_zeros(max(ranks.counts), mine.shape[1])
        padded[: mine.shape[0]] = mine
        return torch.cat(
            [part[:count] for part, count in zip(stack_ranks(padded, ranks.group), ranks.counts, strict=True)]
        )

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks
        total = upstream.contiguous().clone()  # autograd may give the same memory to others
        dist.all_reduce(total, group=ranks.group)
        return total[ranks.offset : ranks.offset + ranks.counts[ranks.rank]], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None
