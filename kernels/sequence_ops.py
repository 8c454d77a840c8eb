"""Triton kernels on packed sequences."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gae_kernel(
    reward_ptr,
    value_ptr,
    bounds_ptr,
    bootstrap_ptr,
    advantage_ptr,
    return_ptr,
    GAMMA: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    # One program walks one sequence from its end: the recurrence is serial, the sequences are not.
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds_ptr + sequence)
    end = tl.load(bounds_ptr + sequence + 1)
    gamma = tl.full((), GAMMA, DTYPE)
    decay = tl.full((), DECAY, DTYPE)
    running = tl.zeros((), DTYPE)
    next_value = tl.zeros((), DTYPE)
    if HAS_BOOTSTRAP:
        next_value = tl.load(bootstrap_ptr + sequence)
    for back in range(1, end - begin + 1):
        at = end - back
        value = tl.load(value_ptr + at)
        delta = (tl.load(reward_ptr + at) + gamma * next_value) - value
        running = delta + decay * running
        tl.store(advantage_ptr + at, running)
        tl.store(return_ptr + at, running + value)
        next_value = value


def gae(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T] of contiguous float32 or float64 `reward` and `value` [T].

    Args:
        bounds: [S + 1] int64, the packed sequences' limits.
        bootstrap_value: [S] of the rewards' type, or None for 0 after each end.
    """
    advantage, returns = torch.empty_like(reward), torch.empty_like(reward)
    sequences = bounds.numel() - 1
    if sequences > 0 and reward.numel() > 0:
        _gae_kernel[(sequences,)](
            reward,
            value,
            bounds,
            reward if bootstrap_value is None else bootstrap_value,
            advantage,
            returns,
            GAMMA=gamma,
            DECAY=gamma * lam,
            HAS_BOOTSTRAP=bootstrap_value is not None,
            DTYPE=tl.float64 if reward.dtype == torch.float64 else tl.float32,
            num_warps=1,
        )
    return advantage, returns
