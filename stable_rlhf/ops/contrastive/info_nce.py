"""InfoNCE over the rows of a batch: every row finds its partner among all the others, by cosine."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_rlhf.ops.backends import choice, register
from stable_rlhf.ops.checks import check_integer, check_positive
from stable_rlhf.ops.contrastive.unit_rows import Ranks, check_pair, unit_rows
from stable_rlhf.ops.operators import loss_operation, requires_grad, shapes_of_gradients
from stable_rlhf.ops.policy import fused
from stable_rlhf.ops.policy.formula import Rows, Terms
from stable_rlhf.ops.policy.products import HeadProducts
from stable_rlhf.ops.policy.types import Kind, PolicyLossConfig

_LIKELIHOOD = PolicyLossConfig(rehearsal_coef=1.0)


def info_nce(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 0.05,
    workspace_bytes: int = 64 << 20,
    process_group: object | None = None,
) -> Tensor:
    """InfoNCE with cosine similarity and in-batch negatives, from a to b (SimCSE, arXiv 2104.08821, eq. 1; the
    contrastive term of arXiv 2401.06080).

    loss = mean over i of -log(exp(cos(a_i, b_i) / temperature) / sum_j exp(cos(a_i, b_j) / temperature)).

    The similarities [B, B] are a head's logits, b its weight and row i its target: chunks of rows pass through one
    workspace, and both gradients are made with the loss. A row of zeros (no entry reaches the smallest normal number of
    float32, or of float64) has similarity 0 to every row and gets no gradient. For both directions add
    `info_nce(b, a)`.

    Args:
        a, b: [B, D] features of the two views, of one floating type; row i of b is the partner of row i of a and a
            negative of all others.
        temperature: positive.
        workspace_bytes: bound on the memory of one chunk of rows' similarities (one row at least). float64, and the
            torch backend, hold all of them.
        process_group: the ranks that share the batch, each with some rows (their numbers may differ). The loss is then
            the mean over the rows of all ranks, the same on each of them, and gradients are exactly those that one
            process with all rows would have for this rank's. Every rank must call this, and backward. A trainer that
            averages gradients over its ranks multiplies the loss by their number.

    Returns:
        0-d float32 (float64 for float64 input); 0 for a batch of one.

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong, non-finite input and an empty batch
            included; with a process group, on every rank.
        RuntimeError: the backend forced by `backend(name)` does not exist or cannot run.
    """
    check_pair(a, b)
    temperature = check_positive("temperature", temperature)
    workspace_bytes = check_integer("workspace_bytes", workspace_bytes, 1)
    backend = "torch" if a.dtype == torch.float64 else choice("info_nce", a.device)
    ranks = Ranks(process_group, {"a": a, "b": b}, {})
    rows, partners = unit_rows(a, "a"), unit_rows(b, "b")
    everyone = ranks.gather(partners)
    if backend == "torch":
        return ranks.sum(_reference(rows, everyone, ranks, temperature))
    # Half types are multiplied as they are where the device has an instruction for it.
    dtype = a.dtype if a.device.type == "cuda" else torch.float32
    call = InfoNceCall(
        rows, everyone, ranks.offset, temperature, dtype, workspace_bytes, backend, requires_grad(rows, everyone)
    )
    return ranks.sum(_fused(call)[0])


class InfoNceCall(NamedTuple):
    """One rank's part of the loss, from float32 rows of unit length."""

    rows: Tensor  # [B, D]
    everyone: Tensor  # [N, D], the partners of the rows of all ranks
    offset: int  # of this rank's rows among them
    temperature: float
    dtype: torch.dtype  # of the products
    workspace_bytes: int
    backend: str
    needs: tuple[bool, ...]  # whether a gradient is asked for, of rows and everyone


def _reference(rows: Tensor, everyone: Tensor, ranks: Ranks, temperature: float) -> Tensor:
    """This rank's part of the loss in plain PyTorch, from rows of unit length."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows @ everyone.T / temperature
    target = torch.arange(ranks.offset, ranks.offset + rows.shape[0], device=rows.device, dtype=torch.int64)
    return F.cross_entropy(logits, target, reduction="sum") / ranks.total


def _loss_and_gradients(call: InfoNceCall) -> tuple[Tensor, ...]:
    rows, everyone, needs = call.rows, call.everyone, call.needs
    count, total = rows.shape[0], everyone.shape[0]
    kernels, _ = fused.row_kernels(call.backend, "", total, rows.device)
    half = call.dtype != torch.float32
    numbers = torch.zeros(count, device=rows.device, dtype=torch.float32)
    kind = torch.full((count,), Kind.REHEARSAL, dtype=torch.int8, device=rows.device)
    target = torch.arange(call.offset, call.offset + count, device=rows.device, dtype=torch.int64)
    likelihood = Rows(torch.Size((count,)), None, target, kind, 0, count, call.temperature)
    # The gradient of a mean over many rows is too small for half types: there it is divided afterwards.
    denominator = torch.full((), 1.0 if half else float(total), device=rows.device, dtype=torch.float32)
    terms = Terms(numbers, numbers, None, None, torch.ones_like(denominator), denominator)
    with torch.autocast(rows.device.type, enabled=False):
        products = HeadProducts(
            rows.to(call.dtype),
            everyone.to(call.dtype),
            None,
            torch.float32 if half else None,
            (needs[0], needs[1], False),
        )
        if any(needs):
            state, gradients = fused.policy(
                kernels, products, likelihood, terms, _LIKELIHOOD, call.workspace_bytes, compact=False
            )
        else:
            state, gradients = (
                fused.statistics(kernels, products, likelihood, None, call.workspace_bytes),
                (None, None, None),
            )
    loss = (-state.logprob.sum(dtype=torch.float64) / total).float()
    whole = (g.float().div_(total) if half and g is not None else g for g in gradients[:2])
    first, second = (rows.new_empty(0) if g is None else g for g in whole)
    return loss, first, second


def _shapes(call: InfoNceCall) -> tuple[Tensor, ...]:
    return call.rows.new_empty(()), *shapes_of_gradients(call.needs, call.rows, call.everyone)


_fused = loss_operation("info_nce", InfoNceCall, ("rows", "everyone"), 3, body=_loss_and_gradients, shapes=_shapes)

register("info_nce", {"torch": _reference, "cpu": _fused, "triton": _fused})
