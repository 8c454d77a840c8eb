"""SwAV: each view of a row predicts the cluster code of the other, codes balanced over the prototypes by Sinkhorn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf.ops.backends import choice, cpu_isa, extension, refuse_second_derivative, register
from stable_rlhf.ops.checks import check_integer, check_positive, check_tensor
from stable_rlhf.ops.contrastive.unit_rows import Ranks, check_pair, group_name, resolve_group, stack_ranks, unit_rows
from stable_rlhf.ops.policy.fused import hand_over, keep


def swav_loss(
    a: Tensor,
    b: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    process_group: object | None = None,
) -> Tensor:
    """SwAV's swapped prediction (arXiv 2006.09882, eqs. 1 to 4; the clustering term of arXiv 2401.06080).

    With s = cos(row, prototype), p = softmax(s / temperature) and q the row's code,

    loss = mean over i of -1/2 (sum_k q^b_ik log p^a_ik + sum_k q^a_ik log p^b_ik),

    the mean of the two directions, as in the authors' code (the paper writes their sum). Codes of a view are Sinkhorn's
    on exp(s / epsilon): `iterations` times every prototype is given the same mass, then every row a mass of 1. So codes
    always sum to 1 over the prototypes, and over the rows their sums tend to N / K. Codes carry no gradient. Prototypes
    are scaled to unit length here, so they need no projection after a step. A row or prototype of zeros (no entry
    reaches the smallest normal number of float32, or of float64) has score 0 everywhere and gets no gradient.

    Args:
        a, b: [B, D] features of the two views of the same rows, of one floating type.
        prototypes: [K, D] of the same type.
        temperature: of the predictions, positive.
        epsilon: of the codes, positive: the smaller, the harder.
        iterations: of Sinkhorn; 0 takes softmax(s / epsilon) as it is.
        process_group: the ranks that share the batch, each with some rows and the same prototypes. Codes are balanced
            over the rows of all ranks; the loss is the mean over them, the same on each rank. Gradients of a and b are
            those that one process with all rows would have; that of the prototypes is this rank's share, and the sum
            over the ranks is the whole. Every rank must call this. A trainer that averages gradients over its ranks
            multiplies the loss by their number.

    Returns:
        0-d float32 (float64 for float64 input).

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong, non-finite input and an empty batch
            included; with a process group, on every rank.
        RuntimeError: the backend forced by `backend(name)` does not exist or cannot run.
    """
    check_pair(a, b)
    check_tensor("prototypes", prototypes, device=a.device, dtypes=(a.dtype,))
    if prototypes.ndim != 2 or prototypes.shape[0] < 1 or prototypes.shape[1] != a.shape[1]:
        raise ValueError(f"prototypes: shape {tuple(prototypes.shape)} instead of [K, {a.shape[1]}]")
    temperature, epsilon = check_positive("temperature", temperature), check_positive("epsilon", epsilon)
    iterations = check_integer("iterations", iterations)
    backend = "torch" if a.dtype == torch.float64 else choice("swav_loss", a.device)
    ranks = Ranks(process_group, {"a": a, "b": b}, {"prototypes": prototypes})
    a, b, prototypes = unit_rows(a, "a"), unit_rows(b, "b"), unit_rows(prototypes, "prototypes")
    if backend == "torch":
        return ranks.sum(_reference(a, b, prototypes, ranks, temperature, epsilon, iterations))
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (a, b, prototypes)]
    loss, *_ = _fused(
        a, b, prototypes, temperature, epsilon, iterations, ranks.total, backend, group_name(ranks.group), needs
    )
    return ranks.sum(loss)


def potentials(
    scores: Tensor, epsilon: float, iterations: int, group: dist.ProcessGroup | None, kernels: Kernels | None
) -> Tensor | None:
    """Sinkhorn in logarithms: v [2, K] such that row i of a view has the code softmax(scores_i / epsilon + v).

    One iteration is v_k = -log sum_i exp(s_ik / epsilon + u_i), after which u_i = -log sum_k exp(s_ik / epsilon + v_k)
    gives every row's code a sum of 1. Constants in v are of no account. None for no iteration.

    Args:
        scores: [2, rows, K] of this rank.
        group: the ranks that have the other rows.
        kernels: of a backend; None: plain PyTorch.
    """
    v = None
    for _ in range(iterations):
        if kernels is not None:
            sums = kernels.log_sums(scores, v, 1.0 / epsilon)
        else:
            x = scores / epsilon
            if v is not None:
                x = x - torch.logsumexp(x + v[:, None], -1, keepdim=True)
            sums = torch.logsumexp(x, 1)
        if group is not None:
            sums = torch.logsumexp(stack_ranks(sums, group), 0)
        v = -sums
    return v


def _reference(
    a: Tensor, b: Tensor, prototypes: Tensor, ranks: Ranks, temperature: float, epsilon: float, iterations: int
) -> Tensor:
    """This rank's part of the loss in plain PyTorch, from rows and prototypes of unit length."""
    with torch.autocast(a.device.type, enabled=False):
        scores = torch.stack([a, b]) @ prototypes.T
    with torch.no_grad():
        held = scores.detach()  # from forward-mode derivatives too
        v = potentials(held, epsilon, iterations, ranks.group, None)
        codes = torch.softmax(held / epsilon if v is None else held / epsilon + v[:, None], -1)
    return -(codes.flip(0) * torch.log_softmax(scores / temperature, -1)).sum() / (2 * ranks.total)


class Kernels(NamedTuple):
    """What a backend makes of scores [2, rows, prototypes] float32: see `kernels.swav`."""

    log_sums: Callable[..., Tensor]
    loss: Callable[..., Tensor]


def kernels_of(backend: str) -> Kernels:
    if backend == "cpu":
        return Kernels(_log_sums_cpu, _loss_cpu)
    from stable_rlhf.kernels import swav

    return Kernels(swav.log_sums, swav.loss)


@torch.library.custom_op("stable_rlhf::swav_loss", mutates_args=())
def _fused(
    a: Tensor,
    b: Tensor,
    prototypes: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    total: int,
    backend: str,
    group: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's part of the loss, and its gradients by float32 rows [B, D] and prototypes [K, D] of unit length."""
    kernels, views = kernels_of(backend), (a, b)
    scores = a.new_empty(2, a.shape[0], prototypes.shape[0])
    with torch.autocast(a.device.type, enabled=False):
        for view, score in zip(views, scores, strict=True):
            torch.mm(view, prototypes.T, out=score)
        v = potentials(scores, epsilon, iterations, resolve_group(group), kernels)
        loss = kernels.loss(scores, v, 1.0 / epsilon, 1.0 / temperature, 0.5 / total, any(needs))
        made = [
            torch.mm(score, prototypes) if need else a.new_empty(0)
            for score, need in zip(scores, needs[:2], strict=True)
        ]
        if needs[2]:
            made.append(torch.mm(scores[0].T, a).addmm_(scores[1].T, b))
        else:
            made.append(a.new_empty(0))
    return (loss / (2 * total)).float(), made[0], made[1], made[2]


@_fused.register_fake
def _(a, b, prototypes, *rest):
    needs = rest[-1]
    made = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((a, b, prototypes), needs, strict=True)
    )
    return a.new_empty(()), *made


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    keep(ctx, output[1:])


def _backward(ctx: Any, upstream: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("swav_loss")
    return (*hand_over(ctx, ctx.needs, upstream), *[None] * 7)


_fused.register_autograd(_backward, setup_context=_setup)


def _cpu_arguments(
    scores: Tensor, potential: Tensor | None, inverse_epsilon: float
) -> tuple[int, int, int, int, float]:
    assert scores.is_contiguous() and scores.dtype == torch.float32
    return (
        scores.data_ptr(), scores.shape[1], scores.shape[2], 0 if potential is None else potential.data_ptr(),
        inverse_epsilon,
    )  # fmt: skip


def _log_sums_cpu(scores: Tensor, potential: Tensor | None, inverse_epsilon: float) -> Tensor:
    module = extension()
    assert module is not None
    sums = torch.empty(2, scores.shape[2], dtype=torch.float32, device="cpu")
    module.swav_log_sums(
        *_cpu_arguments(scores, potential, inverse_epsilon), sums.data_ptr(), torch.get_num_threads(),
        cpu_isa(),
    )  # fmt: skip
    return sums


def _loss_cpu(
    scores: Tensor,
    potential: Tensor | None,
    inverse_epsilon: float,
    inverse_temperature: float,
    scale: float,
    gradient: bool,
) -> Tensor:
    module = extension()
    assert module is not None
    total = module.swav_loss(
        *_cpu_arguments(scores, potential, inverse_epsilon), inverse_temperature, scale, gradient,
        torch.get_num_threads(), cpu_isa(),
    )  # fmt: skip
    return torch.tensor(total, dtype=torch.float64, device="cpu")


register("swav_loss", {"torch": _reference, "cpu": _fused, "triton": _fused})
