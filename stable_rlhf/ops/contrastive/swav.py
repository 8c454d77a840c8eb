"""SwAV: each view of a row predicts the cluster code of the other, codes balanced over the prototypes by Sinkhorn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf.ops.backends import choice, cpu_isa, extension, register
from stable_rlhf.ops.checks import check_integer, check_positive, check_tensor
from stable_rlhf.ops.contrastive.unit_rows import Ranks, check_pair, unit_rows
from stable_rlhf.ops.groups import group_name, resolve_group, stack_ranks
from stable_rlhf.ops.memory import fresh
from stable_rlhf.ops.operators import loss_operation, requires_grad, shapes_of_gradients


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
    call = SwavCall(
        a, b, prototypes, temperature=temperature, epsilon=epsilon, iterations=iterations, total=ranks.total,
        backend=backend, group=group_name(ranks.group), needs=requires_grad(a, b, prototypes),
    )  # fmt: skip
    return ranks.sum(_fused(call)[0])


class SwavCall(NamedTuple):
    """One rank's part of the loss, from float32 rows of unit length."""

    a: Tensor  # [B, D]
    b: Tensor  # [B, D]
    prototypes: Tensor  # [K, D]
    temperature: float
    epsilon: float
    iterations: int
    total: int  # rows of all ranks
    backend: str
    group: str  # name of the process group
    needs: tuple[bool, ...]  # whether a gradient is asked for, of a, b and prototypes


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


class Masses(NamedTuple):
    """A row's code is its masses times the weights, over their sum."""

    mass: Tensor  # [2, rows, padded] exp((score - 1) / epsilon), but for a factor that all have
    weights: Tensor  # [2, padded]


class Kernels(NamedTuple):
    """What a backend makes of scores [2, rows, prototypes] float32: see `kernels.swav`."""

    log_sums: Callable[..., Tensor]
    loss: Callable[..., Tensor]
    masses: Callable[..., Masses | None]  # what Sinkhorn makes without logarithms, of one rank's rows, where it can


def kernels_of(backend: str) -> Kernels:
    if backend == "cpu":
        return Kernels(_log_sums_cpu, _loss_cpu, _masses_cpu)
    from stable_rlhf.kernels import swav

    return Kernels(swav.log_sums, swav.loss, lambda *_: None)


def _loss_and_gradients(call: SwavCall) -> tuple[Tensor, ...]:
    a, b, prototypes, needs = call.a, call.b, call.prototypes, call.needs
    kernels, views = kernels_of(call.backend), (a, b)
    scores = a.new_empty(2, a.shape[0], prototypes.shape[0])
    with torch.autocast(a.device.type, enabled=False):
        for view, score in zip(views, scores, strict=True):
            torch.mm(view, prototypes.T, out=score)
        group, inverse_epsilon = resolve_group(call.group), 1.0 / call.epsilon
        codes: Masses | Tensor | None = None
        if group is None:
            codes = kernels.masses(scores, inverse_epsilon, call.iterations)
        if codes is None:
            codes = potentials(scores, call.epsilon, call.iterations, group, kernels)
        loss = kernels.loss(scores, codes, inverse_epsilon, 1.0 / call.temperature, 0.5 / call.total, any(needs))
        gradients = [
            torch.mm(score, prototypes, out=fresh(torch.empty_like(view))) if need else a.new_empty(0)
            for view, score, need in zip(views, scores, needs[:2], strict=True)
        ]
        if needs[2]:
            gradients.append(torch.mm(scores[0].T, a).addmm_(scores[1].T, b))
        else:
            gradients.append(a.new_empty(0))
    return (loss / (2 * call.total)).float(), gradients[0], gradients[1], gradients[2]


def _shapes(call: SwavCall) -> tuple[Tensor, ...]:
    return call.a.new_empty(()), *shapes_of_gradients(call.needs, call.a, call.b, call.prototypes)


_fused = loss_operation("swav_loss", SwavCall, ("a", "b", "prototypes"), 4, body=_loss_and_gradients, shapes=_shapes)


def _cpu_fields(scores: Tensor, codes: Masses | Tensor | None, inverse_epsilon: float) -> dict[str, Any]:
    """What all calls of C++ take."""
    assert scores.is_contiguous() and scores.dtype == torch.float32
    fields = {
        "scores": scores.data_ptr(), "rows": scores.shape[1], "prototypes": scores.shape[2],
        "inverse_epsilon": inverse_epsilon, "num_threads": torch.get_num_threads(), "isa": cpu_isa(),
    }  # fmt: skip
    if isinstance(codes, Masses):
        return fields | {"mass": codes.mass.data_ptr(), "weights": codes.weights.data_ptr()}
    return fields | ({} if codes is None else {"potential": codes.data_ptr()})


def _masses_cpu(scores: Tensor, inverse_epsilon: float, iterations: int) -> Masses | None:
    """None where a mass may be too small a number, and without iterations."""
    module = extension()
    assert module is not None
    if iterations < 1 or 2.0 * inverse_epsilon > module.SWAV_MOST_DIGITS:
        return None
    _, rows, prototypes = scores.shape
    padded = -(-prototypes // module.SWAV_PADDING) * module.SWAV_PADDING
    mass = fresh(torch.empty(2, rows, padded, dtype=torch.float32, device="cpu"))
    made = Masses(mass, torch.empty(2, padded, dtype=torch.float32, device="cpu"))
    module.swav_balance(**_cpu_fields(scores, made, inverse_epsilon), iterations=iterations)
    return made


def _log_sums_cpu(scores: Tensor, potential: Tensor | None, inverse_epsilon: float) -> Tensor:
    module = extension()
    assert module is not None
    sums = torch.empty(2, scores.shape[2], dtype=torch.float32, device="cpu")
    module.swav_log_sums(**_cpu_fields(scores, potential, inverse_epsilon), log_sums=sums.data_ptr())
    return sums


def _loss_cpu(
    scores: Tensor,
    codes: Masses | Tensor | None,
    inverse_epsilon: float,
    inverse_temperature: float,
    scale: float,
    gradient: bool,
) -> Tensor:
    module = extension()
    assert module is not None
    total = module.swav_loss(
        **_cpu_fields(scores, codes, inverse_epsilon), inverse_temperature=inverse_temperature, scale=scale,
        gradient=gradient,
    )  # fmt: skip
    return torch.tensor(total, dtype=torch.float64, device="cpu")


register("swav_loss", {"torch": _reference, "cpu": _fused, "triton": _fused})
