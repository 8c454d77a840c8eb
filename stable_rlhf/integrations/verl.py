"""verl: its fused head, `linear_cross_entropy`, by `ops.linear_logprob`.

verl loads :mod:`stable_rlhf.integrations.verl_plugin` as a plugin in every process, which calls
:func:`patch_linear_cross_entropy` where ``STABLE_RLHF_VERL=1``. Importing this imports no verl.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf import ops

__all__ = ["linear_cross_entropy", "patch_linear_cross_entropy"]

_HOME = "verl.utils.kernel.linear_cross_entropy"
_NAME = "linear_cross_entropy"
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "sum": Tensor.sum, "mean": Tensor.mean}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: object | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of that name: log-probs of ``labels`` and entropies, float32, of all rows in one dimension.

    Args:
        hidden: [..., H]; weight: [V, H], or this rank's slice of it; labels: [...] in [0, V) of the whole vocabulary.
            At -100, where verl's own function has no defined value, both results are 0.
        temperature: what logits are divided by.
        reduction: of the log-probs, over all rows: "none", "sum" or "mean". Entropies are never reduced.
        dist_process_group: the ranks that the vocabulary is split over.
    """
    reduce = _REDUCTIONS.get(reduction.lower())
    if reduce is None:
        raise ValueError(f"reduction: {reduction!r} is not one of {', '.join(_REDUCTIONS)}")
    hidden = _gathered(hidden, dist_process_group)
    logprob, entropy = ops.linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature, entropy=True,
        process_group=dist_process_group,
    )  # fmt: skip
    assert entropy is not None
    return reduce(logprob), entropy


class _Shared(torch.autograd.Function):
    """The same; each of ``ranks`` ranks gives back its share of a gradient that all of them have whole."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> tuple[Tensor, None]:
        return gradient[0] / ctx.ranks, None


def _gathered(hidden: Tensor, group: Any) -> Tensor:
    """Megatron's sequence parallelism gathers the hidden states before the head, and on the way back sums what the
    ranks give: of verl's own function a part each, of ours the whole, which would count once a rank. Without it nothing
    is summed behind the head, and the whole is what is needed.
    """
    if group is None or not getattr(hidden.grad_fn, "tensor_parallel_output_grad", False):
        return hidden
    shared: Tensor = _Shared.apply(hidden, dist.get_world_size(group))
    return shared


def patch_linear_cross_entropy() -> Callable[[], None]:
    """Put :func:`linear_cross_entropy` in the place of verl's, in every module of verl that holds it.

    Models with ``use_fused_kernels`` and the backend "triton" (Megatron's always) then compute log-probs and entropies
    by :func:`stable_rlhf.ops.linear_logprob`. verl's backend "torch" is another function and stays.

    Returns:
        A function that undoes it.

    Raises:
        RuntimeError: it is patched already.
    """
    home = importlib.import_module(_HOME)
    own: Any = getattr(home, _NAME)
    if own is linear_cross_entropy:
        raise RuntimeError(f"{_HOME}: is patched already; undo that first")
    _replace(own, linear_cross_entropy)

    def undo() -> None:
        if getattr(home, _NAME) is not linear_cross_entropy:
            raise RuntimeError(f"{_HOME}.{_NAME}: is not this patch's any more; undo the last patch first")
        _replace(linear_cross_entropy, own)  # in modules loaded since, too

    return undo


def _replace(old: Any, new: Any) -> None:
    for name, module in [*sys.modules.items()]:
        if name.startswith("verl.") and isinstance(module, ModuleType) and module.__dict__.get(_NAME) is old:
            setattr(module, _NAME, new)
