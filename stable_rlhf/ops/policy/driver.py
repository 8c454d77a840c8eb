"""The driver of the linear losses: chunks of rows through one bounded buffer, three products, one row kernel.

    for each chunk of active rows:
        logits = hidden W^T                        first product, into the buffer
        row kernel: statistics, loss coefficient, gradient in place
        hidden gradient = G W                      second product, rows with a gradient only
        weight gradient += G^T hidden              third product, the same rows

The same for every device; the row kernels are `cpu` (C++) and `kernels.policy` (Triton).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.ops.policy.formula import Rows, RowState, Terms
from stable_rlhf.ops.policy.products import CHUNK_ROWS, HeadProducts, Selection, select_columns
from stable_rlhf.ops.policy.split_vocabulary import SplitVocabulary
from stable_rlhf.ops.policy.types import PolicyLossConfig

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden [A, H], weight, bias


def row_kernels(backend: str, group: str, width: int, device: torch.device) -> tuple[Any, int]:
    """The row kernels of a backend, "cpu" or "triton", and the size of the vocabulary, of which `width` tokens are this
    rank's when `group` names a process group."""
    kernels = importlib.import_module(
        "stable_rlhf.ops.policy.cpu" if backend == "cpu" else "stable_rlhf.kernels.policy"
    )
    if not group:
        return kernels, width
    split = SplitVocabulary(kernels, group, width, device)
    return split, split.vocabulary


def _chunks(count: int, most: int) -> Iterator[tuple[slice, bool]]:
    """Chunks of equal size and at most `most` rows, each with whether it is the last."""
    if count == 0:
        return
    number = math.ceil(count / most)
    size = math.ceil(count / number)
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count)), begin + size >= count


def _run(
    kernels: Any,
    products: HeadProducts,
    count: int,
    workspace_bytes: int,
    work: Callable[[slice, Tensor, Tensor], Tensor | None],
    select: Callable[[Tensor, Tensor], Iterator[Selection]] | None = None,
) -> Gradients:
    """`work(part, logits, gradient)` runs the row kernel on a chunk and says which rows the gradient rows are;
    `select(rows, gradient)`, block by block, which of their columns count."""
    buffers = None
    width = products.weight.shape[0]
    if isinstance(kernels, SplitVocabulary):
        width = kernels.widest
        products.keep_hidden_wide()  # what is rounded before it is summed is rounded once a rank
    most = max(1, workspace_bytes // (width * products.bytes_per_logit))
    for part, last in _chunks(count, most):
        if buffers is None:
            buffers = products.buffers(part.stop - part.start)
        rows = part.stop - part.start
        logits, gradient = (buffer[:rows] for buffer in buffers)
        products.logits(part, logits)
        order = work(part, logits, gradient)
        if not any(products.needs):
            continue
        if order is not None:
            gradient = gradient[: order.numel()]
        if select is None:
            products.backward(part, gradient, order, last)
            continue
        places = torch.arange(rows, device=gradient.device, dtype=torch.int64) if order is None else order
        if products.hidden_grad is not None:
            products.hidden_grad[part] = 0.0
        for selection in select(part.start + places, gradient):
            products.backward_columns(part.start + places, gradient, selection)
        if products.needs[2]:
            products.add_bias(gradient)
    products.finish()
    if isinstance(kernels, SplitVocabulary) and products.hidden_grad is not None:
        products.hidden_grad = kernels.sum(products.hidden_grad).to(products.dtype)
    return products.hidden_grad, products.weight_grad, products.bias_grad


def statistics(
    kernels: Any, products: HeadProducts, rows: Rows, softcap: float | None, workspace_bytes: int
) -> RowState:
    """Log-prob, entropy, max and log_sum of the active rows; one product."""
    state = RowState.of(rows)

    def work(part: slice, logits: Tensor, gradient: Tensor) -> None:
        kernels.statistics(logits, state.cut(part), softcap)

    _run(kernels, products, rows.target.numel(), workspace_bytes, work)
    return state


def policy(
    kernels: Any,
    products: HeadProducts,
    rows: Rows,
    terms: Terms,
    config: PolicyLossConfig,
    workspace_bytes: int,
    grad_tolerance: float = 0.0,
    *,
    compact: bool = True,
) -> tuple[RowState, Gradients]:
    """Statistics of the active rows and the gradients of the loss; three products, the last two over some columns only
    when there is a tolerance (`columns`). `compact`: rows may turn out to have no gradient, and are then left out."""
    state = RowState.of(rows)

    def work(part: slice, logits: Tensor, gradient: Tensor) -> Tensor | None:
        order: Tensor | None = kernels.policy(
            logits, gradient, state.cut(part), rows.kind[part], terms.cut(part), config, compact=compact
        )
        return order

    def select(places: Tensor, gradient: Tensor) -> Iterator[Selection]:
        # Rows that are alike in confidence need columns that are alike in number.
        for block in torch.argsort(state.entropy[places], stable=True).split(CHUNK_ROWS):
            rows_of_block = places[block]
            scale = state.coefficient[rows_of_block].abs() * state.inverse_temperature[rows_of_block]
            yield select_columns(gradient, block, scale, state.target[rows_of_block] - offset, grad_tolerance)

    offset = kernels.offset if isinstance(kernels, SplitVocabulary) else 0
    chosen = select if grad_tolerance > 0.0 else None
    return state, _run(kernels, products, rows.target.numel(), workspace_bytes, work, chosen)


def given(
    kernels: Any, products: HeadProducts, state: RowState, softcap: float | None, workspace_bytes: int
) -> Gradients:
    """Gradients for the coefficients in `state`, whose statistics are known; the logits are made again."""

    def work(part: slice, logits: Tensor, gradient: Tensor) -> None:
        kernels.given(logits, gradient, state.cut(part), softcap)

    return _run(kernels, products, state.target.numel(), workspace_bytes, work)
