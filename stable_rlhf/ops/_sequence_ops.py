"""Per-token rewards, generalised advantage estimation and whitening: from scores to the advantages of PPO.

Packed layout everywhere: the tokens of S sequences lie behind one another, sequence s in
[cu_seqlens[s], cu_seqlens[s + 1]), without padding. All results are data, not differentiable.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf.ops._backend import choose, extension, register
from stable_rlhf.ops._checks import (
    check_choice,
    check_cu_seqlens,
    check_finite,
    check_tensor,
    check_values,
    first_true,
    statistics_dtype,
)


def log_ratio_kl(log_ratio: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(p || q) per sample from log_ratio = log p - log q, the sample drawn from p.

    k1 = log_ratio; k2 = log_ratio^2 / 2; k3 = exp(-log_ratio) - 1 + log_ratio. The caller clamps log_ratio.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    return torch.expm1(-log_ratio) + log_ratio


@torch.no_grad()
def gae(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation on packed sequences (arXiv 1506.02438, eq. 16).

    delta_t = reward_t + gamma value_{t+1} - value_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + value_t.
    After the last token of a sequence the value is 0, or `bootstrap_value` of that sequence (a cut-off episode).

    Args:
        reward, value: [T] floating point.
        cu_seqlens: [S + 1] integer, 0 first and T last; empty sequences are allowed.
        gamma, lam: discount and trace decay, both in [0, 1].
        bootstrap_value: [S] or None.

    Returns:
        advantage, return: [T] float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong.
    """
    check_tensor("reward", reward)
    if reward.ndim != 1:
        raise ValueError(f"reward: shape {tuple(reward.shape)} instead of [T]")
    check_tensor("value", value, shape=tuple(reward.shape), device=reward.device)
    bounds = check_cu_seqlens(cu_seqlens, reward.numel(), reward.device)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name}: {number} is outside [0, 1]")
    dtype = statistics_dtype(reward.dtype, value.dtype)
    if bootstrap_value is not None:
        check_tensor("bootstrap_value", bootstrap_value, shape=(bounds.numel() - 1,), device=reward.device)
    for name, values in (("reward", reward), ("value", value), ("bootstrap_value", bootstrap_value)):
        if values is not None and check_values(reward.device):
            check_finite(name, values)
    if bootstrap_value is not None:
        bootstrap_value = bootstrap_value.to(dtype).contiguous()
    run = choose("gae", reward.device)
    return run(reward.to(dtype).contiguous(), value.to(dtype).contiguous(), bounds, gamma, lam, bootstrap_value)


def _gae_torch(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    lengths = bounds.diff()
    advantage = torch.zeros_like(reward)
    longest = int(lengths.max()) if lengths.numel() else 0
    running = reward.new_zeros(lengths.numel())
    next_value = running.clone() if bootstrap_value is None else bootstrap_value.clone()
    for back in range(1, longest + 1):
        rows = torch.nonzero(lengths >= back).squeeze(1)  # the sequences that have a back-th token from the end
        at = bounds[rows + 1] - back
        delta = (reward[at] + gamma * next_value[rows]) - value[at]
        running[rows] = delta + (gamma * lam) * running[rows]
        next_value[rows] = value[at]
        advantage[at] = running[rows]
    return advantage, advantage + value


def _gae_cpu(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    module = extension()
    assert module is not None
    kernel = module.gae_f64 if reward.dtype == torch.float64 else module.gae_f32
    bounds = bounds.contiguous()
    advantage, returns = torch.empty_like(reward), torch.empty_like(reward)
    kernel(
        reward.data_ptr(),
        value.data_ptr(),
        bounds.data_ptr(),
        0 if bootstrap_value is None else bootstrap_value.data_ptr(),
        bounds.numel() - 1,
        gamma,
        gamma * lam,
        torch.get_num_threads(),
        advantage.data_ptr(),
        returns.data_ptr(),
    )
    return advantage, returns


def _gae_triton(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    from stable_rlhf.kernels.sequence_ops import gae as kernel

    return kernel(reward, value, bounds, gamma, lam, bootstrap_value)


register("gae", {"torch": _gae_torch, "cpu": _gae_cpu, "triton": _gae_triton})


@torch.no_grad()
def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the valid tokens, of every rank of `group` when one is given.

    The variance is the population's (divided by the count), in two passes and in float64, so one token gives 0 and a
    constant gives 0. Every rank of the group must call this, also one without a valid token.

    Args:
        x: any shape, floating point.
        mask: x's shape, bool or numbers that are 0 where a token does not count; None: all count.
        group: process group; `torch.distributed.group.WORLD` for all ranks, None for this process alone.
        shift_mean: False keeps the mean: only the spread is normalised.
        eps: added to the variance.

    Returns:
        x's shape, float32 (float64 for float64 input), exactly 0 where the mask is 0.
    """
    check_tensor("x", x)
    if mask is not None:
        mask = check_tensor(
            "mask",
            mask,
            shape=tuple(x.shape),
            device=x.device,
            dtypes=(torch.bool, torch.int64, torch.int32, torch.int8, torch.uint8, torch.float32),
        )
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    # `where`, not a product: what lies under the mask may be NaN.
    wide = torch.where(valid, x.double(), zero)
    if check_values(x.device):
        check_finite("x", wide)
    totals = torch.stack([wide.sum(), valid.sum().double()])
    if group is not None:
        dist.all_reduce(totals, group=group)
    count = totals[1].clamp(min=1.0)
    mean = totals[0] / count
    centred = torch.where(valid, wide - mean, zero)
    square = (centred * centred).sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    scaled = centred * torch.rsqrt(square / count + eps)
    if not shift_mean:
        scaled = torch.where(valid, scaled + mean, zero)
    return scaled.to(statistics_dtype(x.dtype))


@torch.no_grad()
def token_rewards(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    clamp: float = 20.0,
) -> Tensor:
    """The reward of every response token (arXiv 2309.10202, eq. 2).

    reward_t = -kl_coef kl(log pi(y_t) - log pi_init(y_t)), plus the sequence's score on its last token.

    Args:
        logprob, ref_logprob: [T] packed response tokens under the sampling policy and the initial one.
        score: [S], one score for each sequence.
        cu_seqlens: [S + 1]; every sequence has at least one token, for its score needs a place.
        kl_coef: beta, at least 0.
        kl_estimator: "k1" (the paper), "k2" or "k3"; see `log_ratio_kl`.
        clamp: bound on the absolute log-ratio.

    Returns:
        [T] float32 (float64 for float64 input).

    Raises:
        ValueError: names the argument; an empty sequence is one.
    """
    check_tensor("logprob", logprob)
    if logprob.ndim != 1:
        raise ValueError(f"logprob: shape {tuple(logprob.shape)} instead of [T]")
    device = logprob.device
    check_tensor("ref_logprob", ref_logprob, shape=tuple(logprob.shape), device=device)
    bounds = check_cu_seqlens(cu_seqlens, logprob.numel(), device)
    check_tensor("score", score, shape=(bounds.numel() - 1,), device=device)
    check_choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    if kl_coef < 0:
        raise ValueError(f"kl_coef: {kl_coef} is negative")
    if clamp <= 0:
        raise ValueError(f"clamp: {clamp} is not positive")
    empty = bounds.diff() == 0
    if check_values(device) and bool(empty.any()):
        raise ValueError(f"cu_seqlens: sequence {first_true(empty)} is empty, there is no token to carry its score")
    for name, values in (("logprob", logprob), ("ref_logprob", ref_logprob), ("score", score)):
        if check_values(device):
            check_finite(name, values)
    dtype = statistics_dtype(logprob.dtype, ref_logprob.dtype, score.dtype)
    log_ratio = (logprob.to(dtype) - ref_logprob.to(dtype)).clamp(-clamp, clamp)
    reward = log_ratio_kl(log_ratio, kl_estimator) * -kl_coef
    if logprob.numel():
        # An unread empty sequence must not put its score on the token before it.
        reward.index_add_(0, (bounds[1:] - 1).clamp(min=0), score.to(dtype).masked_fill(empty, 0.0))
    return reward
