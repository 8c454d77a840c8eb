"""The driver of the linear losses: chunks of rows through one bounded buffer, three products, one row kernel.

    for each chunk of active rows:
        logits = hidden W^T                        first product, into the buffer
        row kernel: statistics, loss coefficient, gradient in place
        hidden gradient = G W                      second product, rows with a gradient only
        weight gradient += G^T hidden              third product, the same rows

The same for every device; the row kernels are `_rows_cpu` (C++) and `kernels.policy_rows` (Triton).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor

from stable_rlhf.ops._policy_config import PolicyLossConfig
from stable_rlhf.ops._policy_rows import Rows, RowState, Terms
from stable_rlhf.ops._products import HeadProducts

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden [A, H], weight, bias


def row_kernels(name: str) -> ModuleType:
    """The row kernels of a backend, "cpu" or "triton"."""
    if name == "cpu":
        from stable_rlhf.ops import _rows_cpu

        return _rows_cpu
    from stable_rlhf.kernels import policy_rows

    return policy_rows


def _chunks(count: int, bytes_per_row: int, workspace_bytes: int) -> Iterator[tuple[slice, bool]]:
    """Chunks of equal size that fit the workspace, each with whether it is the last."""
    if count == 0:
        return
    number = math.ceil(count / max(1, workspace_bytes // bytes_per_row))
    size = math.ceil(count / number)
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count)), begin + size >= count


def _run(
    products: HeadProducts,
    count: int,
    workspace_bytes: int,
    work: Callable[[slice, Tensor, Tensor], Tensor | None],
) -> Gradients:
    """`work(part, logits, gradient)` runs the row kernel on a chunk and says which rows the gradient rows are."""
    buffers = None
    for part, last in _chunks(count, products.weight.shape[0] * products.bytes_per_logit, workspace_bytes):
        if buffers is None:
            buffers = products.buffers(part.stop - part.start)
        rows = part.stop - part.start
        logits, gradient = (buffer[:rows] for buffer in buffers)
        products.logits(part, logits)
        order = work(part, logits, gradient)
        if any(products.needs):
            products.backward(part, gradient if order is None else gradient[: order.numel()], order, last)
    products.finish()
    return products.hidden_grad, products.weight_grad, products.bias_grad


def statistics(
    kernels: ModuleType, products: HeadProducts, rows: Rows, softcap: float | None, workspace_bytes: int
) -> RowState:
    """Log-prob, entropy, max and log_sum of the active rows; one product."""
    state = RowState.of(rows)

    def work(part: slice, logits: Tensor, gradient: Tensor) -> None:
        kernels.statistics(logits, state.cut(part), softcap)

    _run(products, rows.target.numel(), workspace_bytes, work)
    return state


def policy(
    kernels: ModuleType,
    products: HeadProducts,
    rows: Rows,
    terms: Terms,
    config: PolicyLossConfig,
    workspace_bytes: int,
) -> tuple[RowState, Gradients]:
    """Statistics of the active rows and the gradients of the loss; three products."""
    state = RowState.of(rows)

    def work(part: slice, logits: Tensor, gradient: Tensor) -> Tensor | None:
        order: Tensor | None = kernels.policy(
            logits, gradient, state.cut(part), rows.kind[part], terms.cut(part), config
        )
        return order

    return state, _run(products, rows.target.numel(), workspace_bytes, work)


def given(
    kernels: ModuleType, products: HeadProducts, state: RowState, softcap: float | None, workspace_bytes: int
) -> Gradients:
    """Gradients for the coefficients in `state`, whose statistics are known; the logits are made again."""

    def work(part: slice, logits: Tensor, gradient: Tensor) -> None:
        kernels.given(logits, gradient, state.cut(part), softcap)

    return _run(products, state.target.numel(), workspace_bytes, work)
