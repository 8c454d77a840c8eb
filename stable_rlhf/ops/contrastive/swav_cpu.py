"""SwAV's kernels on the CPU: csrc/swav.cpp on PyTorch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_rlhf.ops.backends import cpu_isa, extension


def _common(scores: Tensor, potential: Tensor | None, inverse_epsilon: float) -> tuple[int, int, int, int, float]:
    assert scores.is_contiguous() and scores.dtype == torch.float32
    return (
        scores.data_ptr(), scores.shape[1], scores.shape[2], 0 if potential is None else potential.data_ptr(),
        inverse_epsilon,
    )  # fmt: skip


def log_sums(scores: Tensor, potential: Tensor | None, inverse_epsilon: float) -> Tensor:
    """[2, prototypes]: log of the sum over the rows of exp(score / epsilon + u), u making every row's code sum to 1."""
    module = extension()
    assert module is not None
    sums = torch.empty(2, scores.shape[2], dtype=torch.float32, device="cpu")
    module.swav_log_sums(
        *_common(scores, potential, inverse_epsilon), sums.data_ptr(), torch.get_num_threads(),
        cpu_isa(),
    )  # fmt: skip
    return sums


def loss(
    scores: Tensor,
    potential: Tensor | None,
    inverse_epsilon: float,
    inverse_temperature: float,
    scale: float,
    gradient: bool,
) -> Tensor:
    """Sum over the rows of both cross-entropies, 0-d float64; with `gradient`, `scale` times its gradient takes the
    place of the scores."""
    module = extension()
    assert module is not None
    total = module.swav_loss(
        *_common(scores, potential, inverse_epsilon), inverse_temperature, scale, gradient, torch.get_num_threads(),
        cpu_isa(),
    )  # fmt: skip
    return torch.tensor(total, dtype=torch.float64, device="cpu")
